"""Agreement of predicted with measured effects, beside that of two floors and of a ceiling.

The floors are guesses that know nothing of the perturbation; the ceiling is the agreement of the truth itself.
Agreement is a correlation over genes that were not perturbed, per test perturbation, and of two kinds:

* whole: of the whole effect. No change is 0 by definition, since it predicts nothing of any gene.
* specific: of the rest of both without the mean effect e of training, at whatever size: the partial correlation
  r(p, m | e). Every multiple of e, no change included, leaves nothing of a prediction, and is 0 by definition.

Subtracting e from both, r(p − e, m − e), would not do. No change becomes −e there, and −e correlates with m −
e by half wherever effects are weak. A prediction of 0.5 e gets the same, one of 1.5 e its negative, and they know
equally much.
"""

from typing import Any

import numpy as np

from perturbflow.evaluation.bootstrap import MIN_PERTURBATIONS, mean_with_interval
from perturbflow.evaluation.similarity import correlation

FLOORS = {"no_change": "predicting no change", "perturbed_mean": "the mean effect of training"}
KINDS = ("whole", "specific")
LEAST = 0.02  # of the way from a floor to the ceiling: a difference that counts is above it
NEGLIGIBLE = 1e-3  # of an effect: rounding may leave this of a multiple of the mean


def without(effect: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return the rest of an effect minus the mean effect at the size that fits best, (genes,)."""
    effect, mean = effect - effect.mean(), mean - mean.mean()
    rest = effect - mean * (effect @ mean) / max(float(mean @ mean), 1e-12)
    return rest if np.linalg.norm(rest) > NEGLIGIBLE * np.linalg.norm(effect) else np.zeros_like(rest)


def ceiling(a: np.ndarray, b: np.ndarray) -> float:
    """Return the correlation of the truth with the whole measurement, from that of its halves: √(2r / (1 + r)).

    The formula is that of Spearman (1910) and Brown (1910).
    Halves share their controls, whose noise is in both: if anything it is too high.
    """
    r = max(correlation(a, b), 0.0)
    return float(np.sqrt(2 * r / (1 + r)))


def agreement(
    predicted: np.ndarray, measured: np.ndarray, halves: list[np.ndarray], mean: np.ndarray
) -> dict[str, dict[str, float]]:
    """Return both kinds of agreement of a perturbation's prediction, of the floors and of the truth.

    Parameters
    ----------
    predicted, measured
        Effect on the genes that were not perturbed, (genes,).
    halves
        Measured by each half of the cells; the ceiling is NaN without two.
    mean
        Mean effect of the training perturbations.
    """
    guesses = {"model": predicted, "no_change": np.zeros_like(mean), "perturbed_mean": mean}
    found = {}
    for kind in KINDS:
        seen = (lambda effect: effect) if kind == "whole" else (lambda effect: without(effect, mean))
        found[kind] = {name: correlation(seen(guess), seen(measured)) for name, guess in guesses.items()}
        found[kind]["ceiling"] = ceiling(*map(seen, halves)) if len(halves) == 2 else np.nan
    return found


def summary(rows: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Return means over perturbations with intervals, per kind.

    They are of the model, the floors and the ceiling, and of the model minus each floor, paired.
    """
    found: dict[str, Any] = {}
    for kind in KINDS:
        of = [row[kind] for row in rows]
        found[kind] = {name: mean_with_interval([row[name] for row in of]) for name in ("model", *FLOORS, "ceiling")}
        found[kind]["above"] = {
            floor: mean_with_interval([row["model"] - row[floor] for row in of]) for floor in FLOORS
        }
    return found


def verdict(summed: dict[str, Any], n: int) -> str:
    """Return in words whether whole effects are predicted better than by either floor.

    Parameters
    ----------
    summed
        The result of `summary`.
    n
        Number of perturbations.
    """
    if n < MIN_PERTURBATIONS:
        return f"unknown: {n} test perturbations, and fewer than {MIN_PERTURBATIONS} are too few"
    whole = summed["whole"]
    for floor, words in FLOORS.items():
        least = LEAST * np.nan_to_num(whole["ceiling"]["mean"] - whole[floor]["mean"], nan=1.0)
        if not whole["above"][floor]["low"] > max(least, NEGLIGIBLE):
            return f"no better than {words}"
    best = max(FLOORS, key=lambda floor: whole[floor]["mean"])
    above = whole["above"][best]
    way = whole["ceiling"]["mean"] - whole[best]["mean"]
    share = f", {100 * above['mean'] / way:.0f} % of the way to the ceiling" if way > 0 else ""
    size = f"{above['mean']:.2f} ({above['low']:.2f} to {above['high']:.2f})"
    return f"better than {FLOORS[best]} by {size} in agreement{share}"


def sentence(summed: dict[str, Any]) -> str:
    """Return both kinds of agreement in words, each with its floors and its ceiling."""
    whole, specific = (
        {name: found["mean"] for name, found in summed[kind].items() if name != "above"} for kind in KINDS
    )
    return (
        f"Agreement of whole effects {whole['model']:.2f}: no change {whole['no_change']:.0f}, the mean effect of "
        f"training {whole['perturbed_mean']:.2f}, ceiling {whole['ceiling']:.2f}. Beyond that mean "
        f"{specific['model']:.2f}: both floors {specific['no_change']:.0f}, ceiling {specific['ceiling']:.2f}"
    )
