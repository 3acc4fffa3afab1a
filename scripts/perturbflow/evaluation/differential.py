"""Metrics of differential expression, of predicted and of measured cells against the same measured controls.

The test is Wilcoxon's rank sum, two-sided, within batch and cell type (`ranks.SortedCells.rank_sum`). Genes below 5
counts per million in controls (of the pairs' genes) are not tested, nor are the perturbed genes. q is Benjamini and
Hochberg's within a perturbation.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from perturbflow.evaluation.metric import CELL_EVAL, RATIO, SHARE, VCC, metric
from perturbflow.evaluation.scored import Scored

PURITY = 0.9
MIN_GENES_OF_NMAE = 10


@dataclass(frozen=True)
class TestedGenes:
    """The tested genes of one perturbation, (genes,) each; `_hat` and `is_called` are of the predicted cells."""

    z_hat: np.ndarray
    log_fold_change_hat: np.ndarray
    is_called: np.ndarray  # significant in the predicted cells
    log_fold_change: np.ndarray
    is_significant: np.ndarray  # in the measured cells

    @property
    def has_right_sign(self) -> np.ndarray:
        """Whether the predicted log fold change has the sign of the measured one."""
        return np.sign(self.log_fold_change_hat) == np.sign(self.log_fold_change)


def _per_perturbation(scored: Scored, function: Callable[[TestedGenes], float]) -> np.ndarray:
    """Return a score per perturbation, (P,)."""
    predicted, measured = scored.predicted_test, scored.measured_test
    values = []
    for i in range(len(scored.labels)):
        genes = np.isfinite(measured.z[i])
        tested = TestedGenes(
            predicted.z[i, genes],
            predicted.log_fold_change[i, genes],
            predicted.is_significant[i, genes],
            measured.log_fold_change[i, genes],
            measured.is_significant[i, genes],
        )
        values.append(function(tested))
    return np.array(values, dtype=float)


def _descending(values: np.ndarray) -> np.ndarray:
    return np.argsort(-values, kind="stable")


def _average_precision(is_significant: np.ndarray, score: np.ndarray) -> float:
    """Return Σ (R_k − R_{k−1}) P_k over the distinct scores; sklearn's, whose checks cost more than the sum."""
    order = _descending(score)
    found, ranked = np.cumsum(is_significant[order]), score[order]
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # of those with an equal score
    return float((np.diff(found[last], prepend=0) * found[last] / (last + 1)).sum() / found[-1])


@metric("differential_expression", VCC, "higher", SHARE, "de", perfect=1.0, useless=0.0)
def sig_jaccard(scored: Scored) -> np.ndarray:
    """abs(R ∩ R̂) / abs(R ∪ R̂) of the genes with q < 0.05; 1 where both are empty."""

    def jaccard(genes: TestedGenes) -> float:
        union = (genes.is_called | genes.is_significant).sum()
        return (genes.is_called & genes.is_significant).sum() / union if union else 1.0

    return _per_perturbation(scored, jaccard)


@metric("differential_expression", VCC, "higher", SHARE, "de", perfect=1.0, useless=0.0)
def direction_fidelity(scored: Scored) -> np.ndarray:
    """Share k / max(n̂, n), n̂ and n the genes called in the prediction and in the measurement.

    k counts the genes called in the prediction whose fold change has the measured sign. NaN where nothing is called.
    """

    def fidelity(genes: TestedGenes) -> float:
        n = max(genes.is_called.sum(), genes.is_significant.sum())
        return (genes.is_called & genes.has_right_sign).sum() / n if n else np.nan

    return _per_perturbation(scored, fidelity)


@metric("differential_expression", VCC, "higher", SHARE, "de", perfect=1.0)
def direction_reach(scored: Scored) -> np.ndarray:
    """k*/n of the n measured significant genes, most confident prediction first.

    k* is the longest prefix with at least 0.9 of signs right. Of equally confident genes the one with the larger
    abs(lfc) is first. NaN where n is 0.
    """

    def reach(genes: TestedGenes) -> float:
        significant = genes.is_significant
        if not significant.any():
            return np.nan
        order = np.lexsort((-np.abs(genes.log_fold_change_hat), -np.abs(genes.z_hat)))
        is_right = genes.has_right_sign[order][significant[order]]
        length = np.arange(1, len(is_right) + 1)
        return (length * (np.cumsum(is_right) >= PURITY * length - 1e-9)).max() / len(is_right)

    return _per_perturbation(scored, reach)


@metric("differential_expression", VCC, "lower", RATIO, "de", perfect=0.0, useless=1.0)
def lfc_nmae(scored: Scored) -> np.ndarray:
    """Σ abs(lfĉ − lfc) / Σ abs(lfc) over the measured significant genes; NaN below 10 of these.

    lfc = log2((m + 10⁻⁹)/(m_c + 10⁻⁹)) of mean counts per million, not of logarithms.
    """

    def error(genes: TestedGenes) -> float:
        significant = genes.is_significant
        if significant.sum() < MIN_GENES_OF_NMAE:
            return np.nan
        difference = np.abs(genes.log_fold_change_hat - genes.log_fold_change)
        return difference[significant].sum() / np.abs(genes.log_fold_change[significant]).sum()

    return _per_perturbation(scored, error)


@metric("differential_expression", CELL_EVAL, "higher", SHARE, "de", perfect=1.0, useless=0.0)
def overlap_at_n(scored: Scored) -> np.ndarray:
    """Share of the n measured significant genes that are among the n called ones with the largest abs(lfc).

    NaN where n is 0.
    """

    def overlap(genes: TestedGenes) -> float:
        n = genes.is_significant.sum()
        size = np.where(genes.is_called, np.abs(genes.log_fold_change_hat), -1.0)
        strongest = _descending(size)[: min(n, genes.is_called.sum())]
        return genes.is_significant[strongest].sum() / n if n else np.nan

    return _per_perturbation(scored, overlap)


@metric("differential_expression", CELL_EVAL, "higher", SHARE, "de", perfect=1.0, headline=True)
def auprc(scored: Scored) -> np.ndarray:
    """Average precision of −log10 p of the prediction for the measured significant genes.

    p orders genes as the standardized rank sum does, which does not run out of digits. NaN where none or all are
    significant.
    """

    def precision(genes: TestedGenes) -> float:
        significant = genes.is_significant
        is_defined = 0 < significant.sum() < len(significant)
        return _average_precision(significant, np.abs(genes.z_hat)) if is_defined else np.nan

    return _per_perturbation(scored, precision)
