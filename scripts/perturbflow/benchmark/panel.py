"""The scores of one dataset × split as one array."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from perturbflow.evaluation import METRICS

FOLD = re.compile(r"^(?P<name>.+)_fold_\d+$")
QUALITY = ["efficacy", "responds"]
FACTS = ["n_members", "members_seen", "n_sources", "n_cells", "reliability", "effect_size", *QUALITY]


@dataclass(frozen=True)
class Panel:
    """The scores of all runs of one dataset × split: K metrics × M models × S seeds × P perturbations.

    Attributes
    ----------
    metrics, models, seeds
        In the order of the scores.
    perturbations
        Label and measured facts of the P perturbations, and the split that tests them (fold).
    values
        (K, M, S, P); NaN where a metric is undefined or a model gave no prediction.
    """

    dataset: str
    split: str
    metrics: list[str]
    models: list[str]
    seeds: list[int]
    perturbations: pd.DataFrame
    values: np.ndarray

    @cached_property
    def losses(self) -> np.ndarray:
        """How far from perfect every value is, (K, M, S, P)."""
        return np.stack(
            [METRICS[metric].loss(values) for metric, values in zip(self.metrics, self.values, strict=True)]
        )

    @property
    def keys(self) -> dict[str, str]:
        """The first columns of every row of a table."""
        return {"dataset": self.dataset, "split": self.split}

    def model_of(self, family: str, families: dict[str, str]) -> int | None:
        """Return the position of the first model of a family, or None."""
        return next((i for i, model in enumerate(self.models) if families[model] == family), None)


def _panel(dataset: str, split: str, scores: pd.DataFrame) -> Panel:
    codes, names = [], []
    for key in ("metric", "model", "seed"):
        code, found = pd.factorize(scores[key])
        codes.append(code)
        names.append(list(found))
    # A perturbation is held out in one fold; were it in two, these would be two tests.
    labels = pd.MultiIndex.from_frame(scores[["split", "perturbation"]])
    code, found = pd.factorize(labels)
    values = np.full((*map(len, names), len(found)), np.nan)
    values[(*codes, code)] = scores["value"]
    facts = scores[~labels.duplicated()].reindex(columns=["split", "perturbation", *FACTS]).reset_index(drop=True)
    facts = facts.rename(columns={"split": "fold"})
    metrics, models, seeds = names
    return Panel(dataset, split, metrics, models, seeds, facts, values)


def panels(scores: pd.DataFrame, context_folds: Collection[str] = ()) -> Iterator[Panel]:
    """Yield a panel per dataset × split and, after the folds of a k-fold split, one that pools all folds.

    Folds that hold out contexts are not pooled here: they share perturbations, so their scores are not independent
    (`panels_of_contexts`).

    Parameters
    ----------
    scores
        Rows of metrics.tsv.
    context_folds
        Splits that are folds which hold out contexts.
    """
    for dataset, of_dataset in scores.groupby("dataset", sort=False):
        splits = list(of_dataset["split"].unique())
        folds: dict[str, list[str]] = {}
        for split in splits:
            yield _panel(dataset, split, of_dataset[of_dataset["split"] == split])
            if (fold := FOLD.match(split)) and split not in context_folds:
                folds.setdefault(fold["name"], []).append(split)
        for name, pooled in folds.items():
            if len(pooled) > 1 and name not in splits:
                yield _panel(dataset, name, of_dataset[of_dataset["split"].isin(pooled)])


def panels_of_contexts(scores: pd.DataFrame, context_folds: Mapping[str, str]) -> Iterator[Panel]:
    """Yield a panel per dataset × block of splits that hold out contexts in turn; one fold alone has none.

    Parameters
    ----------
    scores
        Rows of metrics.tsv.
    context_folds
        Split → the block that it is a fold of.
    """
    block = scores["split"].map(dict(context_folds))
    for (dataset, name), pooled in scores[block.notna()].groupby(["dataset", block], sort=False):
        if len(pooled["split"].unique()) > 1:
            yield _panel(dataset, name, pooled)
