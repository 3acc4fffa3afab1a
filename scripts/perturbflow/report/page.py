"""The page: all sections of a report, put into the template beside this file."""

import inspect
import logging
import platform
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd

from perturbflow import __version__
from perturbflow.audit.audit import CHECKS
from perturbflow.evaluation import METRICS, N_HIGH_EXPRESSION
from perturbflow.evaluation.bootstrap import MIN_PERTURBATIONS
from perturbflow.io.files import atomic, read_json, write_json
from perturbflow.report.boards import boards_of, context_tables
from perturbflow.report.cards import ModelCard, model_cards, place_of, read_table
from perturbflow.report.numbers import numbers
from perturbflow.report.overview import overview
from perturbflow.report.plotting import Plots
from perturbflow.report.rendering import render
from perturbflow.report.screens import screen_section
from perturbflow.report.sections import complaints, data_account, separability_rows, source_rows
from perturbflow.report.split_sections import RunFiles, split_sections
from perturbflow.report.summary import summaries
from perturbflow.report.what_if import (
    SHOWN_FIRST,
    counterfactual_answers,
    coverage_figures,
    sureness_figures,
    warranty_rows,
)

logger = logging.getLogger(__name__)

TEMPLATE = "report_template.html"

# Bounds of a page of less than 10 MB, whatever was selected: bytes of figures per section, and rows of tables.
# Other modules bound their own lists.
FIGURE_BYTES = {
    "overview": 600_000,
    "leaderboard": 700_000,
    "heatmaps": 400_000,
    "effects": 1_000_000,
    "maps": 200_000,
    "training": 600_000,
    "contexts": 200_000,
    "counterfactuals": 1_800_000,
    "screens": 350_000,
}
SCREEN_ROWS = 300  # of tables of screens

TABLES = ("benchmark", "calibration", "comparisons", "strata", "verdicts", "contexts")  # of the rule benchmark
NUMBERED = (
    "summaries",
    "boards",
    "across_contexts",
    "groups",
    "datasets",
    "screens",
    "warranties",
    "answers",
    "runs",
    "sources",
    "separability",
)
NUMBERS = {
    "benchmark": "leaderboard",
    "comparisons": "differences",
    "contexts": "means over contexts",
}  # of a table of the benchmark
RUN = "results/{dataset}/{split}/{model}/seed_{seed}"
# Numbers on the page, the file that holds them, and the rule that makes the file.
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


def _of_runs(facts: dict[tuple, dict], accounts: dict[str, dict]) -> dict[str, Any]:
    """Return the content of the page on runs: their cards, their cost, their own complaints, and versions."""
    return {
        "n_runs": Counter(model for _, _, model, _ in facts),
        "first_run": {place[2]: place for place in reversed(facts)},
        "runs": [{"place": place, **run} for place, run in facts.items()],
        "sources": source_rows(facts),
        "separability": separability_rows(facts),
        "complaints": complaints(facts),
        "versions": list(_versions([*facts.values(), *accounts.values()])),
    }


def _of_tables(files: dict[str, Path], tables: dict[str, pd.DataFrame]) -> dict[str, Any]:
    """Return the content of the page on metrics, and on the files of its numbers."""
    metrics = set(tables["benchmark"]["metric"])
    return {
        "metrics": {name: metric for name, metric in METRICS.items() if name in metrics},
        "files": files,
        "n_high_expression": N_HIGH_EXPRESSION,
        "min_perturbations": MIN_PERTURBATIONS,
        "least_difference": tables["verdicts"]["least_difference"].iloc[0],
        "traces": [(NUMBERS.get(name, name), file, "benchmark") for name, file in files.items()] + list(TRACES),
    }


def _of_questions(
    counterfactuals: list[Path], figures: list[Path], warranties: list[Path], cards: dict[str, ModelCard], plots: Plots
) -> dict[str, Any]:
    """Return the content of the page on what-if questions; figures of coverage have room first, then answers."""
    checked = warranty_rows(warranties)
    coverage = coverage_figures(checked, cards, plots)
    answers, n_tables_left_out = counterfactual_answers(counterfactuals, figures, checked, cards, plots)
    return {
        "warranties": checked,
        "coverage": coverage,
        "answers": answers,
        "n_tables_left_out": n_tables_left_out,
        "n_shown_first": SHOWN_FIRST,
        "sureness": sureness_figures(checked, cards, plots),
    }


def report(
    benchmark: Path,
    calibration: Path,
    comparisons: Path,
    strata: Path,
    verdicts: Path,
    contexts: Path,
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
    report_numbers: Path,
    effort: str = "",
    provenance: dict | None = None,
) -> None:
    """Write the page, and its numbers.

    Parameters
    ----------
    benchmark, calibration, comparisons, strata, verdicts, contexts
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
    report_numbers
        JSON to be written: the numbers of the page's text and tables.
    effort
        How short trainings were, where the page is not for claims.
    """
    run = RunFiles.read(runs, metrics, predictions, splits, audits, pairs)
    cards = model_cards(run.facts)
    accounts = {place_of(path, 1)[0]: data_account(read_json(path)) for path in harmonizations}
    files = dict(zip(TABLES, (benchmark, calibration, comparisons, strata, verdicts, contexts), strict=True))
    tables = {name: read_table([path]) for name, path in files.items()}
    plots = {section: Plots(section, n) for section, n in FIGURE_BYTES.items()}
    generalizations = {place: division.get("generalization", "") for place, division in run.divisions.items()}
    boards = boards_of(tables, generalizations, cards, plots["leaderboard"])
    least_difference = float(tables["verdicts"]["least_difference"].iloc[0])
    content = {
        "effort": effort,
        "summaries": summaries(boards, least_difference, cards, plots["overview"]),
        "overview": overview(boards, run.facts, cards),
        "cards": cards,
        "seeds": run.seeds,
        "boards": boards,
        "across_contexts": context_tables(tables["contexts"]),
        "groups": split_sections(run, cards, plots),
        "datasets": accounts,
        "screens": [screen_section(path, plots["screens"], SCREEN_ROWS // len(qualities)) for path in qualities],
        "audited": {check.__name__: (inspect.getdoc(check) or "").split("\n\n")[0] for check in CHECKS},
        **_of_runs(run.facts, accounts),
        **_of_tables(files, tables),
        **_of_questions(counterfactuals, figures, warranties, cards, plots["counterfactuals"]),
        "provenance": provenance or {},
    }
    n_left_out = {section: of_section.n_left_out for section, of_section in plots.items()}
    page = render(TEMPLATE, **content, n_left_out=n_left_out)
    write_json(report_numbers, {part: numbers(content[part]) for part in NUMBERED})
    with atomic(report) as partial:
        partial.write_text(page, encoding="utf-8")
    n_plotted = sum(of_section.n_plotted for of_section in plots.values())
    logger.info("%s: %.1f MB, %d figures", report, len(page.encode()) / 1e6, n_plotted)
