"""Cells that are there twice: copies, or one experiment under two names."""

import hashlib
import itertools

import numpy as np
from scipy import sparse
from scipy.special import gammaln

# Expected number of chance copies in a whole screen above which a cell is no evidence of a copy.
CHANCE_COPIES = 1e-3


def digests_of(counts: sparse.csr_matrix) -> np.ndarray:
    """Return 64 bits of every cell's counts, (cells,); genes ascend, and no stored count is 0."""
    genes, values = counts.indices.astype("<i4", copy=False), counts.data.astype("<f4", copy=False)
    digests = np.empty(counts.shape[0], np.uint64)
    for cell, (start, end) in enumerate(itertools.pairwise(counts.indptr)):
        content = hashlib.blake2b(genes[start:end], digest_size=8)
        content.update(values[start:end])
        digests[cell] = int.from_bytes(content.digest(), "little")
    return digests


def improbability_of(counts: sparse.csr_matrix) -> np.ndarray:
    """Return minus the log of the highest probability that another cell has the same counts, (cells,).

    UMI counts vary at least as Poisson counts sampled around a cell's rates (Sarkar & Stephens 2021). Whatever the
    rates, another cell has the count x > 0 of a gene with probability Poisson(x; x) ≤ 1/e at most. It has all counts of
    a cell with the product of these over its expressed genes at most.
    """
    x = np.arange(1.0, max(counts.data.max(initial=0.0), 1.0) + 1)
    of_count = np.append(0.0, x - x * np.log(x) + gammaln(x + 1))  # −log Poisson(x; x)
    of_value = of_count[counts.data.astype(np.int64)]
    return np.add.reduceat(np.append(of_value, 0.0), counts.indptr[:-1]) * (np.diff(counts.indptr) > 0)


def least_improbability(n: int, n_others: int) -> float:
    """Return from which improbability on equal cells of two groups are no chance copies, by the groups' sizes."""
    return float(np.log(max(n, 1) * max(n_others, 1) / CHANCE_COPIES))
