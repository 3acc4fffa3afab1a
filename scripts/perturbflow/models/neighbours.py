"""What training says about a gene that it never saw perturbed: which genes to borrow from, and how much to believe them.

A network that is handed the vector of an unseen gene answers with the confidence of one that it knows. Here the answer is
borrowed: each cell gets what the perturbation of one training gene would do to it, drawn by similarity of gene vectors, and
the displacement is scaled by a strength. Bandwidth, tempering and strength are those that predict best each training gene
from the others, by the mean Euclidean distance of effects.
"""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy.spatial.distance import cdist, pdist

from perturbflow.genes.symbols import entity_of
from perturbflow.models.effects import Effects

BANDWIDTHS = (np.inf, 1.0, 0.5, 0.25)
TEMPERINGS = (0.0, 1.0)
STRENGTHS = np.linspace(0.0, 1.0, 21)
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
    sizes
        Norms of their effects, (genes,).
    bandwidth
        Of the Gaussian kernel, in units of the median distance; infinite weighs all genes alike.
    tempering
        1 weighs genes by the inverse norm of their effect, so that one strong gene does not speak for all; 0 does not.
    strength
        0 to 1: how much of the borrowed effect an unseen gene is expected to have.
    """

    genes: list[str]
    vectors: np.ndarray
    sizes: np.ndarray
    bandwidth: float = np.inf
    tempering: float = 0.0
    strength: float = 1.0

    @classmethod
    def fit(cls, first: Effects, second: Effects, vectors: dict[str, np.ndarray]) -> "Neighbours":
        """Choose bandwidth, tempering and strength by leaving out each training gene, or compound with all its doses, in turn.

        Parameters
        ----------
        first, second
            The same effects against disjoint controls: what is borrowed comes from one, what is predicted from the other.
        vectors
            Standardized embedding per gene.
        """
        by_gene = first.by_gene(), second.by_gene()
        genes = [gene for gene in by_gene[0] if gene in vectors]
        moved = [np.stack([effects[gene] for gene in genes]) for effects in by_gene]
        best = cls(
            genes, np.stack([vectors[gene] for gene in genes]), np.linalg.norm((moved[0] + moved[1]) / 2, axis=1)
        )
        if len(set(map(entity_of, genes))) < LEAST_GENES:
            return best
        lowest, chosen = np.inf, best
        for bandwidth, tempering in itertools.product(BANDWIDTHS, TEMPERINGS):
            candidate = replace(best, bandwidth=bandwidth, tempering=tempering)
            weights = candidate.weights(best.vectors, leave_out_self=True)
            borrowed = [weights @ effects for effects in moved]
            for strength in STRENGTHS:
                errors = [np.linalg.norm(moved[1 - i] - strength * borrowed[i], axis=1).mean() for i in (0, 1)]
                if sum(errors) < lowest:
                    lowest, chosen = sum(errors), replace(candidate, strength=float(strength))
        return chosen

    def state(self) -> dict[str, Any]:
        """Return all of it as a checkpoint may hold it."""
        return {**vars(self), "vectors": torch.as_tensor(self.vectors), "sizes": torch.as_tensor(self.sizes)}

    @classmethod
    def restored(cls, state: dict[str, Any]) -> "Neighbours":
        """Undo `state`."""
        return cls(**{**state, "vectors": state["vectors"].numpy(), "sizes": state["sizes"].numpy()})

    def weights(self, vectors: np.ndarray, *, leave_out_self: bool = False) -> np.ndarray:
        """Return weights over training genes that sum to 1, (vectors, genes)."""
        distances = cdist(vectors, self.vectors)
        among = pdist(self.vectors)
        scale = float(np.median(among[among > 0])) if (among > 0).any() else 1.0
        logits = (
            -0.5 * (distances / (self.bandwidth * scale)) ** 2
            if np.isfinite(self.bandwidth)
            else np.zeros_like(distances)
        )
        logits = logits - self.tempering * np.log(np.maximum(self.sizes, 1e-12))
        if leave_out_self:
            names = np.array(list(map(entity_of, self.genes)))
            logits[names[:, None] == names] = -np.inf
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)
