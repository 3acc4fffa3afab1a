"""A metric: a function of `Scored`, and the facts that a reader of its values needs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from perturbflow.evaluation.scored import Scored

# Sources.
AHLMANN_ELTZE = "Ahlmann-Eltze et al., Nat Methods 2025"
SYSTEMA = "Viñas Torné et al. (Systema), Nat Biotechnol 2025"
PERTURBENCH = "Wu et al. (PerturBench), NeurIPS D&B 2025"
VCC = "Virtual Cell Challenge 2026"
VCC_2025 = "Virtual Cell Challenge 2025"
CELL_EVAL = "cell-eval 0.8"
MEJIA = "Mejia et al., arXiv:2506.22641"
SCPERTEVAL = "scPertEval 0.2"
SZEKELY = "Székely & Rizzo 2013"
OURS = "this repository"

INF = float("inf")


class Quantity(NamedTuple):
    """A kind of values: their unit, and the range that they are in."""

    unit: str
    range: tuple[float, float]


LOG1P = Quantity("log1p expression", (0.0, INF))
LOG1P_SQUARED = Quantity("log1p expression²", (0.0, INF))
CORRELATION = Quantity("correlation", (-1.0, 1.0))
SHARE = Quantity("share", (0.0, 1.0))
RATIO = Quantity("ratio", (0.0, INF))
SIGNED_RATIO = Quantity("ratio", (-INF, INF))
R_SQUARED = Quantity("ratio", (-INF, 1.0))
DISTANCE = Quantity("component", (0.0, INF))
SIGNED_DISTANCE = Quantity("component", (-INF, INF))
KERNEL = Quantity("kernel", (-2.0, 2.0))

Family = Literal[
    "error", "effect", "ranking", "discrimination", "weighted", "differential_expression", "distribution", "on_target"
]
Direction = Literal["higher", "lower", "target"]
Needs = Literal["pseudobulk", "cells", "counts", "de"]
Function = Callable[[Scored], np.ndarray]
Correction = Callable[[np.ndarray, Scored], np.ndarray]


@dataclass(frozen=True)
class Metric:
    """One score. Its name states its variant.

    Attributes
    ----------
    function
        Scored → one value per perturbation, (P,); NaN where it is undefined.
    formula
        The function's docstring, in one line.
    direction
        higher or lower is better, or target: nearer to `perfect` is.
    unit
        Of a value: log1p expression, its square, distance in principal components, share, correlation, ratio.
    needs
        The data that it is computed from: pseudobulk (means of log1p cells), counts (unlogged normalized counts;
        predictions hold no others), cells, or de (tests against controls).
    perfect, useless
        Value of a prediction that is the truth, and of one of no use (no change, or chance).
        `useless` is None where it depends on the data.
    headline
        Whether verdicts on its family are given on it. No headline metric sees a perturbed gene: its level is the
        easiest part of an effect.
    correction
        Takes the noise of the duplicate off its values (`reachable`). It is None where the metric has no such bias:
        distances between distributions are free of bias, or made for equal distributions. It is also None where no
        formula holds (shares of ranks, tests). There the duplicate is the ceiling.
    """

    name: str
    function: Function
    family: Family
    formula: str
    source: str
    direction: Direction
    unit: str
    range: tuple[float, float]
    needs: Needs
    perfect: float
    useless: float | None
    headline: bool = False
    correction: Correction | None = None

    def reachable(self, scored: Scored) -> np.ndarray:
        """Return the values of a perfect predictor of the mean, (P,), given half of the measured cells."""
        values = self.function(scored)
        return values if self.correction is None else self.correction(values, scored)

    @property
    def reading(self) -> str:
        """Which way is better, in words."""
        return f"nearer to {self.perfect:g} is better" if self.direction == "target" else f"{self.direction} is better"

    def loss(self, values: np.ndarray) -> np.ndarray:
        """Return how far values are from perfect, lower is better.

        A loss is below 0 only by the noise of a metric without bias.
        """
        if self.direction == "target":
            return np.abs(values - self.perfect)
        return self.perfect - values if self.direction == "higher" else values - self.perfect


def metric(
    family: Family,
    source: str,
    direction: Direction,
    quantity: Quantity,
    needs: Needs,
    *,
    perfect: float,
    useless: float | None = None,
    headline: bool = False,
    correction: Correction | None = None,
) -> Callable[[Function], Metric]:
    """Make a metric of a function, see `Metric`: its name is the function's, its formula the function's docstring."""

    def decorate(function: Function) -> Metric:
        name, formula = function.__name__, " ".join((function.__doc__ or "").split())
        return Metric(
            name,
            function,
            family,
            formula,
            source,
            direction,
            *quantity,
            needs,
            perfect,
            useless,
            headline,
            correction,
        )

    return decorate
