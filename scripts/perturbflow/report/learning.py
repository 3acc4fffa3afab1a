"""Whether a training learned by heart, from its two curves of loss."""

import numpy as np

LEAST_POINTS = 8  # of a validation curve: fewer show nothing
BEYOND_NOISE = 8.0  # standard errors of a mean of neighbouring points
LEAST_RISE = 0.05  # of all that the curve rises and falls by

Points = list[tuple[float, float]]


def _smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """Return means of `width` neighbours."""
    return np.convolve(values, np.full(width, 1.0 / width), mode="valid")


def _noise(values: np.ndarray) -> float:
    """Return the deviation of points from the course of their curve, from second differences.

    A straight course has none.
    """
    return float(np.sqrt((np.diff(values, 2) ** 2).mean() / 6))


def by_heart(training: Points, validation: Points) -> str:
    """Return in a sentence whether a training learned by heart.

    It did where the validation loss, as a mean of neighbouring points, ends above its minimum by more than its noise
    and by more than a trifle, while the training loss falls from there on.
    """
    if len(validation) < LEAST_POINTS:
        return (
            f"Whether it learned by heart is unknown: {len(validation) or 'no'} points of validation loss were logged."
        )
    steps, values = np.array(validation).T
    width = max(2, len(values) // 5)
    smooth = _smoothed(values, width)
    lowest = int(smooth.argmin())
    rise = smooth[-1] - smooth[lowest]
    middle = steps[lowest + width // 2]
    course = (
        f"its validation loss is lowest about step {middle:.0f} ({smooth[lowest]:.4g}) and ends at {smooth[-1]:.4g}"
    )
    if rise <= max(BEYOND_NOISE * _noise(values) / np.sqrt(width), LEAST_RISE * np.ptp(values)):
        return f"No sign of learning by heart: {course}."
    later = [value for step, value in training if step >= middle]
    if len(later) > 1 and later[-1] < later[0]:
        fell = f"while its training loss falls from {later[0]:.4g} to {later[-1]:.4g}"
        return f"It learned by heart: {course}, {fell}. Fewer steps may predict better."
    return f"Beyond its noise, {course}. It did not learn by heart, as its training loss does not fall either."
