"""The baseline to beat: closed forms, weighted by how well they predict held-out training perturbations.

Three cases have weights of their own, each found by non-negative least squares over inner folds (Breiman 1996, "Stacked regressions"):

* a gene never perturbed alone: the mean, the covariance with it in controls, and ridge, kernel ridge and nearest neighbours on every
  embedding source;
* a combination: the sum of its members' effects, raw, shrunk entry by entry and projected on leading directions; members refitted to all
  perturbations by ridge; the mean combination; and what kernel ridge says the sum leaves over. An unseen member enters with the effect
  that the first case gives it, and weights are found apart for combinations with and without one;
* a perturbation of training in another context: its effect there, and the mean.

A compound alone, at a dose that training lacks of it, has the effect that its other doses say (`DoseInterpolation`).

Weights are pulled towards the plain sum (for combinations), the plain effect (contexts) or zero (genes), as by one more training
perturbation, because a handful of perturbations tells little; for the same reason fewer parts are mixed where training has under 40
genes or ten combinations. The level of an unseen gene itself follows `OwnGene`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from scipy.optimize import nnls

from perturbflow.models.base import Artefact
from perturbflow.models.baselines import Additive, DoseInterpolation, LatentSum, PerturbedMean, Transfer, effects_by_context
from perturbflow.models.effects import Effects
from perturbflow.models.own_gene import OwnGene
from perturbflow.models.regressions import CovarianceResponse, KernelRidge, Nearest
from perturbflow.models.shift import MeanShift, Training
from perturbflow.symbols import entities_of, entity_of, members_of, without_dose

LEAST_GENES_OF_FULL_STACK = 40
LEAST_COMBINATIONS_OF_FULL_STACK = 10
PRIOR = 1.0  # training perturbations that the prior weights count as
N_INTERACTION_DIRECTIONS = 5

Examples = Iterator[tuple[list[np.ndarray], np.ndarray]]  # predictions of all parts, and the truth


class Projected(Additive):
    """The sum of single effects, projected on the leading principal directions of training effects."""

    def __init__(self, n_directions: int) -> None:
        self.n_directions = n_directions

    def learn(self, training: Training) -> Artefact:
        """Find the directions."""
        _, _, directions = np.linalg.svd(training.effects.values, full_matrices=False)
        return {**super().learn(training), "directions": directions[: self.n_directions]}

    def effect(self, perturbation: str) -> np.ndarray:
        """Project the sum."""
        V = self.artefact["directions"]
        return super().effect(perturbation) @ V.T @ V


class ShrunkenEntries(Additive):
    """The sum of single effects, every entry shrunk by its sampling error: e · max(0, 1 − se²/e²) (James & Stein, positive part)."""

    def learn(self, training: Training) -> Artefact:
        """Shrink what is measured."""
        effects = training.effects
        squares = np.maximum(effects.values**2, 1e-24)
        shrunk = effects.values * np.maximum(0.0, 1.0 - effects.errors / squares)
        return super().learn(replace(training, effects=replace(effects, values=shrunk)))


class MeanCombination(MeanShift):
    """The mean effect of training combinations; of all perturbations where there is none."""

    def learn(self, training: Training) -> Artefact:
        """Average."""
        values = training.effects.values
        is_combination = training.effects.order > 1
        return {"effect": (values[is_combination] if is_combination.any() else values).mean(axis=0)}

    def effect(self, perturbation: str) -> np.ndarray:
        """Return the mean."""
        return self.artefact["effect"]


class Interaction(Projected):
    """The sum of single effects and what it leaves over, by kernel ridge regression on the sum's leading directions."""

    def learn(self, training: Training) -> Artefact:
        """Regress the residuals of training combinations on their projected sums."""
        artefact = super().learn(training)
        self.restore(artefact)
        effects = training.effects
        rows = np.flatnonzero(effects.order > 1)
        sums = [Additive.effect(self, effects.labels[i]) for i in rows]
        if len(rows) < 3:
            return {**artefact, "centres": np.zeros((0, 1))}
        centres = np.stack(sums) @ artefact["directions"].T  # (combinations, directions)
        width = max(float(np.median(np.linalg.norm(centres - centres.mean(axis=0), axis=1))), 1e-12)
        kernel = _gaussian(centres, centres, width)
        weights = np.linalg.solve(kernel + np.eye(len(rows)), effects.values[rows] - np.stack(sums))
        return {**artefact, "centres": centres, "width": np.array(width), "weights": weights}

    def effect(self, perturbation: str) -> np.ndarray:
        """Return the sum and its correction."""
        total = Additive.effect(self, perturbation)
        if not len(self.artefact["centres"]):
            return total
        here = (total @ self.artefact["directions"].T)[None]
        return total + _gaussian(here, self.artefact["centres"], float(self.artefact["width"]))[0] @ self.artefact["weights"]


def _gaussian(a: np.ndarray, b: np.ndarray, width: float) -> np.ndarray:
    return np.exp(-0.5 * ((a[:, None] - b[None]) ** 2).sum(axis=2) / width**2)


def gene_parts(embeddings_sources: Sequence[str], n_genes: int) -> dict[str, MeanShift]:
    """Return what an unseen gene's effect is mixed from; few training genes bear few parts."""
    parts: dict[str, MeanShift] = {"mean": PerturbedMean(), "covariance": CovarianceResponse()}
    for source in embeddings_sources:
        parts[f"kernel_ridge {source}"] = KernelRidge(1.0, 0.5, source)
        if n_genes >= LEAST_GENES_OF_FULL_STACK:
            parts[f"ridge {source}"] = KernelRidge(1.0, None, source)
            parts[f"nearest {source}"] = Nearest(5, source)
    return parts


def combination_parts(n_combinations: int) -> dict[str, MeanShift]:
    """Return what a combination's effect is mixed from, the plain sum first; few training combinations bear sums alone."""
    sums: dict[str, MeanShift] = {
        "sum": Additive(),
        "shrunken sum": ShrunkenEntries(),
        "sum on 5 directions": Projected(5),
        "sum on 15 directions": Projected(15),
    }
    if n_combinations < LEAST_COMBINATIONS_OF_FULL_STACK:
        return sums
    return {
        **sums,
        "refitted members 0.3": LatentSum(10_000, 0.3),
        "refitted members 1": LatentSum(10_000, 1.0),
        "refitted members 3": LatentSum(10_000, 3.0),
        "mean combination": MeanCombination(),
        "sum and interaction": Interaction(N_INTERACTION_DIRECTIONS),
    }


def context_parts() -> dict[str, MeanShift]:
    """Return what the effect of a perturbation known from other contexts is mixed from."""
    return {"effect elsewhere": Transfer(), "mean": PerturbedMean()}


def stacking_weights(examples: Examples, prior: np.ndarray) -> np.ndarray:
    """Return non-negative weights of least squared error over held-out perturbations.

    Parameters
    ----------
    examples
        Per perturbation: predictions of the parts, each (genes,), and the truth.
    prior
        Weights without any example, (parts,); with examples they count as `PRIOR` perturbations more.
    """
    n = len(prior)
    gram, cross, n_examples = np.zeros((n, n)), np.zeros(n), 0
    for predictions, truth in examples:
        P = np.stack(predictions)  # (parts, genes)
        gram, cross, n_examples = gram + P @ P.T, cross + P @ truth, n_examples + 1
    if n_examples == 0 or np.trace(gram) == 0:
        return prior
    # Every perturbation is judged twice, against either half of the controls.
    penalty = PRIOR / (n_examples / 2) * np.trace(gram) / n
    root = np.linalg.cholesky(gram + penalty * np.eye(n))
    return nnls(root.T, np.linalg.solve(root, cross + penalty * prior))[0]


class Stacked(MeanShift):
    """Closed forms, weighted by how well they predict training perturbations that inner folds held out: the one to beat."""

    def learn(self, training: Training) -> Artefact:
        """Find the weights of all cases, then fit all parts to the whole of training."""
        sources = training.embeddings.sources
        self.own_gene = OwnGene.fit(training.pairs, training.effects)
        self.own_shift = {gene: self.own_gene.shift(float(training.pairs.control_level[row])) for gene, row in training.row.items()}
        self.gene_parts = gene_parts(sources, len(set(map(entity_of, training.effects.single))))
        self.gene_weights = stacking_weights(self._gene_examples(training), np.zeros(len(self.gene_parts)))
        parts = combination_parts(int((training.effects.order > 1).sum()))
        plain = np.eye(len(parts))[0]
        weights = {}
        for name, of_genes in (("seen", False), ("unseen", True)):
            weights[name] = stacking_weights(self._combination_examples(training, parts, of_genes=of_genes), plain)
        contexts = context_parts()
        context_weights = stacking_weights(_context_examples(training), np.eye(len(contexts))[0])

        whole = self._with_guesses(training)
        measured = set(training.effects.labels)
        artefact: Artefact = {
            "measured": np.array(sorted(measured), dtype=str),
            "known": np.array(training.effects.entities, dtype=str),
            "genes": np.array(sorted(set(whole.effects.labels) - measured), dtype=str),
            "seen_weights": weights["seen"], "unseen_weights": weights["unseen"], "context_weights": context_weights,
            "gene_weights": self.gene_weights, "gene_parts": np.array(list(self.gene_parts), dtype=str),
            "n_combinations": np.array((training.effects.order > 1).sum()),
        }  # fmt: skip
        artefact["guesses"] = np.stack([whole.effects.of(gene) for gene in artefact["genes"].tolist()] or [np.zeros(len(training.genes))])
        # A gene without a row in the embeddings has nothing to be guessed from but what the mean is worth.
        artefact["other"] = self.gene_weights[0] * training.effects.values.mean(axis=0)
        if any(without_dose(label)[1] is not None for label in training.effects.single):
            artefact |= {f"dose.{key}": value for key, value in DoseInterpolation().learn(_singles_only(training)).items()}
        used = weights["seen"] + weights["unseen"]
        for group, models, of, share in (("combination", parts, whole, used), ("context", contexts, training, context_weights)):
            for i, model in enumerate(models.values()):
                if share[i] > 0:
                    artefact |= {f"{group}.{i}.{key}": value for key, value in model.learn(of).items()}
        return artefact

    def restore(self, artefact: Artefact) -> None:
        """Hand every part its arrays; one without weight has none."""
        super().restore(artefact)
        self.parts = {
            "combination": list(combination_parts(int(artefact["n_combinations"])).values()),
            "context": list(context_parts().values()),
        }
        for group, models in self.parts.items():
            for i, model in enumerate(models):
                prefix = f"{group}.{i}."
                if own := {key.removeprefix(prefix): value for key, value in artefact.items() if key.startswith(prefix)}:
                    model.restore(own)
        self.dosed = None
        if own := {key.removeprefix("dose."): value for key, value in artefact.items() if key.startswith("dose.")}:
            self.dosed = DoseInterpolation()
            self.dosed.restore(own)

    def effect(self, perturbation: str) -> np.ndarray:
        """Mix the parts of the case that the perturbation is."""
        if perturbation in self.artefact["measured"]:
            return self._mix("context", perturbation, self.artefact["context_weights"])
        if len(members_of(perturbation)) == 1:
            guessed = self.artefact["genes"].tolist()
            if perturbation in guessed:
                return self.artefact["guesses"][guessed.index(perturbation)]
            if self.dosed and self.dosed.knows(perturbation):
                return self.dosed.effect(perturbation)
            # Where training has no doses, a gene at a dose is the gene.
            name = entity_of(perturbation)
            return self.artefact["other"] if name == perturbation else self.effect(name)
        case = "seen" if set(entities_of(perturbation)) <= set(self.artefact["known"].tolist()) else "unseen"
        return self._mix("combination", perturbation, self.artefact[f"{case}_weights"])

    def _mix(self, group: str, perturbation: str, weights: np.ndarray) -> np.ndarray:
        used = [(weight, part) for weight, part in zip(weights, self.parts[group], strict=True) if weight > 0]
        return sum((weight * part.effect(perturbation) for weight, part in used), np.zeros_like(self.artefact["other"]))

    def _gene_examples(self, training: Training) -> Examples:
        """Yield what the gene parts say of each gene held out, but for the gene's own level."""
        for inner, held_out in training.rounds(of_genes=True):
            if not inner.effects.single:
                continue
            singles = _singles_only(inner)
            parts = [part.learned(singles) for part in self.gene_parts.values()]
            for label, value in held_out.single.items():
                is_own = np.array(training.genes) == entity_of(label)
                yield [np.where(is_own, 0.0, part.effect(label)) for part in parts], np.where(is_own, 0.0, value)

    def _combination_examples(self, training: Training, parts: dict[str, MeanShift], *, of_genes: bool) -> Examples:
        """Yield what the parts say of each combination held out: alone, or with all that involves one of its genes."""
        if not (training.effects.order > 1).any():
            return
        for inner, held_out in training.rounds(of_genes=of_genes):
            combinations = [
                (label, value) for label, value in zip(held_out.labels, held_out.values, strict=True) if len(members_of(label)) > 1
            ]
            if combinations:
                whole = self._with_guesses(inner)
                fitted = [part.learned(whole) for part in parts.values()]
                for label, value in combinations:
                    yield [part.effect(label) for part in fitted], value

    def _with_guesses(self, training: Training) -> Training:
        """Return training with a single effect for every member: refitted from combinations where it is in some, from other doses, or guessed."""
        effects = training.effects
        missing = [gene for gene in training.embeddings.table.index if gene not in effects.labels]
        if not missing:
            return training
        in_combinations = set(missing) & set(effects.genes)
        refitted = LatentSum(10_000, 0.3).learned(training) if in_combinations else None
        singles = _singles_only(training)
        dosed = DoseInterpolation().learned(singles)
        fitted = [
            (weight, part.learned(singles)) for weight, part in zip(self.gene_weights, self.gene_parts.values(), strict=True) if weight > 0
        ]
        values = []
        for gene in missing:
            if refitted is not None and gene in in_combinations:
                values.append(refitted.effect(gene))
                continue
            if dosed.knows(gene):
                values.append(dosed.effect(gene))
                continue
            value = sum((weight * part.effect(gene) for weight, part in fitted), np.zeros(len(training.genes)))
            if (name := entity_of(gene)) in training.row and self.own_gene.coefficients.any():
                value[training.row[name]] = self.own_shift[name]
            values.append(value)
        added = Effects(
            [*effects.labels, *missing], np.vstack([effects.values, *values]), np.vstack([effects.errors, np.zeros_like(values)])
        )
        return replace(training, effects=added)


def _singles_only(training: Training) -> Training:
    """Return training without combinations, if it has a single effect at all."""
    combinations = {label for label in training.effects.labels if len(members_of(label)) > 1}
    return replace(training, effects=training.effects.without(combinations)) if training.effects.single else training


def _context_examples(training: Training) -> Examples:
    """Yield what other contexts say of each perturbation in each context; twice, as all examples are counted."""
    by_context = effects_by_context(training)
    for context, effects in by_context.items():
        elsewhere = [of for other, of in by_context.items() if other != context]
        labels = sorted({label for of in elsewhere for label in of})
        if not labels:
            return
        values = np.stack([np.mean([of[label] for of in elsewhere if label in of], axis=0) for label in labels])
        mean = values.mean(axis=0)
        for label, value in effects.items():
            if label in labels:
                example = [values[labels.index(label)], mean], value
                yield example
                yield example
