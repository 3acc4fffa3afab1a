"""Latent spaces of expression: what every one of them offers, and the linear ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from scipy import sparse
from sklearn.utils.extmath import randomized_svd

from perturbflow.embeddings import from_table
from perturbflow.errors import InputError
from perturbflow.models.effects import Effects
from perturbflow.pairs import Pairs

MAX_CELLS = 20_000
LOWEST_SHARE = 0.3  # of a gene's mean that a cell's own level is at least taken for
LEAST_LEFT = 0.05  # of a gene's level, whatever a cell's part of a change is


class Latent(Protocol):
    """Cells as points, and what a move means for their genes."""

    @property
    def n_dimensions(self) -> int:
        """Number of latent dimensions."""

    def encode(self, X: np.ndarray | sparse.csr_matrix) -> np.ndarray:
        """Return latent coordinates of log1p-normalized cells, (cells, dimensions); training cells have about unit variance."""

    def mean_change(self, moved: np.ndarray) -> np.ndarray | None:
        """Return what moves change in the mean of log1p expression, (genes,); None where that is for the counts to say."""

    def log_fold_change(self, z: np.ndarray, moved: np.ndarray) -> np.ndarray:
        """Return the logarithms of the fold changes of the cells' rates, (cells, genes)."""

    def state(self) -> Mapping[str, Any]:
        """Return what is to be stored, arrays or tensors."""

    def change(self, z: np.ndarray, moved: np.ndarray, total: np.ndarray) -> np.ndarray:
        """Return what moves change in cells' expected log1p expression, (cells, genes); total is their normalized size, (cells,)."""


@dataclass(frozen=True)
class LatentSpace:
    """z = (x − mean) V / scale, and back. Cells have about unit variance in every dimension.

    Attributes
    ----------
    mean
        (genes,), mean of training cells.
    basis
        V, orthonormal, (genes, dimensions).
    scale
        (dimensions,), standard deviations of training cells.
    """

    mean: np.ndarray
    basis: np.ndarray
    scale: np.ndarray

    @classmethod
    def fit(cls, pairs: Pairs, effects: Effects, n_dimensions: int) -> "LatentSpace":
        """Span the directions in which training cells vary and those in which training perturbations move them.

        A principal component analysis of cells alone drops rare effects, a perturbed gene's own above all. Here effects are
        appended to the centred cells with a weight that gives both the same total variance, and the leading singular
        vectors of the two together are kept.
        """
        X = training_sample(pairs)
        mean = X.mean(axis=0)
        cells = (X - mean) / np.sqrt(len(X))
        moved = effects.values.astype(np.float64)
        weight = np.sqrt((cells**2).sum() / max((moved**2).sum(), 1e-12))
        stacked = np.vstack([cells, weight * moved])
        n_dimensions = min(n_dimensions, stacked.shape[1], len(stacked) - 1)
        _, _, Vt = randomized_svd(stacked, n_dimensions, random_state=0, n_iter=7)
        return cls._scaled(X, mean, Vt.T)

    @classmethod
    def from_loadings(cls, path: Path, pairs: Pairs) -> "LatentSpace":
        """Take the directions from a table of gene loadings, learned elsewhere: gene symbol first, one column per dimension.

        Genes without a row have none; the directions are made orthonormal, and means and scales are those of the training cells.

        Raises
        ------
        InputError
            If the table cannot be read, knows no measured gene, or its directions are linearly dependent on these genes.
        """
        loadings = from_table(Path(path), pairs.genes).fillna(0.0).to_numpy(np.float64)
        basis, triangle = np.linalg.qr(loadings)
        if loadings.shape[1] > loadings.shape[0] or np.abs(np.diag(triangle)).min() < 1e-8 * np.abs(triangle).max():
            raise InputError(
                f"{path}: its {loadings.shape[1]} directions are linearly dependent on the {len(pairs.genes)} genes of this screen; "
                "leave some columns out."
            )
        X = training_sample(pairs)
        return cls._scaled(X, X.mean(axis=0), basis)

    @classmethod
    def _scaled(cls, X: np.ndarray, mean: np.ndarray, basis: np.ndarray) -> "LatentSpace":
        return cls(mean, basis, np.maximum(((X - mean) @ basis).std(axis=0), 1e-3))

    @property
    def n_dimensions(self) -> int:
        """Return the number of latent dimensions."""
        return self.basis.shape[1]

    def encode(self, X: np.ndarray | sparse.csr_matrix) -> np.ndarray:
        """Return latent coordinates, (cells, dimensions)."""
        return ((X @ self.basis - self.mean @ self.basis) / self.scale).astype(np.float32)

    def decode(self, z: np.ndarray) -> np.ndarray:
        """Return expression, (cells, genes)."""
        return (z * self.scale) @ self.basis.T + self.mean

    def change(self, z: np.ndarray, moved: np.ndarray, total: np.ndarray) -> np.ndarray:
        """Return what moves change in log1p expression, (cells, genes): the same wherever a cell is."""
        return self._linear(moved)

    def _linear(self, moved: np.ndarray) -> np.ndarray:
        return (moved * self.scale) @ self.basis.T

    def mean_change(self, moved: np.ndarray) -> np.ndarray:
        """Return the mean of `change`, (genes,)."""
        return self._linear(moved.mean(axis=0, keepdims=True))[0]

    def log_fold_change(self, z: np.ndarray, moved: np.ndarray) -> np.ndarray:
        """Return log fold changes of the cells' levels ℓ as the latent space knows them: log((ℓ + (1 + ℓ) Δ) / ℓ), Δ the change of log1p ℓ."""
        level = np.expm1(np.maximum(self.decode(z), 0.0))
        level = np.maximum(level, LOWEST_SHARE * np.maximum(level.mean(axis=0), 1e-3))
        return np.log(np.maximum(level + (1.0 + level) * self._linear(moved), LEAST_LEFT * level) / level)

    def state(self) -> dict[str, np.ndarray]:
        """Return the arrays to be stored."""
        return {"mean": self.mean, "basis": self.basis, "scale": self.scale}


def sampled_rows(pairs: Pairs) -> np.ndarray:
    """Return the rows of at most MAX_CELLS training cells, the same for the same screen."""
    rows = np.flatnonzero((pairs.obs["role"] == "train").to_numpy())
    return rows if len(rows) <= MAX_CELLS else np.sort(np.random.default_rng(0).choice(rows, MAX_CELLS, replace=False))


def training_sample(pairs: Pairs) -> np.ndarray:
    """Return these cells, (cells, genes)."""
    return pairs.X[sampled_rows(pairs)].toarray().astype(np.float64)
