"""The effect of a perturbation on the level of the perturbed gene itself.

The perturbation of an unseen gene changes the gene's own level, too: a knock-out lowers it, an activation raises it.
The other targets of training show by how much. On small panels this effect is most of the predictable signal.
"""

from dataclasses import dataclass, fields, replace

import numpy as np

from perturbflow.controls import Context
from perturbflow.genes.gene_starts import TABLES, neighbours, starts
from perturbflow.genes.symbols import entities_of, entity_of
from perturbflow.models.base import Artefact
from perturbflow.models.closed_form.base import TrainingSet
from perturbflow.models.effects import Effects
from perturbflow.models.gaussian_process.kernel import EffectRows
from perturbflow.pairs import Pairs

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
        level, effect = np.array(targets).T
        design = np.column_stack([np.ones_like(level), level])
        penalty = RIDGE * len(level) * np.diag([0.1, max(level.var(), 1e-6)])
        return cls(np.linalg.solve(design.T @ design + penalty, design.T @ effect))

    def effect(self, level: float) -> float:
        """Return the expected effect on a gene of this control level; no gene falls below zero."""
        return max(float(self.coefficients @ [1.0, level]), -level)


@dataclass(frozen=True)
class OwnLevels:
    """The effects of perturbations on the levels of the perturbed genes themselves, apart from the directions.

    A gene perturbed in training has the mean of its effects on itself; any other gene follows `OwnGene`. By CRISPRi,
    genes that start within 5 kb of an unseen target get a share of its effect. This share is a least squares fit to the
    neighbours of training's targets, shrunk towards zero as by one more target.

    Attributes
    ----------
    genes, values, variances
        Measured genes that training perturbs, their mean effect on themselves, its sampling variance, (genes,) each.
    coefficients, spread
        Of `OwnGene`, and the variance of effects around it.
    level
        Mean control, (measured genes,).
    share
        Share of an effect that neighbours have; 0 where perturbations are not by CRISPRi.
    """

    genes: np.ndarray
    values: np.ndarray
    variances: np.ndarray
    coefficients: np.ndarray
    spread: float
    level: np.ndarray
    share: float = 0.0

    @classmethod
    def of(cls, rows: EffectRows, training: TrainingSet) -> "OwnLevels":
        """Measure the effects of training perturbations on their own genes."""
        own, level = OwnGene.fit(training.pairs, training.effects), rows.population @ rows.levels
        found: dict[str, list[tuple[float, float]]] = {}
        weight = 1.0 / rows.sampling.variances
        for i, label in enumerate(rows.labels):
            for gene in entities_of(label):
                if (column := training.row.get(gene)) is not None:
                    found.setdefault(gene, []).append((rows.values[i, column], weight[i]))
        values, variances, left = [], [], []
        for gene, measured in found.items():
            effects, weights = np.array(measured).T
            values.append(np.average(effects, weights=weights))
            variances.append(rows.variance[training.row[gene]] / weights.sum())
            left.append((values[-1] - own.effect(float(level[training.row[gene]]))) ** 2 - variances[-1])
        spread = max(float(np.mean(left)), 0.0) if left else 0.0
        levels = cls(
            np.array(list(found), dtype=str), np.array(values), np.array(variances), own.coefficients, spread, level
        )
        is_interference = set(training.pairs.obs.get("perturbation_type", [])) == {"CRISPRi"}
        return replace(levels, share=levels._share_of_neighbours(rows, training)) if is_interference else levels

    def _share_of_neighbours(self, rows: EffectRows, training: TrainingSet) -> float:
        near = neighbours(self.genes.tolist(), training.genes, _organism(training.genes))
        crossed, squared = 0.0, [0.0]
        for i, label in enumerate(rows.labels):
            own = rows.values[i, training.row[label]] if label in near and label in training.row else 0.0
            for other, _ in near.get(label, []):
                crossed += own * rows.values[i, training.row[other]]
                squared.append(own**2)
        return max(0.0, crossed / max(sum(squared) + max(squared), 1e-12))

    def neighbours_of(self, gene: str, genes: list[str]) -> list[str]:
        """Return the measured genes that share the effect on an unseen target."""
        if not self.share or gene in self.genes:
            return []
        return [name for name, _ in neighbours([gene], genes, _organism(genes))[gene]]

    @staticmethod
    def replaced(rows: EffectRows, genes: list[str]) -> np.ndarray:
        """Return effects, (rows, genes); the mean of the other rows replaces the effect on a perturbed gene."""
        values = rows.values.astype(float)
        is_own = np.zeros(values.shape, dtype=bool)
        column = {gene: i for i, gene in enumerate(genes)}
        for i, label in enumerate(rows.labels):
            is_own[i, [column[gene] for gene in entities_of(label) if gene in column]] = True
        for j in np.flatnonzero(is_own.any(axis=0)):
            others = values[~is_own[:, j], j]
            values[is_own[:, j], j] = others.mean() if len(others) else 0.0
        return values

    def at(self, gene: str, column: int, context: Context | None) -> tuple[float, float]:
        """Return the expected effect on a gene's own level, and its variance."""
        if len(place := np.flatnonzero(self.genes == gene)):
            return float(self.values[place[0]]), float(self.variances[place[0]])
        level = self.level if context is None else context.level
        return OwnGene(self.coefficients).effect(float(level[column])), self.spread

    def arrays(self) -> Artefact:
        """Return the arrays to be stored."""
        return {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Artefact) -> "OwnLevels":
        """Undo `arrays`."""
        return cls(**{**arrays, **{name: float(arrays[name]) for name in ("spread", "share")}})


def _organism(genes: list[str]) -> str:
    """Return the organism whose table of gene starts has most of these genes."""
    return max(TABLES, key=lambda organism: len(starts(organism).keys() & set(genes)))
