"""The kernel of `set_gp`: how alike the effects of two perturbations in two contexts are (section 3 of its head)."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.spatial.distance import cdist, pdist

from perturbflow.controls import KEYS, MOST_CONTEXTS, Context, Groups
from perturbflow.embeddings import Embeddings
from perturbflow.genes.symbols import CONTROL, entity_of, members_of, without_dose
from perturbflow.models.base import Artefact
from perturbflow.models.closed_form.base import TrainingSet
from perturbflow.models.closed_form.doses import Doses
from perturbflow.pairs import LEAST_CELLS, Pairs

MOST_ROWS = 3000  # kernels are rows × rows; with more, only some perturbations have a row per context
LEAST_BY_CONTEXT = 20  # of which there must be so many, else none has
LEAST_VARIANCE = 1e-6


@dataclass(frozen=True)
class Sampling:
    """The sampling covariance S of rows, in units of a gene's variance.

    It is 1/n on the diagonal for the perturbed cells, and 1/n₀ between rows for shared controls.

    Attributes
    ----------
    n_cells
        n of each row, (rows,).
    shares
        Share of a row's controls in each batch × cell type, (rows, strata).
    n_controls
        n₀ of each batch × cell type, (strata,).
    """

    n_cells: np.ndarray
    shares: np.ndarray
    n_controls: np.ndarray

    @property
    def matrix(self) -> np.ndarray:
        """S, (rows, rows)."""
        S = (self.shares / self.n_controls) @ self.shares.T
        S[np.diag_indices(len(S))] += 1.0 / self.n_cells
        return S

    @property
    def variances(self) -> np.ndarray:
        """The diagonal of S, (rows,)."""
        return 1.0 / self.n_cells + self.shares**2 @ (1.0 / self.n_controls)

    def part(self, rows: np.ndarray) -> "Sampling":
        """Return that of some rows."""
        return replace(self, n_cells=self.n_cells[rows], shares=self.shares[rows])

    def in_units(self, unit: float) -> "Sampling":
        """Return S / unit."""
        return replace(self, n_cells=self.n_cells * unit, n_controls=self.n_controls * unit)


@dataclass(frozen=True)
class EffectRows:
    """Mean effects of training perturbations against matched controls.

    A row is a perturbation in one context (`Pairs.context_keys`) with at least ten of its cells. Where contexts are
    many, a row is a perturbation in all of them. Where rows are, this holds for all but a sample of the perturbations.

    Attributes
    ----------
    labels
        Perturbation of every row.
    contexts
        As `Pairs.contexts` writes them; `all` where rows are over all contexts.
    shares
        Share of a row's cells in each context, (rows, contexts).
    population
        Share of the controls in each context, (contexts,).
    levels
        Mean control of each context, (contexts, genes), log1p.
    values
        Effects, (rows, genes), log1p.
    sampling
        Their sampling covariance.
    variance
        Variance of a gene over the cells of a row, (genes,).
    is_by_kind
        Whether contexts are datasets × cell types, in place of batches × cell types.
    """

    labels: list[str]
    contexts: list[str]
    shares: np.ndarray
    population: np.ndarray
    levels: np.ndarray
    values: np.ndarray
    sampling: Sampling
    variance: np.ndarray
    is_by_kind: bool = False

    @classmethod
    def of(cls, training: TrainingSet) -> "EffectRows":
        """Measure the training set's effects against its controls."""
        groups, labels, sums, squares = _sums(training.pairs)
        is_known = np.isin(labels, training.effects.labels)
        n = groups.n_cells[: len(labels)]
        squared_errors = squares[: len(n)] - sums[: len(n)] ** 2 / n[:, None]
        within = squared_errors[is_known].sum(axis=0) / max(1, (n[is_known] - 1).sum())
        n_controls = groups.n_controls(training.half)
        has_controls = n_controls > 0
        shares, n0 = groups.control_weights(training.half)[is_known][:, has_controls], n_controls[has_controls]
        rows = cls(
            labels=[label for label, known in zip(labels, is_known, strict=True) if known],
            contexts=[stratum for stratum, has in zip(groups.strata, has_controls, strict=True) if has],
            shares=shares,
            population=n0 / n0.sum(),
            levels=groups.control_means(sums, training.half)[has_controls],
            values=groups.effects(sums, training.half)[is_known],
            sampling=Sampling(n[is_known], shares, n0),
            variance=np.maximum(within, LEAST_VARIANCE),
        )
        if groups is training.pairs.groups:
            return rows._over_all() if len(rows.contexts) > 1 else rows
        return rows if training.pairs.context_keys == KEYS[:2] else rows._by_kind(training.pairs)

    def _by_kind(self, pairs: Pairs) -> "EffectRows":
        """Return the same rows with datasets × cell types for contexts: each is all its batches."""
        kind_of = dict(zip(pairs.strata.tolist(), pairs.contexts.tolist(), strict=True))
        kinds, of_context = np.unique([kind_of[name] for name in self.contexts], return_inverse=True)
        members = np.eye(len(kinds))[of_context]  # (batches × cell types, kinds)
        population = self.population @ members
        levels = (members * self.population[:, None]).T @ self.levels / population[:, None]
        return replace(
            self,
            contexts=kinds.tolist(),
            shares=self.shares @ members,
            population=population,
            levels=levels,
            is_by_kind=True,
        )

    def _over_all(self) -> "EffectRows":
        """Return the same rows with one context, the whole of all contexts."""
        levels = (self.population @ self.levels)[None]
        shares = np.ones((len(self.shares), 1))
        return replace(self, contexts=["all"], shares=shares, population=np.ones(1), levels=levels)


def _sums(pairs: Pairs) -> tuple[Groups, list[str], np.ndarray, np.ndarray]:
    """Return groups of cells whose means are rows, their labels, and sums of expression and of its squares.

    The sums are (groups, genes) each. They are computed once per table of pairs.
    """
    if (found := vars(pairs).get("_rows")) is None:
        found = vars(pairs)["_rows"] = _measured(pairs)
    return found


def _measured(pairs: Pairs) -> tuple[Groups, list[str], np.ndarray, np.ndarray]:
    cells = pd.DataFrame({"label": pairs.labels, "context": pairs.contexts})
    perturbed = cells[~pairs.is_control]
    sizes = perturbed.groupby(["label", "context"]).size()
    with_controls = sorted(set(pairs.contexts[pairs.is_control]))
    own = sizes[(sizes >= LEAST_CELLS) & sizes.index.isin(with_controls, level="context")]
    n_contexts = own.index.get_level_values("context").nunique()
    own = _as_many_as_fit(own, perturbed["label"].nunique())
    if not 1 < n_contexts <= MOST_CONTEXTS or own.empty:
        return pairs.groups, pairs.groups.labels, *pairs.sums
    # Cells outside of these contexts have no row, unless their perturbation has no other cells.
    names = pd.Series([f"{label}\n{context}" for label, context in own.index], index=own.index)
    row = names.reindex(pd.MultiIndex.from_frame(cells)).to_numpy(object)
    is_alone = ~np.isin(pairs.labels, own.index.get_level_values("label"))
    row = np.where(is_alone, pairs.labels.astype(object), row)
    is_row = (pd.notna(row) & ~pairs.is_control) | pairs.is_control
    row = np.where(pairs.is_control, CONTROL, row)[is_row].astype(str)
    rows = sorted(set(row) - {CONTROL})
    groups = Groups(rows, row, pairs.is_control[is_row], pairs.obs[is_row])
    return groups, [name.split("\n")[0] for name in rows], *pairs.sums_over(groups.of_cell, is_row, len(groups.n_cells))


def _as_many_as_fit(own: pd.Series, n_labels: int) -> pd.Series:
    """Return the rows of perturbations by context: all, or those of a sample; no more than MOST_ROWS with the others.

    Parameters
    ----------
    own
        Cells by perturbation and context.
    n_labels
        Perturbations. One that is not sampled has one row over all contexts.
    """
    if len(own) <= MOST_ROWS:
        return own
    n_rows = own.groupby("label").size()
    n_rows = n_rows.loc[np.random.default_rng(0).permutation(n_rows.index)]
    sampled = n_rows.index[(n_rows - 1).cumsum() + n_labels <= MOST_ROWS]
    return own[own.index.isin(sampled, level="label")] if len(sampled) >= LEAST_BY_CONTEXT else own[:0]


# Starts of the logarithms of weights.
STARTS = {"own": -0.5, "dose": -0.5, "source": -3.0, "context": -1.0, "interaction": -3.0, "nugget": -3.0}
START_OF_MEMBERS = 1.0  # logit of ω / 1.5
STRENGTH = 0.25  # a gene's strength is this power of the squared norm of its effect
LEAST_STRENGTH = 0.1  # of the median
DOSE_WIDTH = 0.5  # decades
N_FEATURES = 10  # directions in which combinations are compared
N_SAMPLES = 32  # genes sampled in place of one never measured alone
LEAST_COMBINATIONS = 6  # with fewer there is no interaction
LEAST_GENES = 4  # with a vector: with fewer, a source is not used


@dataclass(frozen=True)
class Questions:
    """Perturbations in contexts.

    Attributes
    ----------
    labels
        Perturbations.
    shares
        Share of each context of training in them, (questions, contexts). The rest is of a new context.
    alike
        How alike the new context is to those of training, (contexts,).
    kept
        Tables that a kernel made of them, which are made once.
    """

    labels: list[str]
    shares: np.ndarray
    alike: np.ndarray
    kept: dict[str, Any] = field(default_factory=dict, compare=False)

    def part(self, rows: slice | np.ndarray) -> "Questions":
        """Return some of the questions."""
        return Questions(np.asarray(self.labels, dtype=str)[rows].tolist(), self.shares[rows], self.alike)

    @cached_property
    def is_combination(self) -> np.ndarray:
        """1 for combinations, 0 for singles, (questions,)."""
        return np.array([float(len(members_of(label)) > 1) for label in self.labels])


class Members(NamedTuple):
    """Members of perturbations: names without doses, (members,), decadic logarithms of doses, and vectors by source.

    is_known tells members with a vector, (members,); the vectors, (members, dimensions), of the others are zero.
    """

    names: np.ndarray
    log_doses: np.ndarray
    is_known: dict[str, np.ndarray]
    vectors: dict[str, np.ndarray]


@dataclass(frozen=True)
class Terms:
    """The parts of K between two lists of questions, without their weights, each (questions, questions)."""

    members: list[np.ndarray]
    contexts: list[np.ndarray]
    interactions: list[np.ndarray]
    is_combination: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Weights:
    """The shared hyper-parameters as one vector of logarithms, with names. For ω it holds the logit of ω / 1.5.

    Attributes
    ----------
    members, contexts, interactions, nuggets
        Names of a and a', c, e and ν.
    values
        All of them, ω after the members.
    """

    members: list[str]
    contexts: list[str]
    interactions: list[str]
    nuggets: list[str]
    values: np.ndarray

    @property
    def names(self) -> list[str]:
        """Names of all, in order."""
        return [*self.members, "member", *self.contexts, *self.interactions, *self.nuggets]

    @property
    def groups(self) -> list[np.ndarray]:
        """Weights of members, contexts, interactions and nuggets, and between the first two (1,) of ω."""
        ends = np.cumsum([len(self.members), 1, len(self.contexts), len(self.interactions)])
        a, omega, c, e, nu = np.split(self.values, ends)
        return [np.exp(a), 1.5 / (1.0 + np.exp(-omega)), np.exp(c), np.exp(e), np.exp(nu)]

    def starts(self, of_weights: Mapping[str, float] = STARTS) -> np.ndarray:
        """Return the starts of `values`, (weights,)."""
        of_members = [of_weights.get(name, of_weights["source"]) for name in self.members]
        others = [(self.contexts, "context"), (self.interactions, "interaction"), (self.nuggets, "nugget")]
        return np.array([*of_members, START_OF_MEMBERS, *(of_weights[kind] for names, kind in others for _ in names)])

    def covariance(self, terms: Terms) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return K without nuggets, its part of members alone, and the factor of contexts."""
        a, omega, c, e, _ = self.groups
        left, right = (np.where(is_combination > 0, omega[0], 1.0) for is_combination in terms.is_combination)
        of_members = _weighted(a, terms.members)
        of_contexts = 1.0 + _weighted(c, terms.contexts) if terms.contexts else np.ones((1, 1))
        K = left[:, None] * right * of_members * of_contexts
        return K + _weighted(e, terms.interactions) if terms.interactions else K, of_members, of_contexts


def _weighted(weights: np.ndarray, parts: list[np.ndarray]) -> np.ndarray:
    total = weights[0] * parts[0]
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        total += weight * part
    return total


class SetKernel:
    """K, the covariance of the effects of two lists of questions.

    Parameters
    ----------
    state
        Arrays that `of` makes of training, as they are stored.
    """

    def __init__(self, state: Artefact) -> None:
        self.state = state
        self.sources: dict[str, np.ndarray] = {str(name): state[f"vectors.{name}"] for name in state["sources"]}
        self.place = {str(name): i for i, name in enumerate(state["entities"])}
        known = state["known"].tolist()
        self.known = {name: i for i, name in enumerate(known)}
        self.doses = Doses(known)
        self.has_doses = any(without_dose(name)[1] is not None for name in known)
        self.contexts = state["contexts"].tolist()

    @classmethod
    def of(cls, rows: EffectRows, training: TrainingSet, values: np.ndarray, noise: np.ndarray) -> "SetKernel":
        """Prepare the arrays of a kernel.

        Parameters
        ----------
        values, noise
            Effects in directions, (rows, directions), and the expected squared norm of a row's sampling error, (rows,).
        """
        singles = places_of([label if len(members_of(label)) == 1 else "" for label in rows.labels])
        singles.pop("", None)
        strength, features = _strengths(list(singles.values()), values, noise)
        state: Artefact = {
            "known": np.array(list(singles), dtype=str),
            "strength": strength,
            "features": features,
            "contexts": np.array(rows.contexts, dtype=str),
            "population": rows.population,
            "is_by_kind": np.array(rows.is_by_kind),
            **vectors_of(rows.labels, training.embeddings),
        }
        if len(rows.contexts) > 1:
            between = cdist(rows.levels, rows.levels, "sqeuclidean")
            typical = np.median(between[between > 0]) if between.any() else 1.0
            state["levels"], state["apart"] = rows.levels, np.array(max(typical, 1e-12))
        kernel = cls(state)
        combinations = [label for label in dict.fromkeys(rows.labels) if len(members_of(label)) > 1]
        if len(combinations) >= LEAST_COMBINATIONS and len(features) > 1:
            whole = [label for label in combinations if all(map(kernel.doses.holds, members_of(label)))]
            of_whole, _ = kernel._features(whole if len(whole) > 2 else combinations)
            state["apart.interactions"] = np.array([max(np.median(pdist(X) ** 2), 1e-12) for X in of_whole])
        return cls(state)

    @property
    def weights(self) -> Weights:
        """The kernel's hyper-parameters at their starts."""
        members = ["own", "dose"] if self.has_doses else ["own"]
        members += [f"{name} {form}" for name in self.sources for form in ("near", "linear")]
        contexts = ["own context", "alike contexts"] if "levels" in self.state else []
        interactions = []
        if "apart.interactions" in self.state:
            interactions += ["interaction of sums", "interaction of sums and differences"]
        interactions += ["mean of a context", "mean of alike contexts"] if contexts else []
        weights = Weights(members, contexts, interactions, ["single", "combination"], np.zeros(0))
        return replace(weights, values=weights.starts())

    def questions(self, labels: Sequence[str], context: Context | None = None) -> Questions:
        """Return perturbations in one context; without one, in all contexts in the shares of training's controls."""
        shares, alike = self.state["population"], np.zeros(len(self.contexts))
        if context is not None and "levels" in self.state:
            context = context.by_kind() if self.state["is_by_kind"] else context
            shares = np.array([context.shares.get(name, 0.0) for name in self.contexts])
            if new := {name: share for name, share in context.shares.items() if name not in self.contexts}:
                levels = np.stack([context.levels[name] for name in new])
                alike = np.average(self._alike(levels), axis=0, weights=list(new.values()))
        return Questions(list(labels), np.tile(shares, (len(labels), 1)), alike)

    def questions_in(self, labels: Sequence[str], contexts: Sequence[str]) -> Questions:
        """Return perturbations each in one context of training, named as in `contexts`."""
        column = {name: i for i, name in enumerate(self.contexts)}
        shares = np.eye(len(column))[[column[name] for name in contexts]]
        return Questions(list(labels), shares, np.zeros(len(column)))

    def _alike(self, levels: np.ndarray) -> np.ndarray:
        return np.exp(-cdist(levels, self.state["levels"], "sqeuclidean") / self.state["apart"])

    def strengths(self, members: Sequence[str]) -> np.ndarray:
        """Return √h of members, (members,).

        Between doses it is interpolated. A member never measured alone has the mean.
        """
        strength = self.state["strength"]
        typical = strength.mean() if len(strength) else 1.0
        found = np.full(len(members), typical)
        for i, member in enumerate(members):
            if member in self.known:
                found[i] = strength[self.known[member]]
            elif without_dose(member)[1] is not None and self.doses.holds(member):
                weights = self.doses.weights(member).items()
                found[i] = sum(weight * strength[self.known[name]] for name, weight in weights)
        return found

    def terms(self, a: Questions, b: Questions) -> Terms:
        """Return the parts of K."""
        (_, A), (_, B) = self._incidence(a), self._incidence(b)
        parts = self._of_members(self._members(a), self._members(b))
        members = [np.asarray(A @ np.asarray(B @ part.T).T) for part in parts]
        contexts = []
        if "levels" in self.state:
            new = [1.0 - question.shares.sum(axis=1) for question in (a, b)]
            same = a.shares @ b.shares.T
            alike = a.shares @ self._alike(self.state["levels"]) @ b.shares.T
            alike += np.outer(new[0], b.shares @ a.alike) + np.outer(a.shares @ b.alike, new[1])
            is_one = np.array_equal(a.alike, b.alike)
            contexts = [same + is_one * np.outer(*new), alike + is_one * np.outer(*new)]
        return Terms(members, contexts, [*self._interactions(a, b), *contexts], (a.is_combination, b.is_combination))

    def strength_of(self, labels: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean over members of √h and of h, (labels,) each; 0 for control, which has no members."""
        found = [self.strengths(members_of(label)) if label != CONTROL else np.zeros(1) for label in labels]
        return np.array([of.mean() for of in found]), np.array([(of**2).mean() for of in found])

    def _incidence(self, questions: Questions) -> tuple[list[str], sparse.csr_matrix]:
        """Return all members, and a table of √h where a question has a member, else 0, (questions, members)."""
        if "incidence" in questions.kept:
            return questions.kept["incidence"]
        of = [members_of(label) for label in questions.labels]
        members = sorted({member for names in of for member in names})
        column = {member: i for i, member in enumerate(members)}
        rows = np.repeat(np.arange(len(of)), [len(names) for names in of])
        columns = [column[name] for names in of for name in names]
        strength = self.strengths(members)
        table = sparse.csr_matrix((strength[columns], (rows, columns)), shape=(len(of), len(members)))
        return questions.kept.setdefault("incidence", (members, table))

    def _members(self, questions: Questions) -> Members:
        """Return what κ asks of the members of questions."""
        if "members" in questions.kept:
            return questions.kept["members"]
        names, doses = zip(*map(without_dose, self._incidence(questions)[0]), strict=True)
        place = np.array([self.place.get(name, -1) for name in names])
        known = {source: (place >= 0) & ~np.isnan(vectors[place, 0]) for source, vectors in self.sources.items()}
        found = Members(
            np.array(names, dtype=object),
            np.array([np.log10(dose) if dose else np.nan for dose in doses]),
            known,
            {
                source: np.where(known[source][:, None], vectors[place], 0.0).astype(float)
                for source, vectors in self.sources.items()
            },
        )
        return questions.kept.setdefault("members", found)

    def _of_members(self, a: Members, b: Members) -> list[np.ndarray]:
        """Return the parts of κ, (members of a, members of b) each."""
        same = np.equal.outer(a.names, b.names).astype(float)
        parts = [same]
        if self.has_doses:
            apart = np.nan_to_num(np.subtract.outer(a.log_doses, b.log_doses))
            parts.append(same * np.exp(-0.5 * (apart / DOSE_WIDTH) ** 2))
        for source in self.sources:
            width, size = self.state[f"widths.{source}"]
            X, Y = a.vectors[source], b.vectors[source]
            both = np.outer(a.is_known[source], b.is_known[source])
            alone = np.where(both, 0.0, same)  # without a vector a gene is as uncertain, and like no other
            parts += [np.exp(-cdist(X, Y, "sqeuclidean") / width) * both + alone, X @ Y.T / size + alone]
        return parts

    def _features(self, labels: Sequence[str]) -> tuple[list[np.ndarray], np.ndarray]:
        """Return features of combinations, and the place of the label that each row belongs to, (rows,).

        The features are sums of the members' effects, (rows, n), and these beside mean differences, (rows, 2 n). A
        label with a member never measured alone has a row for each gene that is sampled in its place.
        """
        F, n_known = self.state["features"], len(self.known)
        samples = np.zeros((8, 0), int)
        if n_known:
            samples = np.random.default_rng(0).permuted(np.tile(np.arange(n_known), (8, 1)), axis=1)[:, :N_SAMPLES]
        sums, differences, owner = [], [], []
        for i, label in enumerate(labels):
            members = members_of(label)
            if len(members) < 2:
                continue
            of = self._effects_of(members, samples)
            total = of.sum(axis=0)
            pairs = [np.abs(of[j] - of[k]) for j in range(len(of)) for k in range(j)]
            sums.append(total)
            differences.append(np.hstack([total, np.mean(pairs, axis=0)]))
            owner += [i] * len(total)
        width = F.shape[1]
        tables = [np.vstack(sums or [np.zeros((0, width))]), np.vstack(differences or [np.zeros((0, 2 * width))])]
        return tables, np.array(owner, dtype=int)

    def _effects_of(self, members: Sequence[str], samples: np.ndarray) -> np.ndarray:
        """Return features of each member's effect, (members, rows, n); sampled genes replace an unknown member."""
        F, nearest = self.state["features"], [self.doses.nearest(member) for member in members]
        n_rows = samples.shape[1] if None in nearest else 1
        sampled = itertools.cycle(samples)
        return np.stack([F[[self.known[of]]].repeat(n_rows, axis=0) if of else F[next(sampled)] for of in nearest])

    def _interactions(self, a: Questions, b: Questions) -> list[np.ndarray]:
        if "apart.interactions" not in self.state:
            return []
        for questions in (a, b):
            if "features" not in questions.kept:
                questions.kept["features"] = self._features(questions.labels)
        (of_a, owner_a), (of_b, owner_b) = a.kept["features"], b.kept["features"]
        A, B = _averages(owner_a, len(a.labels)), _averages(owner_b, len(b.labels))
        widths = self.state["apart.interactions"]
        return [
            A @ np.asarray(B @ np.exp(-cdist(X, Y, "sqeuclidean") / width).T).T
            for X, Y, width in zip(of_a, of_b, widths, strict=True)
        ]


def _strengths(of_single: list[np.ndarray], values: np.ndarray, noise: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return √h of genes measured alone, (genes,), and their leading directions, (genes, n), from the rows of each."""
    if not of_single:
        return np.ones(0), np.zeros((0, min(N_FEATURES, values.shape[1])))
    features = np.stack([values[i, :N_FEATURES].mean(axis=0) for i in of_single])
    size = np.array([((values[i] ** 2).sum(axis=1) - noise[i]).mean() for i in of_single])
    size = np.maximum(size, max(LEAST_STRENGTH * np.median(np.maximum(size, 0.0)), 1e-12)) ** STRENGTH
    return np.sqrt(size / size.mean()), features


def vectors_of(labels: Sequence[str], embeddings: Embeddings) -> Artefact:
    """Return the entities that have vectors, and per usable source the vectors and their typical distance and size.

    Genes outside of the labels change nothing for those within: scales and sources are those of the labels.
    """
    members = sorted({member for label in labels for member in members_of(label)})
    raw = embeddings.table
    table = embeddings.standardized(members) if len(raw.columns) else raw
    table = table.groupby([entity_of(name) for name in table.index]).first()
    trained = table.index.isin(sorted(set(map(entity_of, members))))
    found: Artefact = {"entities": np.array(table.index, dtype=str)}
    sources = []
    for source in embeddings.sources:
        columns = [column for column in raw if column.split(":")[0] == source]
        has = set(map(entity_of, raw.index[raw[columns].notna().any(axis=1)]))
        X = table[columns].to_numpy(float)
        X[~table.index.isin(sorted(has))] = np.nan
        own = X[trained & ~np.isnan(X).any(axis=1)]
        distances = pdist(own) ** 2
        if len(own) >= LEAST_GENES and (distances > 1e-9).any():
            sources.append(source)
            found[f"vectors.{source}"] = X.astype(np.float32)
            typical = np.median(distances[distances > 1e-9])
            found[f"widths.{source}"] = np.array([typical, (own**2).sum(axis=1).mean()])
    return {**found, "sources": np.array(sources, dtype=str)}


def places_of(names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the places of every name, names sorted."""
    order = np.array(names, dtype=str)
    return {str(name): np.flatnonzero(order == name) for name in np.unique(order)}


def _averages(owner: np.ndarray, n: int) -> sparse.csr_matrix:
    """Return the matrix that averages over the rows of each owner, (owners, rows)."""
    size = np.bincount(owner, minlength=n)
    return sparse.csr_matrix((1.0 / size[owner], (owner, np.arange(len(owner)))), shape=(n, len(owner)))
