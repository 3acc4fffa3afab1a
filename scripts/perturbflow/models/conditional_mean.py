"""The mean that learned models are built around: a mix of closed forms, with as much of what is a perturbation's own as it can bear.

A closed form that is fitted by squared error shrinks: what it says of one perturbation is drawn towards the mean of all. Mixing several
shrinks again. The error hardly notices, but predictions lose what tells them apart. So the mix's difference to the mean of the training
perturbations of the same order is taken times a gain,

    ŷ_p = m_o + γ (Σ_i w_i ŷ_ip − m_o),

and mix and gain are chosen by predicting training perturbations held out (inner folds of combinations, of genes and of contexts; never the
split's test): of those that have no greater error than the best part alone, the one with the least sum of the four losses below.
Where fewer than `LEAST_HELD_OUT` perturbations can be held out, or no mix is better than `stacked` alone by more than twice the standard
error of the difference, it is `stacked` alone. The level of an unseen gene itself is always that of `stacked`, which fits it apart.

What the chosen mix says of the perturbations that were held out is kept, as scores (`conformal`): they say how far off it is on the next one.

A network's own idea of mean effects is one more part, where it is handed over (`FitPart`): it is trained anew for every inner fold, and is
in the mix only as far as it predicts what it was not trained on.
"""

import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from perturbflow.models.base import Artefact
from perturbflow.models.baselines import Additive, LatentSum, effects_by_context
from perturbflow.models.conformal import CASES, Calibration, Scale, case_of, measured_by
from perturbflow.models.effects import Effects
from perturbflow.models.shift import MeanShift, Training
from perturbflow.models.stacked import Stacked
from perturbflow.progress import progressed
from perturbflow.symbols import entities_of, members_of

logger = logging.getLogger(__name__)

MIXES = ({"stacked": 1.0}, {"latent": 1.0}, {"sum": 1.0}, {"stacked": 0.5, "latent": 0.5}, {"stacked": 0.5, "sum": 0.5})
MIXES_WITH = ({"{}": 1.0}, {"stacked": 0.5, "{}": 0.5}, {"latent": 0.5, "{}": 0.5}, {"stacked": 0.75, "{}": 0.25})  # of another part
GAINS = (1.0, 1.1, 1.2, 1.3, 1.5, 1.75, 2.0)
LEAST_HELD_OUT = 20
MAX_CONTEXTS = 8  # held out
LATENT = (15, 0.3)  # directions and penalty of the members' common fit
N_HIGH = 1000

# Fits a part that is no closed form: from an inner training and rows of pairs.h5ad that hold the controls to start from, to effects by label.
FitPart = Callable[[Training, np.ndarray], Callable[[str], np.ndarray]]


def parts() -> dict[str, MeanShift]:
    """Return the closed forms that are mixed."""
    return {"stacked": Stacked(), "latent": LatentSum(*LATENT), "sum": Additive()}


def centres(effects: Effects) -> dict[str, np.ndarray]:
    """Return the mean effect of singles and of combinations; of all, where training has none of a kind."""
    is_single = effects.order == 1
    kinds = {"single": is_single, "combination": ~is_single}
    return {kind: effects.values[mask if mask.any() else slice(None)].mean(axis=0) for kind, mask in kinds.items()}


def kind_of(perturbation: str) -> str:
    """Return which centre a perturbation has."""
    return "single" if len(members_of(perturbation)) == 1 else "combination"


def losses(predicted: np.ndarray, truth: np.ndarray, reference: np.ndarray, is_high: np.ndarray, is_target: np.ndarray) -> np.ndarray:
    """Return four losses per held-out perturbation, each about 0 (perfect) to 1 (useless), (perturbations, 4).

    Error relative to no change and 1 − Pearson's r of effects on the genes most expressed in controls, 1 − r of effects less the mean
    training effect, and the share of other held-out perturbations whose effect is nearer by cosine, without the perturbed genes.

    Parameters
    ----------
    predicted, truth
        Effects, (perturbations, genes).
    reference
        Mean training effect, (genes,).
    is_high, is_target
        Masks of the genes most expressed in controls and of the perturbed genes, (genes,).
    """
    error = np.linalg.norm((predicted - truth)[:, is_high], axis=1) / np.linalg.norm(truth[:, is_high], axis=1).mean()
    effect = 1.0 - _correlation(predicted[:, is_high], truth[:, is_high])
    own = 1.0 - _correlation(predicted - reference, truth - reference)
    if len(truth) < 2:
        return np.column_stack([error, effect, own, np.full(len(truth), 0.5)])
    cosine = _unit(predicted[:, ~is_target]) @ _unit(truth[:, ~is_target]).T
    right = np.diag(cosine)[:, None]
    nearer = ((cosine > right).sum(axis=1) + 0.5 * ((cosine == right).sum(axis=1) - 1)) / (len(truth) - 1)
    return np.column_stack([error, effect, own, nearer])


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (_unit(a - a.mean(axis=1, keepdims=True)) * _unit(b - b.mean(axis=1, keepdims=True))).sum(axis=1)


class ConditionalMean(MeanShift):
    """A mix of `stacked`, `LatentSum`, `Additive` and whatever else is handed over, with a gain, chosen per case; see the head of this module.

    Parameters
    ----------
    others
        By name, how to fit parts that are no closed forms.
    """

    def __init__(self, others: Mapping[str, FitPart] | None = None) -> None:
        self.others = others or {}
        more = [{key.format(name): weight for key, weight in mix.items()} for name in self.others for mix in MIXES_WITH]
        self.mixes: tuple[dict[str, float], ...] = (*MIXES, *more)

    def learn(self, training: Training) -> Artefact:
        """Choose mix and gain of every case by held-out training perturbations, then fit all parts to the whole of training."""
        chosen = dict.fromkeys(CASES, (0, 1.0, 0))
        scored: dict[str, list[np.ndarray]] = {case: [] for case in CASES}
        kept: list[_HeldOut] = []
        is_target = np.isin(training.genes, training.effects.entities)
        for inner, held_out, start, can_choose in progressed(self._rounds(training), "inner folds", _n_rounds(training)):
            fitted = parts() if can_choose else {"stacked": Stacked()}
            effect_of: dict[str, Callable[[str], np.ndarray]] = {name: part.learned(inner).effect for name, part in fitted.items()}
            if can_choose:
                effect_of |= {name: fit(inner, start) for name, fit in self.others.items()}
            middle, reference = centres(inner.effects), inner.effects.values.mean(axis=0)
            is_high = np.zeros(len(training.genes), dtype=bool)
            is_high[np.argsort(-inner.pairs.control_level, kind="stable")[:N_HIGH]] = True
            measured, known = set(inner.effects.labels), set(inner.effects.entities)
            cases = np.array([case_of(label, measured, known) for label in held_out.labels])
            for case in CASES:
                rows = np.flatnonzero(cases == case)
                if not len(rows):
                    continue
                labels = [held_out.labels[i] for i in rows]
                said = {name: np.stack([effect(label) for label in labels]) for name, effect in effect_of.items()}
                centre = np.stack([middle[kind_of(label)] for label in labels])
                kept.append(
                    _HeldOut(case, labels, said, centre, held_out.values[rows], [_sampling(training, label, start) for label in labels])
                )
                if not can_choose:
                    continue
                tables = [
                    losses(_mixed(said, mix, gain, centre), held_out.values[rows], reference, is_high, is_target)
                    for mix, gain in itertools.product(self.mixes, GAINS)
                ]
                scored[case].append(np.stack(tables))  # (candidates, perturbations, losses)
        for case, tables in scored.items():
            if tables:
                chosen[case] = _chosen(self.mixes, np.concatenate(tables, axis=1))
                mix, gain, n = chosen[case]
                logger.info("mean of the case '%s': %s, gain %.1f, by %d held-out perturbations", case, self.mixes[mix], gain, n)
        artefact: Artefact = {
            "measured": np.array(training.effects.labels, dtype=str),
            "known": np.array(training.effects.entities, dtype=str),
            "mixes": np.array([json.dumps(mix) for mix in self.mixes], dtype=str),
            "choice": np.array([chosen[case] for case in CASES], dtype=float),
            **{f"centre.{kind}": value for kind, value in centres(training.effects).items()},
        }
        scale = Scale.of(training.pairs, training.effects)
        calibration = Calibration.none()
        for held in kept:
            mix, gain, _ = chosen[held.case] if "sum" in held.said else (0, 1.0, 0)
            predicted = _mixed(held.said, self.mixes[mix], gain, held.centre)
            calibration += Calibration.of(
                held.labels, [held.case] * len(held.labels), predicted, held.measured, held.sampling, scale, training.genes
            )
        artefact |= {f"held_out.{key}": value for key, value in calibration.arrays().items()}
        for name, part in parts().items():
            artefact |= {f"{name}.{key}": value for key, value in part.learned(training).artefact.items()}
        artefact["genes"] = np.array(training.genes, dtype=str)
        return artefact

    def restore(self, artefact: Artefact) -> None:
        """Hand every part its arrays."""
        super().restore(artefact)
        self.parts = parts()
        for name, part in self.parts.items():
            prefix = f"{name}."
            part.restore({key.removeprefix(prefix): value for key, value in artefact.items() if key.startswith(prefix)})
        self.mixes = tuple(json.loads(mix) for mix in artefact["mixes"].tolist())
        self.measured, self.known = set(artefact["measured"].tolist()), set(artefact["known"].tolist())
        self.row = {gene: i for i, gene in enumerate(artefact["genes"].tolist())}
        stored = {key.removeprefix("held_out."): value for key, value in artefact.items() if key.startswith("held_out.")}
        self.of_held_out = Calibration.from_arrays(stored)

    def effect(self, perturbation: str, said: Mapping[str, Callable[[], np.ndarray]] | None = None) -> np.ndarray:
        """Mix the parts by the choice of the perturbation's case.

        Parameters
        ----------
        said
            By name, how to get what the parts say that are no closed forms, (genes,).
        """
        mix, gain, _ = self.artefact["choice"][CASES.index(case_of(perturbation, self.measured, self.known))]
        said = said or {}
        effects = {name: (said[name]() if name in said else self.parts[name].effect(perturbation))[None] for name in self.mixes[int(mix)]}
        centre = self.artefact[f"centre.{kind_of(perturbation)}"]
        effect = _mixed(effects, self.mixes[int(mix)], gain, centre)[0]
        own = [self.row[gene] for gene in entities_of(perturbation) if gene not in self.known and gene in self.row]
        if own:
            effect[own] = self.parts["stacked"].effect(perturbation)[own]
        return effect

    def account(self) -> dict[str, str]:
        """Return what was chosen per case, in words."""
        return {
            case: " + ".join(f"{weight:g} {name}" for name, weight in self.mixes[int(mix)].items())
            + f", gain {gain:g}, by {int(n)} held out"
            for case, (mix, gain, n) in zip(CASES, self.artefact["choice"], strict=True)
        }

    @staticmethod
    def _rounds(training: Training) -> Iterator[tuple[Training, Effects, np.ndarray, bool]]:
        """Yield inner trainings, what they do not know, controls to start from, and whether there is enough of that kind to choose by.

        What they do not know are combinations, genes with all that involves them, and contexts.
        """
        for of_genes in (False, True):
            if not of_genes and not (training.effects.order > 1).any():
                continue
            rounds = list(
                itertools.islice(training.rounds(of_genes=of_genes, one_by_one=False), 0, None, 2)
            )  # against one half of the controls
            cases = [case_of(label, set(i.effects.labels), set(i.effects.entities)) for i, held_out in rounds for label in held_out.labels]
            can_choose = max(map(cases.count, cases), default=0) >= LEAST_HELD_OUT
            for inner, held_out in rounds:
                yield inner, held_out, training.pairs.rows[inner.controls], can_choose
        yield from _other_contexts(training)


def _n_rounds(training: Training) -> int:
    """Return how many rounds there are, for what is said of progress."""
    has_combinations, n_contexts = bool((training.effects.order > 1).any()), len(effects_by_context(training))
    return (
        len(training.folds(of_genes=True, one_by_one=False)) + (len(training.folds(of_genes=False)) if has_combinations else 0)
        + (min(n_contexts, MAX_CONTEXTS) if n_contexts > 1 else 0)
    )  # fmt: skip


@dataclass(frozen=True)
class _HeldOut:
    """What the parts said of held-out perturbations of a case, and what was measured, (perturbations, genes) each."""

    case: str
    labels: list[str]
    said: dict[str, np.ndarray]
    centre: np.ndarray
    measured: np.ndarray
    sampling: list[float]


def _sampling(training: Training, label: str, start: np.ndarray) -> float:
    """Return 1/n + 1/n₀ of a held-out perturbation, measured against these controls; its cells are those of their batches."""
    pairs = training.pairs
    controls = np.searchsorted(pairs.rows, start)
    strata = np.unique(pairs.groups.stratum[controls])
    rows = pairs.cells_of(label)
    here = rows[np.isin(pairs.groups.stratum[rows], strata)]
    n_controls = max(1, int(np.isin(pairs.groups.stratum[pairs.is_control], strata).sum()))
    return measured_by(pairs, label, here if len(here) else rows, share=len(controls) / n_controls)


def _other_contexts(training: Training) -> Iterator[tuple[Training, Effects, np.ndarray, bool]]:
    """Yield trainings without the cells of one context, the effects in it of perturbations that the others hold too, and its controls."""
    by_context = effects_by_context(training)
    if len(by_context) < 2:
        return
    contexts = list(by_context)
    held_out = np.random.default_rng(training.seed).permutation(len(contexts))[:MAX_CONTEXTS]
    for context in (contexts[i] for i in sorted(held_out)):
        effects, is_here = by_context[context], training.pairs.is_of_context(context)
        inner = Training.of(training.pairs.without_context(context), training.embeddings, training.seed)
        labels = [label for label in effects if label in inner.effects.labels]
        if labels:
            values = np.stack([effects[label] for label in labels])
            yield inner, Effects(labels, values, np.zeros_like(values)), training.pairs.rows[is_here & training.pairs.is_control], True


def _mixed(said: dict[str, np.ndarray], mix: dict[str, float], gain: float, centre: np.ndarray) -> np.ndarray:
    """Return m + γ (Σ w ŷ − m), (perturbations, genes)."""
    mean = sum(weight * said[name] for name, weight in mix.items())
    return centre + gain * (mean - centre)


def _chosen(mixes: tuple[dict[str, float], ...], tables: np.ndarray) -> tuple[int, float, int]:
    """Return mix, gain and how many perturbations chose them, from losses of all candidates, (candidates, perturbations, 4)."""
    candidates = list(itertools.product(range(len(mixes)), GAINS))
    n = tables.shape[1]
    if n < LEAST_HELD_OUT:
        return 0, 1.0, n
    error, total = tables[..., 0].mean(axis=1), tables.sum(axis=2)
    is_plain = np.array([len(mixes[mix]) == 1 and gain == 1.0 for mix, gain in candidates])
    is_allowed = error <= error[is_plain].min() * (1 + 1e-9)
    best = int(np.where(is_allowed, total.mean(axis=1), np.inf).argmin())
    gained = total[0] - total[best]
    if gained.mean() <= 2 * gained.std(ddof=1) / np.sqrt(n):
        return 0, 1.0, n
    return *candidates[best], n
