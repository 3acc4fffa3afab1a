"""From cells to what the metrics read: one pass over pairs.h5ad, then one perturbation after another.

Memory is bounded by the cells of the scored half and the controls of the role; predicted cells are read a perturbation at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.evaluation.ranks import SortedCells, p_value
from perturbflow.evaluation.scored import BULK_TOTAL, NEEDED, Differential, Scored
from perturbflow.symbols import CONTROL, members_of

if TYPE_CHECKING:  # seconds to import, and the report takes METRICS alone from this package
    import anndata as ad
    from sklearn.decomposition import PCA

    from perturbflow.pairs import Pairs

N_HIGH_EXPRESSION = 1000
N_COMPONENTS = 50
CELLS_OF_PCA = 5000
MAX_CELLS_OF_DISTANCE = 1000
TESTED_CPM = 5.0
LFC_OFFSET = 1e-9
ROWS_AT_ONCE = 2048  # of float64 and index copies of them there are several
NEEDS = frozenset({"pseudobulk", "counts", "de", "cells"})  # what a metric may be computed from


# --- sums over cells ------------------------------------------------------------------------------------------------


def _sums(X: sparse.csc_matrix, values: np.ndarray) -> np.ndarray:
    """Return the sum per gene of values that belong to the stored entries of X, in float64, (genes,)."""
    filled = np.flatnonzero(np.diff(X.indptr))
    out = np.zeros(X.shape[1])
    if len(filled):
        out[filled] = np.add.reduceat(values, X.indptr[filled], dtype=np.float64)
    return out


def _add_sums(total: np.ndarray, X: sparse.csr_matrix, group: np.ndarray) -> None:
    """Add the sum of the rows of X in each group to that group's row of `total`, (groups, genes)."""
    present, place = np.unique(group, return_inverse=True)
    member = sparse.csr_matrix((np.ones(len(group)), (place, np.arange(len(group)))), shape=(len(present), len(group)))
    total[present] += (member @ X).toarray()


@dataclass(frozen=True)
class Spread:
    """Sampling variance of a mean profile P, and its covariance with ΣP: what the variance of a bulk is made of."""

    variance: np.ndarray
    covariance: np.ndarray
    of_total: np.ndarray

    def __add__(self, other: Spread) -> Spread:
        return Spread(self.variance + other.variance, self.covariance + other.covariance, self.of_total + other.of_total)

    def weighted(self, weight: np.ndarray) -> Spread:
        """Return the spread of a weighted sum of independent profiles, the first axis."""
        return Spread(weight**2 @ self.variance, weight**2 @ self.covariance, weight**2 @ self.of_total)

    def of_bulk(self, profile: np.ndarray) -> np.ndarray:
        """Return the sampling variance of log(1 + 5·10⁴·P/ΣP), (genes,).

        The infinitesimal jackknife (Efron 1982): to first order in 1/cells the delete-one jackknife, from sums.
        """
        total = max(profile.sum(), 1e-12)
        share = profile / total
        slope = BULK_TOTAL / total / (1 + BULK_TOTAL * share)
        return slope**2 * (self.variance - 2 * share * self.covariance + share**2 * self.of_total)


def _bulk(profile: np.ndarray) -> np.ndarray:
    """Return log(1 + 5·10⁴·P/ΣP) of a mean profile of normalized counts, (genes,)."""
    return np.log1p(BULK_TOTAL * profile / max(profile.sum(), 1e-12))


def _profile(counts: sparse.csc_matrix) -> tuple[np.ndarray, Spread]:
    """Return the mean of normalized counts over cells and its spread; NaN for a single cell."""
    n = counts.shape[0]
    total = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    mean = _sums(counts, counts.data) / n
    scale = 1 / (n * (n - 1)) if n > 1 else np.nan
    variance = (_sums(counts, np.square(counts.data, dtype=np.float64)) - n * mean**2) * scale
    covariance = (_sums(counts, counts.data * total[counts.indices]) - n * mean * total.mean()) * scale
    return mean, Spread(np.maximum(variance, 0.0), covariance, np.square(total - total.mean()).sum() * scale)


def _mean_and_variance(X: sparse.csc_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance over cells, (genes,); the variance of a single cell is NaN."""
    n = X.shape[0]
    mean = _sums(X, X.data) / n
    squares = _sums(X, np.square(X.data, dtype=np.float64))
    return mean, (np.maximum(squares - n * mean**2, 0.0) / (n - 1) if n > 1 else np.full(len(mean), np.nan))


# --- controls -------------------------------------------------------------------------------------------------------


def _stratify(obs: pd.DataFrame) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Return the stratum of each cell, and the batch and cell type of each stratum."""
    grouped = obs.groupby(["batch", "cell_type"], observed=True, sort=False)
    return grouped.ngroup().to_numpy(), [(str(batch), str(cell_type)) for batch, cell_type in grouped.size().index]


class Controls:
    """Measured controls of one role, in pools: one of each stratum (batch and cell type), and one of each cell type."""

    def __init__(self, X: sparse.csr_matrix, obs: pd.DataFrame) -> None:
        keys = obs[["batch", "cell_type"]].astype(str)
        self.X = X
        self.rows = {**keys.groupby(["batch", "cell_type"]).indices, **keys.groupby("cell_type").indices}

    def pools(self, strata: list[tuple[str, str]]) -> np.ndarray:
        """Return the pool that serves each stratum, -1 for none.

        Where a stratum holds no control, those of its cell type in other batches serve, as in `pairs.match_controls`.
        """
        place = {name: i for i, name in enumerate(self.rows)}
        return np.array([place.get(stratum, place.get(stratum[1], -1)) for stratum in strata])

    def shares(self, pool: np.ndarray) -> np.ndarray:
        """Return the share of cells in each pool, (pools,), given the pool of each cell."""
        return np.bincount(pool, minlength=len(self.rows)) / len(pool)

    @cached_property
    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and sampling variance of log1p-normalized controls, (pools, genes) each."""
        found = [(*_mean_and_variance(self.X[rows].tocsc()), len(rows)) for rows in self.rows.values()]
        return np.stack([mean for mean, _, _ in found]), np.stack([np.nan_to_num(variance) / n for _, variance, n in found])

    @cached_property
    def profiles(self) -> tuple[np.ndarray, Spread]:
        """Mean normalized counts and their spread, pools first; a single control is taken for exact."""
        found = [_profile(self.X[rows].tocsc().expm1()) for rows in self.rows.values()]
        parts = ([getattr(spread, name) for _, spread in found] for name in Spread.__annotations__)
        return np.stack([mean for mean, _ in found]), Spread(*(np.nan_to_num(np.stack(part)) for part in parts))

    def sorted(self, pools: np.ndarray) -> SortedCells:
        """Return the controls of these pools, each gene's values in order."""
        return SortedCells(self.X, [rows if pool in pools else rows[:0] for pool, rows in enumerate(self.rows.values())])

    def halves(self, obs: pd.DataFrame) -> list[Controls]:
        """Divide the controls, whose obs this is, in two, evenly over strata."""
        half = np.empty(len(obs), dtype=int)
        half[np.argsort(_stratify(obs)[0], kind="stable")] = np.arange(len(obs)) % 2
        return [Controls(self.X[half == i], obs[half == i]) for i in (0, 1)]


# --- the pass over measured cells -----------------------------------------------------------------------------------


def _blocks(cells: Pairs) -> Iterator[tuple[slice, sparse.csr_matrix]]:
    """Yield ranges of rows and their cells, without stored zeros."""
    for start in range(0, len(cells.obs), ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, len(cells.obs)))
        X = sparse.csr_matrix(cells.X[rows], dtype=np.float32)
        X.eliminate_zeros()
        yield rows, X


class Measured:
    """What one pass over all measured cells leaves.

    Parameters
    ----------
    cells
        All cells of pairs.h5ad; X may be on disk.
    labels, role
        Perturbations and role that are scored.
    is_sampled
        Whether a sample of training cells is wanted, too.
    """

    def __init__(self, cells: Pairs, labels: list[str], role: str, is_sampled: bool) -> None:
        self.labels, self.genes = labels, cells.genes
        self.stratum, self.strata = _stratify(cells.obs)
        of_role = (cells.obs["role"] == role).to_numpy()
        is_train = (cells.obs["role"] == "train").to_numpy()
        is_scored = of_role & np.isin(cells.labels, labels)
        half = cells.obs["half"].astype(str).to_numpy()
        self.is_control = of_role & cells.is_control
        self.rows, self.duplicates = (self._rows_of(cells, is_scored & (half == name)) for name in "ba")
        of_pca = np.flatnonzero(is_train & is_sampled)
        if len(of_pca) > CELLS_OF_PCA:
            of_pca = np.sort(np.random.default_rng(0).choice(of_pca, CELLS_OF_PCA, replace=False))
        is_kept = self.is_control | (is_scored & (half == "b"))
        is_kept[of_pca] = True

        # Sums are taken over groups: training controls by stratum, perturbed cells by label and by what they are to us.
        keys = pd.DataFrame(
            {
                "perturbation": pd.Categorical(cells.labels),
                "use": np.select([is_train, is_scored & (half == "a")], ["train", "duplicate"], "other"),
                "stratum": np.where(cells.is_control, self.stratum, -1),
            }
        )
        grouped = keys.groupby(list(keys), observed=True, sort=False)
        self._groups = grouped.size().rename("n").reset_index()
        self._of_label = self._groups.groupby("perturbation", observed=True).indices
        self._sums, self._squares, self.X = self._read(cells, is_kept, grouped.ngroup().to_numpy())
        self._kept = np.flatnonzero(is_kept)
        is_training = is_train & ~cells.is_control
        code, _ = pd.factorize(cells.labels[is_training])
        shares = np.bincount(code * len(self.strata) + self.stratum[is_training], minlength=(code.max() + 1) * len(self.strata))
        shares = shares.reshape(-1, len(self.strata))
        self._training_shares = (shares / shares.sum(axis=1, keepdims=True)).mean(axis=0)  # (strata,)
        self.controls = Controls(self.at(np.flatnonzero(self.is_control)), cells.obs[self.is_control])
        self.halves = self.controls.halves(cells.obs[self.is_control])
        self.training_sample = self.at(of_pca)

    @staticmethod
    def _rows_of(cells: Pairs, mask: np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows of pairs.h5ad under a mask, by label."""
        rows = np.flatnonzero(mask)
        return {label: rows[places] for label, places in pd.Series(rows).groupby(cells.labels[mask]).indices.items()}

    def _read(self, cells: Pairs, is_kept: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray, sparse.csr_matrix]:
        """Return the sum of x per group, the sum of x² per scored label and of all other perturbed cells, and the kept cells."""
        n_genes, place = len(self.genes), {label: i for i, label in enumerate(self.labels)}
        others = len(place)
        square = np.array([others + 1 if label == CONTROL else place.get(label, others) for label in self._groups["perturbation"]])
        sums, squares = np.zeros((len(self._groups), n_genes)), np.zeros((others + 2, n_genes))
        kept = []
        for rows, X in _blocks(cells):
            kept.append(X[is_kept[rows]])
            X = X.astype(np.float64)
            _add_sums(sums, X, group[rows])
            np.square(X.data, out=X.data)
            _add_sums(squares, X, square[group[rows]])
        return sums, squares[: others + 1], sparse.vstack(kept, format="csr")

    def at(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Return kept cells by their rows in pairs.h5ad."""
        return self.X[np.searchsorted(self._kept, rows)]

    def _mean(self, groups: np.ndarray) -> np.ndarray:
        return self._sums[groups].sum(axis=0) / self._groups["n"].to_numpy()[groups].sum()

    def _groups_of(self, label: str, use: str) -> np.ndarray:
        groups = self._of_label[label]
        return groups[self._groups["use"].to_numpy()[groups] == use]

    def references(self) -> np.ndarray:
        """Return r per perturbation: the mean of the training perturbations' means, in the perturbation's strata, (P, genes).

        mean_q x̄_q + Σ_s w_s k_s − mean_q c̄_q over training perturbations q, where w_s is the share of the perturbation's cells
        in stratum s, k_s the mean of the training controls there and c̄_q the training controls' mean in q's strata. With one
        stratum that is mean_q x̄_q, as published. Where training has no controls of a stratum (a context that was held
        out), k_s is the mean of the scored role's.
        """
        trained = [groups for label in self._of_label if label != CONTROL and len(groups := self._groups_of(label, "train"))]
        controls = self._groups.iloc[self._groups_of(CONTROL, "train")]
        exact = {stratum: self._mean(rows.index) for stratum, rows in controls.groupby("stratum")}
        cell_type = controls["stratum"].map(lambda stratum: self.strata[stratum][1])
        relaxed = {name: self._mean(rows.index) for name, rows in controls.groupby(cell_type)}
        of_training, of_scored = np.zeros((2, len(self.strata), len(self.genes)))
        for stratum, (pool, (_, name)) in enumerate(zip(self.controls.pools(self.strata), self.strata, strict=True)):
            if self._training_shares[stratum]:
                of_training[stratum] = exact.get(stratum, relaxed.get(name))
            if stratum in exact or pool >= 0:  # other strata hold no scored cell
                of_scored[stratum] = exact.get(stratum, self.controls.means[0][pool])
        shares = [np.bincount(self.stratum[self.rows[label]], minlength=len(self.strata)) / len(self.rows[label]) for label in self.labels]
        return np.mean([self._mean(groups) for groups in trained], axis=0) - self._training_shares @ of_training + shares @ of_scored

    def weights(self, means: np.ndarray, variances: np.ndarray, n_cells: np.ndarray) -> np.ndarray:
        """Return the weight of each gene: ((|t| − min|t|) / (max|t| − min|t|))², divided by its sum (Mejia et al. 2025), (P, genes).

        t is Welch's, of the scored cells against all perturbed cells of other labels, whatever their role.

        Parameters
        ----------
        means, variances, n_cells
            Of the scored cells.
        """
        of_perturbed = (self._groups["perturbation"] != CONTROL).to_numpy()
        sums, squares = self._sums[of_perturbed].sum(axis=0), self._squares.sum(axis=0)
        n = self._groups["n"].to_numpy()
        weights = []
        for i, label in enumerate(self.labels):
            own = self._of_label[label]
            n_others = n[of_perturbed].sum() - n[own].sum()
            if n_others < 2 or n_cells[i] < 2:
                weights.append(np.full(len(self.genes), np.nan))
                continue
            mean = (sums - self._sums[own].sum(axis=0)) / n_others
            variance = np.maximum(squares - self._squares[i] - n_others * mean**2, 0.0) / (n_others - 1)
            error = np.sqrt(variances[i] / n_cells[i] + variance / n_others)
            t = np.abs(np.divide(means[i] - mean, error, out=np.zeros(len(mean)), where=error > 0))
            t = (t - t.min()) ** 2
            weights.append(t / t.sum() if t.sum() > 0 else np.full(len(t), 1 / len(t)))
        return np.stack(weights)

    def reliability(self, label: str, mean: np.ndarray) -> float:
        """Return Pearson's r of the effects of both halves, each against its own half of the controls; NaN where a half is empty.

        Parameters
        ----------
        mean
            Of half 'b', (genes,).
        """
        groups = self._groups_of(label, "duplicate")
        if not len(groups):
            return np.nan
        effects = []
        for half, rows, profile in zip(self.halves, (self.duplicates[label], self.rows[label]), (self._mean(groups), mean), strict=True):
            pool = half.pools(self.strata)[self.stratum[rows]]
            if (pool < 0).any():
                return np.nan
            effect = profile - half.shares(pool) @ half.means[0]
            effects.append((effect - effect.mean()) / max(effect.std(), 1e-12))
        return float(np.mean(effects[0] * effects[1]))


# --- one perturbation after another ---------------------------------------------------------------------------------


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
        self._X, self._measured = predictions.X, measured
        if predictions.isbacked and getattr(self._X, "format", "csr") != "csr":
            self._X = self._X.to_memory().tocsr()
        self._block, self._block_start = self._X[:0], 0
        self.rows = predictions.obs.groupby("perturbation", observed=True).indices
        # A ceiling's cells are measured ones: they started from nothing.
        declared = predictions.uns.get("perturbflow", {}).get("starts_from_controls", True)
        self.starts_from_controls = bool(declared) and "control_index" in predictions.obs
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
            stratum, strata = _stratify(predictions.obs)
            if missing := {cell_type for (_, cell_type), pool in zip(strata, measured.controls.pools(strata), strict=True) if pool < 0}:
                raise InputError(
                    f"predictions: no control of the scored role has the cell type {', '.join(sorted(missing))}, which obs.cell_type holds."
                )
        else:
            raise InputError("predictions: obs needs control_index, or batch and cell_type, to be compared with controls of the same kind.")
        self.pool = measured.controls.pools(strata)[stratum]  # of controls that serves each cell

    def cells(self, label: str) -> sparse.csc_matrix:
        """Return the predicted cells of a perturbation."""
        rows = self.rows[label]
        is_run = rows[-1] - rows[0] == len(rows) - 1  # as `predict` writes them; rows here and there take longer to read
        X = sparse.csc_matrix(self._run(rows[0], rows[-1] + 1) if is_run else self._X[rows], dtype=np.float32)
        if not np.isfinite(X.data).all() or (X.data < 0).any():
            raise InputError(f"predictions of {label} hold negative or missing values; X is log1p-normalized expression, 0 or more.")
        X.eliminate_zeros()
        return X

    def _run(self, first: int, last: int) -> sparse.csr_matrix:
        """Return a range of rows; those after it are read with it, as every reading has its price."""
        if not self._block_start <= first < last <= self._block_start + self._block.shape[0]:
            self._block, self._block_start = self._X[first : max(last, first + ROWS_AT_ONCE)], first
        return self._block[first - self._block_start : last - self._block_start]

    def start(self, label: str) -> np.ndarray:
        """Return a number per predicted cell that cells of one starting control share."""
        return self._index[self.rows[label]] if self.starts_from_controls else self.rows[label]

    def begun(self, label: str) -> sparse.csr_matrix:
        """Return the controls that the cells started from."""
        return self._measured.at(self._index[self.rows[label]])


def _fit_components(training: sparse.csr_matrix) -> PCA:
    from sklearn.decomposition import PCA

    n_components = min(N_COMPONENTS, training.shape[1] - 1, training.shape[0] - 1)
    return PCA(n_components, svd_solver="randomized", iterated_power=3, random_state=0).fit(training.toarray())


class _Comparison:
    """All that is compared of one perturbation after another, as far as it is needed."""

    def __init__(self, measured: Measured, predicted: Predictions, needs: frozenset[str]) -> None:
        self.measured, self.predicted, self.controls, self._needs = measured, predicted, measured.controls, needs
        X = self.controls.X.tocsc()
        self.highly_expressed = np.zeros(X.shape[1], dtype=bool)
        self.highly_expressed[np.argsort(-_mean_and_variance(X)[0], kind="stable")[:N_HIGH_EXPRESSION]] = True
        profile = _profile(X.expm1())[0]
        self._is_expressed = 1e6 * profile > TESTED_CPM * profile.sum()
        self._pool = self.controls.pools(measured.strata)[measured.stratum]
        scored = [self._pool[rows] for rows in measured.rows.values()]
        if "de" in needs:
            self._sorted = self.controls.sorted(np.unique(np.concatenate([*scored, predicted.pool])))
        if "cells" in needs:
            self._pca = _fit_components(measured.training_sample)
        self._rng = np.random.default_rng(0)

    def _components(self, X: sparse.csc_matrix) -> tuple[np.ndarray, np.ndarray]:
        """Return the components of at most MAX_CELLS_OF_DISTANCE cells, and which cells these are."""
        n = X.shape[0]
        chosen = np.arange(n) if n <= MAX_CELLS_OF_DISTANCE else np.sort(self._rng.choice(n, MAX_CELLS_OF_DISTANCE, replace=False))
        return self._pca.transform(X[chosen].toarray()), chosen

    def _differential(self, X: sparse.csc_matrix, profile: np.ndarray, pool: np.ndarray, is_tested: np.ndarray) -> Differential:
        """Test cells, whose mean profile this is, against the controls of their pools, (genes,) each."""
        from scipy.stats import false_discovery_control

        control = self.controls.shares(pool) @ self.controls.profiles[0]
        z = np.where(is_tested, self._sorted.rank_sum(X, pool), np.nan)
        q = np.full(len(z), np.nan)
        if is_tested.any():
            q[is_tested] = false_discovery_control(p_value(z[is_tested]))
        return Differential(z, q, np.where(is_tested, np.log2((profile + LFC_OFFSET) / (control + LFC_OFFSET)), np.nan))

    def of(self, label: str, own_target: np.ndarray) -> dict:
        """Return what `Scored` holds of one perturbation, given the mask of its own genes."""
        controls, is_tested, rows = self.controls, self._is_expressed & ~own_target, self.measured.rows[label]
        X, Y = self.predicted.cells(label), self.measured.at(rows).tocsc()
        pool = self._pool[rows]
        weights = controls.shares(pool)
        control, control_profile = weights @ controls.means[0], weights @ controls.profiles[0]
        control_spread = controls.profiles[1].weighted(weights)

        mean, variance = _mean_and_variance(Y)
        profile, spread = _profile(Y.expm1())
        noise = np.nansum(variance) / len(rows) + (weights**2 @ controls.means[1]).sum()
        found = {
            "measured": mean,
            "measured_variance": variance,
            "measured_bulk": _bulk(profile),
            "measured_bulk_variance": spread.of_bulk(profile),
            "control": control,
            "control_bulk": _bulk(control_profile),
            "control_bulk_variance": control_spread.of_bulk(control_profile),
            "n_cells": len(rows),
            "reliability": self.measured.reliability(label, mean),
            "effect_size": np.sqrt(max(0.0, np.square(mean - control).sum() - noise)),
        }
        if "de" in self._needs:
            found["measured_test"] = self._differential(Y, profile, pool, is_tested)

        mean, variance = _mean_and_variance(X)
        counts = X.expm1()
        profile, spread = _profile(counts)
        if "de" in self._needs:
            found["predicted_test"] = self._differential(X, profile, self.predicted.pool[self.predicted.rows[label]], is_tested)
        if self.predicted.starts_from_controls:
            # What the chance of drawing starts adds, to the mean and to its noise, is taken off; the noise of c̄ comes in its place.
            begun = self.predicted.begun(label).tocsc()
            mean = mean - _mean_and_variance(begun)[0] + control
            change, spread = _profile((counts - begun.expm1()).tocsc())
            profile, spread = np.maximum(change + control_profile, 0.0), spread + control_spread
        if "cells" in self._needs:
            found |= self._of_cells(label, X, Y)
        return found | {
            "predicted": mean,
            "predicted_variance": variance,
            "predicted_bulk": _bulk(profile),
            "predicted_bulk_variance": spread.of_bulk(profile),
        }

    def _of_cells(self, label: str, X: sparse.csc_matrix, Y: sparse.csc_matrix) -> dict:
        """Return what `Scored` holds of the distribution of predicted cells X and of measured cells Y."""
        measured, _ = self._components(Y)
        predicted, chosen = self._components(X)
        coverage = np.full(X.shape[1], np.nan)
        genes = self.highly_expressed
        coverage[genes] = SortedCells(X[:, genes].tocsr(), [np.arange(X.shape[0])]).coverage(Y[:, genes])
        return {
            "measured_components": measured,
            "predicted_components": predicted,
            "predicted_start": self.predicted.start(label)[chosen],
            "coverage": coverage,
        }


def score_inputs(predictions: ad.AnnData, cells: Pairs, needs: frozenset[str] = NEEDS) -> Scored:
    """Bring predicted and measured cells together.

    Parameters
    ----------
    predictions
        predictions.h5ad, in memory or backed by its file. uns["perturbflow"]["role"] says which cells are the truth
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
    if list(predictions.var_names) != cells.genes:
        raise InputError("predictions and pairs differ in their genes or gene order; predict again.")
    role = str(predictions.uns.get("perturbflow", {}).get("role", "test"))
    labels = sorted(set(predictions.obs["perturbation"].astype(str)))
    is_scored = (cells.obs["role"] == role).to_numpy() & (cells.obs["half"] == "b").to_numpy()
    if missing := sorted(set(labels) - set(cells.labels[is_scored])):
        raise InputError(
            f"predictions of the role {role} hold {', '.join(missing[:5])}, of which no cell has that role: only held-out cells can be "
            "scored. Predict the perturbations of this split, or name the right role in uns['perturbflow']['role']."
        )
    measured = Measured(cells, labels, role, is_sampled="cells" in needs)
    comparison = _Comparison(measured, Predictions(predictions, measured), needs)
    own_target = np.stack([np.isin(cells.genes, members_of(label)) for label in labels])
    found = [comparison.of(label, own) for label, own in zip(labels, own_target, strict=True)]

    def collected(name: str) -> np.ndarray | list | Differential:
        values = [of_label[name] for of_label in found]
        if name.endswith("_test"):
            return Differential(*(np.stack([getattr(test, part) for test in values]) for part in Differential.__annotations__))
        return values if name.endswith(("_components", "_start")) else np.stack(values)

    values = dict.fromkeys(NEEDED) | {name: collected(name) for name in found[0]}
    return Scored(
        labels=labels,
        **values,
        reference=measured.references(),
        weight=measured.weights(values["measured"], values["measured_variance"], values["n_cells"]),
        highly_expressed=comparison.highly_expressed,
        own_target=own_target,
    )
