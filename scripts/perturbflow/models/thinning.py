"""Perturbed cells as counts: a control cell's own counts are thinned or added to until the mean is the predicted one.

An effect added to log-normalized expression makes no cell. Zeros become small numbers, the variance stays that of the
control, and negative values have to be cut off. Here the effect acts on counts.

1. One gene of one cell. Its count is Poisson given the cell's rate, k ~ Poisson(λ). Then, with a fold change f,

    k' ~ Binomial(k, f)                  for f ≤ 1, which is exactly Poisson(f λ),
    k' = k + Poisson((f − 1) λ̂)          for f > 1,  λ̂ = μ (k + θ) / (μ + θ).

   λ̂ is the posterior mean of the rate under a Gamma prior with mean μ and shape θ (Robbins 1956; in this field Grün,
   Kester & van Oudenaarden 2014 for the Gamma mixture). μ is the gene's level times the cell's size.

2. One cell. It keeps its size, and its own counts as far as they agree with the perturbation. It has the zeros and the
   noise of a measured cell.

3. All cells. The log fold change of a gene has two parts: each cell's own, and one that all cells have in common. The
   common part is found on the sampled counts themselves, such that their mean is the predicted one.

4. Last, single counts in a few cells settle the mean.
"""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from perturbflow.io.compiled import compiled

MAX_UNITS = 12  # the smallest count of a cell is assumed to be at most this
SMALLEST_RATE = 0.05  # of the target, where no start cell holds a count of a gene that is to appear
LOWEST, HIGHEST = -14.0, 9.0  # of the logarithm of a fold change
FIRST_STEP = 0.25
MAX_TRIALS = 20
MAX_ENUMERATED = 40.0  # larger means are sampled from the Gaussian limit
AVERAGED_AT_LEAST = 512  # cells over which the effect of fold changes on a mean is averaged
SAMPLED_AT_LEAST = 16  # cells that calibrate a gene; fewer cells are repeated
SETTLED_AMONG = 256  # cells whose counts settle a mean: there are pairs enough among them
MAX_SETTLED = 8  # pairs


@compiled
def _units(normalized: np.ndarray, units: np.ndarray) -> None:
    for cell in range(len(normalized)):
        smallest = np.inf
        for value in normalized[cell]:
            if 1e-6 < value < smallest:
                smallest = value
        units[cell] = smallest
        if smallest == np.inf:
            continue
        for divisor in range(1, MAX_UNITS + 1):
            largest = off = 0.0
            for value in normalized[cell]:
                if value > 1e-6:
                    count = value * (divisor / smallest)
                    largest, off = max(largest, count), max(off, abs(count - np.rint(count)))
            if off < 1e-3 * max(largest, 10.0) ** 0.5:
                units[cell] = smallest / divisor
                break


def counts_of(cells: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the counts behind log1p-normalized cells, (cells, genes), and the unit of every cell, see `unit_of`."""
    normalized = np.expm1(cells.astype(np.float64))
    unit = unit_of(normalized)
    return np.rint(normalized / unit[:, None]), unit


def unit_of(normalized: np.ndarray) -> np.ndarray:
    """Return the value of one count in every cell, (cells,): the greatest number that divides all its values.

    Parameters
    ----------
    normalized
        Counts of each cell times a factor of its own, (cells, genes).
    """
    unit = np.empty(len(normalized))
    _units(normalized.astype(np.float64, copy=False), unit)
    has_counts = np.isfinite(unit)
    return np.where(has_counts, unit, np.median(unit[has_counts]) if has_counts.any() else 1.0)


@compiled
def _gaussian_quantile(u: float) -> float:
    # Tukey's lambda approximation of Φ⁻¹, within 0.01.
    return (u**0.135 - (1.0 - u) ** 0.135) / 0.1975


@compiled
def _kept(k: int, p: float, u: float) -> int:
    """Return the u-quantile of Binomial(k, p)."""
    if p >= 1.0 or k == 0:
        return k
    if k * p * (1.0 - p) > MAX_ENUMERATED:
        return min(k, max(0, round(k * p + (k * p * (1.0 - p)) ** 0.5 * _gaussian_quantile(u))))
    odds = p / (1.0 - p)
    mass = (1.0 - p) ** k
    if mass <= 0.0:
        return min(k, max(0, round(k * p + (k * p * (1.0 - p)) ** 0.5 * _gaussian_quantile(u))))
    reached = mass
    n = 0
    while reached < u and n < k:
        mass *= odds * (k - n) / (n + 1)
        reached += mass
        n += 1
    return n


@compiled
def _added(mean: float, u: float) -> int:
    """Return the u-quantile of Poisson(mean)."""
    if mean > MAX_ENUMERATED:
        return max(0, round(mean + mean**0.5 * _gaussian_quantile(u)))
    mass = np.exp(-mean)
    reached = mass
    n = 0
    while reached < u and n < 1000:
        n += 1
        mass *= mean / n
        reached += mass
    return n


def _log1p_of(unit: np.ndarray) -> np.ndarray:
    """Return log1p of 0 to 15 counts in every cell, (16, cells): nearly all counts are among them."""
    return np.log1p(np.arange(16)[:, None] * unit)


@compiled(nogil=True)
def _sample(
    k: np.ndarray,
    unit: np.ndarray,
    log1p: np.ndarray,
    log_fold_change: np.ndarray,
    common: float,
    rate: np.ndarray,
    u: np.ndarray,
    out: np.ndarray,
) -> float:
    """Sample a gene in all cells at log fold changes common + log_fold_change, and return the mean of log1p.

    `log1p` has that of 0, 1, ... counts, (counts, cells), as `_log1p_of` returns it.
    """
    total = f = 0.0
    for i in range(len(k)):
        if i == 0 or log_fold_change[i] != log_fold_change[i - 1]:  # closed forms have one for all cells
            f = np.exp(min(HIGHEST, max(LOWEST, common + log_fold_change[i])))
        n = k[i]
        if f < 1.0:
            n = _kept(n, f, u[i])
        elif u[i] > 1.0 - (f - 1.0) * rate[i]:  # else Poisson's mass at 0, exp(−mean) ≥ 1 − mean, is not exceeded
            n += _added((f - 1.0) * rate[i], u[i])
        out[i] = (log1p[n, i] if n < len(log1p) else np.log1p(n * unit[i])) if n > 0 else 0.0
        total += out[i]
    return total / len(k)


@compiled(nogil=True)
def _calibrated(
    k: np.ndarray,
    unit: np.ndarray,
    log1p: np.ndarray,
    log_fold_change: np.ndarray,
    rate: np.ndarray,
    u: np.ndarray,
    target: np.ndarray,
    common: np.ndarray,
    out: np.ndarray,
) -> None:
    """Sample all genes, each at the common log fold change that meets its target.

    The mean rises with the common log fold change, in steps of one count in one cell. False position with the Illinois
    rule (Dowell & Jarratt 1971) runs on the sampled counts until the mean is within half a count of the target. `unit`
    is (cells,), `target` and `common` are (genes,), the others (genes, cells).
    """
    half_a_count = 0.5 * np.log1p(unit.min()) / len(unit)
    for gene in range(len(k)):
        if target[gene] <= 0.0:
            out[gene] = 0.0
            common[gene] = -np.inf
            continue
        low, high, step = 0.0, 0.0, FIRST_STEP
        at_low = at_high = (
            _sample(k[gene], unit, log1p, log_fold_change[gene], 0.0, rate[gene], u[gene], out[gene]) - target[gene]
        )
        if abs(at_low) <= half_a_count:
            continue
        while at_high < 0.0 and high < HIGHEST:
            low, at_low = high, at_high
            high += step
            step *= 2.0
            at_high = (
                _sample(k[gene], unit, log1p, log_fold_change[gene], high, rate[gene], u[gene], out[gene])
                - target[gene]
            )
        while at_low > 0.0 and low > LOWEST:
            high, at_high = low, at_low
            low -= step
            step *= 2.0
            at_low = (
                _sample(k[gene], unit, log1p, log_fold_change[gene], low, rate[gene], u[gene], out[gene]) - target[gene]
            )
        # The Illinois rule halves the weight of a bound that stays; the choice at the end needs the true distances.
        weight_low, weight_high = at_low, at_high
        for _ in range(MAX_TRIALS):
            if min(-at_low, at_high) <= half_a_count or high - low < 1e-6:
                break
            middle = (low * weight_high - high * weight_low) / (weight_high - weight_low)
            at_middle = (
                _sample(k[gene], unit, log1p, log_fold_change[gene], middle, rate[gene], u[gene], out[gene])
                - target[gene]
            )
            if at_middle < 0.0:
                low, at_low, weight_low = middle, at_middle, at_middle
                weight_high *= 0.5
            else:
                high, at_high, weight_high = middle, at_middle, at_middle
                weight_low *= 0.5
        common[gene] = low if abs(at_low) < abs(at_high) else high
        _sample(k[gene], unit, log1p, log_fold_change[gene], common[gene], rate[gene], u[gene], out[gene])


@compiled
def _nearest_step(up: np.ndarray, down: np.ndarray, missing: float) -> tuple[int, int]:
    """Return a place in `up` and one in `down`, -1 for none: adding one value and subtracting the other.

    Of all such choices this one changes the sum by the amount nearest to `missing`.
    """
    by_up, by_down = np.argsort(up), np.argsort(down)
    best, first, second = abs(missing), -1, -1
    for i in by_up:
        if abs(missing - up[i]) < best:
            best, first, second = abs(missing - up[i]), i, -1
    j = 0
    for i in by_up:  # the best partner rises with it
        while j < len(down) and down[by_down[j]] < up[i] - missing:
            j += 1
        for k in (j - 1, j):
            if 0 <= k < len(down) and by_down[k] != i and np.isfinite(down[by_down[k]]):
                off = abs(missing - up[i] + down[by_down[k]])
                if off < best:
                    best, first, second = off, i, by_down[k]
    for j in by_down:
        if np.isfinite(down[j]) and abs(missing + down[j]) < best:
            best, first, second = abs(missing + down[j]), -1, j
    return first, second


@compiled(nogil=True)
def _settle(unit: np.ndarray, target: np.ndarray, out: np.ndarray) -> None:
    """Move the mean of every gene as near to its target as counts can: one cell gains a count, another loses one.

    This is done at most MAX_SETTLED times. Cells differ in size, so the same count changes their expression by slightly
    different amounts. Among many pairs of cells, one pair changes the mean by almost exactly the missing amount.
    """
    size = unit[:SETTLED_AMONG]
    for gene in range(len(out)):
        some = out[gene, :SETTLED_AMONG]
        for _ in range(MAX_SETTLED if target[gene] > 0.0 else 0):
            missing = target[gene] * len(unit) - out[gene].sum()
            if abs(missing) < 1e-6 * len(unit):
                break
            n = np.rint(np.expm1(some) / size)
            more, fewer = np.log1p((n + 1.0) * size), np.log1p(np.maximum(n - 1.0, 0.0) * size)
            first, second = _nearest_step(more - some, np.where(n > 0, some - fewer, np.inf), missing)
            if first >= 0:
                some[first] = more[first]
            if second >= 0:
                some[second] = fewer[second]
            if first < 0 and second < 0:
                break


@dataclass(frozen=True)
class Counted:
    """Cells as counts.

    Attributes
    ----------
    k
        Counts, (genes, cells).
    unit
        Value of one count, (cells,).
    """

    k: np.ndarray
    unit: np.ndarray

    @classmethod
    def of(cls, cells: np.ndarray) -> "Counted":
        """Count log1p-normalized cells, (cells, genes)."""
        k, unit = counts_of(cells)
        return cls(np.ascontiguousarray(k.astype(np.int64).T), unit)


@dataclass(frozen=True)
class Levels:
    """The Gamma prior of every gene's rate, from a population of cells.

    Attributes
    ----------
    level
        Counts of a cell of size 1, (genes,).
    shape
        θ, (genes,).
    """

    level: np.ndarray
    shape: np.ndarray

    @classmethod
    def of(cls, cells: Counted) -> "Levels":
        """Estimate it from a population."""
        size = 1.0 / cells.unit
        level = cells.k.sum(axis=1) / size.sum()
        return cls(level, _shape(cells.k, level[:, None] * size))

    def rates(self, cells: Counted) -> np.ndarray:
        """Return λ̂, (genes, cells)."""
        expected = self.level[:, None] / cells.unit
        shape = self.shape[:, None]
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(expected > 0, expected * (cells.k + shape) / (expected + shape), 0.0)


@dataclass(frozen=True)
class CommonChange:
    """The change of a population by a perturbation, in a form that applies to single cells.

    Attributes
    ----------
    levels
        Prior of the population.
    common
        Log fold change that all cells have in common; each cell adds its own, (genes,).
    arriving
        Rate per cell size of genes that no cell of the population expresses but the perturbed cells shall, (genes,).
    """

    levels: Levels
    common: np.ndarray
    arriving: np.ndarray


def _arriving(levels: Levels, target: np.ndarray) -> np.ndarray:
    return np.where((levels.level == 0) & (target > 0), SMALLEST_RATE * np.expm1(np.maximum(target, 0.0)), 0.0)


def _in_parts(n_genes: int, work: Callable[[slice], None]) -> None:
    """Do work on ranges of genes, in parallel threads."""
    torch = sys.modules.get("torch")  # a network uses its own number of threads; a closed form uses one
    parts = [part for part in np.array_split(np.arange(n_genes), torch.get_num_threads() if torch else 1) if len(part)]
    with ThreadPoolExecutor(len(parts)) as threads:
        list(threads.map(lambda part: work(slice(part[0], part[-1] + 1)), parts))


def _met(
    cells: np.ndarray, mean_change: np.ndarray, log_fold_change: np.ndarray | None, rng: np.random.Generator
) -> tuple[np.ndarray, CommonChange, np.ndarray]:
    """Return cells with the wanted mean, up to less than a count, (genes, at least so many cells), and their change.

    Last comes the value of one count in every start cell, (cells,).
    """
    repeats = -(-SAMPLED_AT_LEAST // len(cells))
    counted = Counted.of(cells)
    levels = Levels.of(counted)
    target = cells.mean(axis=0, dtype=np.float64) + mean_change
    arriving = _arriving(levels, target)
    k, unit, rate = counted.k, counted.unit, levels.rates(counted) + arriving[:, None] / counted.unit
    own = np.zeros(k.shape)
    if log_fold_change is not None:
        own = np.ascontiguousarray(log_fold_change.T, dtype=np.float64)
    if repeats > 1:
        k, rate, own = (np.tile(table, repeats) for table in (k, rate, own))
        unit = np.tile(unit, repeats)
    u, log1p = rng.random(k.shape), _log1p_of(unit)
    out, common = np.empty(k.shape), np.zeros(len(k))

    def calibrate(genes: slice) -> None:
        of_genes = (table[genes] for table in (own, rate, u, target, common, out))
        _calibrated(k[genes], unit, log1p, *of_genes)

    _in_parts(len(k), calibrate)
    return out, CommonChange(levels, common, arriving), counted.unit


def with_mean_effect(
    cells: np.ndarray, mean_change: np.ndarray, log_fold_change: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
    """Return perturbed cells, (cells, genes), log1p-normalized: counts, with the size of their start cells.

    Their mean is the wanted one as nearly as counts can have it.

    Parameters
    ----------
    cells
        Log1p-normalized start cells, (cells, genes).
    mean_change
        Wanted change of the mean over cells, (genes,).
    log_fold_change
        Each cell's own, (cells, genes), up to a constant per gene; None: the same in all cells.
    """
    out, _, unit = _met(cells, mean_change, log_fold_change, rng)
    out = np.ascontiguousarray(out[:, : len(cells)])
    target = cells.mean(axis=0, dtype=np.float64) + mean_change
    _in_parts(len(out), lambda genes: _settle(unit, target[genes], out[genes]))
    return np.ascontiguousarray(out.T, dtype=np.float32)


def common_change(
    cells: np.ndarray, mean_change: np.ndarray, log_fold_change: np.ndarray | None, rng: np.random.Generator
) -> CommonChange:
    """Return the change of a population that gives its mean this change; parameters as of `with_mean_effect`."""
    return _met(cells, mean_change, log_fold_change, rng)[1]


def applied(
    cells: np.ndarray, change: CommonChange, log_fold_change: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Return perturbed cells, (cells, genes), log1p-normalized. No cell's outcome depends on the other cells.

    Parameters
    ----------
    cells
        Log1p-normalized start cells, (cells, genes); the same cell may occur many times.
    change
        Of the population.
    log_fold_change
        Each cell's own, (cells, genes).
    """
    counted = Counted.of(cells)
    rate = change.levels.rates(counted) + change.arriving[:, None] / counted.unit
    own = np.ascontiguousarray(log_fold_change.T, dtype=np.float64)
    u, out, log1p = rng.random(counted.k.shape), np.empty(counted.k.shape), _log1p_of(counted.unit)

    def sample(genes: slice) -> None:
        for gene in range(genes.start, genes.stop):
            of_gene = (rate[gene], u[gene], out[gene])
            _sample(counted.k[gene], counted.unit, log1p, own[gene], change.common[gene], *of_gene)

    _in_parts(len(out), sample)
    return np.ascontiguousarray(out.T, dtype=np.float32)


def mean_effect_of(cells: np.ndarray, log_fold_change: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the effect of these fold changes on the mean of log1p-normalized cells, (genes,), over enough samples."""
    repeats = -(-AVERAGED_AT_LEAST // len(cells))
    levels = Levels.of(Counted.of(cells))
    nothing_common = CommonChange(levels, np.zeros(cells.shape[1]), np.zeros(cells.shape[1]))
    sampled = applied(np.tile(cells, (repeats, 1)), nothing_common, np.tile(log_fold_change, (repeats, 1)), rng)
    return sampled.mean(axis=0, dtype=np.float64) - cells.mean(axis=0, dtype=np.float64)


def _shape(k: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return θ of every gene by moments, (genes,): the variance of counts is μ + μ²/θ; 0.1 to 1,000."""
    excess = ((k - expected) ** 2 - expected).sum(axis=1)
    squares = (expected**2).sum(axis=1)
    return np.clip(np.divide(squares, excess, out=np.full(len(k), 1000.0), where=excess > 0), 0.1, 1000.0)
