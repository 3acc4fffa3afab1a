"""Sums over cells: means, variances, and bulks of normalized counts with their sampling noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from perturbflow.evaluation.scored import BULK_TOTAL
from perturbflow.io.compiled import compiled


@compiled
def _add(total: np.ndarray, indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, group: np.ndarray) -> None:
    for cell in range(len(group)):
        for i in range(indptr[cell], indptr[cell + 1]):
            total[group[cell], indices[i]] += values[i]


@compiled
def _sums(indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, n_genes: int) -> np.ndarray:
    """Return Σ x and Σ x² over cells, (genes, 2)."""
    sums = np.zeros((n_genes, 2))
    for i in range(indptr[0], indptr[-1]):
        value = np.float64(values[i])
        sums[indices[i], 0] += value
        sums[indices[i], 1] += value * value
    return sums


@compiled
def _products(
    indptr: np.ndarray, indices: np.ndarray, values: np.ndarray, total: np.ndarray, n_genes: int
) -> np.ndarray:
    """Return Σ x·t over cells, t the total of the cell, (genes,)."""
    products = np.zeros(n_genes)
    for cell in range(len(total)):
        for i in range(indptr[cell], indptr[cell + 1]):
            products[indices[i]] += values[i] * total[cell]
    return products


def add_sums(total: np.ndarray, X: sparse.csr_matrix, group: np.ndarray) -> None:
    """Add the sum of the rows of X in each group to that group's row of `total`, (groups, genes)."""
    _add(total, X.indptr, X.indices, X.data, group)


@dataclass(frozen=True)
class Spread:
    """Sampling variance of a mean profile P, and its covariance with ΣP: both make the variance of a bulk."""

    variance: np.ndarray
    covariance: np.ndarray
    of_total: np.ndarray

    def __add__(self, other: Spread) -> Spread:
        return Spread(
            self.variance + other.variance, self.covariance + other.covariance, self.of_total + other.of_total
        )

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


def bulk(profile: np.ndarray) -> np.ndarray:
    """Return log(1 + 5·10⁴·P/ΣP) of a mean profile of normalized counts, (genes,)."""
    return np.log1p(BULK_TOTAL * profile / max(profile.sum(), 1e-12))


def _profile(sums: np.ndarray, total: np.ndarray, products: np.ndarray) -> tuple[np.ndarray, Spread]:
    n, (sums, squares) = len(total), sums.T
    mean = sums / n
    scale = 1 / (n * (n - 1)) if n > 1 else np.nan
    variance = (squares - n * mean**2) * scale
    covariance = (products - n * mean * total.mean()) * scale
    return mean, Spread(np.maximum(variance, 0.0), covariance, np.square(total - total.mean()).sum() * scale)


def mean_profile(counts: sparse.csr_matrix) -> tuple[np.ndarray, Spread]:
    """Return the mean of normalized counts over cells and its spread; NaN for a single cell."""
    total = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    arrays = (counts.indptr, counts.indices, counts.data)
    return _profile(_sums(*arrays, counts.shape[1]), total, _products(*arrays, total, counts.shape[1]))


def mean_and_variance(X: sparse.csr_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance over cells, (genes,); the variance of a single cell is NaN."""
    n = X.shape[0]
    sums, squares = _sums(X.indptr, X.indices, X.data, X.shape[1]).T
    mean = sums / n
    return mean, (np.maximum(squares - n * mean**2, 0.0) / (n - 1) if n > 1 else np.full(len(mean), np.nan))
