"""Perturbed cells as counts: a control cell's own counts thinned or added to, until the mean is the one that is predicted.

A log-normalized control cell plus a shift is no cell: its zeros become small numbers, its variance stays that of the control, and what
falls below zero has to be cut off. Here the shift acts on counts. If a gene's count is Poisson given the cell's rate, k ~ Poisson(λ), then

    k' ~ Binomial(k, f)                  for a fold change f ≤ 1 is exactly Poisson(f λ),
    k' = k + Poisson((f − 1) λ̂)          for f > 1, λ̂ = μ (k + θ) / (μ + θ)

with λ̂ the posterior mean of a Gamma prior of mean μ (the gene's level times the cell's size) and shape θ (Robbins 1956; in this field
Grün, Kester & van Oudenaarden 2014 for the Gamma mixture). So a cell keeps its own counts as far as they agree with the perturbation, its
size, and the zeros and the noise of a measured cell. The fold change of a gene has one part for all cells, found on the very numbers that are
drawn so that their mean is the predicted one, and a part of each cell. Last counts in a few cells settle the mean.
"""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from perturbflow.io.compiled import compiled

MAX_UNITS = 12  # the smallest count of a cell is looked for up to this
SMALLEST_RATE = 0.05  # of the target, where no start cell holds a count of a gene that is to appear
LOWEST, HIGHEST = -14.0, 9.0  # of the logarithm of a fold change
FIRST_STEP = 0.25
MAX_TRIALS = 20
MAX_ENUMERATED = 40.0  # larger means are drawn from the Gaussian limit
AVERAGED_AT_LEAST = 512  # cells that tell what fold changes do to a mean
DRAWN_AT_LEAST = 16  # cells that calibrate a gene; of fewer, each counts several times
SETTLED_AMONG = 256  # cells whose counts settle a mean: their pairs are enough
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
    """Return the counts behind log1p-normalized cells, (cells, genes), and what one of them is worth in every cell, (cells,)."""
    normalized = np.expm1(cells.astype(np.float64))
    unit = unit_of(normalized)
    return np.rint(normalized / unit[:, None]), unit


def unit_of(normalized: np.ndarray) -> np.ndarray:
    """Return what one count is worth in every cell, (cells,): the greatest number of which all values are multiples.

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


@compiled(nogil=True)
def _draw(
    k: np.ndarray, unit: np.ndarray, fold: np.ndarray, level: float, rate: np.ndarray, u: np.ndarray, out: np.ndarray
) -> float:
    """Draw a gene in all cells at log fold changes level + fold, and return the mean of log1p."""
    total = 0.0
    for i in range(len(k)):
        f = np.exp(min(HIGHEST, max(LOWEST, level + fold[i])))
        n = k[i]
        if f < 1.0:
            n = _kept(n, f, u[i])
        elif rate[i] > 0.0:
            n += _added((f - 1.0) * rate[i], u[i])
        out[i] = np.log1p(n * unit[i]) if n > 0 else 0.0
        total += out[i]
    return total / len(k)


@compiled(nogil=True)
def _calibrated(
    k: np.ndarray,
    unit: np.ndarray,
    fold: np.ndarray,
    rate: np.ndarray,
    u: np.ndarray,
    target: np.ndarray,
    common: np.ndarray,
    out: np.ndarray,
) -> None:
    """Draw all genes, each at the common fold change that meets its target; (genes, cells) throughout, but for target and common, (genes,).

    The mean rises with the common fold change, in steps of one count in one cell: false position with the Illinois rule (Dowell & Jarratt
    1971) on the numbers that are drawn, until the mean is within half a count.
    """
    half_a_count = 0.5 * np.log1p(unit.min()) / len(unit)
    for gene in range(len(k)):
        if target[gene] <= 0.0:
            out[gene] = 0.0
            common[gene] = -np.inf
            continue
        low, high, step = 0.0, 0.0, FIRST_STEP
        at_low = at_high = _draw(k[gene], unit, fold[gene], 0.0, rate[gene], u[gene], out[gene]) - target[gene]
        if abs(at_low) <= half_a_count:
            continue
        while at_high < 0.0 and high < HIGHEST:
            low, at_low = high, at_high
            high += step
            step *= 2.0
            at_high = _draw(k[gene], unit, fold[gene], high, rate[gene], u[gene], out[gene]) - target[gene]
        while at_low > 0.0 and low > LOWEST:
            high, at_high = low, at_low
            low -= step
            step *= 2.0
            at_low = _draw(k[gene], unit, fold[gene], low, rate[gene], u[gene], out[gene]) - target[gene]
        # The bounds' own distances guide the search; their halves, where one bound stays, do not say which is nearer.
        weight_low, weight_high = at_low, at_high
        for _ in range(MAX_TRIALS):
            if min(-at_low, at_high) <= half_a_count or high - low < 1e-6:
                break
            middle = (low * weight_high - high * weight_low) / (weight_high - weight_low)
            at_middle = _draw(k[gene], unit, fold[gene], middle, rate[gene], u[gene], out[gene]) - target[gene]
            if at_middle < 0.0:
                low, at_low, weight_low = middle, at_middle, at_middle
                weight_high *= 0.5
            else:
                high, at_high, weight_high = middle, at_middle, at_middle
                weight_low *= 0.5
        common[gene] = low if abs(at_low) < abs(at_high) else high
        _draw(k[gene], unit, fold[gene], common[gene], rate[gene], u[gene], out[gene])


@compiled
def _nearest_move(up: np.ndarray, down: np.ndarray, missing: float) -> tuple[int, int]:
    """Return which value of `up` is to be added and which of `down` taken off so that their sum is nearest to what is missing; -1 for none."""
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
    """Add a count to one cell and take one off another, gene by gene and a few times, so that the mean comes as near to its target as it can.

    Cells differ in size, so what a count adds to one and what it takes off another differ by little, and many such pairs are to choose from.
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
            first, second = _nearest_move(more - some, np.where(n > 0, some - fewer, np.inf), missing)
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
        What one count is worth, (cells,).
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
    """What a population of cells says of the rates in any of them: the Gamma prior of every gene.

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
        """Measure them on a population."""
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
    """What a perturbation does to a population, to be done to single cells of it.

    Attributes
    ----------
    levels
        Of the population.
    common
        Logarithm of the fold change that all cells have, on top of each one's own, (genes,).
    arriving
        Rate per size of a cell of genes that no cell of the population holds and that are to appear, (genes,).
    """

    levels: Levels
    common: np.ndarray
    arriving: np.ndarray


def _arriving(levels: Levels, target: np.ndarray) -> np.ndarray:
    return np.where((levels.level == 0) & (target > 0), SMALLEST_RATE * np.expm1(np.maximum(target, 0.0)), 0.0)


def _in_parts(n_genes: int, work: Callable[[slice], None]) -> None:
    """Do work on ranges of genes, side by side."""
    torch = sys.modules.get("torch")  # what a network has is ours; a closed form, which needs none, has one
    parts = [part for part in np.array_split(np.arange(n_genes), torch.get_num_threads() if torch else 1) if len(part)]
    with ThreadPoolExecutor(len(parts)) as threads:
        list(threads.map(lambda part: work(slice(part[0], part[-1] + 1)), parts))


def _met(
    cells: np.ndarray, mean_change: np.ndarray, fold: np.ndarray | None, rng: np.random.Generator
) -> tuple[np.ndarray, CommonChange]:
    """Return cells whose mean has changed as it is to but for less than a count, (genes, cells) at least, and how that was done."""
    repeats = -(-DRAWN_AT_LEAST // len(cells))
    counted = Counted.of(cells)
    levels = Levels.of(counted)
    target = cells.mean(axis=0, dtype=np.float64) + mean_change
    arriving = _arriving(levels, target)
    k, unit, rate = counted.k, counted.unit, levels.rates(counted) + arriving[:, None] / counted.unit
    folds = np.zeros(k.shape) if fold is None else np.ascontiguousarray(fold.T, dtype=np.float64)
    if repeats > 1:
        k, rate, folds = (np.tile(table, repeats) for table in (k, rate, folds))
        unit = np.tile(unit, repeats)
    u = rng.random(k.shape)
    out, common = np.empty(k.shape), np.zeros(len(k))
    _in_parts(
        len(k),
        lambda genes: _calibrated(
            k[genes], unit, folds[genes], rate[genes], u[genes], target[genes], common[genes], out[genes]
        ),
    )
    return out, CommonChange(levels, common, arriving)


def with_mean_effect(
    cells: np.ndarray, mean_change: np.ndarray, fold: np.ndarray | None, rng: np.random.Generator
) -> np.ndarray:
    """Return perturbed cells, (cells, genes), log1p-normalized: counts of the cells' own sizes, whose mean is met as nearly as counts can.

    Parameters
    ----------
    cells
        Log1p-normalized start cells, (cells, genes).
    mean_change
        What the mean over cells is to change by, (genes,).
    fold
        Logarithm of each cell's fold change, (cells, genes), up to a constant per gene; None: alike in all cells.
    """
    out, _ = _met(cells, mean_change, fold, rng)
    out = np.ascontiguousarray(out[:, : len(cells)])
    unit, target = unit_of(np.expm1(cells.astype(np.float64))), cells.mean(axis=0, dtype=np.float64) + mean_change
    _in_parts(len(out), lambda genes: _settle(unit, target[genes], out[genes]))
    return np.ascontiguousarray(out.T, dtype=np.float32)


def common_change(
    cells: np.ndarray, mean_change: np.ndarray, fold: np.ndarray | None, rng: np.random.Generator
) -> CommonChange:
    """Return what changes the mean of a population as it is to change; parameters as of `with_mean_effect`."""
    return _met(cells, mean_change, fold, rng)[1]


def applied(cells: np.ndarray, change: CommonChange, fold: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return perturbed cells, (cells, genes), log1p-normalized: each one's outcome is the same, whoever else is asked.

    Parameters
    ----------
    cells
        Log1p-normalized start cells, (cells, genes); one may be there many times.
    change
        Of the population.
    fold
        Logarithm of each cell's own fold change, (cells, genes).
    """
    counted = Counted.of(cells)
    rate = change.levels.rates(counted) + change.arriving[:, None] / counted.unit
    folds, u, out = (
        np.ascontiguousarray(fold.T, dtype=np.float64),
        rng.random(counted.k.shape),
        np.empty(counted.k.shape),
    )

    def draw(genes: slice) -> None:
        for gene in range(genes.start, genes.stop):
            _draw(counted.k[gene], counted.unit, folds[gene], change.common[gene], rate[gene], u[gene], out[gene])

    _in_parts(len(out), draw)
    return np.ascontiguousarray(out.T, dtype=np.float32)


def mean_effect_of(cells: np.ndarray, fold: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return what these fold changes do to the mean of log1p-normalized cells, (genes,): the mean of enough draws of the same cells."""
    repeats = -(-AVERAGED_AT_LEAST // len(cells))
    levels = Levels.of(Counted.of(cells))
    as_they_are = CommonChange(levels, np.zeros(cells.shape[1]), np.zeros(cells.shape[1]))
    drawn = applied(np.tile(cells, (repeats, 1)), as_they_are, np.tile(fold, (repeats, 1)), rng)
    return drawn.mean(axis=0, dtype=np.float64) - cells.mean(axis=0, dtype=np.float64)


def _shape(k: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Return θ of every gene by moments, (genes,): the variance of counts is μ + μ²/θ; 0.1 to 1,000."""
    excess = ((k - expected) ** 2 - expected).sum(axis=1)
    squares = (expected**2).sum(axis=1)
    return np.clip(np.divide(squares, excess, out=np.full(len(k), 1000.0), where=excess > 0), 0.1, 1000.0)
