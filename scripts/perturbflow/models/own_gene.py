"""How far a perturbation moves the level of the perturbed gene itself.

A gene that was never perturbed in training still has a level that its perturbation will move: a knock-out lowers it,
an activation raises it. That is known from the other targets, and on small panels it is most of what can be known.
"""

import numpy as np

from perturbflow.models.effects import Effects
from perturbflow.pairs import Pairs
from perturbflow.symbols import entity_of

LEAST_TARGETS = 4
RIDGE = 0.1


class OwnGene:
    """Ridge regression of the own-gene effect on the gene's level in controls, over training single perturbations.

    Parameters
    ----------
    coefficients
        (2,): intercept and slope. Zeros where fewer than four training targets are measured.
    """

    def __init__(self, coefficients: np.ndarray) -> None:
        self.coefficients = np.asarray(coefficients, dtype=float)

    @classmethod
    def fit(cls, pairs: Pairs, effects: Effects) -> "OwnGene":
        """Fit on the targets that are measured; pairs are the training cells."""
        row = {gene: i for i, gene in enumerate(pairs.genes)}
        single = [(entity_of(label), effect) for label, effect in effects.single.items()]
        targets = [(pairs.control_level[row[gene]], effect[row[gene]]) for gene, effect in single if gene in row]
        if len(targets) < LEAST_TARGETS:
            return cls(np.zeros(2))
        level, moved = np.array(targets).T
        design = np.column_stack([np.ones_like(level), level])
        penalty = RIDGE * len(level) * np.diag([0.1, max(level.var(), 1e-6)])
        return cls(np.linalg.solve(design.T @ design + penalty, design.T @ moved))

    def shift(self, level: float) -> float:
        """Return the expected effect on a gene of this control level; no gene falls below zero."""
        return max(float(self.coefficients @ [1.0, level]), -level)
