"""Mean effects of training perturbations: the raw material of every closed form."""

from dataclasses import dataclass

import numpy as np

from perturbflow.pairs import Pairs
from perturbflow.symbols import members_of


@dataclass(frozen=True)
class Effects:
    """Mean effects against matched controls.

    Attributes
    ----------
    labels
        Training perturbations, sorted.
    values
        (perturbations, genes), log1p-normalized.
    n_cells
        Cells behind each.
    """

    labels: list[str]
    values: np.ndarray
    n_cells: np.ndarray

    @classmethod
    def of_training(cls, pairs: Pairs) -> "Effects":
        """Measure the effects of all training perturbations."""
        training = pairs.roles("train")
        labels = training.perturbations
        values = np.stack([training.effect_of(label) for label in labels])
        return cls(labels, values, np.array([len(training.cells_of(label)) for label in labels]))

    @property
    def single(self) -> dict[str, np.ndarray]:
        """Effects of genes perturbed alone."""
        return {label: value for label, value in zip(self.labels, self.values, strict=True) if len(members_of(label)) == 1}

    @property
    def genes(self) -> list[str]:
        """All perturbed genes of training, sorted."""
        return sorted({gene for label in self.labels for gene in members_of(label)})
