"""Metrics of differential expression, of predicted and of measured cells against the same measured controls.

The test is Wilcoxon's rank sum, two-sided, within batch and cell type (`ranks.SortedCells.rank_sum`); genes below 5 counts per million
in controls (of the pairs' genes) and the perturbed genes are left out; q is Benjamini and Hochberg's within a perturbation.
"""

from collections.abc import Callable

import numpy as np

from perturbflow.evaluation.scored import Scored

PURITY = 0.9
MIN_GENES_OF_NMAE = 10


def _per_perturbation(scored: Scored, function: Callable[..., float]) -> np.ndarray:
    """Return a score per perturbation of (predicted, measured) z, lfc and significance over the tested genes."""
    values = []
    for i in range(len(scored.labels)):
        genes = np.isfinite(scored.measured_test.z[i])
        sides = [
            (t.z[i, genes], t.lfc[i, genes], t.is_significant[i, genes])
            for t in (scored.predicted_test, scored.measured_test)
        ]
        values.append(function(*(argument for pair in zip(*sides, strict=True) for argument in pair)))
    return np.array(values, dtype=float)


def _descending(values: np.ndarray) -> np.ndarray:
    return np.argsort(-values, kind="stable")


def _average_precision(is_real: np.ndarray, score: np.ndarray) -> float:
    """Return Σ (R_k − R_{k−1}) P_k over the distinct scores; sklearn's, whose checks cost more than the sum."""
    order = _descending(score)
    found, ranked = np.cumsum(is_real[order]), score[order]
    last = np.flatnonzero(np.append(ranked[1:] != ranked[:-1], True))  # of those with an equal score
    return float((np.diff(found[last], prepend=0) * found[last] / (last + 1)).sum() / found[-1])


def sig_jaccard(scored: Scored) -> np.ndarray:
    """abs(R ∩ R̂) / abs(R ∪ R̂) of the genes with q < 0.05; 1 where both are empty."""

    def one(
        z_hat: np.ndarray, z: np.ndarray, lfc_hat: np.ndarray, lfc: np.ndarray, called: np.ndarray, real: np.ndarray
    ) -> float:
        union = (called | real).sum()
        return (called & real).sum() / union if union else 1.0

    return _per_perturbation(scored, one)


def direction_fidelity(scored: Scored) -> np.ndarray:
    """Share k / max(n̂, n), k the genes called in the prediction whose fold change has the measured sign, n̂ and n the genes called.

    NaN where nothing is called.
    """

    def one(
        z_hat: np.ndarray, z: np.ndarray, lfc_hat: np.ndarray, lfc: np.ndarray, called: np.ndarray, real: np.ndarray
    ) -> float:
        n = max(called.sum(), real.sum())
        return (called & (np.sign(lfc_hat) == np.sign(lfc))).sum() / n if n else np.nan

    return _per_perturbation(scored, one)


def direction_reach(scored: Scored) -> np.ndarray:
    """k*/n of the n measured significant genes, most confident prediction first: the longest prefix with at least 0.9 of signs right.

    NaN where n is 0.
    """

    def one(
        z_hat: np.ndarray, z: np.ndarray, lfc_hat: np.ndarray, lfc: np.ndarray, called: np.ndarray, real: np.ndarray
    ) -> float:
        if not real.any():
            return np.nan
        is_right = (np.sign(lfc_hat) == np.sign(lfc))[real][_descending(np.abs(z_hat[real]))]
        length = np.arange(1, len(is_right) + 1)
        return (length * (np.cumsum(is_right) >= PURITY * length - 1e-9)).max() / len(is_right)

    return _per_perturbation(scored, one)


def lfc_nmae(scored: Scored) -> np.ndarray:
    """Σ abs(lfĉ − lfc) / Σ abs(lfc) over the measured significant genes; NaN below 10 of these.

    lfc = log2((m + 10⁻⁹)/(m_c + 10⁻⁹)) of mean normalized counts, not of logarithms.
    """

    def one(
        z_hat: np.ndarray, z: np.ndarray, lfc_hat: np.ndarray, lfc: np.ndarray, called: np.ndarray, real: np.ndarray
    ) -> float:
        return (
            np.abs(lfc_hat - lfc)[real].sum() / np.abs(lfc[real]).sum() if real.sum() >= MIN_GENES_OF_NMAE else np.nan
        )

    return _per_perturbation(scored, one)


def overlap_at_n(scored: Scored) -> np.ndarray:
    """Share of the n measured significant genes that are among the n called ones with the largest abs(lfc).

    NaN where n is 0.
    """

    def one(
        z_hat: np.ndarray, z: np.ndarray, lfc_hat: np.ndarray, lfc: np.ndarray, called: np.ndarray, real: np.ndarray
    ) -> float:
        n = real.sum()
        strongest = _descending(np.where(called, np.abs(lfc_hat), -1.0))[: min(n, called.sum())]
        return real[strongest].sum() / n if n else np.nan

    return _per_perturbation(scored, one)


def auprc(scored: Scored) -> np.ndarray:
    """Average precision of −log10 p of the prediction for the measured significant genes.

    p orders genes as the standardized rank sum does, which does not run out of digits. NaN where none or all are significant.
    """

    def one(
        z_hat: np.ndarray, z: np.ndarray, lfc_hat: np.ndarray, lfc: np.ndarray, called: np.ndarray, real: np.ndarray
    ) -> float:
        return _average_precision(real, np.abs(z_hat)) if 0 < real.sum() < len(real) else np.nan

    return _per_perturbation(scored, one)
