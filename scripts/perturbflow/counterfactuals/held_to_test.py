"""A trained model held to the test perturbations: agreement, intervals, sureness and the perturbed genes themselves."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import norm, spearmanr

from perturbflow.counterfactuals.agreement import FLOORS, agreement, summary, verdict
from perturbflow.counterfactuals.contexts import MeasuredContexts, contexts_of
from perturbflow.counterfactuals.intervals import relative_widths
from perturbflow.evaluation.bootstrap import MIN_PERTURBATIONS, mean_with_interval
from perturbflow.evaluation.similarity import correlation
from perturbflow.genes.symbols import entities_of
from perturbflow.models.base import Model
from perturbflow.models.calibration import Calibration, Scale, measured_by, novelty_of
from perturbflow.models.effects import Effects
from perturbflow.pairs import Pairs
from perturbflow.progress import progressed

NOMINAL = (0.8, 0.9)  # levels of intervals
MAX_CELLS = 300  # cells of a perturbation whose controls are asked


def asked_effect(model: Model, cells: Pairs, label: str, seed: int) -> np.ndarray:
    """Return the model's effect of a perturbation in the controls of its own cells, (genes,)."""
    rows = cells.cells_of(label)
    if len(rows) > MAX_CELLS:
        rows = np.random.default_rng(seed).choice(rows, MAX_CELLS, replace=False)
    starts, times = np.unique(cells.control_index[rows, 0], return_counts=True)
    context = cells.context_of(starts)
    return np.average(
        model.individual_effects(cells.controls_at(starts).toarray(), label, seed, context), axis=0, weights=times
    )


@dataclass(frozen=True)
class _Prediction:
    """Predicted and measured effect of a test perturbation, (genes,) each.

    Attributes
    ----------
    novelty
        What training knew of it.
    halves
        The effect measured by each half of its cells.
    is_kept
        Mask of the genes that are not perturbed.
    sampling
        Sampling variance of its measurement, in units of a gene's variance.
    uncertainty
        The model's own variance of the mean effect; None where it has none.
    """

    label: str
    novelty: str
    predicted: np.ndarray
    measured: np.ndarray
    halves: list[np.ndarray]
    is_kept: np.ndarray
    sampling: float
    uncertainty: np.ndarray | None

    @property
    def error(self) -> float:
        """Root mean squared error over the genes that are not perturbed."""
        return float(np.sqrt(np.square(self.predicted - self.measured)[self.is_kept].mean()))

    def targets(self, genes: list[str]) -> list[dict[str, float]]:
        """Return the effect on each perturbed gene that is measured: predicted, measured, and by both halves."""
        column = {gene: i for i, gene in enumerate(genes)}
        rows = []
        for i in (column[gene] for gene in entities_of(self.label) if gene in column):
            a, b = [half[i] for half in self.halves] if len(self.halves) == 2 else [np.nan] * 2
            effects = {"predicted": self.predicted[i], "measured": self.measured[i], "a": a, "b": b}
            rows.append({name: float(value) for name, value in effects.items()})
        return rows


class _Test:
    """The test perturbations that a model and the floors are held to, see `held_to_test`."""

    def __init__(
        self, model: Model, known: Pairs, test: Pairs, calibrations: dict[str, Calibration], scale: Scale, seed: int
    ) -> None:
        effects = Effects.of_training(known)
        self.model, self.test, self.calibrations, self.scale, self.seed = model, test, calibrations, scale, seed
        self.seen = set(effects.labels), set(effects.entities)
        self.mean_effect = effects.values.mean(axis=0)
        self.measured_contexts = MeasuredContexts(known.roles("train"))
        self._relative_widths: dict[str, dict[float, dict]] = {}

    def prediction(self, label: str) -> _Prediction:
        """Predict a perturbation, and bring it together with its measurement."""
        rows = self.test.cells_of(label)
        return _Prediction(
            label,
            novelty_of(label, *self.seen),
            asked_effect(self.model, self.test, label, self.seed),
            self.test.effect_of(label),
            self.test.effects_of_halves(label),
            ~np.isin(self.test.genes, entities_of(label)),
            measured_by(self.test, label),
            self.model.uncertainty(label, self.test.context_of(rows)),
        )

    def row(self, found: _Prediction) -> dict[str, Any]:
        """Return the row of a perturbation in warranty.json."""
        kept, uncertainty = found.is_kept, found.uncertainty
        halves = [half[kept] for half in found.halves]
        contexts = contexts_of(self.test.obs.iloc[self.test.cells_of(found.label)])
        promised = np.nan
        if uncertainty is not None:
            promised = float(np.sqrt((self.scale.variance * found.sampling + uncertainty)[kept].mean()))
        row = {
            "perturbation": found.label,
            "case": found.novelty,
            "error": found.error,
            "agreement": agreement(found.predicted[kept], found.measured[kept], halves, self.mean_effect[kept]),
            "in_other_contexts": self.measured_contexts.is_elsewhere(found.label, contexts),
            "promised": promised,
        }
        for level in NOMINAL:
            row |= self._intervals(found, level)
        return row

    def _intervals(self, found: _Prediction, level: float) -> dict[str, Any]:
        """Return coverage and width of the intervals of one level, of the model, the floors and the truth."""
        kept = found.is_kept
        own = {name: calibration.for_novelty(found.novelty) for name, calibration in self.calibrations.items()}
        guesses = {
            "model": found.predicted,
            "no_change": np.zeros_like(self.mean_effect),
            "perturbed_mean": self.mean_effect,
        }
        reach, held = {}, {}
        for name, guess in guesses.items():
            unit = self.scale.at(found.sampling, found.uncertainty if name == "model" else None)
            reach[name] = own[name].reach(level) * unit[kept]
            held[name] = float((np.abs(found.measured - guess)[kept] <= reach[name]).mean())
        # The truth is off by sampling alone.
        reach["ceiling"] = norm.ppf((1 + level) / 2) * np.sqrt(self.scale.variance * found.sampling)[kept]
        of_model = held.pop("model")
        suffix = _percent(level)
        return {
            f"coverage_{suffix}": of_model if own["model"].labels else np.nan,
            f"coverage_of_floors_{suffix}": held,
            f"width_{suffix}": {
                name: 2 * float(half.mean()) if np.isfinite(half).all() else np.nan for name, half in reach.items()
            },
            f"relative_width_{suffix}": self._relative_width(found.novelty, own, level),
        }

    def _relative_width(self, novelty: str, own: dict[str, Calibration], level: float) -> dict:
        """Return `relative_widths` for all perturbations of one novelty, computed once."""
        of_novelty = self._relative_widths.setdefault(novelty, {})
        if level not in of_novelty:
            of_novelty[level] = relative_widths(own, level)
        return of_novelty[level]


def held_to_test(
    model: Model, known: Pairs, test: Pairs, calibrations: dict[str, Calibration], scale: Scale, seed: int
) -> dict[str, Any]:
    """Hold predicted effects and their intervals, and those of the floors, to the measured effects of the test.

    Parameters
    ----------
    known, test
        Cells that the model may know, and those of the role that it is held to.
    calibrations, scale
        The results of `calibrations_of`.
    """
    test_set = _Test(model, known, test, calibrations, scale, seed)
    rows: list[dict[str, Any]] = []
    targets: list[dict[str, float]] = []
    for label in progressed(test.perturbations, "test perturbations"):
        if model.refusal(label) is None:
            found = test_set.prediction(label)
            rows.append(test_set.row(found))
            targets += found.targets(test.genes)
    labels = calibrations["model"].labels
    counts = {"n_calibration": len(labels), "n_calibration_perturbations": len(set(labels))}
    return {**summary_of(rows, counts), "on_target": _on_target(targets), "perturbations": rows}


def _percent(level: float) -> str:
    """Return a level as the ending of a key."""
    return str(round(100 * level))


def summary_of(rows: list[dict], counts: dict[str, int]) -> dict[str, Any]:
    """Return the summary of rows of test perturbations.

    Parameters
    ----------
    counts
        Numbers of measurements and perturbations that the intervals were calibrated on.
    """
    agreed = summary([row["agreement"] for row in rows])
    return {
        "verdict": verdict(agreed, len(rows)),
        "agreement": agreed,
        "coverage": [_coverage(rows, level, counts) for level in NOMINAL],
        "sureness": _sureness(rows),
    }


def _coverage(rows: list[dict], level: float, counts: dict[str, int]) -> dict[str, Any]:
    """Return coverage and width of the intervals of one level, over test perturbations; `counts` as in `summary_of`."""
    suffix = _percent(level)
    held = mean_with_interval([row[f"coverage_{suffix}"] for row in rows])
    of_floors = [row[f"coverage_of_floors_{suffix}"] for row in rows]
    widths = [row[f"width_{suffix}"] for row in rows]
    relative = [row[f"relative_width_{suffix}"] for row in rows]
    return {
        "nominal": level,
        "measured": held["mean"],
        "low": held["low"],
        "high": held["high"],
        "n_test": len(rows),
        **counts,
        "floors": {floor: mean_with_interval([row[floor] for row in of_floors]) for floor in FLOORS},
        "width": {
            name: mean_with_interval([width[name] for width in widths]) for name in ("model", *FLOORS, "ceiling")
        },
        "relative_width": {
            floor: {
                key: float(np.mean([row[floor][key] for row in relative])) if rows else np.nan
                for key in ("mean", "low", "high")
            }
            for floor in FLOORS
        },
    }


def _sureness(rows: list[dict]) -> dict[str, Any]:
    """Return how promised and actual errors of test perturbations go together.

    Both halves of the perturbations, the one that the model was surest of and the other, have their error and
    agreement.
    """
    ordered = sorted((row for row in rows if np.isfinite(row["promised"])), key=lambda row: row["promised"])
    if len(ordered) < MIN_PERTURBATIONS:
        return {"n": len(ordered)}
    promised, error = (np.array([row[name] for row in ordered]) for name in ("promised", "error"))
    halves = {"surest": ordered[: len(ordered) // 2], "others": ordered[len(ordered) // 2 :]}
    return {
        "n": len(ordered),
        "rank_correlation": float(spearmanr(promised, error).statistic),
        "error_per_promise": float(np.median(error / promised)),
        **{
            name: {
                "error": mean_with_interval([row["error"] for row in half]),
                "agreement": mean_with_interval([row["agreement"]["whole"]["model"] for row in half]),
            }
            for name, half in halves.items()
        },
    }


def _on_target(targets: list[dict[str, float]]) -> dict[str, Any]:
    """Return how well the changes of the perturbed genes themselves are predicted, over all measured ones."""
    if not targets:
        return {"n": 0}
    names = ("predicted", "measured", "a", "b")
    predicted, measured, a, b = (np.array([row[name] for row in targets], dtype=float) for name in names)
    are_enough = len(targets) > 2
    return {
        "n": len(targets),
        "median_predicted": float(np.median(predicted)),
        "median_measured": float(np.median(measured)),
        "same_sign": float((np.sign(predicted) == np.sign(measured)).mean()),
        "same_sign_of_halves": float((np.sign(a) == np.sign(b)).mean()),
        "correlation": correlation(predicted, measured, of_flat=np.nan) if are_enough else np.nan,
        "correlation_of_halves": correlation(a, b, of_flat=np.nan) if are_enough else np.nan,
    }
