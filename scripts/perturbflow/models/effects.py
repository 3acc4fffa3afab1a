"""Mean effects of training perturbations: the raw material of every closed form."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from perturbflow.genes.symbols import entities_of, members_of
from perturbflow.pairs import Pairs


@dataclass(frozen=True)
class Effects:
    """Mean effects against matched controls.

    Attributes
    ----------
    labels
        Training perturbations, sorted.
    values
        (perturbations, genes), log1p-normalized.
    """

    labels: list[str]
    values: np.ndarray

    @classmethod
    def of_training(cls, pairs: Pairs) -> "Effects":
        """Measure the effects of all training perturbations."""
        return cls._measured(pairs.roles("train"), None)

    @classmethod
    def with_disjoint_controls(cls, pairs: Pairs) -> "tuple[Effects, Effects]":
        """Measure the effects of all training perturbations twice, each time against half of the controls.

        Effects against the same controls share the controls' noise and look alike because of it. With a hundred
        controls this noise is half of a weak effect. Effects are compared across disjoint controls, which share none.
        """
        training = pairs.roles("train")
        return cls._measured(training, 1), cls._measured(training, 0)

    @classmethod
    def _measured(cls, training: Pairs, half: int | None) -> "Effects":
        return cls(training.groups.labels, training.groups.effects(training.sums[0], half).astype(training.X.dtype))

    def without(self, labels: Collection[str]) -> "Effects":
        """Return all effects except these."""
        keep = [i for i, label in enumerate(self.labels) if label not in labels]
        return Effects([self.labels[i] for i in keep], self.values[keep])

    def of(self, label: str) -> np.ndarray:
        """Return one effect, (genes,)."""
        return self.values[self.labels.index(label)]

    @property
    def n_members(self) -> np.ndarray:
        """Number of members of every label, (perturbations,)."""
        return np.array([len(members_of(label)) for label in self.labels])

    def indicators(self) -> np.ndarray:
        """Return 1 where a gene is a member of a perturbation, else 0, (perturbations, genes as in `genes`)."""
        column = {gene: i for i, gene in enumerate(self.genes)}
        table = np.zeros((len(self.labels), len(column)))
        for row, label in zip(table, self.labels, strict=True):
            row[[column[gene] for gene in members_of(label)]] = 1.0
        return table

    @property
    def single(self) -> dict[str, np.ndarray]:
        """Effects of genes perturbed alone."""
        return {
            label: value for label, value in zip(self.labels, self.values, strict=True) if len(members_of(label)) == 1
        }

    def by_gene(self) -> dict[str, np.ndarray]:
        """Return the effect of each gene perturbed alone.

        Where training holds combinations only, a gene has the mean effect of those that it is a member of.
        """
        if self.single:
            return self.single
        members = [members_of(label) for label in self.labels]
        of_gene = {gene: [i for i, of_label in enumerate(members) if gene in of_label] for gene in self.genes}
        return {gene: np.mean([self.values[i] for i in rows], axis=0) for gene, rows in of_gene.items()}

    @property
    def genes(self) -> list[str]:
        """All members of training perturbations, sorted: perturbed genes, or compounds at each of their doses."""
        return sorted({gene for label in self.labels for gene in members_of(label)})

    @property
    def entities(self) -> list[str]:
        """The genes or compounds among the members, at any dose, sorted."""
        return sorted({entity for label in self.labels for entity in entities_of(label)})
