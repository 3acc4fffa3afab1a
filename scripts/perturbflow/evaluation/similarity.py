"""Pearson's r and the cosine of effects, one pair or row by row. A prediction that is the same for all genes has 0."""

import numpy as np

from perturbflow.evaluation.scored import NO_EFFECT

FLAT = 1e-6  # deviation over genes, log1p units: rounding may leave this of no change


def correlation(predicted: np.ndarray, measured: np.ndarray, of_flat: float = 0.0) -> float:
    """Return Pearson's r of a prediction with a measurement; NaN where the measurement is flat.

    Parameters
    ----------
    of_flat
        The value for a flat prediction.
    """
    if measured.std() <= FLAT:
        return np.nan
    return float(np.corrcoef(predicted, measured)[0, 1]) if predicted.std() > FLAT else of_flat


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine per row; 0 where a row is zero."""
    norm = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.divide((a * b).sum(axis=1), norm, out=np.zeros(len(a)), where=norm > 0)


def correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Pearson's r per row; 0 where a row is constant or smaller than NO_EFFECT."""
    is_flat = (np.abs(a).max(axis=1) < NO_EFFECT) | (np.abs(b).max(axis=1) < NO_EFFECT)
    return np.where(is_flat, 0.0, cosines(a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)))


def correlations_over(genes: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return `correlations` of each row over its own genes, a mask (P, genes)."""
    rows = zip(a, b, genes, strict=True)
    return np.array([correlations(x[None, of_row], y[None, of_row])[0] for x, y, of_row in rows])
