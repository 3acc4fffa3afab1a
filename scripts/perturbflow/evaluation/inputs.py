"""From cells to the inputs of the metrics: one pass over pairs.h5ad (`measured`), then one perturbation at a time.

Memory is bounded by the controls of the role, and by the means of perturbations. Measured and predicted cells are read
one perturbation at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.evaluation.control_pools import ControlPools, strata_of
from perturbflow.evaluation.measured import ROWS_AT_ONCE, Measured, run_of_rows
from perturbflow.evaluation.profiles import Spread, bulk, mean_and_variance, mean_profile
from perturbflow.evaluation.ranks import SortedCells, adjusted, p_value
from perturbflow.evaluation.scored import NEEDED, NO_EFFECT, Differential, Scored
from perturbflow.genes.symbols import entities_of

if TYPE_CHECKING:  # seconds to import, and the report takes METRICS alone from this package
    import anndata as ad
    from sklearn.decomposition import PCA

    from perturbflow.pairs import Pairs

N_HIGH_EXPRESSION = 1000
N_COMPONENTS = 50
MAX_CELLS_OF_DISTANCE = 1000
TESTED_CPM = 5.0
LFC_OFFSET_CPM = 1e-9
MOST_IN_DOUBLE = 16_000_000  # values of a table of perturbations × genes: larger ones are kept in single precision
NEEDS = frozenset({"pseudobulk", "counts", "de", "cells"})  # data that a metric may be computed from


class Predictions:
    """Predicted cells, read a perturbation at a time.

    Parameters
    ----------
    predictions
        predictions.h5ad, in memory or on disk.
    measured
        The measured cells they are compared with.
    """

    def __init__(self, predictions: ad.AnnData, measured: Measured) -> None:
        self._X = predictions.X
        if predictions.isbacked and getattr(self._X, "format", "csr") != "csr":
            self._X = self._X.to_memory().tocsr()
        self._block, self._block_start = self._X[:0], 0
        self.rows = predictions.obs.groupby("perturbation", observed=True).indices
        # A ceiling's cells are measured ones: they started from nothing.
        declared = predictions.uns.get("perturbflow", {}).get("starts_from_controls")
        # `predict` declares it. Its cells have the mean of all controls plus the effect.
        self.has_set_mean = bool(declared)
        self.starts_from_controls = declared in (None, True) and "control_index" in predictions.obs
        if self.starts_from_controls:
            self._index = predictions.obs["control_index"].to_numpy()
            is_row = (self._index >= 0) & (self._index < len(measured.is_control))
            if not is_row.all() or not measured.is_control[self._index].all():
                raise InputError(
                    "predictions: obs.control_index holds rows of pairs.h5ad that are no controls of the scored role; "
                    "predict from these, or set uns['perturbflow']['starts_from_controls'] to False."
                )
            stratum, strata = measured.stratum[self._index], measured.strata
        elif {"batch", "cell_type"} <= set(predictions.obs):
            stratum, strata = strata_of(predictions.obs)
            if missing := {
                cell_type
                for (_, cell_type), pool in zip(strata, measured.controls.pools(strata), strict=True)
                if pool < 0
            }:
                raise InputError(
                    f"predictions: no control of the scored role has the cell type {', '.join(sorted(missing))}, "
                    "which obs.cell_type holds."
                )
        else:
            raise InputError(
                "predictions: obs needs control_index, or batch and cell_type. They say which controls a cell is "
                "compared with."
            )
        self.pool = measured.controls.pools(strata)[stratum]  # of controls that serves each cell

    def cells(self, label: str) -> sparse.csr_matrix:
        """Return the predicted cells of a perturbation."""
        rows = self.rows[label]
        # `predict` writes them in one run; scattered rows take longer to read.
        is_run = rows[-1] - rows[0] == len(rows) - 1
        X = sparse.csr_matrix(self._run(rows[0], rows[-1] + 1) if is_run else self._X[rows]).astype(
            np.float32, copy=False
        )
        if not np.isfinite(X.data).all() or (X.data < 0).any():
            raise InputError(
                f"predictions of {label} hold negative or missing values; X is log1p-normalized expression, 0 or more."
            )
        X.eliminate_zeros()
        return X

    def _run(self, first: int, last: int) -> sparse.csr_matrix:
        """Return a copy of a range of rows. From disk, the rows after it are read in the same access."""
        if sparse.issparse(self._X):
            return run_of_rows(self._X, first, last)
        if not self._block_start <= first < last <= self._block_start + self._block.shape[0]:
            end = min(max(last, first + ROWS_AT_ONCE), self._X.shape[0])
            self._block, self._block_start = run_of_rows(self._X, first, end), first
        return run_of_rows(self._block, first - self._block_start, last - self._block_start)

    def start(self, label: str) -> np.ndarray:
        """Return a number per predicted cell that cells of one starting control share."""
        return self._index[self.rows[label]] if self.starts_from_controls else self.rows[label]


def _fit_components(training: sparse.csr_matrix) -> PCA:
    from sklearn.decomposition import PCA

    n_components = min(N_COMPONENTS, training.shape[1] - 1, training.shape[0] - 1)
    return PCA(n_components, svd_solver="randomized", iterated_power=3, random_state=0).fit(training.toarray())


def _resolution(X: sparse.csr_matrix) -> float:
    """Return the error of a mean of cells that whole counts force: half of a count in the smallest cell."""
    if not X.nnz:
        return 0.0
    filled = X.indptr[:-1][np.diff(X.indptr) > 0]
    return float(np.minimum.reduceat(X.data, filled).max()) / (2 * X.shape[0])


@dataclass(frozen=True)
class _Control:
    """The controls of a perturbation: each pool has the weight that it has among the measured cells."""

    weights: np.ndarray  # (pools,)
    mean: np.ndarray  # log1p-normalized, (genes,)
    profile: np.ndarray  # mean normalized counts, (genes,)
    spread: Spread  # of the profile

    @classmethod
    def of(cls, controls: ControlPools, pool: np.ndarray) -> _Control:
        """Weigh the pools, given the pool of each measured cell."""
        weights = controls.shares(pool)
        profiles, spread = controls.profiles
        return cls(weights, weights @ controls.means[0], weights @ profiles, spread.weighted(weights))


class _Comparison:
    """Compares one perturbation after another, as far as it is needed."""

    def __init__(self, measured: Measured, predicted: Predictions, needs: frozenset[str]) -> None:
        self.measured, self.predicted, self.controls, self._needs = measured, predicted, measured.controls, needs
        X = self.controls.X
        self.highly_expressed = np.zeros(X.shape[1], dtype=bool)
        self.highly_expressed[np.argsort(-mean_and_variance(X)[0], kind="stable")[:N_HIGH_EXPRESSION]] = True
        profile = mean_profile(self.controls.counts)[0]
        per_million = profile.sum() / 1e6  # one count per million of the genes of pairs.h5ad, in normalized counts
        self._is_expressed = profile > TESTED_CPM * per_million
        self._offset = LFC_OFFSET_CPM * per_million
        self._pool = self.controls.pools(measured.strata)[measured.stratum]
        scored = [self._pool[rows] for rows in measured.rows.values()]
        if "de" in needs:
            self._sorted = self.controls.sorted(np.unique(np.concatenate([*scored, predicted.pool])))
        if "cells" in needs:
            self._pca = _fit_components(measured.training_sample)
        self._rng = np.random.default_rng(0)

    def _components(self, X: sparse.csr_matrix, own: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the components of at most MAX_CELLS_OF_DISTANCE cells, those without the own genes, and the cells."""
        n = X.shape[0]
        chosen = (
            np.arange(n)
            if n <= MAX_CELLS_OF_DISTANCE
            else np.sort(self._rng.choice(n, MAX_CELLS_OF_DISTANCE, replace=False))
        )
        cells = X[chosen].toarray()
        components = self._pca.transform(cells)
        off_target = components - cells[:, own] @ self._pca.components_[:, own].T if own.any() else components
        return components, off_target, chosen

    def _differential(
        self, X: sparse.csr_matrix, profile: np.ndarray, pool: np.ndarray, is_tested: np.ndarray
    ) -> np.ndarray:
        """Return the fields of `Differential`, (3, genes), of cells with this mean profile."""
        control = self.controls.shares(pool) @ self.controls.profiles[0]
        z = np.where(is_tested, self._sorted.rank_sum(X, pool), np.nan)
        q = np.full(len(z), np.nan)
        if is_tested.any():
            q[is_tested] = adjusted(p_value(z[is_tested]))
        log_fold_change = np.log2((profile + self._offset) / (control + self._offset))
        return np.stack([z, q, np.where(is_tested, log_fold_change, np.nan)])

    def of(self, label: str, own_target: np.ndarray) -> dict:
        """Return the fields of `Scored` for one perturbation, given the mask of its own genes."""
        predicted, measured = self.predicted.cells(label), self.measured.cells(label)
        is_tested = self._is_expressed & ~own_target
        control = _Control.of(self.controls, self._pool[self.measured.rows[label]])
        found = {
            "control": control.mean,
            "control_bulk": bulk(control.profile),
            "control_bulk_variance": control.spread.of_bulk(control.profile),
            **self._of_measured(label, measured, control, is_tested),
            **self._of_predicted(label, predicted, control, is_tested),
        }
        return found | self._of_cells(label, predicted, measured, own_target) if "cells" in self._needs else found

    def _of_measured(self, label: str, cells: sparse.csr_matrix, control: _Control, is_tested: np.ndarray) -> dict:
        """Return the fields of `Scored` that are means and tests of measured cells."""
        mean, variance = mean_and_variance(cells)
        profile, spread = mean_profile(cells.expm1())
        n = cells.shape[0]
        noise = np.nansum(variance) / n + (control.weights**2 @ self.controls.means[1]).sum()
        found = {
            "measured": mean,
            "measured_variance": variance,
            "measured_bulk": bulk(profile),
            "measured_bulk_variance": spread.of_bulk(profile),
            "n_cells": n,
            "reliability": self.measured.reliability(label, mean),
            "effect_size": np.sqrt(max(0.0, np.square(mean - control.mean).sum() - noise)),
        }
        if "de" in self._needs:
            pool = self._pool[self.measured.rows[label]]
            found["measured_test"] = self._differential(cells, profile, pool, is_tested)
        return found

    def _of_predicted(self, label: str, cells: sparse.csr_matrix, control: _Control, is_tested: np.ndarray) -> dict:
        """Return the fields of `Scored` that are means and tests of predicted cells."""
        mean, variance = mean_and_variance(cells)
        profile, spread = mean_profile(cells.expm1())
        pool = self.predicted.pool[self.predicted.rows[label]]
        test = {"predicted_test": self._differential(cells, profile, pool, is_tested)} if "de" in self._needs else {}
        # Predicted cells of another composition of batches and cell types are moved to that of the measured ones.
        moved = control.weights - self.controls.shares(pool)
        mean = mean + moved @ self.controls.means[0]
        profile = np.maximum(profile + moved @ self.controls.profiles[0], 0.0)
        if self.predicted.has_set_mean:
            spread = control.spread  # only the mean of the controls is uncertain in their mean
            if (np.abs(mean - control.mean) <= _resolution(cells) + NO_EFFECT).all():
                mean, profile = control.mean, control.profile
        return test | {
            "predicted": mean,
            "predicted_variance": variance,
            "predicted_bulk": bulk(profile),
            "predicted_bulk_variance": spread.of_bulk(profile),
            "n_predicted": cells.shape[0],
        }

    def _of_cells(self, label: str, X: sparse.csr_matrix, Y: sparse.csr_matrix, own: np.ndarray) -> dict:
        """Return the fields of `Scored` on distributions of predicted cells X and measured cells Y."""
        measured, measured_off_target, _ = self._components(Y, own)
        predicted, predicted_off_target, chosen = self._components(X, own)
        return {
            "measured_components": measured,
            "measured_off_target_components": measured_off_target,
            "predicted_components": predicted,
            "predicted_off_target_components": predicted_off_target,
            "predicted_start": self.predicted.start(label)[chosen],
            "coverage": SortedCells(X, [np.arange(X.shape[0])]).coverage(Y),
        }


def _check_table(predictions: ad.AnnData, genes: list[str]) -> None:
    """Raise InputError unless predicted cells have the genes of pairs.h5ad, in its order, and a perturbation."""
    found = list(predictions.var_names)
    if found != genes:
        missing, strange = [sorted(set(these) - set(others)) for these, others in ((genes, found), (found, genes))]
        differences = [
            f"{len(them)} {fault} ({', '.join(them[:5])})"
            for them, fault in ((missing, "missing"), (strange, "unknown"))
            if them
        ]
        raise InputError(
            "predictions and pairs differ in their genes or gene order: "
            f"{', '.join(differences) or 'the same genes in another order'}. "
            "var_names must be those of pairs.h5ad, in its order."
        )
    if "perturbation" not in predictions.obs:
        raise InputError(f"predictions: obs has no column perturbation, only {', '.join(predictions.obs) or '(none)'}.")


def score_inputs(predictions: ad.AnnData, cells: Pairs, needs: frozenset[str] = NEEDS) -> Scored:
    """Bring predicted and measured cells together.

    Parameters
    ----------
    predictions
        predictions.h5ad, in memory or backed by its file. uns["perturbflow"]["role"] names the cells that are the truth
        (test where it is silent).
    cells
        All cells of pairs.h5ad, in memory or opened.
    needs
        `Metric.needs` of the metrics that will read it: tests and distributions of cells take most of the time.

    Raises
    ------
    InputError
        If genes differ, a predicted perturbation has no cells of the role, cells did not start from its controls, or
        expression is negative.
    """
    _check_table(predictions, cells.genes)
    role = str(predictions.uns.get("perturbflow", {}).get("role", "test"))
    labels = sorted(set(predictions.obs["perturbation"].astype(str)))
    is_scored = (cells.obs["role"] == role).to_numpy() & (cells.obs["half"] == "b").to_numpy()
    if missing := sorted(set(labels) - set(cells.labels[is_scored])):
        raise InputError(
            f"predictions of the role {role} hold {', '.join(missing[:5])}, but no cell of these has that role. Only "
            "held-out cells can be scored. Predict the perturbations of this split, or name the right role in "
            "uns['perturbflow']['role']."
        )
    measured = Measured(cells, labels, role, is_sampled="cells" in needs)
    comparison = _Comparison(measured, Predictions(predictions, measured), needs)
    column, own_target = pd.Index(cells.genes), np.zeros((len(labels), len(cells.genes)), dtype=bool)
    for own, label in zip(own_target, labels, strict=True):
        own[[place for place in column.get_indexer(entities_of(label)) if place >= 0]] = True
    values: dict = dict.fromkeys(NEEDED)
    for i, (label, own) in enumerate(zip(labels, own_target, strict=True)):
        for name, value in comparison.of(label, own).items():
            if name.endswith(("_components", "_start")):  # of as many cells as each perturbation has
                values[name] = [*(values[name] or []), value]
                continue
            if values.get(name) is None:
                is_wide = np.ndim(value) and len(labels) * np.shape(value)[-1] > MOST_IN_DOUBLE
                dtype = np.float32 if is_wide else np.asarray(value).dtype
                values[name] = np.empty((len(labels), *np.shape(value)), dtype)
            values[name][i] = value
    if "de" in needs:
        values |= {name: Differential(*np.moveaxis(values[name], 1, 0)) for name in ("predicted_test", "measured_test")}
    return Scored(
        labels=labels,
        **values,
        reference=measured.references(),
        highly_expressed=comparison.highly_expressed,
        own_target=own_target,
    )
