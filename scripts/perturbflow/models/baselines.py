"""Closed forms that shift control cells by a predicted mean effect. Seconds, and hard to beat."""

from abc import abstractmethod
from collections.abc import Sequence

import numpy as np

from perturbflow.embeddings import Embeddings
from perturbflow.models.base import Artefact, Model, Run, start_cells
from perturbflow.models.effects import Effects
from perturbflow.pairs import Pairs
from perturbflow.symbols import members_of


class MeanShift(Model):
    """A model whose every prediction is a control cell plus one effect per perturbation."""

    artefact: Artefact

    @abstractmethod
    def learn(self, effects: Effects, genes: list[str]) -> Artefact:
        """Return the arrays that `effect` needs."""

    @abstractmethod
    def effect(self, perturbation: str) -> np.ndarray:
        """Return the predicted mean effect, (genes,)."""

    def fit(self, pairs: Pairs, embeddings: Embeddings, run: Run) -> Artefact:
        """Measure training effects and learn from them."""
        self.artefact = self.learn(Effects.of_training(pairs), pairs.genes)
        return self.artefact

    def restore(self, artefact: Artefact) -> None:
        """Take over the arrays."""
        self.artefact = artefact

    def predict(self, cells: np.ndarray, perturbations: Sequence[str], n: int, seed: int) -> np.ndarray:
        """Shift control cells; deterministic, whatever the seed."""
        start = start_cells(cells, n)
        return np.stack([start + self.effect(perturbation) for perturbation in perturbations]).astype(np.float32)


class NoChange(MeanShift):
    """Perturbed cells look like controls: the floor."""

    def learn(self, effects: Effects, genes: list[str]) -> Artefact:
        """Nothing to learn."""
        return {"effect": np.zeros(len(genes))}

    def effect(self, perturbation: str) -> np.ndarray:
        """No effect."""
        return self.artefact["effect"]


class PerturbedMean(MeanShift):
    """Every perturbation has the mean effect of the training perturbations (Systema's non-control mean)."""

    def learn(self, effects: Effects, genes: list[str]) -> Artefact:
        """Average effects over perturbations, not over cells."""
        return {"effect": effects.values.mean(axis=0)}

    def effect(self, perturbation: str) -> np.ndarray:
        """Return the mean effect."""
        return self.artefact["effect"]


class Additive(MeanShift):
    """The sum of the members' single effects; a member never measured alone counts as the mean single effect.

    Ahlmann-Eltze, Huber & Anders 2025, x̂_{a+b} = x̄_a + x̄_b − c̄.
    """

    def learn(self, effects: Effects, genes: list[str]) -> Artefact:
        """Keep single effects and their mean; without any single, the mean effect per member of all combinations."""
        single = effects.single
        values = np.stack(list(single.values())) if single else np.zeros((0, len(genes)))
        per_member = effects.values / np.array([[len(members_of(label))] for label in effects.labels])
        mean = values.mean(axis=0) if single else per_member.mean(axis=0)
        return {"genes": np.array(list(single), dtype=str), "effects": values, "mean": mean}

    def effect(self, perturbation: str) -> np.ndarray:
        """Sum over members."""
        row = {gene: i for i, gene in enumerate(self.artefact["genes"].tolist())}
        effects, mean = self.artefact["effects"], self.artefact["mean"]
        return sum(effects[row[gene]] if gene in row else mean for gene in members_of(perturbation))


class Linear(MeanShift):
    """The bilinear closed form of Ahlmann-Eltze, Huber & Anders 2025.

    Ŷ = G W P + b with W = (GᵀG + λI)⁻¹ Gᵀ (Y − b) Pᵀ (P Pᵀ + λI)⁻¹, where Y (genes × conditions) holds training effects with
    the control as a condition of zeros, b its row means, G (genes × K) the scores of a centred PCA of Y and P (K × conditions)
    the rows of G of the perturbed genes (summed over members, zero for control). A condition whose gene is not measured
    does not enter the fit and is predicted by b.
    """

    def __init__(self, n_components: int, ridge: float) -> None:
        self.n_components = n_components
        self.ridge = ridge

    def learn(self, effects: Effects, genes: list[str]) -> Artefact:
        """Solve for W."""
        row = {gene: i for i, gene in enumerate(genes)}
        usable = [i for i, label in enumerate(effects.labels) if all(gene in row for gene in members_of(label))]
        Y = np.column_stack([np.zeros(len(genes)), *effects.values[usable]])  # (genes, conditions)
        b = Y.mean(axis=1)
        centred = Y - Y.mean(axis=0)
        U, s, _ = np.linalg.svd(centred, full_matrices=False)
        k = min(self.n_components, int((s > 1e-10 * s[0]).sum())) if s[0] > 0 else 1
        G = U[:, :k] * s[:k]  # (genes, K)
        P = np.column_stack(
            [np.zeros(k), *[G[[row[gene] for gene in members_of(effects.labels[i])]].sum(axis=0) for i in usable]]
        )  # (K, conditions)
        penalty = self.ridge * np.eye(k)
        W = np.linalg.solve(G.T @ G + penalty, G.T @ (Y - b[:, None]) @ P.T) @ np.linalg.inv(P @ P.T + penalty)
        return {"G": G, "W": W, "b": b, "genes": np.array(genes, dtype=str)}

    def effect(self, perturbation: str) -> np.ndarray:
        """Return G W P_p + b."""
        row = {gene: i for i, gene in enumerate(self.artefact["genes"].tolist())}
        G, W, b = self.artefact["G"], self.artefact["W"], self.artefact["b"]
        measured = [row[gene] for gene in members_of(perturbation) if gene in row]
        return G @ W @ G[measured].sum(axis=0) + b
