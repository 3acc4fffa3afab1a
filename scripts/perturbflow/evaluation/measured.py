"""One pass over the measured cells: sums of groups, the controls of the role, and the cells of the scored half.

The controls are kept in memory. So are the scored cells of a matrix in memory; those of a file are laid aside on disk,
perturbation by perturbation, so that their number is not bounded by memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.evaluation.control_pools import ControlPools, strata_of
from perturbflow.evaluation.profiles import add_sums
from perturbflow.genes.symbols import CONTROL
from perturbflow.io.streaming import RowsByLabel
from perturbflow.splits.divisions import KNOWN

if TYPE_CHECKING:
    from perturbflow.pairs import Pairs

CELLS_OF_PCA = 5000
ROWS_AT_ONCE = 2048  # there are several copies of them


def run_of_rows(X: sparse.csr_matrix, first: int, last: int) -> sparse.csr_matrix:
    """Return a copy of a range of rows; scipy, which looks at every column, takes several times as long."""
    if not (sparse.issparse(X) and X.format == "csr"):  # in a file, or given in another form
        return X[first:last]
    here = slice(X.indptr[first], X.indptr[last])
    parts = (X.data[here], X.indices[here], X.indptr[first : last + 1] - X.indptr[first])
    return sparse.csr_matrix(parts, shape=(last - first, X.shape[1]), copy=True)


def _stored(X: sparse.csr_matrix) -> np.ndarray:
    """Return how many values each row of a matrix in memory or on disk holds."""
    if sparse.issparse(X):
        return np.diff(X.tocsr().indptr)
    return X.n_stored


def _without_zeros(X: sparse.spmatrix) -> sparse.csr_matrix:
    """Return rows as float32 without stored zeros; of float32 in CSR form the zeros are removed in place."""
    X = sparse.csr_matrix(X).astype(np.float32, copy=False)
    X.eliminate_zeros()
    return X


def _blocks(cells: Pairs) -> Iterator[tuple[slice, sparse.csr_matrix]]:
    """Yield ranges of rows and their cells, without stored zeros."""
    for start in range(0, len(cells.obs), ROWS_AT_ONCE):
        rows = slice(start, min(start + ROWS_AT_ONCE, len(cells.obs)))
        yield rows, _without_zeros(run_of_rows(cells.X, rows.start, rows.stop))


class Measured:
    """The sums and cells that one pass over all measured cells keeps.

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
        self.stratum, self.strata = strata_of(cells.obs)
        of_role = (cells.obs["role"] == role).to_numpy()
        is_train = cells.obs["role"].isin(KNOWN[role]).to_numpy()
        is_scored = of_role & np.isin(cells.labels, labels)
        half = cells.obs["half"].astype(str).to_numpy()
        self.is_control = of_role & cells.is_control
        self.rows, self.duplicates = (self._rows_of(cells, is_scored & (half == name)) for name in "ba")
        of_pca = np.flatnonzero(is_train & is_sampled)
        if len(of_pca) > CELLS_OF_PCA:
            of_pca = np.sort(np.random.default_rng(0).choice(of_pca, CELLS_OF_PCA, replace=False))
        is_kept = self.is_control.copy()
        is_kept[of_pca] = True
        self._scored = RowsByLabel(cells.X, self.rows)

        # Sums are taken over groups: training controls by stratum, perturbed cells by label and by use.
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
        self._sums, self._X = self._read(cells, is_kept, grouped.ngroup().to_numpy())
        self._kept = np.flatnonzero(is_kept)
        self._training_shares = self._shares(cells, is_train & ~cells.is_control)
        self.controls = ControlPools(self._at(np.flatnonzero(self.is_control)), cells.obs[self.is_control])
        self.halves = self.controls.halves(cells.obs[self.is_control])
        self.training_sample = self._at(of_pca)

    def _shares(self, cells: Pairs, is_training: np.ndarray) -> np.ndarray:
        """Return the mean share of each stratum over training perturbations, (strata,); zeros without any."""
        if not is_training.any():
            return np.zeros(len(self.strata))
        code, _ = pd.factorize(cells.labels[is_training])
        n_strata = len(self.strata)
        n = np.bincount(code * n_strata + self.stratum[is_training], minlength=(code.max() + 1) * n_strata)
        n = n.reshape(-1, n_strata)
        return (n / n.sum(axis=1, keepdims=True)).mean(axis=0)

    @staticmethod
    def _rows_of(cells: Pairs, mask: np.ndarray) -> dict[str, np.ndarray]:
        """Return the rows of pairs.h5ad under a mask, by label."""
        rows = np.flatnonzero(mask)
        return {label: rows[places] for label, places in pd.Series(rows).groupby(cells.labels[mask]).indices.items()}

    def _read(self, cells: Pairs, is_kept: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, sparse.csr_matrix]:
        """Return the sum of x per group, and the kept cells; scored cells are laid aside."""
        sums = np.zeros((len(self._groups), len(self.genes)))
        # Places for all kept values are made beforehand: to put blocks together takes the memory twice.
        n_stored = _stored(cells.X)[is_kept].sum()
        data, indices = np.empty(n_stored, np.float32), np.empty(n_stored, np.int32)
        sizes, n = [[0]], 0
        for rows, X in _blocks(cells):
            add_sums(sums, X, group[rows])
            self._scored.put(rows, X)
            X = X[is_kept[rows]]
            here = slice(n, n := n + X.nnz)
            data[here], indices[here] = X.data, X.indices
            sizes.append(np.diff(X.indptr))
        return sums, sparse.csr_matrix(
            (data[:n], indices[:n], np.cumsum(np.concatenate(sizes))), shape=(is_kept.sum(), len(self.genes))
        )

    def _at(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Return kept cells by their rows in pairs.h5ad."""
        return self._X[np.searchsorted(self._kept, rows)]

    def cells(self, label: str) -> sparse.csr_matrix:
        """Return the scored cells of a perturbation."""
        return _without_zeros(self._scored.of(label))

    def _mean(self, groups: np.ndarray) -> np.ndarray:
        return self._sums[groups].sum(axis=0) / self._groups["n"].to_numpy()[groups].sum()

    def _groups_of(self, label: str, use: str) -> np.ndarray:
        groups = self._of_label[label]
        return groups[self._groups["use"].to_numpy()[groups] == use]

    def references(self) -> np.ndarray:
        """Return r per perturbation, (P, genes): the mean of the training perturbations' means, in its own strata.

        r = mean_q x̄_q + Σ_s w_s k_s − mean_q c̄_q over training perturbations q. w_s is the share of the
        perturbation's cells in stratum s, k_s the mean of the training controls there, c̄_q their mean in q's strata.
        With one stratum that is mean_q x̄_q, as published. Where training has no controls of a stratum (a context that
        was held out), k_s is the mean of the scored role's. NaN where no training cells were given.
        """
        trained = [
            groups for label in self._of_label if label != CONTROL and len(groups := self._groups_of(label, "train"))
        ]
        if not trained:
            return np.full((len(self.labels), len(self.genes)), np.nan)
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
        shares = [
            np.bincount(self.stratum[self.rows[label]], minlength=len(self.strata)) / len(self.rows[label])
            for label in self.labels
        ]
        return (
            np.mean([self._mean(groups) for groups in trained], axis=0)
            - self._training_shares @ of_training
            + shares @ of_scored
        )

    def reliability(self, label: str, mean: np.ndarray) -> float:
        """Return Pearson's r of the effects of both halves, each against its own half of the controls.

        It is NaN where a half is empty.

        Parameters
        ----------
        mean
            Of half 'b', (genes,).
        """
        groups = self._groups_of(label, "duplicate")
        if not len(groups):
            return np.nan
        effects = []
        for half, rows, profile in zip(
            self.halves, (self.duplicates[label], self.rows[label]), (self._mean(groups), mean), strict=True
        ):
            pool = half.pools(self.strata)[self.stratum[rows]]
            if (pool < 0).any():
                return np.nan
            effect = profile - half.shares(pool) @ half.means[0]
            effects.append((effect - effect.mean()) / max(effect.std(), 1e-12))
        return float(np.mean(effects[0] * effects[1]))
