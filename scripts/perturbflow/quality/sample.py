"""A bounded sample of a screen's cells, as principal components, for the tests of single perturbations."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.io.hdf5 import CsrRows
from perturbflow.io.kernels import add_moments

logger = logging.getLogger(__name__)

CELLS_PER_PERTURBATION = 200
CONTROLS_PER_STRATUM = 200
LEAST_CONTROLS = 2000
"""Where strata are few, they share this many controls."""
CELLS_OF_COMPONENTS = 5000
N_GENES = 2000
N_COMPONENTS = 50
ROWS_AT_ONCE = 2048
SEED = 0


class Sample:
    """Some cells of every perturbation, and controls of every batch × cell type.

    Parameters
    ----------
    harmonized
        harmonized.h5ad; rows are read in blocks, so memory grows with the sample alone.

    Attributes
    ----------
    obs
        perturbation, is_control, batch, cell_type, n_perturbations of all cells of the screen.
    rows
        Rows of the sampled cells, ascending.
    label, stratum, cell_type
        Of the sampled cells: perturbation, and number of the batch × cell type and of the cell type.
    components
        Principal components of log1p-normalized expression over the most variable genes, float32, (sampled cells, 50 or
        fewer).
    genes
        Columns of these genes.
    """

    def __init__(self, harmonized: Path) -> None:
        self._path = harmonized
        with h5py.File(harmonized) as file:
            self.obs = ad.io.read_elem(file["obs"])
            self._X = CsrRows(file["X"], harmonized)
            strata = self.obs.groupby(["batch", "cell_type"], observed=True).ngroup().to_numpy()
            types = self.obs.groupby("cell_type", observed=True).ngroup().to_numpy()
            self.rows = self._sampled(strata)
            self.label = self.obs["perturbation"].astype(str).to_numpy()[self.rows]
            self.stratum, self.cell_type = strata[self.rows], types[self.rows]
            self._totals = self.obs["total_counts"].to_numpy(float)
            self._target = float(np.median(self._totals[self.rows])) if len(self.rows) else 1.0
            self.components = self._components()

    def _sampled(self, strata: np.ndarray) -> np.ndarray:
        """Return the rows of the sample, ascending."""
        rng = np.random.default_rng(SEED)
        is_control = self.obs["is_control"].to_numpy(bool)
        n_strata = len(np.unique(strata[is_control]))
        most = max(CONTROLS_PER_STRATUM, LEAST_CONTROLS // max(n_strata, 1))
        group = self.obs["perturbation"].cat.codes.to_numpy().astype(np.int64)
        group[is_control] = group.max(initial=0) + 1 + strata[is_control]
        order = rng.permutation(len(group))
        turn = pd.Series(group[order]).groupby(group[order]).cumcount().to_numpy()
        return np.sort(order[turn < np.where(is_control[order], most, CELLS_PER_PERTURBATION)])

    def _expression(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Return log1p of normalized counts of some rows of the screen."""
        X = self._X[rows].astype(np.float32)
        totals = self._totals[rows]
        scale = np.divide(self._target, totals, out=np.zeros(len(rows)), where=totals > 0)
        X = sparse.csr_matrix(sparse.diags(scale.astype(np.float32)) @ X)
        X.data = np.log1p(X.data)
        return X

    def _blocks(self) -> Iterator[tuple[slice, sparse.csr_matrix]]:
        for first in range(0, len(self.rows), ROWS_AT_ONCE):
            here = slice(first, first + ROWS_AT_ONCE)
            yield here, self._expression(self.rows[here])

    def moments(self, group: np.ndarray, n_groups: int) -> tuple[np.ndarray, np.ndarray]:
        """Return sums of expression and of its squares over groups of the sample's cells, (groups, genes) each.

        Parameters
        ----------
        group
            Of every sampled cell.
        """
        sums, squares = np.zeros((2, n_groups, len(self.genes)))
        first = 0
        for block in self.expression():
            X = block[:, self.genes]
            add_moments(X.data, X.indices, X.indptr, group[first : first + X.shape[0]], sums, squares)
            first += X.shape[0]
        return sums, squares

    def expression(self) -> Iterator[sparse.csr_matrix]:
        """Yield log1p of normalized counts of the sampled cells in their order, a block at a time."""
        with h5py.File(self._path) as file:
            self._X = CsrRows(file["X"], self._path)
            for _, block in self._blocks():
                yield block

    def _components(self) -> np.ndarray:
        """Return the principal components, fitted on some thousand cells of the sample.

        Genes are highly variable ones by scanpy's measure.
        """
        import scanpy as sc  # seconds to import
        from sklearn.decomposition import PCA

        n = len(self.rows)
        fitted = np.sort(np.random.default_rng(SEED).choice(n, min(n, CELLS_OF_COMPONENTS), replace=False))
        X = self._expression(self.rows[fitted])
        genes = np.arange(X.shape[1])
        if len(genes) > N_GENES:
            cells = ad.AnnData(X)
            sc.pp.highly_variable_genes(cells, n_top_genes=N_GENES, flavor="seurat")
            genes = np.flatnonzero(cells.var["highly_variable"])
        self.genes = genes
        n_components = min(N_COMPONENTS, len(genes) - 1, len(fitted) - 1)
        if n_components < 1:
            return np.zeros((n, 1), np.float32)
        pca = PCA(n_components, svd_solver="randomized", iterated_power=3, random_state=SEED).fit(X[:, genes].toarray())
        components = np.empty((n, n_components), np.float32)
        for here, block in self._blocks():
            components[here] = pca.transform(block[:, genes].toarray())
        logger.info(
            "%s cells of %s sampled, %d components of %s genes",
            f"{n:,}",
            f"{len(self.obs):,}",
            n_components,
            f"{len(genes):,}",
        )
        return components
