"""One Gaussian process for the mean effect of any set of perturbed genes in any context.

Data. Row r is a perturbation p, a set of genes or compounds, in a context c, a batch × cell type. y_r, (genes,), is the mean of its cells minus the
mean of the controls of c. Its errors are those of sampling, for gene g

    cov(y_rg, y_sg) = v_g S_rs,    S_rs = [r = s] / n_r + Σ_c s_rc s_sc / n₀c,

with n_r cells, n₀c controls, and s_rc the share of a row's cells in c: effects against the same controls err together (`effect_rows`).

1. Directions. The level of a perturbed gene itself is predicted apart (`own_levels`), and replaced in its row by the mean of the other rows. The
   singular vectors V of what is left, Y = U D Vᵀ, turn it to directions, Y V, which are taken for independent.

2. Model. In every direction k

    Y_k = M β_k + σ_k g + ε_k,    β_kj ~ N(0, τ_kj),  g ~ N(0, K),  ε_k ~ N(0, b_k S).

   M holds what perturbations have in common: one column for singles and one for combinations, and one for every mean that is handed over, as that of
   a network (`FitPart`). Signal σ_k², noise b_k and the variances τ_kj are a direction's own; the kernel K is that of all.

3. Kernel.

    K_rs = ω_r ω_s Σ_{i ∈ r} Σ_{j ∈ s} √(h_i h_j) κ(i, j) · (1 + c₁ s_r·s_s + c₂ s_rᵀ A s_s)  +  Σ_q e_q ⟨φ_q(r), φ_q(s)⟩  +  [r = s] ν_r h_r
    κ(i, j) = a₀ [i = j] + a₁ [i = j] δ(i, j) + Σ_e ( a_e exp(−|x_i − x_j|² / m_e) + a'_e x_i·x_j )

   Members add up. A gene has an effect of its own, and what its vectors x say, one weight per source e: a source that says nothing gets none. In a
   combination every member counts ω, in (0, 1.5). The strength h_i of a gene, relative to the mean, is known where it was perturbed alone: strong
   effects are rare and heavy-tailed, so that effects resemble one another in direction rather than in size. Doses of a compound share its effect, and
   share more the nearer they are by logarithm, δ; strengths between doses are interpolated (`DoseInterpolation`).
   A context shares what all contexts share, keeps something of its own, c₁, and shares more with contexts whose controls look alike,
   A = exp(−|level − level'|² / m). Combinations interact alike, φ_q Gaussian, where the sums of their members' effects, and the differences between
   these, are alike; a member never measured alone may have the effect of any that was: φ is the mean over them.
   ν is what does not come back in other rows, for singles and for combinations.

4. Hyper-parameters maximize the marginal likelihood of the training rows, with weak priors that keep each near where it starts, and one that draws the
   weights of sources to zero, −log p = 10 √a: few genes cannot tell sources apart. The log τ_kj of all directions have a mean that is learned. The shared
   ones are learned from directions that hold more signal than sampling noise, and from at most 1,000 rows; then every direction learns its own.

5. One factorization serves all directions. With S = L Lᵀ and L⁻¹ K L⁻ᵀ = U Λ Uᵀ, every covariance C_k = σ_k² K + b_k S + M T_k Mᵀ is diagonal in T⁻¹, T = L⁻ᵀ U, up
   to the columns of M: D_k = σ_k² Λ + b_k. The likelihood's gradient is

    ∂ℓ/∂K = ½ T ( Σ_k σ_k² [ D_k⁻¹ − H_k H_kᵀ − p_k p_kᵀ ] ) Tᵀ,    p_k = Tᵀ-coordinates of C_k⁻¹ Y_k,  H_k H_kᵀ = D_k⁻¹ M (T_k⁻¹ + Mᵀ D_k⁻¹ M)⁻¹ Mᵀ D_k⁻¹.

6. Answer. For a question *, mean M_* β̂ + σ_k K_*r C⁻¹ (Y_k − M β̂) and its variance, turned back by V: Rasmussen & Williams 2006, equations 2.25, 2.26 and 2.41, 2.42.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse
from scipy.linalg import cholesky, eigh, solve_triangular
from scipy.optimize import minimize
from scipy.spatial.distance import cdist, pdist
from sklearn.utils.extmath import randomized_svd

from perturbflow.embeddings import Embeddings
from perturbflow.gene_starts import TABLES, neighbours, starts
from perturbflow.models.base import Artefact, Run
from perturbflow.models.doses import Doses
from perturbflow.models.effect_rows import EffectRows
from perturbflow.models.own_gene import OwnGene
from perturbflow.models.shift import MeanShift, Training
from perturbflow.pairs import Context, Pairs
from perturbflow.progress import progressed
from perturbflow.symbols import entities_of, entity_of, members_of, without_dose

# Of the logarithms of weights. Where sources start low they may stay there, where high they may stay too: both are tried.
STARTS = {"own": -0.5, "dose": -0.5, "source": -3.0, "context": -1.0, "interaction": -3.0, "nugget": -3.0}  # of the logarithms of weights
SECOND_STARTS = {"own": -6.0, "source": -0.5, "nugget": -6.0}
START_OF_MEMBERS = 1.0  # logit of ω / 1.5
WIDTH = 3.0  # of priors on logarithms of shared weights
WIDTH_OF_DIRECTIONS = 1.0  # of priors on logarithms of a direction's own σ², b and τ
WIDTH_OF_MEANS = 4.0  # of the prior on the mean of log τ
SPARSITY = 10.0  # −log p per √a of a source
STRENGTH = 0.5  # power of the squared norm of a gene's effect that its strength is
LEAST_STRENGTH = 0.1  # of the median
DOSE_WIDTH = 0.5  # decades
N_FEATURES = 10  # directions in which combinations are compared
N_DRAWS = 32  # genes that stand for one never measured alone
LEAST_COMBINATIONS = 6  # with fewer there is no interaction
LEAST_GENES = 4  # with a vector: with fewer, a source says nothing
MOST_DIRECTIONS = 300
LEAST_SIGNAL = 0.5  # share of a direction's variance that shared weights are learned from
LEAST_DIRECTIONS = 3
MOST_LEARNED_FROM = 1000  # rows
ROWS_AT_ONCE = 512
N_STEPS = 80  # of L-BFGS
LEAST_HELD_OUT = 20  # perturbations, to judge another model's means by

# Fits a mean that is no closed form: from an inner training and rows of pairs.h5ad that hold the controls to start from, to effects by label.
FitPart = Callable[[Training, np.ndarray], Callable[[str], np.ndarray]]


@dataclass(frozen=True)
class Questions:
    """Perturbations in contexts.

    Attributes
    ----------
    labels
        Perturbations.
    shares
        Share of each context of training in them, (questions, contexts); what is left is of a new context.
    alike
        How alike the new context is to those of training, (contexts,).
    kept
        What a kernel made of them, to be made once.
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


@dataclass(frozen=True)
class Terms:
    """The parts of K between two lists of questions, without their weights, each (questions, questions)."""

    members: list[np.ndarray]
    contexts: list[np.ndarray]
    interactions: list[np.ndarray]
    is_combination: tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Weights:
    """The shared hyper-parameters, and where each stands in one vector of logarithms (of ω: the logit of ω / 1.5).

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
        """Return where they start, (weights,)."""
        of_members = [of_weights.get(name, of_weights["source"]) for name in self.members]
        others = [(self.contexts, "context"), (self.interactions, "interaction"), (self.nuggets, "nugget")]
        return np.array([*of_members, START_OF_MEMBERS, *(of_weights[kind] for names, kind in others for _ in names)])

    def covariance(self, terms: Terms) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return K but for nuggets, its part of members alone, and the factor of contexts."""
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
    """K: what of two questions makes their effects alike.

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
    def of(cls, rows: EffectRows, training: Training, values: np.ndarray, noise: np.ndarray) -> "SetKernel":
        """Prepare what a kernel needs.

        Parameters
        ----------
        values, noise
            Effects in directions, (rows, directions), and the expected squared norm of a row's sampling error, (rows,).
        """
        singles = _places_of([label if len(members_of(label)) == 1 else "" for label in rows.labels])
        singles.pop("", None)
        strength, features = np.ones(0), np.zeros((0, min(N_FEATURES, values.shape[1])))
        if singles:
            of_single = list(singles.values())
            features = np.stack([values[i, :N_FEATURES].mean(axis=0) for i in of_single])
            size = np.array([((values[i] ** 2).sum(axis=1) - noise[i]).mean() for i in of_single])
            size = np.maximum(size, max(LEAST_STRENGTH * np.median(np.maximum(size, 0.0)), 1e-12)) ** STRENGTH
            strength = np.sqrt(size / size.mean())
        members = sorted({member for label in rows.labels for member in members_of(label)})
        table = training.embeddings.standardized(members) if len(training.embeddings.table.columns) else training.embeddings.table
        table = table.groupby([entity_of(name) for name in table.index]).first()
        trained = table.index.isin(sorted(set(map(entity_of, members))))
        state: Artefact = {
            "entities": np.array(table.index, dtype=str), "known": np.array(list(singles), dtype=str), "strength": strength,
            "features": features, "contexts": np.array(rows.contexts, dtype=str), "population": rows.population,
        }  # fmt: skip
        raw = training.embeddings.table
        for source in training.embeddings.sources:
            columns = [column for column in raw if column.split(":")[0] == source]
            has = set(map(entity_of, raw.index[raw[columns].notna().any(axis=1)]))
            X = table[columns].to_numpy(float)
            X[~table.index.isin(sorted(has))] = np.nan
            own = X[trained & ~np.isnan(X).any(axis=1)]
            distances = pdist(own) ** 2
            if len(own) >= LEAST_GENES and (distances > 1e-9).any():
                state[f"vectors.{source}"] = X.astype(np.float32)
                state[f"widths.{source}"] = np.array([np.median(distances[distances > 1e-9]), (own**2).sum(axis=1).mean()])
        state["sources"] = np.array([name.removeprefix("vectors.") for name in state if name.startswith("vectors.")], dtype=str)
        if len(rows.contexts) > 1:
            between = cdist(rows.levels, rows.levels, "sqeuclidean")
            state["levels"], state["apart"] = rows.levels, np.array(max(np.median(between[between > 0]) if between.any() else 1.0, 1e-12))
        kernel = cls(state)
        combinations = [label for label in dict.fromkeys(rows.labels) if len(members_of(label)) > 1]
        if len(combinations) >= LEAST_COMBINATIONS and len(features) > 1:
            whole = [label for label in combinations if all(map(kernel.doses.holds, members_of(label)))]
            of_whole, _ = kernel._features(whole if len(whole) > 2 else combinations)
            state["apart.interactions"] = np.array([max(np.median(pdist(X) ** 2), 1e-12) for X in of_whole])
        return cls(state)

    @property
    def weights(self) -> Weights:
        """The hyper-parameters that it has, at their starts."""
        members = [
            "own",
            *(["dose"] if self.has_doses else []),
            *(f"{name} {form}" for name in self.sources for form in ("near", "linear")),
        ]
        contexts = ["own context", "alike contexts"] if "levels" in self.state else []
        interactions = ["interaction of sums", "interaction of sums and differences"] if "apart.interactions" in self.state else []
        weights = Weights(members, contexts, interactions, ["single", "combination"], np.zeros(0))
        return replace(weights, values=weights.starts())

    def questions(self, labels: Sequence[str], context: Context | None = None) -> Questions:
        """Return perturbations asked in one context; without one, in contexts as training's controls are."""
        shares, alike = self.state["population"], np.zeros(len(self.contexts))
        if context is not None and "levels" in self.state:
            shares = np.array([context.shares.get(name, 0.0) for name in self.contexts])
            if new := {name: share for name, share in context.shares.items() if name not in self.contexts}:
                alike = np.average(self._alike(np.stack([context.levels[name] for name in new])), axis=0, weights=list(new.values()))
        return Questions(list(labels), np.tile(shares, (len(labels), 1)), alike)

    def _alike(self, levels: np.ndarray) -> np.ndarray:
        return np.exp(-cdist(levels, self.state["levels"], "sqeuclidean") / self.state["apart"])

    def strengths(self, members: Sequence[str]) -> np.ndarray:
        """Return √h of members; between doses by interpolation, of a member never measured alone the mean, (members,)."""
        strength = self.state["strength"]
        typical = strength.mean() if len(strength) else 1.0
        found = np.full(len(members), typical)
        for i, member in enumerate(members):
            if member in self.known:
                found[i] = strength[self.known[member]]
            elif without_dose(member)[1] is not None and self.doses.holds(member):
                found[i] = sum(weight * strength[self.known[name]] for name, weight in self.doses.weights(member).items())
        return found

    def terms(self, a: Questions, b: Questions) -> Terms:
        """Return the parts of K."""
        (of_a, A), (of_b, B) = self._incidence(a), self._incidence(b)
        members = [np.asarray(A @ np.asarray(B @ part.T).T) for part in self._of_members(of_a, of_b)]
        contexts = []
        if "levels" in self.state:
            new = [1.0 - question.shares.sum(axis=1) for question in (a, b)]
            same = a.shares @ b.shares.T
            alike = a.shares @ self._alike(self.state["levels"]) @ b.shares.T
            alike += np.outer(new[0], b.shares @ a.alike) + np.outer(a.shares @ b.alike, new[1])
            is_one = np.array_equal(a.alike, b.alike)
            contexts = [same + is_one * np.outer(*new), alike + is_one * np.outer(*new)]
        return Terms(members, contexts, self._interactions(a, b), (a.is_combination, b.is_combination))

    def strength_of(self, labels: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Return the mean over members of √h and of h, (labels,) each."""
        found = [self.strengths(members_of(label)) for label in labels]
        return np.array([of.mean() for of in found]), np.array([(of**2).mean() for of in found])

    def _incidence(self, questions: Questions) -> tuple[list[str], sparse.csr_matrix]:
        """Return all members, and √h where a question holds one, (questions, members)."""
        if "incidence" in questions.kept:
            return questions.kept["incidence"]
        of = [members_of(label) for label in questions.labels]
        members = sorted({member for names in of for member in names})
        column = {member: i for i, member in enumerate(members)}
        rows, columns = np.repeat(np.arange(len(of)), [len(names) for names in of]), [column[name] for names in of for name in names]
        strength = self.strengths(members)
        table = sparse.csr_matrix((strength[columns], (rows, columns)), shape=(len(of), len(members)))
        return questions.kept.setdefault("incidence", (members, table))

    def _of_members(self, a: list[str], b: list[str]) -> list[np.ndarray]:
        """Return the parts of κ, (members of a, members of b) each."""
        (names_a, doses_a), (names_b, doses_b) = (zip(*map(without_dose, members), strict=True) for members in (a, b))
        same = np.equal.outer(np.array(names_a, dtype=object), np.array(names_b, dtype=object)).astype(float)
        parts = [same]
        if self.has_doses:
            logs = [np.array([np.nan if not dose else np.log10(dose) for dose in doses]) for doses in (doses_a, doses_b)]
            apart = np.nan_to_num(np.subtract.outer(*logs))
            parts.append(same * np.exp(-0.5 * (apart / DOSE_WIDTH) ** 2))
        places = [np.array([self.place.get(name, -1) for name in names]) for names in (names_a, names_b)]
        for source, vectors in self.sources.items():
            width, size = self.state[f"widths.{source}"]
            X, Y = (np.where((place >= 0)[:, None], vectors[place], np.nan).astype(float) for place in places)
            both = np.outer(~np.isnan(X[:, 0]), ~np.isnan(Y[:, 0]))
            X, Y = np.nan_to_num(X), np.nan_to_num(Y)
            parts += [np.exp(-cdist(X, Y, "sqeuclidean") / width) * both, X @ Y.T / size]
        return parts

    def _features(self, labels: Sequence[str]) -> tuple[list[np.ndarray], np.ndarray]:
        """Return where combinations stand: sums of members' effects, and these and mean differences, and the label that each row is of.

        A label with a member never measured alone has as many rows as members stand for it.
        """
        F, n_known = self.state["features"], len(self.known)
        draws = (
            np.random.default_rng(0).permuted(np.tile(np.arange(n_known), (8, 1)), axis=1)[:, :N_DRAWS]
            if n_known
            else np.zeros((8, 0), int)
        )
        sums, differences, owner = [], [], []
        for i, label in enumerate(labels):
            members = members_of(label)
            if len(members) < 2:
                continue
            nearest = [self.doses.nearest(member) for member in members]
            unknown = nearest.count(None)
            stand_ins = iter(draws[:unknown])
            of = np.stack(
                [F[[self.known[name]]].repeat(draws.shape[1] if unknown else 1, axis=0) if name else F[next(stand_ins)] for name in nearest]
            )
            total = of.sum(axis=0)
            pairs = [np.abs(of[j] - of[k]) for j in range(len(of)) for k in range(j)]
            sums.append(total)
            differences.append(np.hstack([total, np.mean(pairs, axis=0)]))
            owner += [i] * len(total)
        width = F.shape[1]
        return [np.vstack(sums or [np.zeros((0, width))]), np.vstack(differences or [np.zeros((0, 2 * width))])], np.array(owner, dtype=int)

    def _interactions(self, a: Questions, b: Questions) -> list[np.ndarray]:
        if "apart.interactions" not in self.state:
            return []
        for questions in (a, b):
            if "features" not in questions.kept:
                questions.kept["features"] = self._features(questions.labels)
        (of_a, owner_a), (of_b, owner_b) = a.kept["features"], b.kept["features"]
        A, B = _averages(owner_a, len(a.labels)), _averages(owner_b, len(b.labels))
        widths = self.state["apart.interactions"]
        return [A @ np.asarray(B @ np.exp(-cdist(X, Y, "sqeuclidean") / width).T).T for X, Y, width in zip(of_a, of_b, widths, strict=True)]


def _places_of(names: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the places of every name, names in order."""
    order = np.array(names, dtype=str)
    return {str(name): np.flatnonzero(order == name) for name in np.unique(order)}


def _averages(owner: np.ndarray, n: int) -> sparse.csr_matrix:
    """Return the matrix that takes the mean over rows of one owner, (owners, rows)."""
    size = np.bincount(owner, minlength=n)
    return sparse.csr_matrix((1.0 / size[owner], (owner, np.arange(len(owner)))), shape=(n, len(owner)))


@dataclass(frozen=True)
class Directions:
    """What is each direction's own: signal, noise and the variances of means, as logarithms.

    Attributes
    ----------
    signal, noise
        log σ_k² and log b_k, (directions,).
    means
        log τ_kj, (columns of M, directions).
    """

    signal: np.ndarray
    noise: np.ndarray
    means: np.ndarray

    @property
    def values(self) -> np.ndarray:
        """All of them in one row."""
        return np.concatenate([self.signal, self.noise, self.means.ravel()])

    def like(self, values: np.ndarray) -> "Directions":
        """Return others of the same shape."""
        n = len(self.signal)
        return Directions(values[:n], values[n : 2 * n], values[2 * n :].reshape(self.means.shape))

    def part(self, directions: np.ndarray) -> "Directions":
        """Return those of some directions."""
        return Directions(self.signal[directions], self.noise[directions], self.means[:, directions])

    def around(self, found: "Directions", directions: np.ndarray) -> "Directions":
        """Return starts that are what was found for some directions, and for the others have its mean change of τ."""
        means = self.means + (found.means - self.means[:, directions]).mean(axis=1, keepdims=True)
        moved = Directions(self.signal.copy(), self.noise.copy(), means)
        moved.signal[directions], moved.noise[directions], moved.means[:, directions] = found.signal, found.noise, found.means
        return moved


class Diagonal:
    """The data where K and S are diagonal, section 5; Z and M are U ᵀ L⁻¹ of Y and of M.

    Attributes
    ----------
    T
        L⁻ᵀ U, (rows, rows).
    eigenvalues
        Λ, (rows,).
    Z
        (rows, directions).
    M
        (rows, directions, columns).
    """

    def __init__(self, K: np.ndarray, root: np.ndarray, Y: np.ndarray, M: np.ndarray) -> None:
        # Each of these may be the size of the memory that is left: what is no longer needed goes.
        K = solve_triangular(root, K, lower=True, check_finite=False).T
        K = solve_triangular(root, K, lower=True, overwrite_b=True, check_finite=False)
        eigenvalues, U = eigh(K, overwrite_a=True, check_finite=False)
        del K
        self.eigenvalues = np.maximum(eigenvalues, 0.0)
        self.T = solve_triangular(root, U, lower=True, trans=1, overwrite_b=True, check_finite=False)
        self.Z = self.T.T @ Y  # Uᵀ L⁻¹ = Tᵀ
        self.M = np.tensordot(self.T.T, M, axes=1) if M.shape[1] > 1 else (self.T.T @ M[:, 0])[:, None]

    def solved(self, of: Directions) -> "Solved":
        """Return C⁻¹ and what follows from it, for all directions at once."""
        variance, tau = np.exp(of.signal), np.exp(of.means)
        inverse = 1.0 / (variance * self.eigenvalues[:, None] + np.exp(of.noise))  # D⁻¹, (rows, directions)
        scaled = inverse[:, :, None] * self.M
        gram = np.einsum("iko,ikp->kop", np.broadcast_to(self.M, scaled.shape), scaled)
        precision = gram.copy()
        columns = np.arange(len(tau))
        precision[:, columns, columns] += 1.0 / tau.T
        B = np.linalg.inv(precision)  # covariance of β given the data
        beta = np.einsum("kop,ikp,ik->ko", B, scaled, self.Z)
        p = inverse * self.Z - np.einsum("iko,ko->ik", scaled, beta)
        determinant = -np.log(inverse).sum() + np.log(tau).sum() + np.linalg.slogdet(precision)[1].sum()
        return Solved(inverse, scaled, gram, B, beta, p, 0.5 * ((self.Z * p).sum() + determinant))


@dataclass(frozen=True)
class Solved:
    """C⁻¹ in diagonal coordinates: D⁻¹, D⁻¹ M, Mᵀ D⁻¹ M, the covariance and mean of β, p = C⁻¹ Y, and −log likelihood but for constants."""

    inverse: np.ndarray
    scaled: np.ndarray
    gram: np.ndarray
    B: np.ndarray
    beta: np.ndarray
    p: np.ndarray
    loss: float

    def gradient(self, data: Diagonal, of: Directions) -> tuple[Directions, np.ndarray]:
        """Return the gradient by what is a direction's own, and H, (rows, directions, columns)."""
        H = np.einsum("iko,kop->ikp", self.scaled, np.linalg.cholesky(self.B))
        core = self.inverse - (H**2).sum(axis=2) - self.p**2
        of_means = np.einsum("koo->ok", self.gram) - np.einsum("kop,kpq,kqo->ok", self.gram, self.B, self.gram)
        along = np.einsum("iko,ik->ok", np.broadcast_to(data.M, self.scaled.shape), self.p)
        signal = 0.5 * np.exp(of.signal) * (data.eigenvalues[:, None] * core).sum(axis=0)
        return Directions(signal, 0.5 * np.exp(of.noise) * core.sum(axis=0), 0.5 * np.exp(of.means) * (of_means - along**2)), H


@dataclass(frozen=True)
class Problem:
    """What hyper-parameters are learned from, and what answers are conditioned on.

    Attributes
    ----------
    kernel, asked
        The kernel, and the rows as questions to it.
    sampling
        S, (rows, rows), with a mean of 1 on the diagonal.
    Y, M
        Effects in directions, (rows, directions), and the columns of means, (rows, directions or 1, columns).
    strength
        h of rows, (rows,).
    start
        Where a direction's own start.
    n_means
        Columns of M that are means of singles and combinations; the others are what another model says.
    """

    kernel: SetKernel
    asked: Questions
    sampling: np.ndarray
    Y: np.ndarray
    M: np.ndarray
    strength: np.ndarray
    start: Directions
    n_means: int

    def part(self, rows: np.ndarray, directions: np.ndarray) -> "Problem":
        """Return the problem of some rows and directions."""
        M = self.M[rows][:, directions] if self.M.shape[1] > 1 else self.M[rows]
        return replace(
            self, asked=self.asked.part(rows), sampling=self.sampling[np.ix_(rows, rows)], Y=self.Y[np.ix_(rows, directions)], M=M,
            strength=self.strength[rows], start=self.start.part(directions),
        )  # fmt: skip

    @cached_property
    def root(self) -> np.ndarray:
        """L of S = L Lᵀ, (rows, rows)."""
        return cholesky(self.sampling, lower=True)

    @cached_property
    def terms(self) -> Terms:
        """Parts of K between all rows."""
        return self.kernel.terms(self.asked, self.asked)

    @cached_property
    def of_nuggets(self) -> list[np.ndarray]:
        """Return h of singles and of combinations, 0 for the others, (rows,) each."""
        is_combination = self.asked.is_combination
        return [self.strength * (1.0 - is_combination), self.strength * is_combination]

    def diagonal(self, weights: Weights) -> "Diagonal":
        """Return the data where K and S are diagonal."""
        if "terms" in vars(self):
            K = weights.covariance(self.terms)[0]
        else:  # of many rows all parts together would not fit
            K = np.empty(self.sampling.shape)
            for first in range(0, len(K), ROWS_AT_ONCE):
                block = slice(first, first + ROWS_AT_ONCE)
                K[block] = weights.covariance(self.kernel.terms(self.asked.part(block), self.asked))[0]
        K[np.diag_indices(len(K))] += sum(nu * of for nu, of in zip(weights.groups[4], self.of_nuggets, strict=True))
        return Diagonal(K, self.root, self.Y, self.M)

    def learned(self, weights: Weights) -> tuple[Weights, Directions]:
        """Return shared weights and a direction's own of greatest posterior density."""
        self.terms  # noqa: B018 (they are needed at every step)
        n, starts, has_sources = len(weights.values), weights.values, any(name not in STARTS for name in weights.members)

        def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
            shared, of = replace(weights, values=values[:n]), self.start.like(values[n:])
            data = self.diagonal(shared)
            solved = data.solved(of)
            own, H = solved.gradient(data, of)
            root = np.sqrt(np.exp(of.signal))
            P, Q = solved.p * root, (H * root[:, None]).reshape(len(H), -1)
            inner = -(P @ P.T) - Q @ Q.T
            inner[np.diag_indices(len(inner))] += solved.inverse @ np.exp(of.signal)
            by_K = 0.5 * data.T @ inner @ data.T.T
            penalty, slope = _prior_of_shared(shared, starts)
            of_own, slope_of_own = _prior_of_directions(of, self.start, self.n_means)
            gradient = np.concatenate([self._by_weights(shared, by_K) + slope, own.values + slope_of_own])
            return solved.loss + penalty + of_own, gradient

        tried = [
            np.concatenate([first, self.start.values])
            for first in (starts, *([weights.starts(STARTS | SECOND_STARTS)] if has_sources else []))
        ]
        found = min((minimized(loss, first, N_STEPS) for first in tried), key=lambda values: loss(values)[0])
        return replace(weights, values=found[:n]), self.start.like(found[n:])

    @staticmethod
    def conditioned(data: "Diagonal", start: Directions) -> Directions:
        """Return a direction's own of greatest posterior density, given shared weights."""

        def loss(values: np.ndarray) -> tuple[float, np.ndarray]:
            of = start.like(values)
            solved = data.solved(of)
            penalty, slope = _prior_of_directions(of, start)
            return solved.loss + penalty, solved.gradient(data, of)[0].values + slope

        return start.like(minimized(loss, start.values, N_STEPS))

    def _by_weights(self, weights: Weights, by_K: np.ndarray) -> np.ndarray:
        """Return the gradient by shared weights from that by K."""
        a, omega, c, e, nu = weights.groups
        is_combination = self.asked.is_combination
        _, of_members, of_contexts = weights.covariance(self.terms)
        factor = np.where(is_combination > 0, omega[0], 1.0)
        outer = by_K * np.outer(factor, factor)
        times_contexts = outer * of_contexts
        by_omega = 2.0 * omega * (1.0 - omega / 1.5) * (by_K * np.outer(is_combination, factor) * of_members * of_contexts).sum()
        diagonal = by_K.diagonal()
        return np.concatenate([
            a * [(times_contexts * part).sum() for part in self.terms.members], by_omega,
            c * [(outer * of_members * part).sum() for part in self.terms.contexts], e * [(by_K * part).sum() for part in self.terms.interactions],
            nu * [(diagonal * of).sum() for of in self.of_nuggets],
        ])  # fmt: skip


def _prior_of_shared(weights: Weights, starts: np.ndarray) -> tuple[float, np.ndarray]:
    """Return −log p of shared weights and its gradient."""
    apart = weights.values - starts
    slope, loss = apart / WIDTH**2, 0.5 * float((apart**2).sum()) / WIDTH**2
    for i, name in enumerate(weights.members):
        if name not in STARTS:
            pull = SPARSITY * np.exp(weights.values[i] / 2)
            loss, slope[i] = loss + pull, slope[i] + pull / 2
    return loss, slope


def _prior_of_directions(of: Directions, start: Directions, n_free: int = 0) -> tuple[float, np.ndarray]:
    """Return −log p of a direction's own and its gradient; of the first `n_free` columns of M, log τ varies around a mean that is free."""
    own = [(of.signal - start.signal) / WIDTH_OF_DIRECTIONS**2, (of.noise - start.noise) / WIDTH_OF_DIRECTIONS**2]
    loss = 0.5 * WIDTH_OF_DIRECTIONS**2 * sum(float((slope**2).sum()) for slope in own)
    apart = of.means - start.means
    slope = apart / WIDTH_OF_DIRECTIONS**2
    # The mean is integrated out: (w² I + W² 1 1ᵀ)⁻¹.
    common = WIDTH_OF_DIRECTIONS**2 / WIDTH_OF_MEANS**2 + apart.shape[1]
    slope[:n_free] -= apart[:n_free].sum(axis=1, keepdims=True) / common / WIDTH_OF_DIRECTIONS**2
    return loss + 0.5 * float((apart * slope).sum()), np.concatenate([*own, slope.ravel()])


def minimized(loss: Callable[[np.ndarray], tuple[float, np.ndarray]], start: np.ndarray, n_steps: int) -> np.ndarray:
    """Return where a function, that gives value and gradient, is least (L-BFGS-B), within e⁻¹² to e⁸ times the start."""
    bounds = np.column_stack([start - 12.0, start + 8.0])
    return minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"maxiter": n_steps, "maxcor": 20}).x


class SetGP(MeanShift):
    """One Gaussian process over sets of perturbed genes in contexts: own effects, gene vectors, interactions, doses and contexts in one model.

    Its mean is that of the learned models, too, and its posterior variance the scale of intervals. The page of maths is the head of its module.

    Parameters
    ----------
    others
        By name, how to fit means that are no closed forms, as that of a network. Each enters as columns of M: its predictions of training
        perturbations, made by inner folds that held them out.
    """

    reads_strata = True

    def __init__(self, others: Mapping[str, FitPart] | None = None) -> None:
        self.others = others or {}
        self.out_of_fold: dict[str, dict[str, np.ndarray]] = {}

    def learn(self, training: Training) -> Artefact:
        """Measure rows, turn them to directions, find hyper-parameters and condition on all rows."""
        rows = EffectRows.of(training)
        own = OwnLevels.of(rows, training)
        values = own.replaced(rows, training.genes)
        V = _directions(values)  # (genes, directions)
        Y, unit = values @ V, rows.sampling.diagonal().mean()
        of_gene = V**2
        noise = unit * rows.variance @ of_gene
        kernel = SetKernel.of(rows, training, Y, rows.sampling.diagonal() * (rows.variance @ of_gene).sum())
        asked = Questions(rows.labels, rows.shares, np.zeros(len(rows.contexts)))
        self.out_of_fold = self.out_of_fold or _out_of_fold(self.others, training)
        root_h, h = kernel.strength_of(rows.labels)
        orders = np.array([len(members_of(label)) for label in rows.labels])
        mean_orders = np.array([orders[kind].mean() if kind.any() else 0.0 for kind in (orders == 1, orders > 1)])
        M = _columns(orders, root_h, mean_orders, [_said(said, rows.labels, V) for said in self.out_of_fold.values()])
        size = np.maximum((Y**2).mean(axis=0), 1e-24)
        signal, n_means = np.maximum(size - noise, 0.05 * size), int((mean_orders > 0).sum())
        of_means = np.log(np.vstack([np.tile(0.3 * signal, (n_means, 1)), np.full((M.shape[2] - n_means, len(size)), 0.3)]))
        start = Directions(np.log(0.7 * signal), np.log(np.maximum(noise, 0.3 * signal)), of_means)
        problem = Problem(kernel, asked, rows.sampling / unit, Y, M, h, start, n_means)
        telling = size - noise > LEAST_SIGNAL * size
        if telling.sum() < LEAST_DIRECTIONS:
            telling = np.isin(np.arange(len(size)), np.argsort(noise - size, kind="stable")[:LEAST_DIRECTIONS])
        weights, found = problem.part(_learned_from(rows.labels, training.seed), telling).learned(kernel.weights)
        data = problem.diagonal(weights)
        of = Problem.conditioned(data, start.around(found, telling))
        solved = data.solved(of)
        return {
            **{f"kernel.{name}": value for name, value in kernel.state.items()}, **{f"own.{name}": value for name, value in own.arrays().items()},
            "weights": weights.values, "V": V, "labels": np.array(rows.labels, dtype=str), "shares": rows.shares, "mean_orders": mean_orders,
            "alpha": data.T @ (solved.p * np.exp(of.signal)), "beta": solved.beta, "B": solved.B, "signal": np.exp(of.signal),
            "T": data.T.astype(np.float32), "inverse": solved.inverse.astype(np.float32), "scaled": solved.scaled.astype(np.float32),
            "genes": np.array(training.genes, dtype=str), "others": np.array(list(self.out_of_fold), dtype=str),
            **{f"said.{name}": np.stack(list(said.values())) for name, said in self.out_of_fold.items()},
            **{f"said_of.{name}": np.array(list(said), dtype=str) for name, said in self.out_of_fold.items()},
        }  # fmt: skip

    def restore(self, artefact: Artefact) -> None:
        """Rebuild the kernel around its arrays."""
        super().restore(artefact)
        of = {
            part: {name.removeprefix(part): value for name, value in artefact.items() if name.startswith(part)}
            for part in ("kernel.", "own.")
        }
        self.kernel = SetKernel(of["kernel."])
        self.own = OwnLevels.from_arrays(of["own."])
        self.weights = replace(self.kernel.weights, values=artefact["weights"])
        self.asked = Questions(artefact["labels"].tolist(), artefact["shares"], np.zeros(len(self.kernel.contexts)))
        self.column = {gene: i for i, gene in enumerate(artefact["genes"].tolist())}
        self.out_of_fold = {
            name: dict(zip(artefact[f"said_of.{name}"].tolist(), artefact[f"said.{name}"], strict=True))
            for name in artefact["others"].tolist()
        }

    @property
    def looks_at_contexts(self) -> bool:
        """Whether answers differ between batches and cell types."""
        return "levels" in self.kernel.state

    def effect(self, perturbation: str) -> np.ndarray:
        """Answer for cells as training's controls are."""
        return self.effect_in(perturbation)

    def effect_in(self, perturbation: str, context: Context | None = None, said: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
        """Return the posterior mean, (genes,), in a context.

        Parameters
        ----------
        said
            Effects by the models of `others`, by name, (genes,) each.
        """
        effect = (self._across(perturbation, context)[0] @ self.artefact["alpha"] + self._in_common(perturbation, said)[1])[
            0
        ] @ self.artefact["V"].T
        for gene in entities_of(perturbation):
            if gene in self.column:
                effect[self.column[gene]] = self.own.at(gene, self.column[gene], context)[0]
                for other in self.own.neighbours_of(gene, self.artefact["genes"].tolist()):
                    effect[self.column[other]] += self.own.share * effect[self.column[gene]]
        return effect

    def uncertainty(self, perturbation: str, context: Context | None = None, said: Mapping[str, np.ndarray] | None = None) -> np.ndarray:
        """Return the posterior variance of the effect, (genes,)."""
        K, questions = self._across(perturbation, context)
        itself = self.weights.covariance(self.kernel.terms(questions, questions))[0]
        signal, R = self.artefact["signal"], K @ self.artefact["T"]  # (1, rows)
        of_g = itself[0, 0] * signal - (R**2 @ self.artefact["inverse"])[0] * signal**2
        columns = self._in_common(perturbation, said)[0][0] - np.einsum("i,iko,k->ko", R[0], self.artefact["scaled"], signal)
        variance = np.maximum(of_g, 0.0) + np.einsum("ko,kop,kp->k", columns, self.artefact["B"], columns)
        found = self.artefact["V"] ** 2 @ variance
        for gene in entities_of(perturbation):
            if gene in self.column:
                found[self.column[gene]] = self.own.at(gene, self.column[gene], context)[1]
        return found

    def _across(self, perturbation: str, context: Context | None) -> tuple[np.ndarray, Questions]:
        """Return K between a question and the rows, (1, rows), and the question."""
        questions = self.kernel.questions([perturbation], context)
        return self.weights.covariance(self.kernel.terms(questions, self.asked))[0], questions

    def _in_common(self, perturbation: str, said: Mapping[str, np.ndarray] | None) -> tuple[np.ndarray, np.ndarray]:
        """Return the columns of M of a question, (1, directions, columns), and M β̂, (1, directions)."""
        known = self.out_of_fold
        if said is not None:
            known = {name: {perturbation: said[name]} for name in known}
        others = [_said(of, [perturbation], self.artefact["V"]) for of in known.values()]
        root_h, _ = self.kernel.strength_of([perturbation])
        M = _columns(np.array([len(members_of(perturbation))]), root_h, self.artefact["mean_orders"], others)
        M = np.broadcast_to(M, (1, len(self.artefact["beta"]), M.shape[2]))
        return M, np.einsum("qko,ko->qk", M, self.artefact["beta"])

    def fit(self, pairs: Pairs, embeddings: Embeddings, run: Run) -> Artefact:
        """Learn, and tell the weights."""
        artefact = super().fit(pairs, embeddings, run)
        run.facts["mean"] = self.account()
        return artefact

    def account(self) -> dict[str, float]:
        """Return the weights: what every source of vectors, every context and combination was worth on this screen."""
        a, omega, c, e, nu = self.weights.groups
        return {name: round(float(value), 4) for name, value in zip(self.weights.names, np.concatenate([a, omega, c, e, nu]), strict=True)}


@dataclass(frozen=True)
class OwnLevels:
    """How far perturbations move the levels of the perturbed genes themselves, which directions do not tell.

    A gene perturbed in training has the mean of its effects on itself, one that is not follows the others' (`OwnGene`). By CRISPRi, genes that start
    within 5 kb of an unseen target get a share of its effect: that which neighbours of training's targets had, by least squares, drawn to
    none as by one target more.

    Attributes
    ----------
    genes, values, variances
        Measured genes that training perturbs, their mean effect on themselves and its sampling variance, (genes,) each.
    coefficients, spread
        Of `OwnGene`, and the variance that it leaves over.
    level
        Mean control, (measured genes,).
    share
        What neighbours have of an effect; 0 where perturbations are not by CRISPRi.
    """

    genes: np.ndarray
    values: np.ndarray
    variances: np.ndarray
    coefficients: np.ndarray
    spread: float
    level: np.ndarray
    share: float = 0.0

    @classmethod
    def of(cls, rows: EffectRows, training: Training) -> "OwnLevels":
        """Measure them."""
        own, level = OwnGene.fit(training.pairs, training.effects), rows.population @ rows.levels
        found: dict[str, list[tuple[float, float]]] = {}
        for i, label in enumerate(rows.labels):
            for gene in entities_of(label):
                if (column := training.row.get(gene)) is not None:
                    found.setdefault(gene, []).append((rows.values[i, column], 1.0 / rows.sampling[i, i]))
        values, variances, left = [], [], []
        for gene, measured in found.items():
            effects, weights = np.array(measured).T
            values.append(np.average(effects, weights=weights))
            variances.append(rows.variance[training.row[gene]] / weights.sum())
            left.append((values[-1] - own.shift(float(level[training.row[gene]]))) ** 2 - variances[-1])
        spread = max(float(np.mean(left)), 0.0) if left else 0.0
        levels = cls(np.array(list(found), dtype=str), np.array(values), np.array(variances), own.coefficients, spread, level)
        is_interference = set(training.pairs.obs.get("perturbation_type", [])) == {"CRISPRi"}
        return replace(levels, share=levels._share_of_neighbours(rows, training)) if is_interference else levels

    def _share_of_neighbours(self, rows: EffectRows, training: Training) -> float:
        near = neighbours(self.genes.tolist(), training.genes, _organism(training.genes))
        crossed, squared = 0.0, [0.0]
        for i, label in enumerate(rows.labels):
            own = rows.values[i, training.row[label]] if label in near and label in training.row else 0.0
            for other, _ in near.get(label, []):
                crossed += own * rows.values[i, training.row[other]]
                squared.append(own**2)
        return max(0.0, crossed / max(sum(squared) + max(squared), 1e-12))

    def neighbours_of(self, gene: str, genes: list[str]) -> list[str]:
        """Return the measured genes that an unseen target takes with it."""
        if not self.share or gene in self.genes:
            return []
        return [name for name, _ in neighbours([gene], genes, _organism(genes))[gene]]

    @staticmethod
    def replaced(rows: EffectRows, genes: list[str]) -> np.ndarray:
        """Return effects with the mean of the other rows where a gene is the perturbed one, (rows, genes)."""
        values = rows.values.astype(float)
        is_own = np.zeros(values.shape, dtype=bool)
        column = {gene: i for i, gene in enumerate(genes)}
        for i, label in enumerate(rows.labels):
            is_own[i, [column[gene] for gene in entities_of(label) if gene in column]] = True
        for j in np.flatnonzero(is_own.any(axis=0)):
            others = values[~is_own[:, j], j]
            values[is_own[:, j], j] = others.mean() if len(others) else 0.0
        return values

    def at(self, gene: str, column: int, context: Context | None) -> tuple[float, float]:
        """Return the expected effect on a gene's own level, and its variance."""
        if len(place := np.flatnonzero(self.genes == gene)):
            return float(self.values[place[0]]), float(self.variances[place[0]])
        level = self.level if context is None else context.level
        return OwnGene(self.coefficients).shift(float(level[column])), self.spread

    def arrays(self) -> Artefact:
        """Return what is to be stored."""
        return {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_arrays(cls, arrays: Artefact) -> "OwnLevels":
        """Rebuild what `arrays` returned."""
        return cls(**{**arrays, **{name: float(arrays[name]) for name in ("spread", "share")}})


def _organism(genes: list[str]) -> str:
    """Return the organism whose table of gene starts knows most of these genes."""
    return max(TABLES, key=lambda organism: len(starts(organism).keys() & set(genes)))


def _directions(values: np.ndarray) -> np.ndarray:
    """Return the leading singular vectors, (genes, directions): all, or MOST_DIRECTIONS."""
    if min(values.shape) > 4 * MOST_DIRECTIONS:
        _, size, Vt = randomized_svd(values, MOST_DIRECTIONS, n_iter=4, random_state=0)
    else:
        _, size, Vt = np.linalg.svd(values, full_matrices=False)
    n = max(1, min(MOST_DIRECTIONS, int((size > 1e-8 * size[0]).sum())))
    # The sign of a singular vector is arbitrary: fixed, so that equal data give equal numbers.
    return (Vt[:n] * np.sign(Vt[np.arange(n), np.abs(Vt[:n]).argmax(axis=1)])[:, None]).T


def _columns(orders: np.ndarray, root_h: np.ndarray, mean_orders: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """Return M, (questions, directions or 1, columns): means of singles and of combinations, and what others say of either.

    Parameters
    ----------
    orders, root_h
        Members and mean √h of questions.
    mean_orders
        Mean number of members of training's singles and combinations; 0 where there is none. Where one kind is missing, the other serves, in
        proportion to the members.
    others
        What another model says in directions, (questions, directions) each.
    """
    is_single = orders == 1
    kinds = [kind for kind, mean in zip((is_single, ~is_single), mean_orders, strict=True) if mean]
    if len(kinds) == 1:
        kinds = [np.ones(len(orders))]
    means = np.stack([kind * root_h * orders / mean for kind, mean in zip(kinds, mean_orders[mean_orders > 0], strict=True)], axis=1)[
        :, None
    ]
    if not others:
        return means
    said = np.stack([table * kind[:, None] for table in others for kind in (is_single, ~is_single)], axis=2)
    return np.concatenate([np.broadcast_to(means, (*said.shape[:2], means.shape[2])), said], axis=2)


def _said(said: Mapping[str, np.ndarray], labels: Sequence[str], V: np.ndarray) -> np.ndarray:
    """Return what another model says in directions, (labels, directions); zeros where it says nothing."""
    return np.stack([said[label] @ V if label in said else np.zeros(V.shape[1]) for label in labels])


def _learned_from(labels: list[str], seed: int) -> np.ndarray:
    """Return the rows that shared weights are learned from: of all perturbations, or of as many as have MOST_LEARNED_FROM rows together."""
    rows = _places_of(labels)
    drawn = np.random.default_rng(seed).permutation(sorted(rows)).tolist() if len(labels) > MOST_LEARNED_FROM else sorted(rows)
    ends = np.cumsum([len(rows[name]) for name in drawn])
    return np.sort(np.concatenate([rows[name] for name, end in zip(drawn, ends, strict=True) if end <= MOST_LEARNED_FROM]))


def _out_of_fold(others: Mapping[str, FitPart], training: Training) -> dict[str, dict[str, np.ndarray]]:
    """Return what others say of training perturbations that inner folds held out, by name and label."""
    found: dict[str, dict[str, np.ndarray]] = {name: {} for name in others}
    kinds = [of_genes for of_genes in (False, True) if of_genes or (training.effects.order > 1).any()] if others else []
    rounds = [one for of_genes in kinds for one in itertools.islice(training.rounds(of_genes=of_genes, one_by_one=False), 0, None, 2)]
    if sum(len(held_out.labels) for _, held_out in rounds) < LEAST_HELD_OUT:
        return {}
    for inner, held_out in progressed(rounds, "inner folds", len(rounds)):
        for name, fit in others.items():
            effect = fit(inner, training.pairs.rows[inner.controls])
            found[name] |= {label: effect(label) for label in held_out.labels if label not in found[name]}  # a combination by its own fold
    return found
