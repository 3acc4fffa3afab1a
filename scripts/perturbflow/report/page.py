"""The page: what every section says of a dataset × split, put into the template beside this file."""

import inspect
import logging
import platform
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import anndata as ad
import matplotlib as mpl
import pandas as pd

from perturbflow import __version__
from perturbflow.audit.audit import CHECKS
from perturbflow.benchmark.panel import FOLD
from perturbflow.evaluation import METRICS, N_HIGH_EXPRESSION
from perturbflow.evaluation.bootstrap import MIN_PERTURBATIONS
from perturbflow.io.files import atomic, read_json
from perturbflow.report.boards import (
    CalibrationTable,
    StrataTable,
    VerdictTable,
    calibration_table,
    strata_tables,
    verdict_table,
)
from perturbflow.report.cards import ModelCard, model_cards, place_of, read_table
from perturbflow.report.leaderboard import Leaderboard, leaderboard
from perturbflow.report.overview import overview
from perturbflow.report.plotting import Plots
from perturbflow.report.rendering import render
from perturbflow.report.scatter_plots import Chosen, choose, effect_figures
from perturbflow.report.screens import screen_section
from perturbflow.report.sections import (
    CORRELATION,
    Names,
    PerturbationTable,
    complaints,
    counterfactual_answers,
    coverage_figures,
    data_account,
    history_of,
    perturbation_table,
    separability_rows,
    source_rows,
    sureness_figures,
    training_curves,
    warranty_rows,
)
from perturbflow.splits.divisions import ROLES

logger = logging.getLogger(__name__)

TEMPLATE = "report_template.html"

# What a page of less than 10 MB holds, whatever was selected: bytes of figures per section, and rows
# of the table of perturbations. `effects` and `sections` bound their lists beside what they list.
FIGURE_BYTES = {
    "leaderboard": 1_400_000,
    "effects": 1_500_000,
    "training": 600_000,
    "counterfactuals": 2_000_000,
    "screens": 350_000,
}
PERTURBATION_ROWS = 4000
SCREEN_ROWS = 300  # of tables of screens

NUMBERS = {"benchmark": "leaderboard", "comparisons": "differences"}  # of a table of the benchmark
RUN = "results/{dataset}/{split}/{model}/seed_{seed}"
# What stands on the page, the file that holds it, and the rule that makes the file.
TRACES = (
    ("scores of single perturbations", f"{RUN}/metrics.tsv", "evaluate"),
    ("predicted and measured effects", f"{RUN}/predictions.h5ad", "predict"),
    ("measured cells", "results/{dataset}/{split}/pairs.h5ad", "pair"),
    ("run cards, curves and cost", f"{RUN}/run.json", "train_…"),
    ("is this screen good enough?", "results/{dataset}/quality.tsv, quality.json", "quality"),
    ("dropped and renamed", "results/{dataset}/harmonization.json", "harmonize"),
    ("roles", "results/{dataset}/{split}/split.json", "split"),
    ("audits", "results/{dataset}/{split}/audit.json", "audit"),
    ("warranties", f"{RUN}/warranty.json", "warranty"),
    ("what if", f"{RUN}/counterfactuals/{{query}}.tsv", "counterfactual"),
)


class OfSplit:
    """What is shown of one dataset × split: its title and its anchor."""

    dataset: str
    split: str

    @property
    def title(self) -> str:
        """Dataset × split."""
        return f"{self.dataset} × {self.split}"

    @property
    def anchor(self) -> str:
        """What its ids end with."""
        return f"{self.dataset}-{self.split}"


@dataclass
class SplitSection(OfSplit):
    """What the page says of the runs of one dataset × split."""

    dataset: str
    split: str
    spec: dict
    roles: dict[str, dict]
    contexts: dict[str, list[str]]  # per role, where contexts are held out
    n_cells: int
    n_genes: int
    checks: dict[str, str]  # of the audit → passed
    perturbations: PerturbationTable
    left_out: Names
    without_row: dict[str, Names]
    without_vector: Names
    matched: dict[str, Any]  # across batches, of the audit
    matched_batches: Names
    chosen: Chosen | None = None
    effects: list[dict] = field(default_factory=list)
    other_effects: list[dict] = field(default_factory=list)
    curves: list[dict] = field(default_factory=list)


@dataclass(frozen=True)
class Board(OfSplit):
    """What the tables of the benchmark say of one dataset × split; the folds of a k-fold split have one more, which pools them."""

    dataset: str
    split: str
    n_folds: int  # that it pools
    is_fold: bool
    generalization: str
    verdicts: VerdictTable
    leaderboard: Leaderboard
    calibration: CalibrationTable
    strata: list[StrataTable]


def _boards(
    tables: dict[str, pd.DataFrame],
    generalizations: dict[tuple[str, ...], str],
    cards: dict[str, ModelCard],
    plots: Plots,
) -> list[Board]:
    """Return a board per dataset × split of benchmark.tsv.

    Parameters
    ----------
    tables
        Name → table of the benchmark.
    generalizations
        What every split of the runs says of itself.
    """
    places = list(tables["benchmark"][["dataset", "split"]].drop_duplicates().itertuples(index=False, name=None))
    pools: dict[tuple[str, str], list[str]] = {}
    for dataset, split in places:
        pool = (dataset, fold["name"]) if (fold := FOLD.match(split)) else (dataset, split)
        is_fold = pool in places and pool not in generalizations  # a table of no run of its own is one that pools
        pools.setdefault(pool if is_fold else (dataset, split), []).append(split)
    boards = []
    for (dataset, whole), members in pools.items():
        for split in sorted(members, key=whole.__ne__):  # what pools the folds comes first
            of = {
                name: table[(table["dataset"] == dataset) & (table["split"] == split)] for name, table in tables.items()
            }
            told = calibration_table(of["calibration"])
            board = leaderboard(of["benchmark"], cards, plots, told.mute)
            boards.append(
                Board(
                    dataset,
                    split,
                    n_folds=len(members) - 1 if split == whole else 0,
                    is_fold=split != whole,
                    generalization=generalizations[
                        dataset, split if split != whole or len(members) == 1 else members[0]
                    ],
                    verdicts=verdict_table(of["verdicts"], of["comparisons"], cards),
                    leaderboard=board,
                    calibration=told,
                    strata=strata_tables(of["strata"], list(board.best_baselines), cards),
                )
            )
    return boards


def _effects(
    group: SplitSection,
    chosen: Chosen,
    pairs: dict[tuple[str, ...], Path],
    predictions: dict[tuple[str, ...], Path],
    scores: pd.DataFrame,
    cards: dict[str, ModelCard],
    plots: Plots,
) -> list[dict]:
    """Return the scatter plots of the chosen perturbations and models of one dataset × split.

    Parameters
    ----------
    pairs, predictions
        By dataset and split; by dataset, split, model and seed.
    scores
        Correlations of the seed that is shown, as in metrics.tsv.
    """
    if plots.bytes_left <= 0:
        return []
    here = scores[(scores["dataset"] == group.dataset) & (scores["split"] == group.split)]
    of_model = {
        model: predictions[group.dataset, group.split, model, f"seed_{here['seed'].iloc[0]}"] for model in chosen.models
    }
    correlations = here.set_index(["model", "perturbation"])["value"].to_dict()
    return effect_figures(chosen, pairs[group.dataset, group.split], of_model, correlations, cards, plots)


def _versions(runs: Iterable[dict]) -> Iterator[tuple[str, list[str]]]:
    found: dict[str, set[str]] = {
        "python": {platform.python_version()},
        "perturbflow": {__version__},
        "matplotlib": {mpl.__version__},
    }
    for run in runs:
        for name, version in run["versions"].items():
            found.setdefault(name, set()).add(str(version))
    yield from ((name, sorted(versions)) for name, versions in sorted(found.items()))


def report(
    benchmark: Path,
    calibration: Path,
    comparisons: Path,
    strata: Path,
    verdicts: Path,
    runs: list[Path],
    metrics: list[Path],
    predictions: list[Path],
    harmonizations: list[Path],
    qualities: list[Path],
    splits: list[Path],
    audits: list[Path],
    pairs: list[Path],
    counterfactuals: list[Path],
    figures: list[Path],
    warranties: list[Path],
    report: Path,
    provenance: dict | None = None,
) -> None:
    """Write the page.

    Parameters
    ----------
    benchmark, calibration, comparisons, strata, verdicts
        Tables of the rule benchmark.
    runs, metrics, predictions
        run.json, metrics.tsv and predictions.h5ad of every run.
    harmonizations
        harmonization.json of every dataset.
    qualities
        quality.json of every dataset, with quality.tsv beside it.
    splits, audits, pairs
        split.json, audit.json and pairs.h5ad of every dataset × split.
    counterfactuals
        {query}.tsv of every answered what-if question.
    figures
        Their figures.
    warranties
        warranty.json of every model that was checked.
    report
        HTML to be written: one file, nothing fetched.
    """
    facts = {place_of(path, 4): read_json(path) for path in runs}
    cards = model_cards(facts)
    predicted = {place_of(path, 4): path for path in predictions}
    seeds = list(dict.fromkeys(int(run["seed"]) for run in facts.values()))
    accounts = {place_of(path, 1)[0]: data_account(read_json(path)) for path in harmonizations}
    roles, checked, paired = ({place_of(path, 2): path for path in paths} for paths in (splits, audits, pairs))
    scores = read_table(metrics)
    files = {
        "benchmark": benchmark,
        "calibration": calibration,
        "comparisons": comparisons,
        "strata": strata,
        "verdicts": verdicts,
    }
    tables = {name: read_table([path]) for name, path in files.items()}
    divisions = {place: read_json(path) for place, path in roles.items()}
    plots = {section: Plots(section, n) for section, n in FIGURE_BYTES.items()}

    generalizations = {place: division.get("generalization", "") for place, division in divisions.items()}
    boards = _boards(tables, generalizations, cards, plots["leaderboard"])
    groups = []
    for dataset, split in dict.fromkeys((dataset, split) for dataset, split, _, _ in facts):
        here = (scores["dataset"] == dataset) & (scores["split"] == split)
        division = divisions[dataset, split]
        of_role = {
            role: {"perturbations": Names.of(division["perturbations"][role]), "n": len(division["perturbations"][role]),
                   "controls": division["controls"][role], "cells": len(division["cells"][role])}
            for role in ROLES
        }  # fmt: skip
        n_cells, n_genes = ad.read_h5ad(paired[dataset, split], backed="r").shape
        audited = read_json(checked[dataset, split])
        n_rows = PERTURBATION_ROWS // len(roles)
        group = SplitSection(
            dataset, split, division["spec"], of_role, division.get("contexts") or {}, n_cells, n_genes,
            audited["checks"],
            perturbation_table(scores[here], [model for model in cards if model in set(scores.loc[here, "model"])], n_rows),
            Names.of(division["left_out"]),
            {source: Names.of(genes) for source, genes in audited["without_row"].items() if genes},
            Names.of(audited["without_vector"]),
            audited["matched_across_batches"],
            Names.of(f"{batch} ({n:,})" for batch, n in audited["matched_across_batches"]["batches"].items()),
        )  # fmt: skip
        histories: dict[str, list[list[dict]]] = {}
        for place, run in facts.items():
            if place[:2] == (dataset, split) and run["history"]:
                histories.setdefault(place[2], []).append(history_of(run))
        group.curves = training_curves(histories, group.title, cards, plots["training"])
        group.chosen = choose(scores[here & (scores["metric"] == CORRELATION)], cards)
        logger.info("%s: %d figures of training", group.title, sum(len(model["panels"]) for model in group.curves))
        groups.append(group)

    # The best and worst perturbations of every split first, then as many others as there is room for.
    of_seed = scores[(scores["metric"] == CORRELATION) & (scores["seed"] == seeds[0])]
    for group in groups:
        if group.chosen:
            group.effects = _effects(group, group.chosen, paired, predicted, of_seed, cards, plots["effects"])
    for group in groups:
        if group.chosen and group.chosen.others:
            group.other_effects = _effects(
                group, group.chosen.rest(), paired, predicted, of_seed, cards, plots["effects"]
            )

    warranted = warranty_rows(warranties)
    coverage = coverage_figures(warranted, cards, plots["counterfactuals"])
    answers, n_tables_left_out = counterfactual_answers(
        counterfactuals, figures, warranted, cards, plots["counterfactuals"]
    )
    page = render(
        TEMPLATE,
        overview=overview(boards, facts, cards),
        cards=cards,
        n_runs=Counter(model for _, _, model, _ in facts),
        first_run={place[2]: place for place in reversed(facts)},
        boards=boards,
        groups=groups,
        datasets=accounts,
        screens=[screen_section(path, plots["screens"], SCREEN_ROWS // len(qualities)) for path in qualities],
        seeds=seeds,
        metrics={name: metric for name, metric in METRICS.items() if name in set(tables["benchmark"]["metric"])},
        runs=[{"place": place, **run} for place, run in facts.items()],
        answers=answers,
        warranties=warranted,
        coverage=coverage,
        sureness=sureness_figures(warranted, cards, plots["counterfactuals"]),
        sources=source_rows(facts),
        audited={check.__name__: (inspect.getdoc(check) or "").split("\n\n")[0] for check in CHECKS},
        separability=separability_rows(facts),
        complaints=complaints(facts),
        n_tables_left_out=n_tables_left_out,
        n_left_out={section: drawing.n_left_out for section, drawing in plots.items()},
        n_high_expression=N_HIGH_EXPRESSION,
        files=files,
        min_perturbations=MIN_PERTURBATIONS,
        least_difference=tables["verdicts"]["least_difference"].iloc[0],
        versions=list(_versions([*facts.values(), *accounts.values()])),
        provenance=provenance or {},
        traces=[(NUMBERS.get(name, name), file, "benchmark") for name, file in files.items()] + list(TRACES),
    )
    with atomic(report) as partial:
        partial.write_text(page, encoding="utf-8")
    logger.info(
        "%s: %.1f MB, %d figures",
        report,
        len(page.encode()) / 1e6,
        sum(drawing.n_plotted for drawing in plots.values()),
    )
