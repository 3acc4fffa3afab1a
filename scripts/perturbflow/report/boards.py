"""What the tables of the benchmark say of one dataset × split: verdicts, what the metrics can tell, and strata."""

from dataclasses import dataclass

import pandas as pd

from perturbflow.benchmark.tables import NEGATIVES, POSITIVES, WORDED
from perturbflow.benchmark.verdicts import MIN_DISTINGUISHING, distinguishing
from perturbflow.evaluation import METRICS
from perturbflow.report.cards import ModelCard

STRATA = {
    "reliability": "by how well two halves of a perturbation's cells agree",
    "effect_size": "by size of the measured effect",
    "n_cells": "by number of measured cells scored",
    "members_seen": "by how many of the perturbed genes or compounds training knew alone",
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
        """Whether too few metrics tell for any verdict."""
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
        mute = row["cannot_tell"].split(",")
        by_metric = {metric: cells.get((row["model"], metric)) for metric in metrics}
        rows.append(
            {
                **row,
                "cells": {metric: cell and {**cell, "is_mute": metric in mute} for metric, cell in by_metric.items()},
            }
        )
    return VerdictTable(metrics, rows, [row for row in rows if cards[row["model"]].kind == "learned"])


@dataclass(frozen=True)
class CalibrationTable:
    """One row per metric: whether it tells, and how each positive control stands against each negative one."""

    pairs: list[tuple[str, str]]
    rows: list[dict]

    @property
    def mute(self) -> list[str]:
        """Metrics that cannot tell on these data."""
        return [row["metric"] for row in self.rows if not row["tells"]]


def calibration_table(calibration: pd.DataFrame) -> CalibrationTable:
    """Return what the metrics can tell on one dataset × split, headline metrics first; without rows where there is no ceiling.

    Parameters
    ----------
    calibration
        Rows of calibration.tsv.
    """
    pairs = [pair for pair in ((p, n) for p in POSITIVES for n in NEGATIVES)
             if pair in set(zip(calibration["positive"], calibration["negative"], strict=True))]  # fmt: skip
    tells = distinguishing(calibration)
    rows = calibration.fillna({"reason": ""}).itertuples(index=False)
    cells = {(row.metric, row.positive, row.negative): row._asdict() for row in rows}
    metrics = sorted((metric for metric in METRICS if metric in tells), key=lambda metric: not METRICS[metric].headline)
    rows = [
        {"metric": metric, "tells": tells[metric], "cells": [cells.get((metric, *pair)) for pair in pairs]}
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
