"""Closed forms for a new context: what other contexts measured, carried over as it is, centred or shrunken."""

from abc import abstractmethod

import numpy as np

from perturbflow.controls import Context
from perturbflow.models.base import Artefact
from perturbflow.models.closed_form.base import ClosedForm, TrainingSet

TRANSFERRED = (0.0, 0.25, 0.5, 0.6)  # share of the centred effect, by the number of contexts


def _means(training: TrainingSet) -> dict[tuple[str, str], np.ndarray]:
    """Return the mean effect of every context, over its perturbations."""
    return {context: np.mean(list(of.values()), axis=0) for context, of in training.effects_by_context.items()}


class Elsewhere(ClosedForm):
    """The base of those that predict one effect per perturbation from the contexts that measured it."""

    def learn(self, training: TrainingSet) -> Artefact:
        """Combine the effects that each perturbation has in the contexts of training."""
        by_context, means = training.effects_by_context, _means(training)
        mean = np.mean(list(means.values()), axis=0) if means else training.effects.values.mean(axis=0)
        effects = []
        for label in training.effects.labels:
            own = {context: of[label] for context, of in by_context.items() if label in of}
            effects.append(self.combined(own, means, mean) if own else mean)
        return {"labels": np.array(training.effects.labels, dtype=str), "effects": np.stack(effects), "mean": mean}

    @abstractmethod
    def combined(
        self, own: dict[tuple[str, str], np.ndarray], means: dict[tuple[str, str], np.ndarray], mean: np.ndarray
    ) -> np.ndarray:
        """Return the effect of a perturbation from those in the contexts that measured it, (genes,).

        Parameters
        ----------
        own
            Context → its effect there; at least one.
        means, mean
            Mean effect of every context, and the mean of these.
        """

    def effect(self, perturbation: str) -> np.ndarray:
        """Look the perturbation up."""
        labels = self.artefact["labels"].tolist()
        return self.artefact["effects"][labels.index(perturbation)] if perturbation in labels else self.artefact["mean"]


class OtherContextsMean(Elsewhere):
    """The mean effect of the other contexts, whatever the perturbation: each context counts once."""

    def combined(
        self, own: dict[tuple[str, str], np.ndarray], means: dict[tuple[str, str], np.ndarray], mean: np.ndarray
    ) -> np.ndarray:
        """Return the mean over contexts."""
        return mean


class SameElsewhere(Elsewhere):
    """The mean effect of the same perturbation in the contexts that measured it, as it is."""

    def combined(
        self, own: dict[tuple[str, str], np.ndarray], means: dict[tuple[str, str], np.ndarray], mean: np.ndarray
    ) -> np.ndarray:
        """Average over contexts."""
        return np.mean(list(own.values()), axis=0)


class Transfer(Elsewhere):
    """The mean effect, plus a share of the perturbation's difference from it in the contexts that measured it.

    δ̂ = m̄ + w_k · mean over k contexts of (δ_c − m_c). m_c is the mean effect in context c, m̄ the mean of these. w is 0,
    0.25, 0.5 for k = 0, 1, 2 and 0.6 for three or more contexts: chosen by nested leave-one-line-out in the four
    essential-gene screens (GenBio 2026). There the whole effect of one other context (w = 1) is worse than no change. A
    context (`Pairs.context_keys`) has controls of its own and at least ten cells of the perturbation.
    """

    def combined(
        self, own: dict[tuple[str, str], np.ndarray], means: dict[tuple[str, str], np.ndarray], mean: np.ndarray
    ) -> np.ndarray:
        """Centre, average over contexts, and shrink."""
        share = TRANSFERRED[min(len(own), len(TRANSFERRED) - 1)]
        return mean + share * np.mean([effect - means[context] for context, effect in own.items()], axis=0)


class NearestContext(ClosedForm):
    """The effect of the same perturbation in that of the contexts that measured it whose controls are most alike.

    A perturbation that no context measured has the mean effect of the nearest context.
    """

    def learn(self, training: TrainingSet) -> Artefact:
        """Keep effects and mean control of every context."""
        by_context, pairs = training.effects_by_context, training.pairs
        if not by_context:
            by_context = {("", ""): {label: training.effects.of(label) for label in training.effects.labels}}
        levels = [
            pairs.mean_of(np.flatnonzero(pairs.is_of_context(context) & pairs.is_control))
            if context != ("", "")
            else pairs.control_level
            for context in by_context
        ]
        places = [(i, label) for i, of in enumerate(by_context.values()) for label in of]
        return {
            "levels": np.stack(levels),
            "context": np.array([i for i, _ in places]),
            "labels": np.array([label for _, label in places], dtype=str),
            "effects": np.stack([effect for of in by_context.values() for effect in of.values()]),
        }

    def effect(self, perturbation: str) -> np.ndarray:
        """Return the mean over contexts, where none is asked."""
        known = self.artefact["labels"] == perturbation
        return self.artefact["effects"][known if known.any() else slice(None)].mean(axis=0)

    def effect_in(self, perturbation: str, context: Context | None) -> np.ndarray:
        """Look the perturbation up in the nearest context."""
        if context is None:
            return self.effect(perturbation)
        artefact = self.artefact
        near = np.argsort(((artefact["levels"] - context.level) ** 2).sum(axis=1), kind="stable")
        known = artefact["labels"] == perturbation
        for place in near if known.any() else near[:1]:
            rows = (artefact["context"] == place) & (known if known.any() else True)
            if rows.any():
                return artefact["effects"][rows].mean(axis=0)
        return self.effect(perturbation)
