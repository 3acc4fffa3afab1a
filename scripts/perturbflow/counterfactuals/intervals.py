"""How wide a model's intervals are beside those of guesses that know nothing of the perturbation: their coverage alone is had by no change, too."""

import numpy as np

from perturbflow.counterfactuals.agreement import FLOORS
from perturbflow.evaluation.bootstrap import MIN_PERTURBATIONS
from perturbflow.models.calibration import Calibration

RESAMPLES = 300


def relative_widths(calibrations: dict[str, Calibration], level: float) -> dict[str, dict[str, float]]:
    """Return, per floor, how many times as wide as the floor's the model's intervals of a level are.

    Its 95 % interval is over the perturbations that they were calibrated on, drawn with replacement, the same for model
    and floor.

    Parameters
    ----------
    calibrations
        Of the model ("model") and of the floors, all for one case.
    """
    labels = sorted({label for calibration in calibrations.values() for label in calibration.labels})
    place = {label: i for i, label in enumerate(labels)}
    rows = {
        name: np.array([place[label] for label in calibration.labels], dtype=int)
        for name, calibration in calibrations.items()
    }
    rng = np.random.default_rng(0)
    drawn = {name: np.full(RESAMPLES, np.nan) for name in calibrations}
    for i in range(RESAMPLES if len(set(calibrations["model"].labels)) >= MIN_PERTURBATIONS else 0):
        times = np.bincount(rng.integers(0, len(labels), len(labels)), minlength=len(labels))
        for name, calibration in calibrations.items():
            if (of_row := times[rows[name]]).any():
                drawn[name][i] = np.quantile(np.repeat(calibration.scores, of_row, axis=0), level)
    found = {}
    for floor in FLOORS:
        ratios = drawn["model"] / drawn[floor]
        ratios = ratios[np.isfinite(ratios)]
        low, high = np.quantile(ratios, [0.025, 0.975]) if len(ratios) else (np.nan, np.nan)
        reach = [calibrations[name].reach(level) for name in ("model", floor)]
        found[floor] = {
            "mean": float(reach[0] / reach[1]) if np.isfinite(reach).all() else np.nan,
            "low": float(low),
            "high": float(high),
        }
    return found
