"""The bootstrap: how much a mean would vary with other perturbations of the same kind, and other seeds.

Perturbations are sampled with replacement, and so are seeds where there are several. A model keeps its score for a
sampled perturbation and seed. All models get the same samples, so that differences between them are paired.

Intervals are expanded percentile intervals (Hesterberg 2015, Am. Stat. 69, 371, section 5.3). The percentiles are
moved out as far as Student's t and the n of the plug-in variance ask for. Without that, intervals over few
perturbations are too narrow.

Scores in several contexts are sampled by contexts and by perturbations, each with replacement: a score is in a resample
as often as its context times as often as its perturbation (the pigeonhole bootstrap; Owen 2007, Ann. Appl. Stat. 1,
386). For the same perturbation in several contexts is not several perturbations, and one context is one draw.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from scipy.stats import beta, norm, t

N_RESAMPLES = 5_000
RESAMPLES_AT_ONCE = 500
CONFIDENCE = 0.95

# Fewer show nothing at 95 %: five coins fall on one side by chance in 1 of 16 throws, six in 1 of 32.
MIN_PERTURBATIONS = 6
# Intervals over fewer contexts are too narrow: workflow_tests/benchmarks/intervals_over_contexts.py.
MIN_CONTEXTS = 4


class Estimates(NamedTuple):
    """N means with their intervals, each (N,); NaN bounds for fewer than two perturbations."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray
    n: np.ndarray  # perturbations

    @property
    def sign(self) -> np.ndarray:
        """1 where the interval is above zero, -1 below; 0 where it holds zero, or the perturbations are too few."""
        are_enough = self.n >= MIN_PERTURBATIONS
        return np.where(are_enough & (self.low > 0), 1, np.where(are_enough & (self.high < 0), -1, 0))


@lru_cache(maxsize=4)
def _times_sampled(n: int, seed: int) -> np.ndarray:
    """Return how often each of n is in every resample, (resamples, n), in the narrowest type: n may be thousands."""
    rng, times = np.random.default_rng(seed), np.empty((N_RESAMPLES, n), np.min_scalar_type(n))
    for part in _parts():
        sampled = rng.integers(0, n, (len(times[part]), n))
        places = sampled + n * np.arange(len(sampled))[:, None]
        times[part] = np.bincount(places.ravel(), minlength=sampled.size).reshape(sampled.shape)
    return times


def _parts() -> Iterator[slice]:
    """Yield all resamples, RESAMPLES_AT_ONCE at a time."""
    for first in range(0, N_RESAMPLES, RESAMPLES_AT_ONCE):
        yield slice(first, min(first + RESAMPLES_AT_ONCE, N_RESAMPLES))


def mean(values: np.ndarray) -> np.ndarray:
    """Return the means of the defined values over seeds and perturbations, (N, S, P) → (N,); NaN without any."""
    n = (~np.isnan(values)).sum(axis=(1, 2))
    return np.divide(np.nansum(values, axis=(1, 2)), n, out=np.full(len(values), np.nan), where=n > 0)


def n_perturbations(values: np.ndarray) -> np.ndarray:
    """Return the number of perturbations with a defined value, (N, S, P) → (N,)."""
    return (~np.isnan(values)).any(axis=1).sum(axis=1)


def resampled_means(values: np.ndarray) -> np.ndarray:
    """Return the means of all resamples.

    Rows that are defined for the same perturbations get the same samples. Undefined values are never sampled.

    Parameters
    ----------
    values
        N rows × S seeds × P perturbations.

    Returns
    -------
    (N, resamples); NaN for rows with fewer than two perturbations.
    """
    n_rows, n_seeds, _ = values.shape
    defined = ~np.isnan(values)
    patterns, pattern_of = np.unique(
        np.concatenate([defined.any(axis=2), defined.any(axis=1)], axis=1), axis=0, return_inverse=True
    )
    means = np.full((n_rows, N_RESAMPLES), np.nan)
    for i, pattern in enumerate(patterns):
        seeds, columns = np.flatnonzero(pattern[:n_seeds]), np.flatnonzero(pattern[n_seeds:])
        if len(columns) < 2:
            continue
        rows = np.flatnonzero(pattern_of.ravel() == i)
        block, is_defined = (array[np.ix_(rows, seeds, columns)] for array in (values, defined))
        n = len(seeds) * len(columns) if is_defined.all() else _weighted_sums(is_defined.astype(float))
        total = _weighted_sums(np.where(is_defined, block, 0.0))
        means[rows] = np.divide(total, n, out=np.full(total.shape, np.nan), where=np.asarray(n) > 0)
    return means


def mean_over_contexts(values: np.ndarray) -> np.ndarray:
    """Return the means over contexts of the means over seeds and perturbations, (C, N, S, P) → (N,)."""
    of_context = np.stack([mean(of) for of in values])
    return mean(of_context.T[:, None])


def n_contexts(values: np.ndarray) -> np.ndarray:
    """Return the number of contexts with a defined value, (C, N, S, P) → (N,)."""
    return (~np.isnan(values)).any(axis=(2, 3)).sum(axis=0)


def estimate_over_contexts(values: np.ndarray) -> Estimates:
    """Return means over contexts with their intervals, (C, N, S, P) → N rows.

    Every context counts the same. Contexts, perturbations and seeds are resampled, each on its own.
    """
    times = _times_sampled(len(values), seed=2)
    total, weight = np.zeros((2, values.shape[1], N_RESAMPLES))
    for of_context, drawn in zip(values, times.T, strict=True):
        is_defined = ~np.isnan(of_context)
        n = _weighted_sums(is_defined.astype(float))
        total += drawn * np.divide(_weighted_sums(np.nan_to_num(of_context)), n, out=np.zeros(n.shape), where=n > 0)
        weight += drawn * (n > 0)
    resampled = np.divide(total, weight, out=np.full(total.shape, np.nan), where=weight > 0)
    n_perturbed = (~np.isnan(values)).any(axis=(0, 2)).sum(axis=1)
    least = np.minimum(n_contexts(values), n_perturbed)  # it decides how far percentiles are moved out
    return Estimates(mean_over_contexts(values), *interval(resampled, least), n_perturbed)


def _weighted_sums(block: np.ndarray) -> np.ndarray:
    """Return the sums of every resample, (N, S, P) → (N, resamples)."""
    n_rows, n_seeds, n_columns = block.shape
    perturbations, total = _times_sampled(n_columns, seed=0), np.zeros((n_rows, N_RESAMPLES))
    seeds = _times_sampled(n_seeds, seed=1) if n_seeds > 1 else np.ones((N_RESAMPLES, 1))
    for part in _parts():
        times = perturbations[part].T.astype(float)
        for s in range(n_seeds):
            total[:, part] += (block[:, s] @ times) * seeds[part, s]
    return total


def interval(resampled: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return both bounds of every row.

    Parameters
    ----------
    resampled
        (N, resamples).
    n
        Number of perturbations behind each row, (N,).
    """
    bounds = np.full((2, len(resampled)), np.nan)
    quantile = np.nanquantile if np.isnan(resampled[n > 1]).any() else np.quantile  # the former takes many times longer
    for size in np.unique(n[n > 1]):
        tail = norm.cdf(-np.sqrt(size / (size - 1)) * t.ppf((1 + CONFIDENCE) / 2, size - 1))
        bounds[:, n == size] = quantile(resampled[n == size], [tail, 1 - tail], axis=1)
    return bounds[0], bounds[1]


def estimate(values: np.ndarray) -> Estimates:
    """Return means over seeds and perturbations with their intervals, (N, S, P) → N rows."""
    n = n_perturbations(values)
    return Estimates(mean(values), *interval(resampled_means(values), n), n)


def mean_with_interval(values: Sequence[float]) -> dict[str, float]:
    """Return the mean over perturbations and its 95 % interval, as warranty.json has them."""
    found = estimate(np.array(values, dtype=float)[None, None])
    return {"mean": float(found.mean[0]), "low": float(found.low[0]), "high": float(found.high[0])}


def share_interval(share: np.ndarray, n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the exact interval of a share of n perturbations (Clopper & Pearson 1934), ties having counted half.

    The bootstrap has no spread where all perturbations agree, however few they are.
    """
    tail = (1 - CONFIDENCE) / 2
    k = share * n
    low, high = beta.ppf(tail, k, n - k + 1), beta.ppf(1 - tail, k + 1, n - k)
    return np.where(k > 0, low, 0.0), np.where(k < n, high, 1.0)
