"""Latent spaces of expression: the interface of all, and the linear ones."""

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
LOWEST_SHARE = 0.3  # of a gene's mean: lower levels of a cell count as this
LEAST_LEFT = 0.05  # of a gene's level: no change leaves less


class Latent(Protocol):
    """Coordinates of cells, and the effects of latent shifts on their genes."""

    @property
    def n_dimensions(self) -> int:
        """Number of latent dimensions."""

    def encode(self, X: np.ndarray | sparse.csr_matrix) -> np.ndarray:
        """Return latent coordinates of log1p-normalized cells, (cells, dimensions).

        Training cells have about unit variance in every dimension.
        """

    def mean_change(self, shifts: np.ndarray) -> np.ndarray | None:
        """Return the mean effect of latent shifts on log1p expression, (genes,); None where counts decide it."""

    def log_fold_change(self, z: np.ndarray, shifts: np.ndarray) -> np.ndarray:
        """Return the log fold changes of the cells' rates by latent shifts, (cells, genes)."""

    def state(self) -> Mapping[str, Any]:
        """Return the arrays or tensors to be stored."""

    def change(self, z: np.ndarray, shifts: np.ndarray, total: np.ndarray) -> np.ndarray:
        """Return the effects of latent shifts on the cells' expected log1p expression, (cells, genes).

        `total` is the normalized size of each cell, (cells,).
        """


@dataclass(frozen=True)
class LatentSpace:
    """The linear latent space z = (x − mean) V / scale. Cells have about unit variance in every dimension.

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
        """Span the directions in which training cells vary and those of training effects.

        A principal component analysis of cells alone drops rare effects, above all the effect on the perturbed gene. So
        effects are appended to the centred cells, with a weight that gives both the same total variance. The leading
        singular vectors of the two together are the directions.
        """
        X = training_sample(pairs)
        mean = X.mean(axis=0)
        cells = (X - mean) / np.sqrt(len(X))
        values = effects.values.astype(np.float64)
        weight = np.sqrt((cells**2).sum() / max((values**2).sum(), 1e-12))
        stacked = np.vstack([cells, weight * values])
        n_dimensions = min(n_dimensions, stacked.shape[1], len(stacked) - 1)
        _, _, Vt = randomized_svd(stacked, n_dimensions, random_state=0, n_iter=7)
        return cls._scaled(X, mean, Vt.T)

    @classmethod
    def from_loadings(cls, path: Path, pairs: Pairs) -> "LatentSpace":
        """Take the directions from a table of external gene loadings: gene symbol first, one column per dimension.

        Genes without a row have loadings of zero. The directions are made orthonormal. Means and scales are those of
        training cells.

        Raises
        ------
        InputError
            If the table cannot be read, knows no measured gene, or has linearly dependent directions on these genes.
        """
        loadings = from_table(Path(path), pairs.genes).fillna(0.0).to_numpy(np.float64)
        basis, triangle = np.linalg.qr(loadings)
        if loadings.shape[1] > loadings.shape[0] or np.abs(np.diag(triangle)).min() < 1e-8 * np.abs(triangle).max():
            raise InputError(
                f"{path}: its {loadings.shape[1]} directions are linearly dependent on the {len(pairs.genes)} genes of "
                "this screen; leave some columns out."
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

    def change(self, z: np.ndarray, shifts: np.ndarray, total: np.ndarray) -> np.ndarray:
        """Return the effects of latent shifts on log1p expression, (cells, genes); they do not depend on z."""
        return self._linear(shifts)

    def _linear(self, shifts: np.ndarray) -> np.ndarray:
        return (shifts * self.scale) @ self.basis.T

    def mean_change(self, shifts: np.ndarray) -> np.ndarray:
        """Return the mean of `change`, (genes,)."""
        return self._linear(shifts.mean(axis=0, keepdims=True))[0]

    def log_fold_change(self, z: np.ndarray, shifts: np.ndarray) -> np.ndarray:
        """Return log((ℓ + (1 + ℓ) Δ) / ℓ), (cells, genes): ℓ are decoded levels, Δ the changes of log1p ℓ."""
        level = np.expm1(np.maximum(self.decode(z), 0.0))
        level = np.maximum(level, LOWEST_SHARE * np.maximum(level.mean(axis=0), 1e-3))
        changed = level + (1.0 + level) * self._linear(shifts)
        return np.log(np.maximum(changed, LEAST_LEFT * level) / level)

    def state(self) -> dict[str, np.ndarray]:
        """Return the arrays to be stored."""
        return {"mean": self.mean, "basis": self.basis, "scale": self.scale}


def sampled_rows(pairs: Pairs) -> np.ndarray:
    """Return rows of at most MAX_CELLS training cells, the same for the same screen."""
    rows = np.flatnonzero((pairs.obs["role"] == "train").to_numpy())
    return rows if len(rows) <= MAX_CELLS else np.sort(np.random.default_rng(0).choice(rows, MAX_CELLS, replace=False))


def training_sample(pairs: Pairs) -> np.ndarray:
    """Return the cells of `sampled_rows`, (cells, genes)."""
    return pairs.X[sampled_rows(pairs)].toarray().astype(np.float64)
