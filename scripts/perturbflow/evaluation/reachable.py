"""Scores of a perfect predictor of the mean against half 'b', from those of half 'a' without its own noise.

Half 'a' predicts with x̄_a = μ + e_a and is scored on x̄_b = μ + e_b. Each function returns the score of μ itself.
Both halves are of the same cells, so that the variance of e_a is to that of e_b as n_b to n_a. Controls are common to
both sides: c̄ is part of the score.
"""

import numpy as np

from perturbflow.evaluation.scored import Scored


def of_errors(values: np.ndarray, scored: Scored) -> np.ndarray:
    """Return values · √(n_a / (n_a + n_b)).

    Errors then have the standard deviation of e_b, in place of that of e_a − e_b.
    """
    return values * np.sqrt(scored.n_predicted / (scored.n_predicted + scored.n_cells))


def of_correlations(values: np.ndarray, scored: Scored) -> np.ndarray:
    """Return √ρ_b from r = √(ρ_a ρ_b), ρ = 1/(1 + x/n) the reliability of the mean of n cells.

    x is the ratio of noise to signal in one cell (Spearman 1910, Brown 1910). With equal halves that is √r. The sign
    of r is kept, so that pure noise has 0 on average.
    """
    a, b = 1 / scored.n_predicted, 1 / scored.n_cells
    r = np.maximum(np.abs(values), 1e-12)
    x = (np.sqrt((a + b) ** 2 + 4 * a * b * (1 / r**2 - 1)) - a - b) / (2 * a * b)  # (1 + a x)(1 + b x) = 1 / r²
    return np.sign(values) / np.sqrt(1 + b * x)


def _share_of_others(scored: Scored, weight: np.ndarray) -> np.ndarray:
    """Return the share of Σ w (x̂ − x̄)² without the noise Σ w v/n_a of half 'a', v the variance of cells."""
    noise = (weight * scored.predicted_variance).sum(axis=1) / scored.n_predicted
    error = (weight * np.square(scored.predicted - scored.measured)).sum(axis=1)
    return 1.0 - np.divide(noise, error, out=np.full(len(error), np.nan), where=error > 0)


def of_weighted_errors(values: np.ndarray, scored: Scored) -> np.ndarray:
    """Return Σ w (x̂ − x̄)² without the noise of half 'a'; it is no half of it, as w is larger where e_b is."""
    return values * _share_of_others(scored, scored.weight)


def of_weighted_r2(values: np.ndarray, scored: Scored) -> np.ndarray:
    """Return 1 − Σ w (x̂ − x̄)² / spread, without the noise of half 'a'."""
    return 1.0 - (1.0 - values) * _share_of_others(scored, scored.weight)


def of_weighted_r2_off_target(values: np.ndarray, scored: Scored) -> np.ndarray:
    """Return `of_weighted_r2` without the perturbed genes."""
    return 1.0 - (1.0 - values) * _share_of_others(scored, scored.weight_off_target)
