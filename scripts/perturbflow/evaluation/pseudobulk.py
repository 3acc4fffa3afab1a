"""Metrics of mean expression: error, effect, ranking, discrimination, weighted error, and error on target.

Metrics that compare perturbations with one another use effects, Δ̂ = x̂ − c̄ and Δ = x̄ − c̄, each against
its own c̄. Otherwise the batches of the perturbations would distinguish them. Where c̄ is common, that is the
published form.
"""

import numpy as np

from perturbflow.evaluation.metric import (
    AHLMANN_ELTZE,
    CELL_EVAL,
    CORRELATION,
    LOG1P,
    LOG1P_SQUARED,
    MEJIA,
    OURS,
    PERTURBENCH,
    R_SQUARED,
    SHARE,
    SIGNED_RATIO,
    SYSTEMA,
    VCC,
    VCC_2025,
    metric,
)
from perturbflow.evaluation.reachable import (
    of_correlations,
    of_errors,
    of_weighted_errors,
    of_weighted_r2,
    of_weighted_r2_off_target,
)
from perturbflow.evaluation.scored import NO_EFFECT, Scored
from perturbflow.evaluation.similarity import correlations, correlations_over, cosines

# Distances this near, relative to the largest, are equal: equal predictions differ by rounding.
TOLERANCE = 1e-6
# Predicted effects this near, relative to their norm, are one: equal ones differ by clipping at zero, as their
# starting controls do.
ALIKE = 0.1
ROWS_AT_ONCE = 1024  # of a table of distances


def _effects(scored: Scored) -> tuple[np.ndarray, np.ndarray]:
    """Return Δ̂ and Δ; an effect of rounding errors is zero."""
    return _without_rounding(scored.predicted - scored.control), _without_rounding(scored.measured - scored.control)


def _without_rounding(effects: np.ndarray) -> np.ndarray:
    return np.where(np.abs(effects).max(axis=1, keepdims=True, initial=0.0) < NO_EFFECT, 0.0, effects)


def _distances(a: np.ndarray, b: np.ndarray, kind: str) -> np.ndarray:
    """Return cityblock, euclidean or cosine distances of all rows; the cosine distance of a zero effect is 1."""
    if kind == "cityblock":
        from scipy.spatial.distance import cdist

        return cdist(a, b, kind)
    if kind == "euclidean":  # by products: those of all rows at once take a tenth of the time of differences
        squares = np.square(a).sum(axis=1)[:, None] + np.square(b).sum(axis=1)[None, :] - 2.0 * (a @ b.T)
        return np.sqrt(np.maximum(squares, 0.0))
    norms = np.linalg.norm(a, axis=1)[:, None] * np.linalg.norm(b, axis=1)[None, :]
    return 1.0 - np.divide(a @ b.T, norms, out=np.zeros(norms.shape), where=norms > 0)


def _nearer(a: np.ndarray, b: np.ndarray, kind: str, *, ties_are_alike: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Return, per row of a, the share of the other rows of b that are nearer than its own, and of those as near.

    A single row has NaN, and so have all where no gene is left to compare. The table of distances is made ROWS_AT_ONCE
    rows at a time.

    Parameters
    ----------
    ties_are_alike
        Whether rows of b within ALIKE of its own, relative to the larger norm, are as near, too.
    """
    n = len(a)
    found: list[tuple[np.ndarray, np.ndarray]] = []
    if n < 2 or not a.shape[1]:
        return np.full(n, np.nan), np.full(n, np.nan)
    a, b = a.astype(float, copy=False), b.astype(float, copy=False)
    norms = np.linalg.norm(b, axis=1)
    for first in range(0, n, ROWS_AT_ONCE):
        rows = np.arange(first, min(first + ROWS_AT_ONCE, n))
        distance = _distances(a[rows], b, kind)
        own = distance[np.arange(len(rows)), rows][:, None]
        is_tie = np.abs(distance - own) <= TOLERANCE * distance.max(axis=1, keepdims=True)
        if ties_are_alike:
            is_tie |= _distances(b[rows], b, "euclidean") <= ALIKE * np.maximum.outer(norms[rows], norms)
        is_tie[np.arange(len(rows)), rows] = True
        found.append((((distance < own) & ~is_tie).sum(axis=1), is_tie.sum(axis=1) - 1))
    nearer, ties = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return nearer / (n - 1), ties / (n - 1)


# --- error ----------------------------------------------------------------------------------------------------------


@metric("error", VCC_2025, "lower", LOG1P, "pseudobulk", perfect=0.0, correction=of_errors)
def mae(scored: Scored) -> np.ndarray:
    """Mean over genes of abs(x̂ − x̄)."""
    return np.abs(scored.predicted - scored.measured).mean(axis=1)


@metric("error", AHLMANN_ELTZE, "lower", LOG1P, "pseudobulk", perfect=0.0, correction=of_errors)
def l2_heg1000(scored: Scored) -> np.ndarray:
    """‖x̂ − x̄‖ over the 1,000 genes most expressed in controls."""
    genes = scored.highly_expressed
    return np.linalg.norm(scored.predicted[:, genes] - scored.measured[:, genes], axis=1)


@metric("error", OURS, "lower", LOG1P, "pseudobulk", perfect=0.0, headline=True, correction=of_errors)
def l2_heg1000_off_target(scored: Scored) -> np.ndarray:
    """l2_heg1000 without the perturbed genes themselves, whose level is the easiest part of an effect to predict."""
    difference = np.where(scored.own_target, 0.0, scored.predicted - scored.measured)
    return np.linalg.norm(difference[:, scored.highly_expressed], axis=1)


@metric("error", VCC, "lower", SIGNED_RATIO, "counts", perfect=0.0, useless=1.0)
def expr_mse_unbiased_norm(scored: Scored) -> np.ndarray:
    """N_p / mean_q D_q, N = (‖b̂ − b‖² − min(Ĉ, C) − C)/G, D = (‖b − b_c‖² − C − C_c)/G.

    b = log(1 + 5·10⁴·P/ΣP) of summed normalized counts P of cells and controls (c) over G genes, C the sums of their
    sampling variances by the infinitesimal jackknife; without the perturbed genes. The mean over perturbations is
    ΣN/ΣD. Ĉ is the noise of c̄ where the mean of the cells was set to c̄ plus an effect, as by every model here: no
    change has 1. It is below 0 for cells nearer to the measured ones than a second sample. Ĉ has no cap ρ as in the
    source. NaN where measured effects do not exceed their noise, or for a single cell.
    """
    genes = ~scored.own_target
    error, effect, noise_hat, noise, noise_of_control = (
        (part * genes).sum(axis=1) / genes.sum(axis=1)
        for part in (
            np.square(scored.predicted_bulk - scored.measured_bulk),
            np.square(scored.measured_bulk - scored.control_bulk),
            scored.predicted_bulk_variance,
            scored.measured_bulk_variance,
            scored.control_bulk_variance,
        )
    )
    numerator, denominator = error - np.minimum(noise_hat, noise) - noise, effect - noise - noise_of_control
    is_known = np.isfinite(denominator)
    mean = denominator[is_known].mean() if is_known.any() else np.nan
    return numerator / mean if mean > 0 else np.full(len(numerator), np.nan)


# --- effect ---------------------------------------------------------------------------------------------------------


@metric(
    "effect", AHLMANN_ELTZE, "higher", CORRELATION, "pseudobulk", perfect=1.0, useless=0.0, correction=of_correlations
)
def pearson_delta_ctrl(scored: Scored) -> np.ndarray:
    """Pearson's r of Δ̂ and Δ over the 1,000 genes most expressed in controls; 0 where nothing is predicted.

    It rewards the average response.
    """
    genes = scored.highly_expressed
    control = scored.control[:, genes]
    return correlations(scored.predicted[:, genes] - control, scored.measured[:, genes] - control)


@metric("effect", OURS, "higher", CORRELATION, "pseudobulk", perfect=1.0, useless=0.0, correction=of_correlations)
def pearson_delta_ctrl_off_target(scored: Scored) -> np.ndarray:
    """pearson_delta_ctrl without the perturbed genes themselves."""
    genes = scored.highly_expressed & ~scored.own_target
    return correlations_over(genes, scored.predicted - scored.control, scored.measured - scored.control)


@metric("effect", SYSTEMA, "higher", CORRELATION, "pseudobulk", perfect=1.0, useless=0.0, correction=of_correlations)
def pearson_delta_pert(scored: Scored) -> np.ndarray:
    """Pearson's r of x̂ − r and x̄ − r over all genes, r the mean of the training perturbations' means.

    Training controls move r to the perturbation's composition of batches and cell types (controls of the scored role
    where training has none). The average response scores about 0.
    """
    return correlations(scored.predicted - scored.reference, scored.measured - scored.reference)


@metric(
    "effect",
    OURS,
    "higher",
    CORRELATION,
    "pseudobulk",
    perfect=1.0,
    useless=0.0,
    headline=True,
    correction=of_correlations,
)
def pearson_delta_pert_off_target(scored: Scored) -> np.ndarray:
    """pearson_delta_pert without the perturbed genes themselves."""
    return correlations_over(
        ~scored.own_target, scored.predicted - scored.reference, scored.measured - scored.reference
    )


@metric(
    "effect", PERTURBENCH, "higher", CORRELATION, "pseudobulk", perfect=1.0, useless=0.0, correction=of_correlations
)
def cosine_logfc(scored: Scored) -> np.ndarray:
    """Cosine of Δ̂ and Δ over all genes; 0 where nothing is predicted."""
    return cosines(*_effects(scored))


# --- ranking --------------------------------------------------------------------------------------------------------


def _rank(scored: Scored, kind: str, is_left_out: np.ndarray | None = None) -> np.ndarray:
    predicted, measured = _effects(scored)
    if is_left_out is not None:
        predicted, measured = predicted[:, ~is_left_out], measured[:, ~is_left_out]
    nearer, ties = _nearer(measured, predicted, kind, ties_are_alike=True)
    return nearer + 0.5 * ties


@metric("ranking", PERTURBENCH, "lower", SHARE, "pseudobulk", perfect=0.0, useless=0.5)
def rank_cosine(scored: Scored) -> np.ndarray:
    """Share of the other perturbations q with d(Δ̂_q, Δ_p) < d(Δ̂_p, Δ_p), d the cosine distance.

    Ties count half (whole in the source). Predictions that differ by less than a tenth of their norm are ties: even
    one prediction for all differs in counts by the cells it started from. One prediction for all has 0.5; a mean
    above 0.4 is a sign of mode collapse.
    """
    return _rank(scored, "cosine")


@metric("ranking", OURS, "lower", SHARE, "pseudobulk", perfect=0.0, useless=0.5, headline=True)
def rank_cosine_off_target(scored: Scored) -> np.ndarray:
    """rank_cosine without the perturbed genes of all scored perturbations: these alone distinguish perturbations.

    NaN where no other gene is measured.
    """
    return _rank(scored, "cosine", np.any(scored.own_target, axis=0))


@metric("ranking", PERTURBENCH, "lower", SHARE, "pseudobulk", perfect=0.0, useless=0.5)
def rank_rmse(scored: Scored) -> np.ndarray:
    """rank_cosine with the root mean squared error for d."""
    return _rank(scored, "euclidean")


# --- discrimination -------------------------------------------------------------------------------------------------


def _pds(scored: Scored, kind: str) -> np.ndarray:
    genes = ~scored.own_target.any(axis=0)
    bulks = (scored.predicted_bulk, scored.measured_bulk)
    predicted, measured = (_without_rounding((bulk - scored.control_bulk)[:, genes]) for bulk in bulks)
    nearer, ties = _nearer(predicted, measured, kind)
    return 1.0 - nearer - 0.5 * ties


@metric("discrimination", VCC_2025, "higher", SHARE, "counts", perfect=1.0, useless=0.5)
def pds_l1(scored: Scored) -> np.ndarray:
    """pds_cosine with the sum of absolute differences for the distance."""
    return _pds(scored, "cityblock")


@metric("discrimination", CELL_EVAL, "higher", SHARE, "counts", perfect=1.0, useless=0.5)
def pds_l2(scored: Scored) -> np.ndarray:
    """pds_cosine with the Euclidean distance."""
    return _pds(scored, "euclidean")


@metric("discrimination", VCC, "higher", SHARE, "counts", perfect=1.0, useless=0.5, headline=True)
def pds_cosine(scored: Scored) -> np.ndarray:
    """1 − k/(n − 1), k the measured effects that are nearer to the prediction than its own; ties count half.

    By the cosine distance of b − b_c, b the log bulk log(1 + 5·10⁴·P/ΣP) of normalized counts. All perturbed
    genes of the panel are left out; NaN where no other gene is measured.
    """
    return _pds(scored, "cosine")


@metric("discrimination", SYSTEMA, "higher", SHARE, "pseudobulk", perfect=1.0, useless=0.5)
def centroid_accuracy(scored: Scored) -> np.ndarray:
    """Share of the other perturbations q with ‖Δ̂_p − Δ_q‖ > ‖Δ̂_p − Δ_p‖; ties count half.

    Distances are over all genes.
    """
    nearer, ties = _nearer(*_effects(scored), "euclidean")
    return 1.0 - nearer - 0.5 * ties


# --- weighted -------------------------------------------------------------------------------------------------------


def _weighted_error(scored: Scored, weight: np.ndarray) -> np.ndarray:
    """Return Σ w (x̂ − x̄)²."""
    return (weight * np.square(scored.predicted - scored.measured)).sum(axis=1)


def _weighted_r2(scored: Scored, weight: np.ndarray) -> np.ndarray:
    """Return 1 − Σ w (x̂ − x̄)² / Σ w (δ − Σ w δ)², δ = x̄ − r."""
    delta = scored.measured - scored.reference
    spread = (weight * np.square(delta - (weight * delta).sum(axis=1, keepdims=True))).sum(axis=1)
    return 1.0 - np.divide(_weighted_error(scored, weight), spread, out=np.full(len(spread), np.nan), where=spread > 0)


@metric("weighted", MEJIA, "lower", LOG1P_SQUARED, "pseudobulk", perfect=0.0, correction=of_weighted_errors)
def wmse(scored: Scored) -> np.ndarray:
    """Σ w (x̂ − x̄)² over all genes, w ∝ (abs(t) − min abs(t))², Σ w = 1.

    t is Welch's, of the measured cells against those of all other perturbations that are scored.
    """
    return _weighted_error(scored, scored.weight)


@metric("weighted", MEJIA, "higher", R_SQUARED, "pseudobulk", perfect=1.0, useless=0.0, correction=of_weighted_r2)
def r2_w_delta(scored: Scored) -> np.ndarray:
    """1 − Σ w (x̂ − x̄)² / Σ w (δ − Σ w δ)², w as in wmse, δ = x̄ − r.

    r is that of pearson_delta_pert. The average response has at most 0.
    """
    return _weighted_r2(scored, scored.weight)


@metric(
    "weighted",
    OURS,
    "higher",
    R_SQUARED,
    "pseudobulk",
    perfect=1.0,
    useless=0.0,
    headline=True,
    correction=of_weighted_r2_off_target,
)
def r2_w_delta_off_target(scored: Scored) -> np.ndarray:
    """r2_w_delta without the perturbed genes themselves, w of the others divided by its sum."""
    return _weighted_r2(scored, scored.weight_off_target)


# --- on target ------------------------------------------------------------------------------------------------------


@metric("on_target", OURS, "lower", LOG1P, "pseudobulk", perfect=0.0, correction=of_errors)
def mae_on_target(scored: Scored) -> np.ndarray:
    """Mean of abs(x̂ − x̄) over the perturbed genes themselves; NaN where none of them is measured."""
    n = scored.own_target.sum(axis=1)
    error = np.where(scored.own_target, np.abs(scored.predicted - scored.measured), 0.0).sum(axis=1)
    return np.divide(error, n, out=np.full(len(n), np.nan), where=n > 0)
