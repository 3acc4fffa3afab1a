"""Closed forms that need measured effects alone: means, sums, and the bilinear form of the field's benchmarks."""

import numpy as np

from perturbflow.genes.symbols import entities_of, entity_of, members_of
from perturbflow.models.base import Artefact
from perturbflow.models.closed_form.base import ClosedForm, TrainingSet, least_error
from perturbflow.models.closed_form.doses import Doses
from perturbflow.registry.families import LinearParams

LATENT_RIDGES = (0.1, 0.3, 1.0, 3.0)
LATENT_COMPONENTS = (5, 15, 50)


class NoChange(ClosedForm):
    """Perturbed cells look like controls: the floor of every comparison."""

    def learn(self, training: TrainingSet) -> Artefact:
        """Nothing to learn."""
        return {"effect": np.zeros(len(training.genes))}

    def effect(self, perturbation: str) -> np.ndarray:
        """No effect."""
        return self.artefact["effect"]


class PerturbedMean(ClosedForm):
    """Every perturbation has the mean effect of the training perturbations (Systema's non-control mean)."""

    def learn(self, training: TrainingSet) -> Artefact:
        """Average effects over perturbations, not over cells."""
        return {"effect": training.effects.values.mean(axis=0)}

    def effect(self, perturbation: str) -> np.ndarray:
        """Return the mean effect."""
        return self.artefact["effect"]


class Additive(ClosedForm):
    """The sum of the members' single effects; a member never measured alone counts as the mean single effect.

    Ahlmann-Eltze, Huber & Anders 2025, x̂_{a+b} = x̄_a + x̄_b − c̄. A compound at a dose that training lacks has its
    effect at the nearest dose.
    """

    def learn(self, training: TrainingSet) -> Artefact:
        """Keep single effects and their mean.

        Where training holds combinations only, the mean is that of their effects, each divided by its members.
        """
        effects, single = training.effects, training.effects.single
        values = np.stack(list(single.values())) if single else np.zeros((0, len(training.genes)))
        mean = values.mean(axis=0) if single else (effects.values / effects.n_members[:, None]).mean(axis=0)
        return {"genes": np.array(list(single), dtype=str), "effects": values, "mean": mean}

    def restore(self, artefact: Artefact) -> None:
        """Take over the arrays."""
        super().restore(artefact)
        self.row = {gene: i for i, gene in enumerate(artefact["genes"].tolist())}
        self.doses = Doses(self.row)

    def known(self, member: str) -> np.ndarray | None:
        """Return the effect of a member, (genes,); None for a gene or compound never measured alone."""
        nearest = self.doses.nearest(member)
        return None if nearest is None else self.artefact["effects"][self.row[nearest]]

    def members(self, perturbation: str) -> np.ndarray:
        """Return the effect of every member, (members, genes)."""
        effects = map(self.known, members_of(perturbation))
        return np.stack([self.artefact["mean"] if effect is None else effect for effect in effects])

    def knows(self, perturbation: str) -> bool:
        """Return whether every member was measured alone, at any dose."""
        return all(map(self.doses.holds, members_of(perturbation)))

    def effect(self, perturbation: str) -> np.ndarray:
        """Sum over members."""
        return self.members(perturbation).sum(axis=0)


class DoseInterpolation(Additive):
    """The effect of a compound between two of its training doses, interpolated over the log dose; members add up.

    e(d) = (1 − t) e(d₁) + t e(d₂) with t = log(d / d₁) / log(d₂ / d₁) for the nearest doses d₁ < d < d₂. The area under
    a dose-response curve uses the same interpolation (trapezium rule). Below the lowest dose the effect falls in
    proportion to the dose, as a Hill curve of slope 1 does far below its half-maximum. Above the highest dose it is
    that of the highest. A compound never measured alone counts as the mean single effect.
    """

    def known(self, member: str) -> np.ndarray | None:
        """Interpolate."""
        weights = self.doses.weights(member)
        effects = [weight * self.artefact["effects"][self.row[known]] for known, weight in weights.items()]
        return np.sum(effects, axis=0) if effects else None


class MatchingMean(Additive):
    """The mean of the members' single effects; a member never measured alone counts as the mean effect.

    Systema 2025, x̂_{a+b} = ½ (m_a + m_b), m_a the mean of single a, or that of all training perturbations if unseen.
    """

    def learn(self, training: TrainingSet) -> Artefact:
        """Keep single effects and the mean of all training perturbations."""
        return {**super().learn(training), "mean": training.effects.values.mean(axis=0)}

    def effect(self, perturbation: str) -> np.ndarray:
        """Average over members."""
        return self.members(perturbation).mean(axis=0)


class ShrunkenAdditive(Additive):
    """The sum of single effects times the factor that fits held-out training combinations best.

    Without any combination it is the plain sum. One factor serves combinations whose members were all measured alone,
    another one the others: unseen members add noise.
    """

    def learn(self, training: TrainingSet) -> Artefact:
        """Fit both factors by least squares over inner folds of combinations and of genes."""
        explained, energy = np.zeros((2, 2))
        for of_genes in (False, True):
            for inner, held_out in training.rounds(of_genes=of_genes):
                plain = Additive().learned(inner)
                for label, value in zip(held_out.labels, held_out.values, strict=True):
                    if len(members_of(label)) > 1 and (is_unseen := not plain.knows(label)) == of_genes:
                        predicted = plain.effect(label)
                        explained[int(is_unseen)] += predicted @ value
                        energy[int(is_unseen)] += predicted @ predicted
        factors = np.maximum(np.divide(explained, energy, out=np.ones(2), where=energy > 0), 0.0)
        return {**super().learn(training), "factors": factors}

    def effect(self, perturbation: str) -> np.ndarray:
        """Shrink the sum of a combination; a single effect stays as it is."""
        if len(members_of(perturbation)) == 1:
            return super().effect(perturbation)
        return super().effect(perturbation) * self.artefact["factors"][int(not self.knows(perturbation))]


class LatentSum(ClosedForm):
    """Members add up in a latent space; their vectors are fitted to all training perturbations at once.

    y_p = (μ_n + Σ_{g ∈ p} z_g) V. V are the leading principal directions of training effects. μ_n is an intercept for
    perturbations of n members. z_g comes from ridge regression on the indicators of members. It is zero for an unseen
    member. A compound at a dose that training lacks has the z of its nearest dose.

    Parameters
    ----------
    n_components
        Directions of V.
    ridge
        Penalty on z, in perturbations.
    """

    def __init__(self, n_components: int, ridge: float) -> None:
        self.n_components = n_components
        self.ridge = ridge

    def learn(self, training: TrainingSet) -> Artefact:
        """Solve the ridge regression."""
        effects = training.effects
        _, _, directions = np.linalg.svd(effects.values, full_matrices=False)
        V = directions[: self.n_components]  # (K, genes)
        genes, numbers = effects.genes, sorted(set(effects.n_members.tolist()))
        n = len(numbers)  # intercepts
        design = np.hstack([effects.n_members[:, None] == numbers, effects.indicators()])  # (perturbations, n + genes)
        penalty = np.diag([1e-6] * n + [self.ridge] * len(genes))
        solved = np.linalg.solve(design.T @ design + penalty, design.T @ (effects.values @ V.T))
        members = {"genes": np.array(genes, dtype=str), "z": solved[n:]}
        return {"V": V, "n_members": np.array(numbers), "intercepts": solved[:n], **members}

    def restore(self, artefact: Artefact) -> None:
        """Take over the arrays."""
        super().restore(artefact)
        self._row = {gene: i for i, gene in enumerate(artefact["genes"].tolist())}
        self._doses = Doses(self._row)

    def effect(self, perturbation: str) -> np.ndarray:
        """Add up and decode.

        For a number of members that training lacks, the intercept of the nearest number is scaled by their ratio.
        """
        members = members_of(perturbation)
        numbers, known = self.artefact["n_members"], filter(None, map(self._doses.nearest, members))
        nearest = int(np.abs(numbers - len(members)).argmin())
        intercept = self.artefact["intercepts"][nearest] * len(members) / numbers[nearest]
        z = self.artefact["z"][[self._row[member] for member in known]].sum(axis=0)
        return (intercept + z) @ self.artefact["V"]


class LatentAdditive(ClosedForm):
    """The linear form of PerturBench's latent additive model (arXiv 2408.10609).

    It is `LatentSum`; inner folds choose its two constants. Held-out combinations choose them for perturbations of seen
    members, held-out genes for the others.
    """

    def learn(self, training: TrainingSet) -> Artefact:
        """Choose the number of directions and the penalty for both, then fit."""
        candidates = [LatentSum(k, ridge) for k in LATENT_COMPONENTS for ridge in LATENT_RIDGES]
        unseen = least_error(candidates, training, of_genes=True).learn(training)
        has_combinations = (training.effects.n_members > 1).any()
        seen = least_error(candidates, training, of_genes=False).learn(training) if has_combinations else unseen
        parts = {"seen": seen, "unseen": unseen}
        return {f"{name}.{key}": value for name, part in parts.items() for key, value in part.items()}

    def restore(self, artefact: Artefact) -> None:
        """Take over the arrays."""
        super().restore(artefact)
        self._known = {entity_of(member) for member in artefact["seen.genes"].tolist()}
        self._chosen = {}
        for name in ("seen", "unseen"):
            part = {key.split(".")[1]: value for key, value in artefact.items() if key.split(".")[0] == name}
            self._chosen[name] = LatentSum(0, 0.0)
            self._chosen[name].restore(part)

    def effect(self, perturbation: str) -> np.ndarray:
        """Add up in the latent space."""
        is_seen = set(entities_of(perturbation)) <= self._known
        return self._chosen["seen" if is_seen else "unseen"].effect(perturbation)


class Linear(ClosedForm):
    """The bilinear closed form of Ahlmann-Eltze, Huber & Anders 2025.

    Ŷ = G W P + b with W = (GᵀG + λI)⁻¹ Gᵀ (Y − b) Pᵀ (P Pᵀ + λI)⁻¹. Y (genes × conditions) holds training effects, with
    the control as a condition of zeros; b are its row means. G (genes × K) are the scores of a centred PCA of Y. P (K ×
    conditions) holds the rows of G of the perturbed genes, summed over members, zero for control. A condition whose
    gene is not measured does not enter the fit and is predicted by b.
    """

    params: LinearParams

    def __init__(self, params: LinearParams) -> None:
        super().__init__(params)
        self.n_components, self.ridge = params.n_components, params.ridge

    def learn(self, training: TrainingSet) -> Artefact:
        """Solve for W."""
        effects, genes, row = training.effects, training.genes, training.row
        usable = [i for i, label in enumerate(effects.labels) if all(gene in row for gene in entities_of(label))]
        Y = np.column_stack([np.zeros(len(genes)), *effects.values[usable]])  # (genes, conditions)
        b = Y.mean(axis=1)
        centred = Y - Y.mean(axis=0)
        U, s, _ = np.linalg.svd(centred, full_matrices=False)
        k = min(self.n_components, int((s > 1e-10 * s[0]).sum())) if s[0] > 0 else 1
        G = U[:, :k] * s[:k]  # (genes, K)
        members = [[row[gene] for gene in entities_of(effects.labels[i])] for i in usable]
        P = np.column_stack([np.zeros(k), *[G[rows].sum(axis=0) for rows in members]])  # (K, conditions)
        penalty = self.ridge * np.eye(k)
        W = np.linalg.solve(G.T @ G + penalty, G.T @ (Y - b[:, None]) @ P.T) @ np.linalg.inv(P @ P.T + penalty)
        return {"G": G, "W": W, "b": b, "genes": np.array(genes, dtype=str)}

    def effect(self, perturbation: str) -> np.ndarray:
        """Return G W P_p + b."""
        row = {gene: i for i, gene in enumerate(self.artefact["genes"].tolist())}
        G, W, b = self.artefact["G"], self.artefact["W"], self.artefact["b"]
        measured = [row[gene] for gene in entities_of(perturbation) if gene in row]
        return G @ W @ G[measured].sum(axis=0) + b
