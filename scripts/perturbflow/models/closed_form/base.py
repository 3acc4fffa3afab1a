"""The base of all closed forms: one mean effect per perturbation, and inner cross-validation over perturbations."""

import copy
import itertools
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self, TypeVar

import numpy as np

from perturbflow.controls import Context
from perturbflow.embeddings import Embeddings
from perturbflow.genes.symbols import CONTROL, SEPARATOR, entities_of, members_of
from perturbflow.models.base import Artefact, Model, Run, off_level, start_cells
from perturbflow.models.calibration import Calibration, Scale, measured_by, novelty_of
from perturbflow.models.effects import Effects
from perturbflow.models.thinning import with_mean_effect
from perturbflow.pairs import Pairs

N_FOLDS = 5
MAX_GENES_ONE_BY_ONE = 20  # up to so many genes are held out one by one
MAX_CONTEXTS = 8  # at most so many contexts are held out
ENOUGH_HELD_OUT = 1000  # perturbations by folds of one kind: more make intervals no better, and each fold is a fit


@dataclass(frozen=True)
class TrainingSet:
    """The data that a closed form learns from.

    Attributes
    ----------
    pairs
        Training cells and their controls.
    embeddings
        Vectors of the perturbed genes.
    seed
        Governs folds and all samples.
    effects
        Mean effects of the training perturbations.
    halves
        The same, each against half of the controls. Models learn from one and are judged on the other, so that the
        noise of shared controls does not count as skill.
    half
        The half of the controls that `effects` are measured against; None is all.
    """

    pairs: Pairs
    embeddings: Embeddings
    seed: int
    effects: Effects
    halves: tuple[Effects, Effects]
    half: int | None = None

    @classmethod
    def of(cls, pairs: Pairs, embeddings: Embeddings, seed: int) -> "TrainingSet":
        """Measure the effects of all training perturbations."""
        training = pairs.roles("train")
        return cls(training, embeddings, seed, Effects.of_training(training), Effects.with_disjoint_controls(training))

    @property
    def genes(self) -> list[str]:
        """Measured genes, the columns of an effect."""
        return self.pairs.genes

    @cached_property
    def row(self) -> dict[str, int]:
        """Column of an effect for every measured gene."""
        return {gene: i for i, gene in enumerate(self.genes)}

    @property
    def controls(self) -> np.ndarray:
        """Mask of the controls that `effects` are measured against, (cells,)."""
        return self.pairs.is_control if self.half is None else self.pairs.groups.is_of_half(self.half)

    def folds(self, *, of_genes: bool, one_by_one: bool = True) -> list[set[str]]:
        """Return sets of perturbations to be held out.

        Parameters
        ----------
        of_genes
            True: a set has all perturbations of some genes or compounds, at any dose. False: a set has combinations
            alone.
        one_by_one
            Whether few genes are held out one by one.
        """
        rng = np.random.default_rng(self.seed)
        labels = self.effects.labels
        if of_genes:
            genes = rng.permutation(self.effects.entities)
            parts = np.array_split(genes, len(genes) if one_by_one and len(genes) <= MAX_GENES_ONE_BY_ONE else N_FOLDS)
            folds = [{label for label in labels if not set(part).isdisjoint(entities_of(label))} for part in parts]
        else:
            names = {label: SEPARATOR.join(entities_of(label)) for label in labels if len(members_of(label)) > 1}
            combinations = rng.permutation(list(dict.fromkeys(names.values())))
            dealt = {str(name): i % N_FOLDS for i, name in enumerate(combinations)}
            folds = [{label for label, name in names.items() if dealt[name] == i} for i in range(N_FOLDS)]
        return [fold for fold in folds if fold and len(fold) < len(labels)]

    def rounds(self, *, of_genes: bool, one_by_one: bool = True) -> Iterator[tuple["TrainingSet", Effects]]:
        """Yield inner training sets and held-out effects, which are measured against the other half of the controls."""
        for held_out in self.folds(of_genes=of_genes, one_by_one=one_by_one):
            rest = [half.without(held_out) for half in self.halves]
            known = set(rest[0].labels)
            for seen, judged in ((0, 1), (1, 0)):
                # halves[0] is measured against half 1.
                inner = replace(self, effects=rest[seen], halves=(rest[0], rest[1]), half=judged)
                yield inner, self.halves[judged].without(known)

    def rounds_of_contexts(self) -> Iterator[tuple["TrainingSet", Effects, Context]]:
        """Yield inner training sets without the cells of one context, effects in this context, and the context.

        The effects are those of perturbations that the inner training set holds too.
        """
        by_context = self.effects_by_context
        names = list(by_context) if len(by_context) > 1 else []
        sampled = np.random.default_rng(self.seed).permutation(len(names))[:MAX_CONTEXTS]
        for name in (names[i] for i in sorted(sampled)):
            inner = TrainingSet.of(self.pairs.without_context(name), self.embeddings, self.seed)
            labels = [label for label in by_context[name] if label in inner.effects.labels]
            if labels:
                values = np.stack([by_context[name][label] for label in labels])
                here = np.flatnonzero(self.pairs.is_of_context(name) & self.pairs.is_control)
                yield inner, Effects(labels, values), self.pairs.context_of(here)

    def sampling_of(self, label: str, context: Context | None) -> float:
        """Return 1/n + 1/n₀ of a held-out effect: against half of the controls, or in a held-out context."""
        if context is None:
            return measured_by(self.pairs, label, share=0.5)
        return measured_by(self.pairs, label, self.pairs.cells_in(label, context))

    @property
    def effects_by_context(self) -> dict[tuple[str, str], dict[str, np.ndarray]]:
        """Per context, the effects of the training perturbations that have enough cells in it."""
        known = set(self.effects.labels)
        of_known = {
            context: {label: effect for label, effect in effects.items() if label in known}
            for context, effects in self.pairs.effects_by_context.items()
        }
        return {context: effects for context, effects in of_known.items() if effects}


Round = tuple[TrainingSet, Effects, Context | None]  # an inner training set, held-out effects, and their context


class MeanEffects(Model):
    """A model with one mean effect per perturbation, the same for all cells."""

    artefact: Artefact

    @abstractmethod
    def effect(self, perturbation: str) -> np.ndarray:
        """Return the predicted mean effect, (genes,)."""

    def effect_in(self, perturbation: str, context: Context | None) -> np.ndarray:
        """Return the predicted mean effect in a context, (genes,); most models ignore the context."""
        return self.effect(perturbation)

    def restore(self, artefact: Artefact) -> None:
        """Take over the arrays."""
        self.artefact = artefact

    def predict(
        self, cells: np.ndarray, perturbations: Sequence[str], n: int, seed: int, context: Context | None = None
    ) -> np.ndarray:
        """Change the counts of control cells until their mean has changed by the effect; control changes nothing."""
        start = start_cells(cells, n)
        predicted = np.empty((len(perturbations), *start.shape), dtype=np.float32)
        for p, perturbation in enumerate(perturbations):
            if perturbation == CONTROL:
                predicted[p] = start
            else:
                change = self.effect_in(perturbation, context) + off_level(start, context)
                predicted[p] = with_mean_effect(start, change, None, np.random.default_rng((seed, p)))
        return predicted

    def counterfactual(
        self, cells: np.ndarray, perturbations: Sequence[str], samples: int, seed: int, context: Context | None = None
    ) -> np.ndarray:
        """Add the effect to every cell; control adds nothing. No cell's outcome depends on the other cells."""

        def effect(perturbation: str) -> np.ndarray:
            if perturbation == CONTROL:
                return np.zeros_like(cells)
            return self.individual_effects(cells, perturbation, seed, context)

        effects = np.stack([effect(perturbation) for perturbation in perturbations])
        return np.repeat((cells + effects)[:, :, None], samples, axis=2).astype(np.float32)

    def mean_effects(
        self, cells: np.ndarray, perturbations: Sequence[str], seed: int, context: Context | None = None
    ) -> np.ndarray:
        """Return mean effects over a context, (perturbations, genes)."""
        of_control = np.zeros(cells.shape[1])
        return np.stack([of_control if label == CONTROL else self.effect_in(label, context) for label in perturbations])

    def individual_effects(
        self, cells: np.ndarray, perturbation: str, seed: int, context: Context | None = None
    ) -> np.ndarray:
        """Return the effect, the same for every cell of a batch and cell type, (cells, genes)."""
        effects = np.empty(cells.shape)
        for rows, place in [(slice(None), None)] if context is None else context.places():
            effects[rows] = self.effect_in(perturbation, place)
        return effects


class ClosedForm(MeanEffects):
    """Mean effects that are learned from those of training, without a network."""

    @abstractmethod
    def learn(self, training: TrainingSet) -> Artefact:
        """Return the arrays that `effect` needs."""

    def fit(self, pairs: Pairs, embeddings: Embeddings, run: Run) -> Artefact:
        """Measure training effects and learn from them."""
        return self.learned(TrainingSet.of(pairs, embeddings, run.seed)).artefact

    def learned(self, training: TrainingSet) -> Self:
        """Learn, and return the model itself."""
        self.restore(self.learn(training))
        return self

    def held_out(self, pairs: Pairs, embeddings: Embeddings, seed: int) -> Calibration:
        """Fit again without combinations, genes and contexts, in turn, and score the predictions of these.

        Of each kind, folds end once ENOUGH_HELD_OUT perturbations are scored.
        """
        training = TrainingSet.of(pairs, embeddings, seed)
        scale, found = Scale.of(training.pairs, training.effects), Calibration.none()
        # Every second round: those against one half of the controls.
        of_labels = (training.rounds(of_genes=of_genes, one_by_one=False) for of_genes in (False, True))
        kinds = [((*one, None) for one in itertools.islice(of, 0, None, 2)) for of in of_labels]
        rounds = map(_until_enough, [*kinds, training.rounds_of_contexts()])
        for inner, held, context in itertools.chain.from_iterable(rounds):
            fitted = copy.copy(self).learned(inner)
            measured, known = set(inner.effects.labels), set(inner.effects.entities)
            found += Calibration.of(
                held.labels,
                [novelty_of(label, measured, known) for label in held.labels],
                np.stack([fitted.effect_in(label, context) for label in held.labels]),
                held.values,
                [training.sampling_of(label, context) for label in held.labels],
                scale,
                training.genes,
                [fitted.uncertainty(label, context) for label in held.labels],
            )
        return found


def _until_enough(rounds: Iterable[Round]) -> Iterator[Round]:
    """Yield rounds of one kind until they held out enough perturbations."""
    n = 0
    for inner, held_out, context in rounds:
        yield inner, held_out, context
        n += len(held_out.labels)
        if n >= ENOUGH_HELD_OUT:
            return


Candidate = TypeVar("Candidate", bound=ClosedForm)


def least_error(
    candidates: Sequence[Candidate], training: TrainingSet, *, of_genes: bool, one_by_one: bool = True
) -> Candidate:
    """Return the candidate with the least squared error on held-out training perturbations.

    It is the first candidate where none can be held out.
    """
    errors = np.zeros(len(candidates))
    for inner, held_out in training.rounds(of_genes=of_genes, one_by_one=one_by_one):
        for i, candidate in enumerate(candidates):
            candidate.learned(inner)
            errors[i] += sum(
                ((candidate.effect(label) - value) ** 2).sum()
                for label, value in zip(held_out.labels, held_out.values, strict=True)
            )
    return candidates[int(errors.argmin())]
