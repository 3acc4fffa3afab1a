"""Inputs of the metrics for one model: pseudobulks, tests and components of every perturbation."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

NO_EFFECT = 1e-5  # an effect smaller than this in every gene is none: rounding errors would give its direction
BULK_TOTAL = 5e4
FDR = 0.05
# Fields of `Scored` that are None where no metric needs tests or cells.
NEEDED = ("predicted_test", "measured_test", "coverage", "predicted_components", "measured_components",
          "predicted_off_target_components", "measured_off_target_components", "predicted_start")  # fmt: skip


@dataclass(frozen=True)
class Differential:
    """Differential expression of cells against measured controls, (P, genes) each; NaN where a gene was not tested.

    Attributes
    ----------
    z
        Standardized rank sum; positive where expression is higher than in controls.
    q
        p-value, adjusted within the perturbation (Benjamini and Hochberg 1995).
    log_fold_change
        log2((m + 10⁻⁹) / (m_c + 10⁻⁹)) of the mean counts per million of cells and of controls.
    """

    z: np.ndarray
    q: np.ndarray
    log_fold_change: np.ndarray

    @cached_property
    def is_significant(self) -> np.ndarray:
        """Mask of genes with q below 0.05."""
        return self.q < FDR


@dataclass(frozen=True)
class Scored:
    """All perturbations of one model, as the metrics read them. Arrays are (P perturbations, genes) without a note.

    Where only some metrics are asked for, a field that none of them needs (`Metric.needs`) is None.

    Attributes
    ----------
    labels
        The P perturbations.
    predicted, measured, control
        x̂, x̄ and c̄, log1p-normalized.
    reference
        r: mean of the training perturbations' means, in the strata of the perturbation.
    predicted_bulk, measured_bulk, control_bulk
        log(1 + 5·10⁴ · share of the summed normalized counts).
    predicted_bulk_variance, measured_bulk_variance, control_bulk_variance
        Sampling variance of the three.
    highly_expressed
        Mask of the 1,000 genes with the highest mean in measured controls, (genes,).
    own_target
        Mask of the perturbed genes of each perturbation.
    predicted_test, measured_test
        Differential expression of predicted and of measured cells.
    predicted_variance, measured_variance
        Variance over the cells of a perturbation, log1p-normalized.
    coverage
        Share of measured cells between the 5 and 95 % quantiles of the predicted ones.
    predicted_components, measured_components
        Per perturbation, cells × 50 principal components fitted on training cells.
    predicted_off_target_components, measured_off_target_components
        The same of cells whose perturbed genes are set to 0.
    predicted_start
        Per perturbation, which control each of these predicted cells started from, (cells,).
    n_cells, n_predicted
        Measured cells that are scored, and predicted ones, (P,).
    reliability
        Pearson's r of the effects of the two halves of the measured cells, each against its own half of the
        controls, (P,).
    effect_size
        √max(0, ‖x̄ − c̄‖² − sampling variance of x̄ and c̄, summed over genes), (P,).
    """

    labels: list[str]
    predicted: np.ndarray
    measured: np.ndarray
    control: np.ndarray
    reference: np.ndarray
    predicted_bulk: np.ndarray
    measured_bulk: np.ndarray
    control_bulk: np.ndarray
    predicted_bulk_variance: np.ndarray
    measured_bulk_variance: np.ndarray
    control_bulk_variance: np.ndarray
    highly_expressed: np.ndarray
    own_target: np.ndarray
    predicted_test: Differential
    measured_test: Differential
    predicted_variance: np.ndarray
    measured_variance: np.ndarray
    coverage: np.ndarray
    predicted_components: list[np.ndarray]
    measured_components: list[np.ndarray]
    predicted_off_target_components: list[np.ndarray]
    measured_off_target_components: list[np.ndarray]
    predicted_start: list[np.ndarray]
    n_cells: np.ndarray
    n_predicted: np.ndarray
    reliability: np.ndarray
    effect_size: np.ndarray

    @cached_property
    def weight(self) -> np.ndarray:
        """((|t| − min|t|) / (max|t| − min|t|))² of each gene, divided by its sum (Mejia et al. 2025), (P, genes).

        t is Welch's, of the measured cells against those of all other perturbations that are scored. The weight is
        NaN where either is a single cell.
        """
        n, n_others = self.n_cells[:, None], self.n_cells.sum() - self.n_cells[:, None]
        sums, squares = n * self.measured, (n - 1) * np.nan_to_num(self.measured_variance) + n * self.measured**2
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = (sums.sum(axis=0) - sums) / n_others
            variance = np.maximum(squares.sum(axis=0) - squares - n_others * mean**2, 0.0) / (n_others - 1)
            error = np.sqrt(self.measured_variance / n + variance / n_others)
            t = np.abs(self.measured - mean) / error
        t = np.where(error > 0, t, 0.0)
        t = (t - t.min(axis=1, keepdims=True)) ** 2
        total = t.sum(axis=1, keepdims=True)
        weight = np.divide(t, total, out=np.full(t.shape, 1 / t.shape[1]), where=total > 0)
        return np.where((n < 2) | (n_others < 2), np.nan, weight)

    @cached_property
    def weight_off_target(self) -> np.ndarray:
        """The weight of the genes that are not perturbed, divided by its sum, (P, genes)."""
        weight = np.where(self.own_target, 0.0, self.weight)
        total = weight.sum(axis=1, keepdims=True)
        return np.divide(weight, total, out=np.full(weight.shape, np.nan), where=total > 0)
