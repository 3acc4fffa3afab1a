"""Rank sums and quantiles of sparse cells, all genes at once.

Positive float32 numbers are ordered as their bits are. A cell's nonzero value becomes the integer
(gene · groups + group) · 2³² + bits, so that one sort puts every gene's values in order and one search places the values of
other cells among them; zeros are counted. Nothing is densified, and the counts are exact.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy import sparse
from scipy.special import ndtr

VALUES_AT_ONCE = 4_000_000  # about 60 bytes each while they are ranked
_HALF = np.uint64(32)


def _runs(X: sparse.csc_matrix, group: np.ndarray, n_groups: int, genes: slice) -> tuple[np.ndarray, np.ndarray]:
    """Return the distinct keys of some genes' nonzero values, in order, and how often each occurs."""
    first, last = X.indptr[genes.start], X.indptr[genes.stop]
    gene = np.repeat(np.arange(genes.start, genes.stop), np.diff(X.indptr[genes.start : genes.stop + 1]))
    keys = (gene * n_groups + group[X.indices[first:last]]).astype(np.uint64) << _HALF
    keys |= X.data[first:last].view(np.uint32)
    keys.sort()
    is_first = np.ones(len(keys), dtype=bool)
    np.not_equal(keys[1:], keys[:-1], out=is_first[1:])
    position = np.flatnonzero(is_first)
    return keys[position], np.diff(position, append=len(keys))


def _gene_blocks(X: sparse.csc_matrix) -> Iterator[slice]:
    """Yield ranges of genes that hold about VALUES_AT_ONCE values each."""
    n_blocks = max(1, -(-X.nnz // VALUES_AT_ONCE))
    edges = np.searchsorted(X.indptr, np.linspace(0, X.nnz, n_blocks + 1)[1:-1])
    edges = np.unique([0, *edges, X.shape[1]])
    yield from (slice(int(a), int(b)) for a, b in pairwise(edges))


def _ties(n: np.ndarray) -> np.ndarray:
    n = n.astype(np.float64)
    return n * (n * n - 1)


@dataclass(frozen=True)
class _Places:
    """Where the distinct nonzero values of some cells stand among the sorted ones, one entry per value, and the zeros.

    Attributes
    ----------
    group
        gene · groups + group, from 0 for the first of these genes.
    times
        How often the value occurs in the cells.
    below
        Nonzero values of sorted cells, of all genes and groups before it and of its own, that are less.
    ties
        Sorted cells of its group with this value.
    zeros, nonzero
        Cells without and with expression, (genes · groups,).
    """

    group: np.ndarray
    times: np.ndarray
    below: np.ndarray
    ties: np.ndarray
    zeros: np.ndarray
    nonzero: np.ndarray


class SortedCells:
    """Cells in groups, each gene's values in order.

    Parameters
    ----------
    X
        float32 without negative values or stored zeros, cells × genes.
    groups
        Rows of X in each group; a row may be in several.
    """

    def __init__(self, X: sparse.csr_matrix, groups: list[np.ndarray]) -> None:
        self.n_groups, self.n_genes = len(groups), X.shape[1]
        self.size = np.array([len(rows) for rows in groups])  # (groups,)
        stacked = X[np.concatenate(groups)].tocsc()
        group = np.repeat(np.arange(self.n_groups), self.size)
        runs = [_runs(stacked, group, self.n_groups, genes) for genes in _gene_blocks(stacked)]
        values, times = (np.concatenate(parts) for parts in zip(*runs, strict=True))
        of_value = (values >> _HALF).astype(np.int64)
        n = self.n_genes * self.n_groups
        nonzero = np.bincount(of_value, times, minlength=n)
        self._values = np.append(values, np.iinfo(np.uint64).max)
        self._times = np.append(times, 0)
        self._before = np.concatenate([[0.0], np.cumsum(times)])
        self._first = np.cumsum(nonzero) - nonzero
        self._zeros = np.tile(self.size, self.n_genes) - nonzero  # (genes · groups,)
        self._ties = np.bincount(of_value, _ties(times), minlength=n)

    def _places(self, X: sparse.csc_matrix, group: np.ndarray, genes: slice) -> _Places:
        values, times = _runs(X, group, self.n_groups, genes)
        of_value = (values >> _HALF).astype(np.int64) - genes.start * self.n_groups
        at = np.searchsorted(self._values, values)
        ties = np.where(self._values[at] == values, self._times[at], 0)
        n = np.bincount(group, minlength=self.n_groups)
        nonzero = np.bincount(of_value, times, minlength=(genes.stop - genes.start) * self.n_groups)
        return _Places(of_value, times, self._before[at], ties, np.tile(n, genes.stop - genes.start) - nonzero, nonzero)

    def rank_sum(self, X: sparse.csc_matrix, group: np.ndarray) -> np.ndarray:
        """Return the standardized Wilcoxon rank sum of cells against the sorted cells, stratified by group, (genes,).

        Mann and Whitney's U, its mean and its variance, corrected for ties, are summed over the groups that the cells are in
        (van Elteren 1960, strata weighted alike); half a step is taken off for continuity. With one group this is
        scipy.stats.mannwhitneyu(method="asymptotic").

        Parameters
        ----------
        X
            Cells to be tested, as those that were sorted.
        group
            Group of each cell.
        """
        n = np.bincount(group, minlength=self.n_groups)
        is_in = n > 0
        total, pairs = n + self.size, n * self.size  # (groups,)
        z = np.zeros(self.n_genes)
        for genes in _gene_blocks(X):
            here = slice(genes.start * self.n_groups, genes.stop * self.n_groups)
            found = self._places(X, group, genes)
            zeros = self._zeros[here]
            # Of sorted cells: those with less, zeros among them, and half of those with as much.
            u = np.bincount(found.group, found.times * found.below, minlength=len(zeros))
            u = u + found.nonzero * (zeros - self._first[here]) + 0.5 * found.zeros * zeros
            ties = self._ties[here] + _ties(found.zeros + zeros)
            tied = np.flatnonzero((found.ties > 0) | (found.times > 1))
            if len(tied):
                of_value, times, others = found.group[tied], found.times[tied], found.ties[tied]
                u += 0.5 * np.bincount(of_value, times * others, minlength=len(zeros))
                ties += np.bincount(of_value, _ties(times + others) - _ties(others), minlength=len(zeros))
            variance = pairs / 12 * (total + 1 - ties.reshape(-1, self.n_groups) / np.maximum(total * (total - 1), 1))
            variance = variance[:, is_in].sum(axis=1)
            excess = (u.reshape(-1, self.n_groups) - pairs / 2)[:, is_in].sum(axis=1)
            excess = np.sign(excess) * np.maximum(np.abs(excess) - 0.5, 0.0)
            # Where all cells are alike, rounding leaves a variance of about 0.
            z[genes] = np.divide(excess, np.sqrt(np.maximum(variance, 0.0)), out=np.zeros(len(excess)), where=variance > 1e-6)
        return z

    def coverage(self, X: sparse.csc_matrix, low: float = 0.05, high: float = 0.95) -> np.ndarray:
        """Return the share of cells between two quantiles of the sorted cells, which are one group, (genes,).

        A cell that ties with sorted ones stands on each of their ranks with equal probability (randomized probability integral
        transform, Smith 1985), in expectation: the sorted cells themselves are covered by exactly high − low, whatever the ties.
        """
        n_sorted, n = self.size[0], X.shape[0]

        def covered(below: np.ndarray, ties: np.ndarray) -> np.ndarray:
            start, width = below / n_sorted, ties / n_sorted
            inside = np.minimum(start + width, high) - np.maximum(start, low)
            return np.where(ties > 0, np.maximum(inside, 0.0) / np.maximum(width, 1e-300), inside >= 0)

        share = np.zeros(self.n_genes)
        for genes in _gene_blocks(X):
            found = self._places(X, np.zeros(n, dtype=np.int64), genes)
            zeros = self._zeros[genes]
            below = found.below + (zeros - self._first[genes])[found.group]
            inside = np.bincount(found.group, found.times * covered(below, found.ties), minlength=len(zeros))
            share[genes] = (inside + found.zeros * covered(np.zeros(len(zeros)), zeros)) / n
        return share


def p_value(z: np.ndarray) -> np.ndarray:
    """Return the two-sided p-value of a standard normal."""
    return 2 * ndtr(-np.abs(z))


def adjusted(p: np.ndarray) -> np.ndarray:
    """Return p-values adjusted for the false discovery rate (Benjamini and Hochberg 1995); scipy.stats takes a second to import."""
    order = np.argsort(p)[::-1]
    q = np.empty(len(p))
    q[order] = np.minimum.accumulate(p[order] * (len(p) / np.arange(len(p), 0, -1)))
    return np.minimum(q, 1.0)
