"""Which experiment next? Perturbations that would tell most, chosen one by one from the joint posterior of `set_gp`.

Three aims, each greedy: after every choice the posterior is that after its measurement, so that no two choices tell
the same. No outcome is needed for it (`models/gaussian_process/posterior.py`).

* rest: the others are predicted best. Gain of i: Σ_k Σ_{t ≠ i} C_k[t, i]² / (C_k[i, i] + own_k,i), the reduction of the
  summed variance of the targets (A-optimal design; Krause, Singh & Guestrin 2008, section 3, on greedy choice).
* target: a state is reached. The reach of i along the wanted change is Gaussian; a batch is worth the expectation of
  its maximum beyond the best that was measured (parallel expected improvement; Ginsbourger, Le Riche & Carraro 2010),
  over joint samples.
* interactions: combinations that differ from the sum of their members. Expected squared norm of f_{a+b} − f_a − f_b, by
  its mean and variance.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from perturbflow.counterfactuals.questions import Asked, expanded, perturbed_genes, term_of
from perturbflow.counterfactuals.search import Direction
from perturbflow.embeddings import Embeddings
from perturbflow.errors import InputError
from perturbflow.genes.symbols import CONTROL, members_of
from perturbflow.io.artefacts import load_artefact
from perturbflow.io.files import atomic
from perturbflow.models.base import build
from perturbflow.models.gaussian_process.posterior import Posterior
from perturbflow.models.gaussian_process.set_gp import SetGP
from perturbflow.pairs import Pairs

logger = logging.getLogger(__name__)

AIMS = ("rest", "target", "interactions")
# A perturbation and the context that it is measured in; "" is all contexts, in the shares of training's controls.
Place = tuple[str, str]
MOST_CANDIDATES = 1500  # covariances are candidates × candidates
MOST_DIRECTIONS = 20  # the strongest: the others hold little variance
N_SAMPLES = 2000  # of reaches, for expected improvement


@dataclass(frozen=True)
class Choice:
    """Candidates in the order of choice.

    Attributes
    ----------
    places
        Places among the candidates.
    gains
        What each added, in the unit of its aim, (choices,).
    left
        What is left after each, as a share of that before any; NaN where the aim has no such share.
    """

    places: np.ndarray
    gains: np.ndarray
    left: np.ndarray


class Measured:
    """Covariances per direction while measurements are added, (directions, perturbations, perturbations)."""

    def __init__(self, covariances: np.ndarray, own: np.ndarray) -> None:
        self.C, self.own = covariances.astype(np.float64), own

    @classmethod
    def of(cls, posterior: Posterior, contrast: np.ndarray | None = None) -> "Measured":
        """Take the strongest directions.

        Parameters
        ----------
        contrast
            Contrasts × perturbations; None is every perturbation itself.
        """
        strongest = np.argsort(-posterior.signal, kind="stable")[:MOST_DIRECTIONS]
        units = np.eye(len(posterior.signal))[strongest]
        found = [posterior.covariance(unit) for unit in units]
        own = np.stack([posterior.own(unit) for unit in units])
        if contrast is not None:
            found = [contrast @ C @ contrast.T for C in found]
            own = own[:, contrast.argmax(axis=1)]
        return cls(np.stack(found), own)

    @property
    def variance(self) -> np.ndarray:
        """Of each, over directions, (perturbations,)."""
        return np.maximum(np.einsum("kii->i", self.C), 0.0)

    def gains(self, targets: np.ndarray) -> np.ndarray:
        """Return how much the measurement of each lowers the variance of the targets other than itself."""
        total = np.zeros(self.C.shape[1])
        for C, own in zip(self.C, self.own, strict=True):
            total += ((C[targets] ** 2).sum(axis=0) - targets * C.diagonal() ** 2) / (C.diagonal() + own)
        return total

    def add(self, i: int) -> None:
        """Condition on the measurement of one, whatever its outcome."""
        for C, own in zip(self.C, self.own, strict=True):
            C -= np.outer(C[:, i], C[i]) / (C[i, i] + own[i])


def for_rest(posterior: Posterior, candidates: np.ndarray, targets: np.ndarray, budget: int) -> Choice:
    """Choose candidates after whose measurement the targets are predicted best.

    Parameters
    ----------
    candidates, targets
        Masks, (perturbations,).
    """
    measured, open_ = Measured.of(posterior), candidates.copy()
    start = measured.variance[targets].sum()
    places: list[int] = []
    gains, left = [], []
    for _ in range(budget):
        gain = np.where(open_, measured.gains(targets & ~np.isin(np.arange(len(open_)), places)), -np.inf)
        places.append(int(gain.argmax()))
        gains.append(gain.max() / start)
        open_[places[-1]] = False
        measured.add(places[-1])
        left.append(measured.variance[targets].sum() / start)
    return Choice(np.array(places), np.array(gains), np.array(left))


def for_target(
    posterior: Posterior, wanted: np.ndarray, candidates: np.ndarray, best: float, budget: int, seed: int
) -> Choice:
    """Choose candidates of which the best is expected to reach furthest along the wanted change, (genes,).

    Parameters
    ----------
    best
        The reach of the best that was measured.
    """
    along = posterior.V.T @ wanted / (wanted @ wanted)
    places = np.flatnonzero(candidates)
    C = posterior.covariance(along**2) + np.diag((along**2 @ posterior.signal) * posterior.nugget)
    values, vectors = np.linalg.eigh(C[np.ix_(places, places)])
    z = np.random.default_rng(seed).normal(size=(N_SAMPLES, len(values)))
    samples = (posterior.mean @ along)[places] + (z * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    reached = np.full(N_SAMPLES, best)
    chosen: list[int] = []
    gains = []
    for _ in range(budget):
        gain = np.maximum(samples - reached[:, None], 0.0).mean(axis=0)
        gain[chosen] = -1.0
        chosen.append(int(gain.argmax()))
        gains.append(gain.max())
        reached = np.maximum(reached, samples[:, chosen[-1]])
    return Choice(places[chosen], np.array(gains), np.full(budget, np.nan))


def for_interactions(posterior: Posterior, pairs: Sequence[str], budget: int) -> Choice:
    """Choose combinations that are expected to differ most from the sum of their members.

    Parameters
    ----------
    posterior
        Of these combinations, and of their members alone.
    """
    column = {label: i for i, label in enumerate(posterior.labels)}
    contrast = np.zeros((len(pairs), len(column)))
    for row, pair in zip(contrast, pairs, strict=True):
        row[[column[member] for member in members_of(pair)]] = -1.0
        row[column[pair]] = 1.0
    measured = Measured.of(posterior, contrast)
    of_mean = ((contrast @ posterior.mean) ** 2).sum(axis=1)
    own = posterior.signal.sum() * posterior.nugget[contrast.argmax(axis=1)]  # of the pair alone: an interaction too
    places: list[int] = []
    gains = []
    for _ in range(budget):
        expected = of_mean + measured.variance + own
        expected[places] = -np.inf
        places.append(int(expected.argmax()))
        gains.append(np.sqrt(expected.max()))
        measured.add(places[-1])
    return Choice(np.array(places), np.array(gains), np.full(budget, np.nan))


def design(
    pairs: Path,
    embeddings: Path,
    model: Path,
    design: Path,
    implementation: str,
    params: dict,
    query: dict,
    seed: int,
    scored: str = "test",
    gene_vectors: Path | None = None,
    annotations: list[Path] | None = None,
    roles: list | None = None,
) -> None:
    """Choose the perturbations that are to be measured next.

    Parameters
    ----------
    pairs, embeddings, model
        The pairs of the split, its gene vectors, and a trained `set_gp`.
    design
        Table to be written, one row per choice in its order: rank, perturbation, context (with `each_context`: batch |
        cell type, or dataset | cell type), gain, left, size of the predicted
        effect, and sd, its posterior standard deviation. gain of the aim rest is the share of the targets' variance
        that the choice takes away from the others, and left what is left, its own taken off too; of target the
        expected reach beyond the best so far; of interactions the expected norm of the interaction.
    query
        A question whose perturbations are the candidates. Its `design` has aim, budget, targets and each_context, its
        `search` the state that the aim target goes towards.
    scored, gene_vectors, annotations, roles
        As in `answers.counterfactual`.

    Raises
    ------
    InputError
        For a model of another family, a budget above the number of candidates that are not measured yet, or
        each_context where training has one context.
    """
    everything = Pairs.open(pairs)
    family = build(implementation, params)
    if not isinstance(family, SetGP):
        raise InputError(
            f"design needs the posterior of a set_gp, and {implementation} is none. Train the model set_gp on the same "
            "split; it takes seconds to minutes."
        )
    family.restore(load_artefact(model))
    training, own = everything.fitted_on(scored), Embeddings.read(embeddings)
    everyone = Embeddings.read(gene_vectors) if gene_vectors else None
    perturbed, each = perturbed_genes(own, everything.perturbations), query["design"]["each_context"]
    contexts, measured = _contexts(family) if each else ([""], {(label, "") for label in family.asked.labels})

    def named(asked: Asked) -> list[Place]:
        of_term = term_of(asked, annotations or [], roles or [])
        labels = expanded(asked, perturbed, everything.genes, everyone, of_term)
        places = [(label, context) for label in labels for context in contexts if label != CONTROL]
        return _few_enough([place for place in places if place not in measured], seed)

    aim, budget, targets = (query["design"][key] for key in ("aim", "budget", "targets"))
    candidates = named(query["perturbations"])
    if aim == "interactions":
        candidates = [place for place in candidates if len(members_of(place[0])) > 1]
        others = [(name, "") for label, _ in candidates for name in members_of(label)]
    else:
        others = candidates if targets is None else named(targets)
    _check_budget(aim, budget, len(candidates))
    places = list(dict.fromkeys([*candidates, *others]))
    labels, each_in = [label for label, _ in places], [context for _, context in places]
    members = [member for label in labels for member in members_of(label)]
    family.add_genes(training, own.with_genes_of(everyone or own, members), seed)
    posterior = Posterior.of(family, labels, each_in=each_in if each else None)
    is_candidate, is_target = (np.array([place in kept for place in places]) for kept in (set(candidates), set(others)))
    if aim == "rest":
        choice = for_rest(posterior, is_candidate, is_target, budget)
    elif aim == "target":
        choice = _towards(query, posterior, is_candidate, everything, training, seed)
    else:
        choice = for_interactions(posterior, [label for label, _ in candidates], budget)
    table = _table(posterior, choice)
    if each:
        table.insert(2, "context", [each_in[i] for i in choice.places])
    with atomic(design) as partial:
        table.to_csv(partial, sep="\t", index=False, float_format="%.6g")
    logger.info("%s: first %s", aim, ", ".join(table["perturbation"].head(5)))


def _contexts(model: SetGP) -> tuple[list[str], set[Place]]:
    """Return the contexts of training, and which perturbations were measured in which; InputError for one context."""
    contexts = list(model.kernel.contexts)
    if not model.looks_at_contexts:
        raise InputError(
            f"each_context: training knows one context, {contexts[0]}, so there is none to choose between. Leave "
            "each_context out, or unite screens of several lines (union), or declare covariates.batch and "
            "covariates.cell_type in the dataset's block."
        )
    rows, columns = np.nonzero(model.asked.shares)
    return contexts, {(model.asked.labels[row], contexts[column]) for row, column in zip(rows, columns, strict=True)}


def _towards(
    query: dict, posterior: Posterior, is_candidate: np.ndarray, cells: Pairs, training: Pairs, seed: int
) -> Choice:
    """Choose towards the state of the query."""
    test = cells.roles("test")
    if not query["search"]:
        raise InputError("design: the aim target needs a state to reach: search: {towards: ...}, as in a question.")
    direction = Direction.of(query["search"], cells, test.select(test.is_control))
    known = training.roles("train")
    reach = [known.effect_of(label) @ direction.wanted for label in known.perturbations]
    best = max(reach, default=0.0) / (direction.wanted @ direction.wanted)
    logger.info("towards %s; the best that was measured makes %.2f of the way", direction.words, best)
    return for_target(posterior, direction.wanted, is_candidate, float(best), query["design"]["budget"], seed)


def _few_enough(places: list[Place], seed: int) -> list[Place]:
    """Return the places, or a sample of them."""
    if len(places) <= MOST_CANDIDATES:
        return places
    logger.info(
        "%d of %d candidates are compared: covariances are candidates × candidates", MOST_CANDIDATES, len(places)
    )
    kept = np.sort(np.random.default_rng(seed).choice(len(places), MOST_CANDIDATES, replace=False))
    return [places[i] for i in kept]


def _check_budget(aim: str, budget: int, n_candidates: int) -> None:
    if budget > n_candidates:
        kind = "combinations" if aim == "interactions" else "candidates"
        raise InputError(
            f"budget: {budget} are to be chosen, and only {n_candidates} {kind} are not measured yet. Lower the "
            "budget, or name more candidates."
        )


def _table(posterior: Posterior, choice: Choice) -> pd.DataFrame:
    places = choice.places
    return pd.DataFrame(
        {
            "rank": np.arange(1, len(places) + 1),
            "perturbation": [posterior.labels[i] for i in places],
            "gain": choice.gains,
            "left": choice.left,
            "size": np.linalg.norm(posterior.mean[places], axis=1),
            "sd": np.sqrt(np.maximum(posterior.variance[places], 0.0)),
        }
    )
