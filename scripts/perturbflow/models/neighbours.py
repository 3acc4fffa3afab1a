"""What training says about a gene that it never saw perturbed: which genes to borrow from, and how much to believe them.

A network that is handed the vector of an unseen gene answers with the confidence of one that it knows. Here the answer is
borrowed: each cell gets what the perturbation of one training gene would do to it, drawn by similarity of gene vectors, and
the displacement is scaled by a strength. Bandwidth and strength are those that predict best each training gene from the others.
"""

from dataclasses import dataclass

import numpy as np

from perturbflow.models.effects import Effects

BANDWIDTHS = (np.inf, 1.0, 0.5, 0.25)
LEAST_GENES = 3


@dataclass(frozen=True)
class Neighbours:
    """Weights over training genes, and the share of their effect that an unseen gene is expected to have.

    Attributes
    ----------
    genes
        Training genes with a single effect.
    vectors
        Their standardized embeddings, (genes, dimensions).
    bandwidth
        Of the Gaussian kernel, in units of the median distance; infinite weighs all genes alike.
    strength
        0 to 1: slope of measured on borrowed effects, over training genes left out in turn.
    """

    genes: list[str]
    vectors: np.ndarray
    bandwidth: float
    strength: float

    @classmethod
    def fit(cls, effects: Effects, vectors: dict[str, np.ndarray]) -> "Neighbours":
        """Choose bandwidth and strength by leaving out each training gene in turn."""
        single = effects.single or dict(zip(effects.labels, effects.values, strict=True))
        genes = [gene for gene in single if gene in vectors]
        if not genes:  # combinations only
            return cls(effects.genes, np.stack([vectors[gene] for gene in effects.genes]), np.inf, 1.0)
        table = np.stack([vectors[gene] for gene in genes])
        measured = np.stack([single[gene] for gene in genes])
        best = cls(genes, table, np.inf, 1.0)
        if len(genes) < LEAST_GENES:
            return best
        lowest = np.inf
        for bandwidth in BANDWIDTHS:
            weights = cls(genes, table, bandwidth, 1.0).weights(table, leave_out_self=True)
            borrowed = weights @ measured
            strength = float(np.clip((borrowed * measured).sum() / max((borrowed**2).sum(), 1e-12), 0.0, 1.0))
            error = float(((measured - strength * borrowed) ** 2).sum())
            if error < lowest:
                lowest, best = error, cls(genes, table, bandwidth, strength)
        return best

    def weights(self, vectors: np.ndarray, *, leave_out_self: bool = False) -> np.ndarray:
        """Return weights over training genes that sum to 1, (vectors, genes)."""
        distances = np.linalg.norm(vectors[:, None] - self.vectors[None], axis=-1)
        positive = distances[distances > 0]
        scale = float(np.median(positive)) if positive.size else 1.0
        logits = -0.5 * (distances / (self.bandwidth * scale)) ** 2 if np.isfinite(self.bandwidth) else np.zeros_like(distances)
        if leave_out_self:
            np.fill_diagonal(logits, -np.inf)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)
