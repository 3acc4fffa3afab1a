"""Measured effects, one row per perturbation and context, and how the rows' sampling errors hang together."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from perturbflow.models.shift import Training
from perturbflow.pairs import LEAST_CELLS, Groups, Pairs
from perturbflow.symbols import CONTROL

MOST_CONTEXTS = 8
MOST_ROWS = 3000  # rows of their own for contexts are no more than this: kernels are rows × rows
LEAST_VARIANCE = 1e-6


@dataclass(frozen=True)
class EffectRows:
    """Mean effects of training perturbations against matched controls.

    A row is a perturbation in one context (batch × cell type) where it has at least ten cells; where contexts are many, all its cells.

    Attributes
    ----------
    labels
        Perturbation of every row.
    contexts
        Batch × cell type, as `Pairs.strata` writes them; `all`, where rows are over all of them.
    shares
        Share of a row's cells in each context, (rows, contexts).
    population
        Share of the controls in each context, (contexts,).
    levels
        Mean control of each context, (contexts, genes), log1p.
    values
        Effects, (rows, genes), log1p.
    sampling
        Their sampling covariance in units of a gene's variance, (rows, rows): 1/n on the diagonal for the perturbed cells, and 1/n₀ between rows
        for the controls that they share.
    variance
        Variance of a gene over cells of one row, (genes,).
    """

    labels: list[str]
    contexts: list[str]
    shares: np.ndarray
    population: np.ndarray
    levels: np.ndarray
    values: np.ndarray
    sampling: np.ndarray
    variance: np.ndarray

    @classmethod
    def of(cls, training: Training) -> "EffectRows":
        """Measure what a training knows, against its controls."""
        groups, labels, sums, squares = _sums(training.pairs)
        is_known = np.isin(labels, training.effects.labels)
        n_controls, first = groups.n_controls(training.half), len(labels)
        has_controls, n = n_controls > 0, groups.n_cells[:first]
        levels = groups.control_means(sums, training.half)[has_controls]
        within = (squares[:first] - sums[:first] ** 2 / n[:, None])[is_known].sum(axis=0) / max(1, (n[is_known] - 1).sum())
        shares, n0 = groups.control_weights(training.half)[is_known][:, has_controls], n_controls[has_controls]
        sampling, population = np.diag(1.0 / n[is_known]) + (shares / n0) @ shares.T, n0 / n0.sum()
        contexts = [stratum for stratum, has in zip(groups.strata, has_controls, strict=True) if has]
        if groups is training.pairs.groups and len(contexts) > 1:  # rows hold cells of many contexts: there is one, for all
            contexts, shares, population, levels = ["all"], np.ones((len(shares), 1)), np.ones(1), (population @ levels)[None]
        return cls(
            labels=[label for label, known in zip(labels, is_known, strict=True) if known],
            contexts=contexts,
            shares=shares,
            population=population,
            levels=levels,
            values=groups.effects(sums, training.half)[is_known],
            sampling=sampling,
            variance=np.maximum(within, LEAST_VARIANCE),
        )


def _sums(pairs: Pairs) -> tuple[Groups, list[str], np.ndarray, np.ndarray]:
    """Return the groups of cells whose means are rows, the label of each, and sums of expression and its squares, (groups, genes) each."""
    if (found := vars(pairs).get("_rows")) is None:
        found = vars(pairs)["_rows"] = _measured(pairs)
    return found


def _measured(pairs: Pairs) -> tuple[Groups, list[str], np.ndarray, np.ndarray]:
    cells = pd.DataFrame({"label": pairs.labels, "context": pairs.strata})
    perturbed = cells[~pairs.is_control]
    sizes = perturbed.groupby(["label", "context"]).size()
    own = sizes[(sizes >= LEAST_CELLS) & sizes.index.isin(sorted(set(pairs.strata[pairs.is_control])), level="context")]
    if not 1 < own.index.get_level_values("context").nunique() <= MOST_CONTEXTS or len(own) > MOST_ROWS:
        return pairs.groups, pairs.groups.labels, *pairs.sums
    # Cells of a perturbation outside of these have no row, unless there is no other.
    names = pd.Series([f"{label}\n{context}" for label, context in own.index], index=own.index)
    row = names.reindex(pd.MultiIndex.from_frame(cells)).to_numpy(object)
    is_alone = ~np.isin(pairs.labels, own.index.get_level_values("label"))
    row = np.where(is_alone, pairs.labels.astype(object), row)
    is_row = (pd.notna(row) & ~pairs.is_control) | pairs.is_control
    row = np.where(pairs.is_control, CONTROL, row)[is_row].astype(str)
    rows = sorted(set(row) - {CONTROL})
    groups = Groups(rows, row, pairs.is_control[is_row], pairs.obs[is_row])
    return groups, [name.split("\n")[0] for name in rows], *pairs.sums_over(groups.of_cell, is_row, len(groups.n_cells))
