"""The width of a model's intervals beside that of guesses that know nothing of the perturbation.

Coverage alone shows nothing: no change has it, too.
"""

import numpy as np

from perturbflow.counterfactuals.agreement import FLOORS
from perturbflow.evaluation.bootstrap import MIN_PERTURBATIONS
from perturbflow.models.calibration import Calibration

RESAMPLES = 300


def _resampled_reach(calibrations: dict[str, Calibration], level: float) -> dict[str, np.ndarray]:
    """Return `Calibration.reach` in resamples of the perturbations, the same for all; NaN where these are too few."""
    labels = sorted({label for calibration in calibrations.values() for label in calibration.labels})
    place = {label: i for i, label in enumerate(labels)}
    rows = {
        name: np.array([place[label] for label in calibration.labels], dtype=int)
        for name, calibration in calibrations.items()
    }
    reach = {name: np.full(RESAMPLES, np.nan) for name in calibrations}
    if len(set(calibrations["model"].labels)) < MIN_PERTURBATIONS:
        return reach
    rng = np.random.default_rng(0)
    for i in range(RESAMPLES):
        times = np.bincount(rng.integers(0, len(labels), len(labels)), minlength=len(labels))
        for name, calibration in calibrations.items():
            if (of_row := times[rows[name]]).any():
                reach[name][i] = np.quantile(np.repeat(calibration.scores, of_row, axis=0), level)
    return reach


def relative_widths(calibrations: dict[str, Calibration], level: float) -> dict[str, dict[str, float]]:
    """Return, per floor, the width of the model's intervals of a level in units of the floor's.

    Its 95 % interval is over the perturbations that they were calibrated on. These are sampled with replacement, and
    are the same for model and floor.

    Parameters
    ----------
    calibrations
        Of the model ("model") and of the floors, all for perturbations of one novelty.
    """
    resampled = _resampled_reach(calibrations, level)
    found = {}
    for floor in FLOORS:
        ratios = resampled["model"] / resampled[floor]
        ratios = ratios[np.isfinite(ratios)]
        low, high = np.quantile(ratios, [0.025, 0.975]) if len(ratios) else (np.nan, np.nan)
        reach = [calibrations[name].reach(level) for name in ("model", floor)]
        mean = float(reach[0] / reach[1]) if np.isfinite(reach).all() else np.nan
        found[floor] = {"mean": mean, "low": float(low), "high": float(high)}
    return found
