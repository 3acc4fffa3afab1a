"""Unseen genes: which training genes an unseen gene borrows its latent shifts from, and how strongly.

A network cannot know how far it may trust the vector of a gene that training never perturbed. So such a gene borrows.
For each cell a training gene is sampled, by the similarity of gene vectors. The cell gets the latent shift of this
gene, times a strength. Bandwidth, tempering and strength are those that predict each training gene best from the
others, by the mean Euclidean distance of effects.
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
    """Weights over training genes, and the share of their effect that an unseen gene has in expectation.

    Attributes
    ----------
    genes
        Training genes with a single effect.
    vectors
        Their standardized embeddings, (genes, dimensions).
    sizes
        Norms of their effects, (genes,).
    bandwidth
        Of the Gaussian kernel, in units of the median distance. Infinite: all genes have the same weight.
    tempering
        1: a gene's weight is divided by the norm of its effect, so that no strong gene dominates. 0: it is not.
    strength
        0 to 1: share of the borrowed effect that an unseen gene has.
    """

    genes: list[str]
    vectors: np.ndarray
    sizes: np.ndarray
    bandwidth: float = np.inf
    tempering: float = 0.0
    strength: float = 1.0

    @classmethod
    def fit(cls, first: Effects, second: Effects, vectors: dict[str, np.ndarray]) -> "Neighbours":
        """Choose bandwidth, tempering and strength by leaving out one training gene, or compound, at a time.

        A compound is left out with all its doses.

        Parameters
        ----------
        first, second
            The same effects against disjoint controls: one table predicts the other, in both directions.
        vectors
            Standardized embedding per gene.
        """
        by_gene = first.by_gene(), second.by_gene()
        genes = [gene for gene in by_gene[0] if gene in vectors]
        effects = [np.stack([table[gene] for gene in genes]) for table in by_gene]
        sizes = np.linalg.norm((effects[0] + effects[1]) / 2, axis=1)
        first_guess = cls(genes, np.stack([vectors[gene] for gene in genes]), sizes)
        if len(set(map(entity_of, genes))) < LEAST_GENES:
            return first_guess
        lowest, chosen = np.inf, first_guess
        for bandwidth, tempering in itertools.product(BANDWIDTHS, TEMPERINGS):
            candidate = replace(first_guess, bandwidth=bandwidth, tempering=tempering)
            weights = candidate.weights(first_guess.vectors, leave_out_self=True)
            borrowed = [weights @ table for table in effects]
            for strength in STRENGTHS:
                errors = [np.linalg.norm(effects[1 - i] - strength * borrowed[i], axis=1).mean() for i in (0, 1)]
                if sum(errors) < lowest:
                    lowest, chosen = sum(errors), replace(candidate, strength=float(strength))
        return chosen

    def state(self) -> dict[str, Any]:
        """Return all attributes as a checkpoint may hold them."""
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
        logits = np.zeros_like(distances)
        if np.isfinite(self.bandwidth):
            logits = -0.5 * (distances / (self.bandwidth * scale)) ** 2
        logits = logits - self.tempering * np.log(np.maximum(self.sizes, 1e-12))
        if leave_out_self:
            names = np.array(list(map(entity_of, self.genes)))
            logits[names[:, None] == names] = -np.inf
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)
