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
GENES_AT_ONCE = 1000  # weights of all training genes over all would be large tables


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
    apart
        Median distance between their embeddings.
    bandwidth
        Of the Gaussian kernel, in units of `apart`. Infinite: all genes have the same weight.
    tempering
        1: a gene's weight is divided by the norm of its effect, so that no strong gene dominates. 0: it is not.
    strength
        0 to 1: share of the borrowed effect that an unseen gene has.
    """

    genes: list[str]
    vectors: np.ndarray
    sizes: np.ndarray
    apart: float
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
        known = np.stack([vectors[gene] for gene in genes])
        first_guess = cls(genes, known, sizes, _apart(known))
        if len(set(map(entity_of, genes))) < LEAST_GENES:
            return first_guess
        lowest, chosen = np.inf, first_guess
        for bandwidth, tempering in itertools.product(BANDWIDTHS, TEMPERINGS):
            candidate = replace(first_guess, bandwidth=bandwidth, tempering=tempering)
            lent = candidate.borrowed(effects)
            for strength in STRENGTHS:
                errors = [np.linalg.norm(effects[1 - i] - strength * lent[i], axis=1).mean() for i in (0, 1)]
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

    def weights(self, vectors: np.ndarray, is_left_out: np.ndarray | bool = False) -> np.ndarray:
        """Return weights over training genes that sum to 1, (vectors, genes).

        Parameters
        ----------
        is_left_out
            Which training genes have no weight, (vectors, genes).
        """
        logits = np.zeros((len(vectors), len(self.genes)))
        if np.isfinite(self.bandwidth):
            logits = -0.5 * (cdist(vectors, self.vectors) / (self.bandwidth * self.apart)) ** 2
        logits -= self.tempering * np.log(np.maximum(self.sizes, 1e-12))
        logits = np.where(is_left_out, -np.inf, logits)
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return weights / weights.sum(axis=1, keepdims=True)

    def borrowed(self, effects: list[np.ndarray]) -> list[np.ndarray]:
        """Return what every training gene, or compound, would borrow from the others, by table of effects."""
        names = np.array(list(map(entity_of, self.genes)))
        found = [np.empty(table.shape) for table in effects]
        for first in range(0, len(names), GENES_AT_ONCE):
            here = slice(first, first + GENES_AT_ONCE)
            weights = self.weights(self.vectors[here], names[here, None] == names)
            for borrowed, table in zip(found, effects, strict=True):
                borrowed[here] = weights @ table
        return found


def _apart(vectors: np.ndarray) -> float:
    """Return the median distance between different vectors; 1 where all are equal."""
    among = pdist(vectors)
    among = among[among > 0]
    return float(np.median(among)) if len(among) else 1.0
