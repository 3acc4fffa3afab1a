"""Agreement of predicted with measured effects, beside guesses that know nothing of the perturbation and what the truth itself would reach.

All of it is correlation over genes that were not perturbed, per test perturbation, and of two kinds:

* whole: of the whole effect. No change is 0 by definition, since it says nothing of any gene.
* specific: of what is left of both when the mean effect e of training is taken out, at whatever size: the partial
  correlation r(p, m | e). Every multiple of e, no change included, leaves nothing of a prediction, and is 0 by
  definition.

Both minus e, r(p − e, m − e), would not do: no change becomes −e there, which correlates with m − e by half
wherever effects are weak; a prediction of 0.5 e gets the same, one of 1.5 e its negative, and they know equally much.
"""

from typing import Any

import numpy as np

from perturbflow.evaluation.bootstrap import MIN_PERTURBATIONS, Estimates, estimate

FLOORS = {"no_change": "predicting no change", "perturbed_mean": "the mean effect of training"}
KINDS = ("whole", "specific")
LEAST = 0.02  # of the way from a floor to the ceiling: what a difference has to be above to count
NEGLIGIBLE = 1e-3  # of an effect: what rounding may leave of a multiple of the mean
NOTHING = 1e-6  # deviation over genes, log1p units: what rounding may leave of no change


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return the correlation of a prediction with a measurement: 0 for a prediction that is the same for all genes, NaN for such a measurement."""
    if b.std() <= NOTHING:
        return np.nan
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > NOTHING else 0.0


def without(effect: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """Return what is left of an effect when the mean effect, at the size that fits best, is taken out, (genes,)."""
    effect, mean = effect - effect.mean(), mean - mean.mean()
    rest = effect - mean * (effect @ mean) / max(float(mean @ mean), 1e-12)
    return rest if np.linalg.norm(rest) > NEGLIGIBLE * np.linalg.norm(effect) else np.zeros_like(rest)


def ceiling(a: np.ndarray, b: np.ndarray) -> float:
    """Return what the truth itself would correlate with the whole measurement, from that of its halves: √(2r / (1 + r)) (Spearman 1910; Brown 1910).

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


def _estimate(values: list[float]) -> Estimates:
    return estimate(np.array(values, dtype=float)[None, None])


def numbers(found: Estimates) -> dict[str, float]:
    """Return a mean over perturbations and its 95 % interval."""
    return {"mean": float(found.mean[0]), "low": float(found.low[0]), "high": float(found.high[0])}


def summary(rows: list[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Return means over perturbations with intervals, per kind: of the model, floors and ceiling, and of the model minus each floor, paired."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        of = [row[kind] for row in rows]
        found[kind] = {name: numbers(_estimate([row[name] for row in of])) for name in ("model", *FLOORS, "ceiling")}
        found[kind]["above"] = {
            floor: numbers(_estimate([row["model"] - row[floor] for row in of])) for floor in FLOORS
        }
    return found


def verdict(summed: dict[str, Any], n: int) -> str:
    """Return in words whether whole effects are predicted better than by either floor; `summed` is what `summary` gives, n the perturbations."""
    if n < MIN_PERTURBATIONS:
        return f"cannot tell: {n} test perturbations, and fewer than {MIN_PERTURBATIONS} tell nothing"
    whole = summed["whole"]
    for floor, words in FLOORS.items():
        least = LEAST * np.nan_to_num(whole["ceiling"]["mean"] - whole[floor]["mean"], nan=1.0)
        if not whole["above"][floor]["low"] > max(least, NEGLIGIBLE):
            return f"no better than {words}"
    best = max(FLOORS, key=lambda floor: whole[floor]["mean"])
    above = whole["above"][best]
    way = whole["ceiling"]["mean"] - whole[best]["mean"]
    share = f", {100 * above['mean'] / way:.0f} % of the way to the ceiling" if way > 0 else ""
    return f"better than {FLOORS[best]} by {above['mean']:.2f} ({above['low']:.2f} to {above['high']:.2f}) in agreement{share}"


def sentence(summed: dict[str, Any]) -> str:
    """Return both kinds of agreement in words, each with its floors and its ceiling."""
    whole, specific = (
        {name: found["mean"] for name, found in summed[kind].items() if name != "above"} for kind in KINDS
    )
    return (
        f"Agreement of whole effects {whole['model']:.2f}: no change {whole['no_change']:.0f}, the mean effect of training "
        f"{whole['perturbed_mean']:.2f}, ceiling {whole['ceiling']:.2f}. Beyond that mean {specific['model']:.2f}: both floors "
        f"{specific['no_change']:.0f}, ceiling {specific['ceiling']:.2f}"
    )
