"""The metrics, and what has to be known to read them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from perturbflow.evaluation import differential as d
from perturbflow.evaluation import distributions as f
from perturbflow.evaluation import pseudobulk as e
from perturbflow.evaluation import reachable as r
from perturbflow.evaluation.scored import Scored

AHLMANN_ELTZE = "Ahlmann-Eltze et al., Nat Methods 2025"
SYSTEMA = "Viñas Torné et al. (Systema), Nat Biotechnol 2025"
PERTURBENCH = "Wu et al. (PerturBench), NeurIPS D&B 2025"
VCC = "Virtual Cell Challenge 2026"
VCC_2025 = "Virtual Cell Challenge 2025"
CELL_EVAL = "cell-eval 0.8"
MEJIA = "Mejia et al., arXiv:2506.22641"
SCPERTEVAL = "scPertEval 0.2"
OURS = "this repository"

Family = Literal[
    "error", "effect", "ranking", "discrimination", "weighted", "differential_expression", "distribution", "on_target"
]
Direction = Literal["higher", "lower", "target"]
Needs = Literal["pseudobulk", "cells", "counts", "de"]
Correction = Callable[[np.ndarray, Scored], np.ndarray]


@dataclass(frozen=True)
class Metric:
    """One score: its name says its variant.

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
        What it is computed from: pseudobulk (means of log1p cells), counts (unlogged normalized counts; predictions hold
        no others), cells, or de (tests against controls).
    perfect, useless
        Value of a prediction that is the truth, and of one of no use (no change, or chance); None where that depends on the data.
    headline
        Whether verdicts on its family are given on it. None of these sees a perturbed gene: its level is the easiest part of an effect.
    correction
        Takes the noise of the duplicate off its values (`reachable`). None where the metric has no such bias (distances between distributions,
        free of bias or made for equal ones), and where there is no formula that holds (shares of ranks, tests): the duplicate is the ceiling.
    """

    name: str
    function: Callable[[Scored], np.ndarray]
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
        """Return what a perfect predictor of the mean would have, (P,), given half of the measured cells as the prediction."""
        values = self.function(scored)
        return values if self.correction is None else self.correction(values, scored)

    @property
    def reading(self) -> str:
        """Which way is better, in words."""
        return f"nearer to {self.perfect:g} is better" if self.direction == "target" else f"{self.direction} is better"

    def loss(self, values: np.ndarray) -> np.ndarray:
        """Return how far values are from perfect, lower is better; below 0 only by the noise of a metric without bias."""
        if self.direction == "target":
            return np.abs(values - self.perfect)
        return self.perfect - values if self.direction == "higher" else values - self.perfect


def _metric(function: Callable[[Scored], np.ndarray], family: Family, source: str, direction: Direction, unit: str, range_: tuple[float, float],
            needs: Needs, perfect: float, useless: float | None, *, headline: bool = False, correction: Correction | None = None) -> Metric:  # fmt: skip
    formula = " ".join((function.__doc__ or "").split())
    return Metric(
        function.__name__,
        function,
        family,
        formula,
        source,
        direction,
        unit,
        range_,
        needs,
        perfect,
        useless,
        headline,
        correction,
    )


INF = float("inf")
POSITIVE, ANY, SHARE, CORRELATION = (0.0, INF), (-INF, INF), (0.0, 1.0), (-1.0, 1.0)

METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        _metric(e.mae, "error", VCC_2025, "lower", "log1p expression", POSITIVE, "pseudobulk", 0.0, None, correction=r.of_errors),
        _metric(e.l2_heg1000, "error", AHLMANN_ELTZE, "lower", "log1p expression", POSITIVE, "pseudobulk", 0.0, None, correction=r.of_errors),
        _metric(e.l2_heg1000_off_target, "error", OURS, "lower", "log1p expression", POSITIVE, "pseudobulk", 0.0, None, headline=True, correction=r.of_errors),
        _metric(e.expr_mse_unbiased_norm, "error", VCC, "lower", "ratio", ANY, "counts", 0.0, 1.0),
        _metric(e.pearson_delta_ctrl, "effect", AHLMANN_ELTZE, "higher", "correlation", CORRELATION, "pseudobulk", 1.0, 0.0, correction=r.of_correlations),
        _metric(e.pearson_delta_ctrl_off_target, "effect", OURS, "higher", "correlation", CORRELATION, "pseudobulk", 1.0, 0.0, correction=r.of_correlations),
        _metric(e.pearson_delta_pert, "effect", SYSTEMA, "higher", "correlation", CORRELATION, "pseudobulk", 1.0, 0.0, correction=r.of_correlations),
        _metric(e.pearson_delta_pert_off_target, "effect", OURS, "higher", "correlation", CORRELATION, "pseudobulk", 1.0, 0.0, headline=True, correction=r.of_correlations),
        _metric(e.cosine_logfc, "effect", PERTURBENCH, "higher", "correlation", CORRELATION, "pseudobulk", 1.0, 0.0, correction=r.of_correlations),
        _metric(e.rank_cosine, "ranking", PERTURBENCH, "lower", "share", SHARE, "pseudobulk", 0.0, 0.5),
        _metric(e.rank_cosine_off_target, "ranking", OURS, "lower", "share", SHARE, "pseudobulk", 0.0, 0.5, headline=True),
        _metric(e.rank_rmse, "ranking", PERTURBENCH, "lower", "share", SHARE, "pseudobulk", 0.0, 0.5),
        _metric(e.pds_l1, "discrimination", VCC_2025, "higher", "share", SHARE, "counts", 1.0, 0.5),
        _metric(e.pds_l2, "discrimination", CELL_EVAL, "higher", "share", SHARE, "counts", 1.0, 0.5),
        _metric(e.pds_cosine, "discrimination", VCC, "higher", "share", SHARE, "counts", 1.0, 0.5, headline=True),
        _metric(e.centroid_accuracy, "discrimination", SYSTEMA, "higher", "share", SHARE, "pseudobulk", 1.0, 0.5),
        _metric(e.wmse, "weighted", MEJIA, "lower", "log1p expression²", POSITIVE, "pseudobulk", 0.0, None, correction=r.of_weighted_errors),
        _metric(e.r2_w_delta, "weighted", MEJIA, "higher", "ratio", (-INF, 1.0), "pseudobulk", 1.0, 0.0, correction=r.of_weighted_r2),
        _metric(e.r2_w_delta_off_target, "weighted", OURS, "higher", "ratio", (-INF, 1.0), "pseudobulk", 1.0, 0.0, headline=True, correction=r.of_weighted_r2_off_target),
        _metric(d.sig_jaccard, "differential_expression", VCC, "higher", "share", SHARE, "de", 1.0, 0.0),
        _metric(d.direction_fidelity, "differential_expression", VCC, "higher", "share", SHARE, "de", 1.0, 0.0),
        _metric(d.direction_reach, "differential_expression", VCC, "higher", "share", SHARE, "de", 1.0, None),
        _metric(d.lfc_nmae, "differential_expression", VCC, "lower", "ratio", POSITIVE, "de", 0.0, 1.0),
        _metric(d.overlap_at_n, "differential_expression", CELL_EVAL, "higher", "share", SHARE, "de", 1.0, 0.0),
        _metric(d.auprc, "differential_expression", CELL_EVAL, "higher", "share", SHARE, "de", 1.0, None, headline=True),
        _metric(f.energy_distance, "distribution", "Székely & Rizzo 2013", "lower", "component", ANY, "cells", 0.0, None),
        _metric(f.energy_distance_off_target, "distribution", OURS, "lower", "component", ANY, "cells", 0.0, None, headline=True),
        _metric(f.mmd, "distribution", SCPERTEVAL, "lower", "kernel", (-2.0, 2.0), "cells", 0.0, None),
        _metric(f.sinkhorn_w2, "distribution", SCPERTEVAL, "lower", "component", POSITIVE, "cells", 0.0, None),
        _metric(f.variance_ratio, "distribution", OURS, "target", "ratio", POSITIVE, "cells", 1.0, None),
        _metric(f.quantile_coverage, "distribution", OURS, "target", "share", SHARE, "cells", 0.9, None),
        _metric(e.mae_on_target, "on_target", OURS, "lower", "log1p expression", POSITIVE, "pseudobulk", 0.0, None, correction=r.of_errors),
    )
}  # fmt: skip
