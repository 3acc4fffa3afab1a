"""Sums over cells: means, variances, and bulks of normalized counts with their sampling noise."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from perturbflow.evaluation.scored import BULK_TOTAL


def _sums(X: sparse.csc_matrix, values: np.ndarray) -> np.ndarray:
    """Return the sum per gene of values that belong to the stored entries of X, in float64, (genes,)."""
    filled = np.flatnonzero(np.diff(X.indptr))
    out = np.zeros(X.shape[1])
    if len(filled):
        out[filled] = np.add.reduceat(values, X.indptr[filled], dtype=np.float64)
    return out


def add_sums(total: np.ndarray, X: sparse.csr_matrix, group: np.ndarray) -> None:
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


def bulk(profile: np.ndarray) -> np.ndarray:
    """Return log(1 + 5·10⁴·P/ΣP) of a mean profile of normalized counts, (genes,)."""
    return np.log1p(BULK_TOTAL * profile / max(profile.sum(), 1e-12))


def mean_profile(counts: sparse.csc_matrix) -> tuple[np.ndarray, Spread]:
    """Return the mean of normalized counts over cells and its spread; NaN for a single cell."""
    n = counts.shape[0]
    total = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    mean = _sums(counts, counts.data) / n
    scale = 1 / (n * (n - 1)) if n > 1 else np.nan
    variance = (_sums(counts, np.square(counts.data, dtype=np.float64)) - n * mean**2) * scale
    covariance = (_sums(counts, counts.data * total[counts.indices]) - n * mean * total.mean()) * scale
    return mean, Spread(np.maximum(variance, 0.0), covariance, np.square(total - total.mean()).sum() * scale)


def mean_and_variance(X: sparse.csc_matrix) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance over cells, (genes,); the variance of a single cell is NaN."""
    n = X.shape[0]
    mean = _sums(X, X.data) / n
    squares = _sums(X, np.square(X.data, dtype=np.float64))
    return mean, (np.maximum(squares - n * mean**2, 0.0) / (n - 1) if n > 1 else np.full(len(mean), np.nan))
