"""Boards: the tables of the benchmark on one dataset × split, with verdicts, scores, calibration and strata."""

import itertools
from collections.abc import Collection
from dataclasses import dataclass

import pandas as pd

from perturbflow.benchmark.panel import FOLD
from perturbflow.benchmark.tables import NEGATIVES, POSITIVES, WORDED
from perturbflow.benchmark.verdicts import MIN_DISTINGUISHING, distinguishing
from perturbflow.evaluation import METRICS
from perturbflow.evaluation.bootstrap import MIN_CONTEXTS
from perturbflow.report.cards import ModelCard
from perturbflow.report.leaderboard import Leaderboard, leaderboard
from perturbflow.report.plotting import Plots

STRATA = {
    "reliability": "by how well two halves of a perturbation's cells agree",
    "effect_size": "by size of the measured effect",
    "n_cells": "by number of measured cells scored",
    "members_seen": "by how many of the perturbed genes or compounds training knew alone",
    "n_sources": "by how many other contexts have the perturbation in training",
    "efficacy": "by the share by which the perturbation changed its own gene",
    "responds": "by whether the perturbation differs from controls at all",
}
MODELS_OF_STRATA = 6


@dataclass(frozen=True)
class VerdictTable:
    """One row per model: the verdict, and the difference to the best baseline by every headline metric."""

    metrics: list[str]
    rows: list[dict]
    learned: list[dict]  # rows of learned models

    @property
    def cannot_rank(self) -> bool:
        """Whether too few metrics distinguish for any verdict."""
        return any(row["n_telling"] < MIN_DISTINGUISHING for row in self.rows)


def verdict_table(verdicts: pd.DataFrame, comparisons: pd.DataFrame, cards: dict[str, ModelCard]) -> VerdictTable:
    """Return the verdicts of one dataset × split, learned models first.

    Parameters
    ----------
    verdicts, comparisons
        Rows of verdicts.tsv and comparisons.tsv.
    """
    decisive = comparisons[comparisons["headline"] & comparisons["is_best_baseline"]]
    metrics = [metric for metric in METRICS if metric in set(decisive["metric"])]
    cells = {(row.model, row.metric): row._asdict() for row in decisive.itertuples(index=False)}
    in_order = sorted(verdicts.fillna("").to_dict("records"), key=lambda row: cards[row["model"]].kind != "learned")
    rows = []
    for row in in_order:
        not_counted = row["cannot_tell"].split(",")
        of_model = {metric: cells.get((row["model"], metric)) for metric in metrics}
        of_model = {
            metric: cell and {**cell, "is_counted": metric not in not_counted} for metric, cell in of_model.items()
        }
        rows.append({**row, "cells": of_model})
    return VerdictTable(metrics, rows, [row for row in rows if cards[row["model"]].kind == "learned"])


@dataclass(frozen=True)
class CalibrationTable:
    """One row per metric: whether it distinguishes, and each positive reference against each negative one."""

    pairs: list[tuple[str, str]]
    rows: list[dict]

    @property
    def uninformative(self) -> list[str]:
        """Metrics that do not distinguish good from bad on these data."""
        return [row["metric"] for row in self.rows if not row["distinguishes"]]


def calibration_table(calibration: pd.DataFrame) -> CalibrationTable:
    """Return whether the metrics distinguish on one dataset × split, headline metrics first.

    There are no rows where there is no ceiling.

    Parameters
    ----------
    calibration
        Rows of calibration.tsv.
    """
    found = set(zip(calibration["positive"], calibration["negative"], strict=True))
    pairs = [pair for pair in itertools.product(POSITIVES, NEGATIVES) if pair in found]
    distinguishes = distinguishing(calibration)
    rows = calibration.fillna({"reason": ""}).itertuples(index=False)
    cells = {(row.metric, row.positive, row.negative): row._asdict() for row in rows}
    metrics = sorted(filter(distinguishes.__contains__, METRICS), key=lambda metric: not METRICS[metric].headline)
    rows = [
        {
            "metric": metric,
            "distinguishes": distinguishes[metric],
            "cells": [cells.get((metric, *pair)) for pair in pairs],
        }
        for metric in metrics
    ]
    return CalibrationTable(pairs, rows)


@dataclass(frozen=True)
class StrataTable:
    """Headline metrics of a few models by one kind of stratum: a row per metric × bin."""

    title: str
    models: list[str]
    rows: list[dict]


def strata_tables(strata: pd.DataFrame, best: list[str], cards: dict[str, ModelCard]) -> list[StrataTable]:
    """Return one table per stratum with more than one bin: learned models, the best baselines and the first ceiling.

    Parameters
    ----------
    strata
        Rows of strata.tsv of one dataset × split.
    best
        Baselines that are best by a headline metric.
    """
    present = list(strata["model"].unique())
    learned = [model for model in present if cards[model].kind == "learned"]
    ceilings = [model for model in present if cards[model].kind == "ceiling"][:1]
    models = [*learned[: MODELS_OF_STRATA - len(ceilings) - 1], *best]
    models = [*models[: MODELS_OF_STRATA - len(ceilings)], *ceilings]
    tables = []
    for stratum, title in STRATA.items():
        here = strata[strata["stratum"] == stratum]
        if here["bin"].nunique() < 2:
            continue
        rows = []
        for (metric, name), of_bin in here.groupby(["metric", "bin"], sort=False):
            if not of_bin["n_perturbations"].max():
                continue
            scores = of_bin.set_index("model")
            first = of_bin.iloc[0]
            rows.append(
                {
                    "metric": metric,
                    "bin": name,
                    "from": first["from"],
                    "to": first["to"],
                    "n": int(of_bin["n_perturbations"].max()),
                    "is_range": stratum not in WORDED,
                    "cells": [scores.loc[model] for model in models],
                }
            )
        order = list(METRICS)
        tables.append(StrataTable(title, models, sorted(rows, key=lambda row: order.index(row["metric"]))))
    return tables


@dataclass(frozen=True)
class ContextTable:
    """Headline metrics of every model over contexts that were held out in turn: a row per model."""

    dataset: str
    split: str
    n_contexts: int
    is_trusted: bool
    metrics: list[str]
    rows: list[dict]


def context_tables(contexts: pd.DataFrame) -> list[ContextTable]:
    """Return one table per dataset × block of splits.

    Parameters
    ----------
    contexts
        Rows of contexts.tsv.
    """
    tables = []
    headlines = contexts[contexts["headline"].astype(bool)]
    for (dataset, split), here in headlines.groupby(["dataset", "split"], sort=False):
        metrics = list(here["metric"].unique())
        rows = []
        for model, of_model in here.groupby("model", sort=False):
            cells = of_model.set_index("metric").to_dict("index")
            rows.append({"model": model, "cells": [cells.get(metric) for metric in metrics]})
        n = int(here["n_contexts"].max())
        tables.append(ContextTable(dataset, split, n, n >= MIN_CONTEXTS, metrics, rows))
    return tables


# --- boards -----------------------------------------------------------------------------------------------------------


class Titled:
    """A part of the page on one dataset × split: its title and its anchor."""

    dataset: str
    split: str

    @property
    def title(self) -> str:
        """Dataset × split."""
        return f"{self.dataset} × {self.split}"

    @property
    def anchor(self) -> str:
        """The ending of its ids."""
        return f"{self.dataset}-{self.split}"


@dataclass(frozen=True)
class Board(Titled):
    """The tables of the benchmark on one dataset × split; folds of a k-fold split have one more, which pools them."""

    dataset: str
    split: str
    n_folds: int  # that it pools
    is_fold: bool
    generalization: str
    verdicts: VerdictTable
    leaderboard: Leaderboard
    calibration: CalibrationTable
    strata: list[StrataTable]


def _pools(places: list[tuple[str, str]], of_runs: Collection[tuple[str, ...]]) -> dict[tuple[str, str], list[str]]:
    """Return dataset and split → the splits that stand together: the folds and their pool, or one split alone."""
    pools: dict[tuple[str, str], list[str]] = {}
    for dataset, split in places:
        pool = (dataset, fold["name"]) if (fold := FOLD.match(split)) else (dataset, split)
        is_fold = pool in places and pool not in of_runs  # a table without a run of its own pools others
        pools.setdefault(pool if is_fold else (dataset, split), []).append(split)
    return pools


def boards_of(
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
        The sentence of every split of the runs on its own scores.
    """
    places = list(tables["benchmark"][["dataset", "split"]].drop_duplicates().itertuples(index=False, name=None))
    boards = []
    for (dataset, whole), members in _pools(places, generalizations).items():
        for split in sorted(members, key=whole.__ne__):  # the pool of the folds comes first
            of = {name: rows[(rows["dataset"] == dataset) & (rows["split"] == split)] for name, rows in tables.items()}
            is_pool = split == whole and len(members) > 1
            calibration = calibration_table(of["calibration"])
            scores = leaderboard(of["benchmark"], cards, plots, calibration.uninformative)
            boards.append(
                Board(
                    dataset,
                    split,
                    n_folds=len(members) - 1 if split == whole else 0,
                    is_fold=split != whole,
                    generalization=generalizations[dataset, members[0] if is_pool else split],
                    verdicts=verdict_table(of["verdicts"], of["comparisons"], cards),
                    leaderboard=scores,
                    calibration=calibration,
                    strata=strata_tables(of["strata"], list(scores.best_baselines), cards),
                )
            )
    return boards
