"""Rank sums and quantiles of sparse cells, all genes at once.

Compiled loops go along each gene's nonzero values in order; zeros are counted. Positive float32 numbers have the order
of their bits: a nonzero value becomes the integer (gene · groups + group) · 2³² + bits. So one sort puts the values
of all genes and groups in order. Nothing is densified, and the counts are exact.
"""

import numpy as np
from scipy import sparse
from scipy.special import ndtr

from perturbflow.io.compiled import compiled

STEPS = 20  # to the next value, above which halving finds it sooner


@compiled
def _keys(indptr: np.ndarray, indices: np.ndarray, bits: np.ndarray, group: np.ndarray, n_groups: int) -> np.ndarray:
    """Return (gene · groups + group) · 2³² + bits of the stored values of a CSR matrix."""
    keys = np.empty(indptr[len(group)] - indptr[0], dtype=np.uint64)
    for cell in range(len(group)):
        for i in range(indptr[cell], indptr[cell + 1]):
            keys[i] = np.uint64(np.int64(indices[i]) * n_groups + group[cell]) << np.uint64(32) | np.uint64(bits[i])
    return keys


@compiled
def _segments(keys: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the bits of ascending keys, and where those of each of n genes and groups begin, (n + 1,)."""
    bits, start = np.empty(len(keys), dtype=np.uint32), np.zeros(n + 1, dtype=np.int64)
    for i in range(len(keys)):
        bits[i] = np.uint32(keys[i] & np.uint64(0xFFFFFFFF))
        start[np.int64(keys[i] >> np.uint64(32)) + 1] += 1
    for i in range(n):
        start[i + 1] += start[i]
    return bits, start


def _sorted_bits(X: sparse.csr_matrix, group: np.ndarray, n_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Return values by gene and group, ascending, as bits, and where those of gene · groups + group begin."""
    keys = _keys(X.indptr, X.indices, X.data.view(np.uint32), group, n_groups)
    keys.sort()
    return _segments(keys, X.shape[1] * n_groups)


@compiled
def _below(values: np.ndarray, first: int, last: int, value: int, is_near: bool) -> int:
    """Return the place of the first of the ascending values[first:last] that is not smaller than a value.

    With is_near, a step at a time is faster than halving.
    """
    if is_near:
        while first < last and values[first] < value:
            first += 1
        return first
    while first < last:
        middle = (first + last) // 2
        if values[middle] < value:
            first = middle + 1
        else:
            last = middle
    return first


@compiled
def _after(values: np.ndarray, first: int, last: int) -> int:
    """Return the place of the first of the ascending values[first:last] that differs from values[first]."""
    place = first + 1
    while place < last and values[place] == values[first]:
        place += 1
    return place


@compiled
def _ties(n: float) -> float:
    return n * (n * n - 1.0)


@compiled
def _rank_sums(
    values: np.ndarray, start: np.ndarray, n: np.ndarray, present: np.ndarray,
    sorted_values: np.ndarray, sorted_start: np.ndarray, size: np.ndarray, own_ties: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Return `SortedCells.rank_sum` of cells, n of each group that is present, whose values and starts these are."""
    n_genes, n_groups = (len(start) - 1) // len(n), len(size)
    z = np.zeros(n_genes)
    for gene in range(n_genes):
        excess = variance = 0.0
        for group in range(len(n)):
            here, there = gene * len(n) + group, gene * n_groups + present[group]
            place, last = sorted_start[there], sorted_start[there + 1]
            n_sorted = size[present[group]]
            zeros, sorted_zeros = n[group] - (start[here + 1] - start[here]), n_sorted - (last - place)
            # Of sorted cells: those with smaller values, zeros among them, and half of those with equal values.
            u = 0.5 * zeros * sorted_zeros
            ties = own_ties[there] + _ties(zeros + sorted_zeros)
            is_near = last - place < STEPS * (start[here + 1] - start[here])
            i = start[here]
            while i < start[here + 1]:
                after = _after(values, i, start[here + 1])
                times = after - i
                place = _below(sorted_values, place, last, values[i], is_near)
                others = 0
                if place < last and sorted_values[place] == values[i]:
                    others = _after(sorted_values, place, last) - place
                u += times * (sorted_zeros + place - sorted_start[there] + 0.5 * others)
                if others or times > 1:
                    ties += _ties(times + others) - _ties(others)
                i = after
            total, pairs = n[group] + n_sorted, float(n[group]) * n_sorted
            excess += u - pairs / 2
            variance += pairs / 12 * (total + 1 - ties / max(float(total) * (total - 1), 1.0))
        # Where all cells are alike, rounding leaves a variance of about 0.
        if variance > 1e-6:
            z[gene] = np.sign(excess) * max(abs(excess) - 0.5, 0.0) / np.sqrt(variance)
    return z


@compiled
def _covered(below: float, ties: float, n_sorted: float, low: float, high: float) -> float:
    """Return the share of the ranks of the ties, or of the place between values, that is between two quantiles."""
    begin, width = below / n_sorted, ties / n_sorted
    inside = min(begin + width, high) - max(begin, low)
    if ties > 0:
        return max(inside, 0.0) / width
    return 1.0 if inside >= 0 else 0.0


@compiled
def _coverage(
    indptr: np.ndarray, indices: np.ndarray, bits: np.ndarray, n_genes: int,
    sorted_values: np.ndarray, sorted_start: np.ndarray, n_sorted: int, low: float, high: float,
) -> np.ndarray:  # fmt: skip
    """Return `SortedCells.coverage` of the cells of a CSR matrix."""
    n = len(indptr) - 1
    zeros, share = np.full(n_genes, n), np.zeros(n_genes)
    for i in range(indptr[n]):
        gene = indices[i]
        first, last = sorted_start[gene], sorted_start[gene + 1]
        place = _below(sorted_values, first, last, bits[i], False)
        ties = 0
        if place < last and sorted_values[place] == bits[i]:
            ties = _after(sorted_values, place, last) - place
        share[gene] += _covered(n_sorted - last + place, ties, n_sorted, low, high)
        zeros[gene] -= 1
    for gene in range(n_genes):
        sorted_zeros = n_sorted - (sorted_start[gene + 1] - sorted_start[gene])
        share[gene] += zeros[gene] * _covered(0.0, sorted_zeros, n_sorted, low, high)
    return share / n


@compiled
def _ties_within(values: np.ndarray, start: np.ndarray) -> np.ndarray:
    """Return Σ t³ − t over the values that occur t times, of each gene and group."""
    ties = np.zeros(len(start) - 1)
    for here in range(len(ties)):
        i = start[here]
        while i < start[here + 1]:
            after = _after(values, i, start[here + 1])
            ties[here] += _ties(after - i)
            i = after
    return ties


class SortedCells:
    """Cells in groups, each gene's values in order.

    Parameters
    ----------
    X
        Without negative values or stored zeros, cells × genes.
    groups
        Rows of X in each group; a row may be in several.
    """

    def __init__(self, X: sparse.csr_matrix, groups: list[np.ndarray]) -> None:
        self.size = np.array([len(rows) for rows in groups])  # (groups,)
        stacked = X[np.concatenate(groups)]
        self._values, self._start = _sorted_bits(stacked, np.repeat(np.arange(len(groups)), self.size), len(groups))
        self._ties = _ties_within(self._values, self._start)

    def rank_sum(self, X: sparse.csr_matrix, group: np.ndarray) -> np.ndarray:
        """Return the standardized Wilcoxon rank sum of cells against the sorted cells, stratified by group, (genes,).

        Mann and Whitney's U, its mean and its variance, corrected for ties, are summed over the groups of the cells
        (van Elteren 1960, strata weighted alike). Half a step is taken off for continuity. With one group this is
        scipy.stats.mannwhitneyu(method="asymptotic").

        Parameters
        ----------
        X
            Cells to be tested, as those that were sorted.
        group
            Group of each cell.
        """
        present, place, n = np.unique(group, return_inverse=True, return_counts=True)
        values, start = _sorted_bits(X, place, len(present))
        return _rank_sums(values, start, n, present, self._values, self._start, self.size, self._ties)

    def coverage(self, X: sparse.csr_matrix, low: float = 0.05, high: float = 0.95) -> np.ndarray:
        """Return the share of cells between two quantiles of the sorted cells, which are one group, (genes,).

        A cell that ties with sorted ones has each of their ranks with equal probability (randomized probability
        integral transform, Smith 1985). This is the expectation: the sorted cells themselves have exactly
        high − low, whatever the ties.
        """
        return _coverage(
            X.indptr, X.indices, X.data.view(np.uint32), X.shape[1], self._values, self._start, self.size[0], low, high
        )


def p_value(z: np.ndarray) -> np.ndarray:
    """Return the two-sided p-value of a standard normal."""
    return 2 * ndtr(-np.abs(z))


def adjusted(p: np.ndarray) -> np.ndarray:
    """Return p-values adjusted for the false discovery rate (Benjamini and Hochberg 1995).

    scipy.stats has the same, but takes a second to import.
    """
    order = np.argsort(p)[::-1]
    q = np.empty(len(p))
    q[order] = np.minimum.accumulate(p[order] * (len(p) / np.arange(len(p), 0, -1)))
    return np.minimum(q, 1.0)
