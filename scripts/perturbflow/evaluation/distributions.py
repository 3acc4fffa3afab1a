"""Metrics of distributions of cells: distances on principal components of training cells, variances and quantiles.

Distances take at most 1,000 cells of each side. Predicted cells of one starting control are no independent samples:
distances that are free of bias leave such pairs out.
"""

from collections.abc import Callable

import numpy as np

from perturbflow.evaluation.metric import (
    DISTANCE,
    KERNEL,
    OURS,
    RATIO,
    SCPERTEVAL,
    SHARE,
    SIGNED_DISTANCE,
    SZEKELY,
    metric,
)
from perturbflow.evaluation.scored import Scored

SINKHORN_CELLS = 300
SINKHORN_BLUR = 0.05
SINKHORN_SCALING = 0.5


def _independent(start: np.ndarray) -> np.ndarray:
    """Return which pairs, in the order of pdist, are of different starts."""
    first, second = np.triu_indices(len(start), 1)
    return start[first] != start[second]


def _two_samples(
    function: Callable[[np.ndarray, np.ndarray, np.ndarray], float],
    predicted: list[np.ndarray],
    measured: list[np.ndarray],
    start: list[np.ndarray],
) -> np.ndarray:
    """Return a distance per perturbation of predicted and measured cells, by their components."""
    return np.array(
        [function(x, y, _independent(from_)) for x, y, from_ in zip(predicted, measured, start, strict=True)]
    )


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else np.nan


def _energy_distance(predicted: np.ndarray, measured: np.ndarray, independent: np.ndarray) -> float:
    from scipy.spatial.distance import cdist, pdist

    return 2 * cdist(predicted, measured).mean() - _mean(pdist(predicted)[independent]) - _mean(pdist(measured))


@metric("distribution", SZEKELY, "lower", SIGNED_DISTANCE, "cells", perfect=0.0)
def energy_distance(scored: Scored) -> np.ndarray:
    """2 E‖X−Y‖ − E‖X−X′‖ − E‖Y−Y′‖ of predicted and measured cells, 50 components.

    Distances are unsquared Euclidean, the means U-statistics. It can fall below 0. NaN for a single cell.
    """
    return _two_samples(
        _energy_distance, scored.predicted_components, scored.measured_components, scored.predicted_start
    )


@metric("distribution", OURS, "lower", SIGNED_DISTANCE, "cells", perfect=0.0, headline=True)
def energy_distance_off_target(scored: Scored) -> np.ndarray:
    """energy_distance of cells whose perturbed genes are set to 0 on both sides before the components are taken."""
    sides = (scored.predicted_off_target_components, scored.measured_off_target_components)
    return _two_samples(_energy_distance, *sides, scored.predicted_start)


@metric("distribution", SCPERTEVAL, "lower", KERNEL, "cells", perfect=0.0)
def mmd(scored: Scored) -> np.ndarray:
    """E k(X,X′) + E k(Y,Y′) − 2 E k(X,Y), U-statistic, k(x,y) = exp(−‖x−y‖²/2σ²), 50 components.

    σ is the median distance of all cells. It can fall below 0. NaN for a single cell.
    """
    from scipy.spatial.distance import cdist, pdist

    def one(predicted: np.ndarray, measured: np.ndarray, independent: np.ndarray) -> float:
        distances = pdist(predicted), pdist(measured), cdist(predicted, measured).ravel()
        scale = 2 * np.median(np.concatenate(distances)) ** 2
        if scale == 0:
            return 0.0
        of_predicted, of_measured, between = (np.exp(-np.square(distance) / scale) for distance in distances)
        return _mean(of_predicted[independent]) + _mean(of_measured) - 2 * between.mean()

    return _two_samples(one, scored.predicted_components, scored.measured_components, scored.predicted_start)


def _softmin(epsilon: float, cost: np.ndarray, potential: np.ndarray) -> np.ndarray:
    """Return −ε log mean_j exp((h_j − C_ij)/ε)."""
    exponent = (potential[None, :] - cost) / epsilon
    largest = exponent.max(axis=1)
    exponent -= largest[:, None]
    return -epsilon * (largest + np.log(np.exp(exponent, out=exponent).mean(axis=1)))


def sinkhorn_divergence(x: np.ndarray, y: np.ndarray) -> float:
    """Return the debiased entropic transport cost of ‖x−y‖²/2, ε = blur² (Feydy et al. 2019, algorithm 1).

    ε falls from the diameter's square by SINKHORN_SCALING² a step, with one averaged update each. That is geomloss'
    default.
    """
    from scipy.spatial.distance import cdist

    xy, xx, yy = (cdist(a, b, "sqeuclidean") / 2 for a, b in ((x, y), (x, x), (y, y)))
    both = np.concatenate([x, y])
    diameter = np.maximum(np.linalg.norm(np.ptp(both, axis=0)), SINKHORN_BLUR)
    steps = np.arange(2 * np.log(diameter), 2 * np.log(SINKHORN_BLUR), 2 * np.log(SINKHORN_SCALING))
    schedule = [diameter**2, *np.exp(steps), SINKHORN_BLUR**2]
    costs = (xy, xy.T, xx, yy)
    partner = (1, 0, 2, 3)  # the potential that each is the soft minimum over
    zero = [np.zeros(cost.shape[1]) for cost in costs]
    potentials = [_softmin(schedule[0], cost, start) for cost, start in zip(costs, zero, strict=True)]
    for epsilon in schedule:
        updated = [_softmin(epsilon, cost, potentials[other]) for cost, other in zip(costs, partner, strict=True)]
        potentials = [(old + new) / 2 for old, new in zip(potentials, updated, strict=True)]
    f, g, f_own, g_own = (
        _softmin(schedule[-1], cost, potentials[other]) for cost, other in zip(costs, partner, strict=True)
    )
    return float((f - f_own).mean() + (g - g_own).mean())


@metric("distribution", SCPERTEVAL, "lower", DISTANCE, "cells", perfect=0.0)
def sinkhorn_w2(scored: Scored) -> np.ndarray:
    """√(2 S_ε) of predicted and measured cells, 50 components.

    S_ε is the debiased Sinkhorn divergence of ‖x−y‖²/2 at ε = 0.05². At most 300 cells of each side. A second
    sample of the measured cells is above 0.
    """

    def spread(cells: np.ndarray) -> np.ndarray:
        return cells[np.linspace(0, len(cells) - 1, min(len(cells), SINKHORN_CELLS)).astype(int)].astype(float)

    pairs = zip(scored.predicted_components, scored.measured_components, strict=True)
    return np.array([np.sqrt(max(0.0, 2 * sinkhorn_divergence(spread(x), spread(y)))) for x, y in pairs])


@metric("distribution", OURS, "target", RATIO, "cells", perfect=1.0)
def variance_ratio(scored: Scored) -> np.ndarray:
    """Variance of predicted cells / variance of measured cells.

    Each is summed over the 1,000 genes most expressed in controls. Below 1 predicted cells are too alike. NaN for a
    single cell.
    """
    genes = scored.highly_expressed
    predicted, measured = (
        variance[:, genes].sum(axis=1) for variance in (scored.predicted_variance, scored.measured_variance)
    )
    return np.divide(predicted, measured, out=np.full(len(measured), np.nan), where=measured > 0)


@metric("distribution", OURS, "target", SHARE, "cells", perfect=0.9)
def quantile_coverage(scored: Scored) -> np.ndarray:
    """Share of measured cells between the 5 and 95 % quantiles of predicted cells.

    It is the mean over the 1,000 genes most expressed in controls. A cell that ties with predicted ones counts in
    expectation (randomized probability integral transform): equal distributions have 0.9, discrete ones too. Below,
    predicted cells are too alike or elsewhere; above, too different.
    """
    return scored.coverage[:, scored.highly_expressed].mean(axis=1)
