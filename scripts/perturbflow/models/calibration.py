"""Intervals of mean effects by split-conformal prediction, with perturbations as what is exchanged.

What a model says of perturbations that it was not trained on is held against what was measured of them. The score of a gene is |measured − predicted|
in units of what it may differ by,

    s_pg² = v_g (1/n + 1/n₀) + τ_g²,

with v_g the gene's variance over controls, n and n₀ the cells and controls that the measurement is a mean of, τ_g² the variance of true effects over
training perturbations; a model that is unsure of each effect by a variance of its own (`uncertainty`) has that in place of τ_g². An interval of level 1 − α reaches q s to both sides, q the 1 − α quantile of the scores, each held-out measurement having the same
weight (the pooled distribution of groups: Dunn, Wasserman & Ramdas 2022, doi:10.1080/01621459.2022.2060112, section 3). Over perturbations like those held out,
it covers what a screen of as many cells would measure; with few held out, only roughly.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perturbflow.genes.symbols import entities_of
from perturbflow.models.effects import Effects
from perturbflow.pairs import Pairs

CASES = ("measured", "seen", "unseen gene", "unseen member")  # what training knew of a perturbation
LEVELS = np.linspace(0.0, 1.0, 201)  # of the scores that are kept of a perturbation
LEAST_OF_CASE = 4  # perturbations: with fewer of its own case, a question gets the scores of all


def case_of(perturbation: str, measured: set[str], known: set[str]) -> str:
    """Return which case a perturbation is, given the labels of training and the genes or compounds perturbed in it, at whatever dose."""
    entities = entities_of(perturbation)
    if perturbation in measured:
        return "measured"
    if set(entities) <= known:
        return "seen"
    return "unseen gene" if len(entities) == 1 else "unseen member"


@dataclass(frozen=True)
class Scale:
    """What a measured effect may differ from a predicted one by.

    Attributes
    ----------
    variance
        v_g, of log1p expression over controls of a batch and cell type, (genes,).
    spread
        τ_g², of true effects over perturbations, (genes,).
    """

    variance: np.ndarray
    spread: np.ndarray

    @classmethod
    def of(cls, training: Pairs, effects: Effects) -> "Scale":
        """Measure it on training cells."""
        groups, (sums, squares) = training.groups, training.sums
        first = len(groups.labels)
        n = groups.n_cells[first:].reshape(-1, 2).sum(axis=1)[:, None]
        of_strata, squares_of_strata = (table[first:].reshape(len(n), 2, -1).sum(axis=1) for table in (sums, squares))
        within = (squares_of_strata - of_strata**2 / np.maximum(n, 1)).sum(axis=0) / max(1, (n - 1)[n > 0].sum())
        variance = np.maximum(within, 1e-6)
        noise = variance * np.mean([measured_by(training, label) for label in effects.labels])
        return cls(variance, np.maximum((effects.values.astype(float) ** 2).mean(axis=0) - noise, 0.0))

    def at(self, sampling: float, uncertainty: np.ndarray | None = None) -> np.ndarray:
        """Return s, (genes,), for a measurement with 1/n + 1/n₀ as given; where a model has a variance of its own, (genes,), in place of τ²."""
        return np.sqrt(self.variance * sampling + (self.spread if uncertainty is None else uncertainty))


def measured_by(pairs: Pairs, label: str, rows: np.ndarray | None = None, share: float = 1.0) -> float:
    """Return 1/n + 1/n₀ of a perturbation's mean effect: its cells, and the controls of their batches, weighted as the cells are.

    Parameters
    ----------
    rows
        The cells; None takes all of the perturbation.
    share
        Of the controls, that it was measured against.
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
    labels, cases
        Of every perturbation: its label, and what was known of it (CASES).
    scores
        Quantiles of its genes' scores at LEVELS, the perturbed genes left out, (perturbations, levels).
    sampling
        1/n + 1/n₀ of its measurement, (perturbations,).
    """

    labels: list[str]
    cases: list[str]
    scores: np.ndarray
    sampling: np.ndarray

    @classmethod
    def none(cls) -> "Calibration":
        """Return one without perturbations."""
        return cls([], [], np.zeros((0, len(LEVELS))), np.zeros(0))

    @classmethod
    def of(
        cls,
        labels: Sequence[str],
        cases: Sequence[str],
        predicted: np.ndarray,
        measured: np.ndarray,
        sampling: Sequence[float],
        scale: Scale,
        genes: list[str],
        uncertainty: Sequence[np.ndarray | None] | None = None,
    ) -> "Calibration":
        """Score predictions of held-out perturbations, (perturbations, genes), in units of `Scale.at`."""
        scores = []
        for label, p, m, s, u in zip(
            labels, predicted, measured, sampling, uncertainty or [None] * len(labels), strict=True
        ):
            kept = ~np.isin(genes, entities_of(label))
            scores.append(np.quantile((np.abs(m - p) / scale.at(s, u))[kept], LEVELS))
        return cls(
            list(labels),
            list(cases),
            np.array(scores).reshape(len(scores), len(LEVELS)),
            np.array(sampling, dtype=float),
        )

    def __add__(self, other: "Calibration") -> "Calibration":
        return Calibration(
            [*self.labels, *other.labels],
            [*self.cases, *other.cases],
            np.concatenate([self.scores, other.scores]),
            np.concatenate([self.sampling, other.sampling]),
        )

    def for_case(self, case: str) -> "Calibration":
        """Return the perturbations of a case; all, where these are too few."""
        rows = [i for i, of in enumerate(self.cases) if of == case]
        if len(rows) < LEAST_OF_CASE:
            return self
        return Calibration([self.labels[i] for i in rows], [case] * len(rows), self.scores[rows], self.sampling[rows])

    def reach(self, level: float) -> float:
        """Return q, in units of s; infinite without a perturbation."""
        if not self.labels:
            return np.inf
        return float(np.quantile(self.scores.ravel(), level))

    @property
    def typical_sampling(self) -> float:
        """Median of 1/n + 1/n₀."""
        return float(np.median(self.sampling)) if self.labels else np.nan

    def arrays(self) -> dict[str, np.ndarray]:
        """Return what is to be stored."""
        return {
            "labels": np.array(self.labels, dtype=str), "cases": np.array(self.cases, dtype=str), "scores": self.scores.astype(np.float32),
            "sampling": self.sampling,
        }  # fmt: skip

    @classmethod
    def from_arrays(cls, arrays: dict[str, np.ndarray]) -> "Calibration":
        """Rebuild what `arrays` returned."""
        return cls(
            arrays["labels"].tolist(), arrays["cases"].tolist(), arrays["scores"].astype(float), arrays["sampling"]
        )
