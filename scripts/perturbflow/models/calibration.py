"""Intervals of mean effects by split-conformal prediction; perturbations are the exchangeable units.

1. Score. A model predicts perturbations that it was not trained on. The score of a gene is |measured − predicted| / s:

    s_pg² = v_g (1/n + 1/n₀) + τ_g².

   v_g is the gene's variance over controls. The measurement is a mean over n cells minus one over n₀ controls. τ_g² is
   the variance of true effects over training perturbations. Where a model has its own variance of each effect
   (`uncertainty`), that replaces τ_g².

2. Interval. At level 1 − α it reaches q s to both sides; q is the 1 − α quantile of the scores. Each held-out
   measurement has the same weight (the pooled distribution of groups: Dunn, Wasserman & Ramdas 2022,
   doi:10.1080/01621459.2022.2060112, section 3).

3. Promise. The expected correlation of a predicted effect μ with a measurement is about ‖μ‖ / √(‖μ‖² + Σ_g s_g²), where
   s_pg is the scale above. Beside it stands the correlation that was found (`accuracy`).

4. Coverage. For perturbations like those held out, it covers the measurement of a screen with as many cells. With few
   held out, the level holds only roughly.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from perturbflow.genes.symbols import entities_of
from perturbflow.models.effects import Effects
from perturbflow.pairs import Pairs

NOVELTIES = ("measured", "seen", "unseen gene", "unseen member")  # how new a perturbation is to training
LEVELS = np.linspace(0.0, 1.0, 201)  # of a perturbation's scores, of which these quantiles are kept
NEGLIGIBLE = 1e-3  # of an effect: rounding may leave this of a multiple of another
LEAST_OF_NOVELTY = 4  # perturbations: with fewer of its own novelty, a question gets the scores of all


def novelty_of(perturbation: str, measured: set[str], known: set[str]) -> str:
    """Return how new a perturbation is to training.

    Parameters
    ----------
    measured
        Labels of training.
    known
        Genes or compounds that training perturbs, at any dose.
    """
    entities = entities_of(perturbation)
    if perturbation in measured:
        return "measured"
    if set(entities) <= known:
        return "seen"
    return "unseen gene" if len(entities) == 1 else "unseen member"


@dataclass(frozen=True)
class Scale:
    """The scale s of the difference between a measured and a predicted effect.

    Attributes
    ----------
    variance
        v_g, of log1p expression over controls of a batch and cell type, (genes,).
    spread
        τ_g², of true effects over perturbations, (genes,).
    mean
        Mean effect of training, (genes,).
    """

    variance: np.ndarray
    spread: np.ndarray
    mean: np.ndarray = field(default_factory=lambda: np.zeros(1))

    @classmethod
    def of(cls, training: Pairs, effects: Effects) -> "Scale":
        """Estimate both variances from training cells."""
        groups, (sums, squares) = training.groups, training.sums
        first = len(groups.labels)
        n = groups.n_cells[first:].reshape(-1, 2).sum(axis=1)[:, None]
        of_strata, squares_of_strata = (table[first:].reshape(len(n), 2, -1).sum(axis=1) for table in (sums, squares))
        within = (squares_of_strata - of_strata**2 / np.maximum(n, 1)).sum(axis=0) / max(1, (n - 1)[n > 0].sum())
        variance = np.maximum(within, 1e-6)
        noise = variance * np.mean([measured_by(training, label) for label in effects.labels])
        values = effects.values.astype(float)
        return cls(variance, np.maximum((values**2).mean(axis=0) - noise, 0.0), values.mean(axis=0))

    def at(self, sampling: float, uncertainty: np.ndarray | None = None) -> np.ndarray:
        """Return s, (genes,).

        Parameters
        ----------
        sampling
            1/n + 1/n₀ of the measurement.
        uncertainty
            The model's own variance, (genes,), which replaces τ²; None keeps τ².
        """
        return np.sqrt(self.variance * sampling + (self.spread if uncertainty is None else uncertainty))


def promised(effect: np.ndarray, unit: np.ndarray) -> float:
    """Return the expected correlation of a predicted effect with a measurement.

    Parameters
    ----------
    effect
        (genes,).
    unit
        s of `Scale.at`, (genes,).
    """
    size = float(((effect - effect.mean()) ** 2).sum())
    return float(np.sqrt(size / max(size + float((unit**2).sum()), 1e-24)))


def _agreement(a: np.ndarray, b: np.ndarray, without: Sequence[np.ndarray]) -> float:
    """Return the cosine of two effects of what some vectors leave of them, (genes,) each; 0 where that is nothing.

    Without a constant it is Pearson's correlation, and without another effect too the partial one.
    """
    basis, _ = np.linalg.qr(np.stack([vector for vector in without if np.abs(vector).max() > 0], axis=1))
    rests = [effect - basis @ (basis.T @ effect) for effect in (a.astype(float), b.astype(float))]
    sizes = [float(np.linalg.norm(rest)) for rest in rests]
    is_flat = any(size <= NEGLIGIBLE * np.linalg.norm(of) for size, of in zip(sizes, (a, b), strict=True))
    return 0.0 if is_flat else float(rests[0] @ rests[1]) / (sizes[0] * sizes[1])


def measured_by(pairs: Pairs, label: str, rows: np.ndarray | None = None, share: float = 1.0) -> float:
    """Return 1/n + 1/n₀ of a perturbation's mean effect, with the controls of each batch weighted as its cells are.

    Parameters
    ----------
    rows
        The cells; None takes all cells of the perturbation.
    share
        Share of the controls that the effect was measured against.
    """
    rows = pairs.cells_of(label) if rows is None else rows
    stratum = pairs.groups.stratum
    controls = pairs.groups.n_controls() * share
    n = np.bincount(stratum[rows], minlength=len(controls))
    of_controls = np.where(controls > 0, controls, controls.sum())
    return float(1.0 / len(rows) + ((n / len(rows)) ** 2 / of_controls).sum())


@dataclass(frozen=True)
class Calibration:
    """Scores of perturbations that were held out.

    Attributes
    ----------
    labels, novelties
        Label and novelty of every perturbation (NOVELTIES).
    scores
        Quantiles at LEVELS of the scores of its genes without the perturbed ones, (perturbations, levels).
    sampling
        1/n + 1/n₀ of its measurement, (perturbations,).
    accuracy
        Promised correlation, and the correlations that were found: of whole effects, and of effects without the mean
        effect of training; NaN where they are not known, (perturbations, 3).
    """

    labels: list[str]
    novelties: list[str]
    scores: np.ndarray
    sampling: np.ndarray
    accuracy: np.ndarray = field(default_factory=lambda: np.zeros((0, 3)))

    def __post_init__(self) -> None:
        if len(self.accuracy) != len(self.labels):
            object.__setattr__(self, "accuracy", np.full((len(self.labels), 3), np.nan))

    @classmethod
    def none(cls) -> "Calibration":
        """Return one without perturbations."""
        return cls([], [], np.zeros((0, len(LEVELS))), np.zeros(0))

    @classmethod
    def of(
        cls,
        labels: Sequence[str],
        novelties: Sequence[str],
        predicted: np.ndarray,
        measured: np.ndarray,
        sampling: Sequence[float],
        scale: Scale,
        genes: list[str],
        uncertainty: Sequence[np.ndarray | None] | None = None,
    ) -> "Calibration":
        """Score predictions of held-out perturbations, (perturbations, genes), in units of `Scale.at`."""
        scores, accuracy = np.empty((len(labels), len(LEVELS))), np.empty((len(labels), 3))
        uncertainty = uncertainty or [None] * len(labels)
        for i, (label, variance) in enumerate(zip(labels, uncertainty, strict=True)):
            kept, unit = ~np.isin(genes, entities_of(label)), scale.at(sampling[i], variance)
            scores[i] = np.quantile((np.abs(measured[i] - predicted[i]) / unit)[kept], LEVELS)
            mean = np.broadcast_to(scale.mean, unit.shape)[kept]
            effects = predicted[i][kept], measured[i][kept]
            accuracy[i] = (
                promised(effects[0], unit[kept]),
                _agreement(*effects, [np.ones(len(mean))]),
                _agreement(*effects, [np.ones(len(mean)), mean]),
            )
        return cls(list(labels), list(novelties), scores, np.array(sampling, dtype=float), accuracy)

    def __add__(self, other: "Calibration") -> "Calibration":
        return Calibration(
            [*self.labels, *other.labels],
            [*self.novelties, *other.novelties],
            np.concatenate([self.scores, other.scores]),
            np.concatenate([self.sampling, other.sampling]),
            np.concatenate([self.accuracy, other.accuracy]),
        )

    @cached_property
    def _found(self) -> dict[str | float, Any]:
        """What `for_novelty` and `reach` returned: thousands of questions ask the same."""
        return {}

    def for_novelty(self, novelty: str) -> "Calibration":
        """Return the perturbations of one novelty; all, where these are too few."""
        if novelty not in self._found:
            rows = [i for i, of in enumerate(self.novelties) if of == novelty]
            labels = [self.labels[i] for i in rows]
            of_rows = self.scores[rows], self.sampling[rows], self.accuracy[rows]
            own = Calibration(labels, [novelty] * len(rows), *of_rows)
            self._found[novelty] = own if len(rows) >= LEAST_OF_NOVELTY else self
        return self._found[novelty]

    def reach(self, level: float) -> float:
        """Return q, in units of s; infinite without a perturbation."""
        if not self.labels:
            return np.inf
        if level not in self._found:
            self._found[level] = float(np.quantile(self.scores.ravel(), level))
        return self._found[level]

    @property
    def typical_sampling(self) -> float:
        """Median of 1/n + 1/n₀."""
        return float(np.median(self.sampling)) if self.labels else np.nan

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the arrays to be stored."""
        return {
            "labels": np.array(self.labels, dtype=str),
            "cases": np.array(self.novelties, dtype=str),
            "scores": self.scores.astype(np.float32),
            "sampling": self.sampling,
            "accuracy": self.accuracy,
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Calibration":
        """Undo `arrays`."""
        labels, novelties = arrays["labels"].tolist(), arrays["cases"].tolist()
        return cls(labels, novelties, arrays["scores"].astype(float), arrays["sampling"], arrays["accuracy"])
