"""A linear latent space of expression, fitted on training cells, and what it leaves out."""

from dataclasses import dataclass

import numpy as np
from scipy import sparse
from sklearn.utils.extmath import randomized_svd

from perturbflow.models.effects import Effects
from perturbflow.pairs import Pairs

MAX_CELLS = 20_000


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
        rows = np.flatnonzero((pairs.obs["role"] == "train").to_numpy())
        if len(rows) > MAX_CELLS:
            rows = np.sort(np.random.default_rng(0).choice(rows, MAX_CELLS, replace=False))
        X = pairs.X[rows].toarray().astype(np.float64)
        mean = X.mean(axis=0)
        cells = (X - mean) / np.sqrt(len(X))
        moved = effects.values.astype(np.float64)
        weight = np.sqrt((cells**2).sum() / max((moved**2).sum(), 1e-12))
        stacked = np.vstack([cells, weight * moved])
        n_dimensions = min(n_dimensions, stacked.shape[1], len(stacked) - 1)
        _, _, Vt = randomized_svd(stacked, n_dimensions, random_state=0, n_iter=7)
        scale = (cells @ Vt.T * np.sqrt(len(X))).std(axis=0)
        return cls(mean, Vt.T, np.maximum(scale, 1e-3))

    @property
    def n_dimensions(self) -> int:
        """Return the number of latent dimensions."""
        return self.basis.shape[1]

    def encode(self, X: np.ndarray | sparse.csr_matrix) -> np.ndarray:
        """Return latent coordinates, (cells, dimensions)."""
        return ((X @ self.basis - self.mean @ self.basis) / self.scale).astype(np.float32)

    def encode_effect(self, effects: np.ndarray) -> np.ndarray:
        """Return effects as latent differences, (effects, dimensions)."""
        return (effects @ self.basis / self.scale).astype(np.float32)

    def decode(self, z: np.ndarray) -> np.ndarray:
        """Return expression, (cells, genes)."""
        return (z * self.scale) @ self.basis.T + self.mean

    def state(self) -> dict[str, np.ndarray]:
        """Return the arrays to be stored."""
        return {"mean": self.mean, "basis": self.basis, "scale": self.scale}
