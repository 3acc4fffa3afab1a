"""One Gaussian process for the mean effect of any set of perturbed genes in any context.

Data. Row r is a perturbation p, a set of genes or compounds, in a context c, a batch × cell type. Its effect y_r,
(genes,), is the mean of its cells minus the mean of the controls of c. Its errors are sampling errors. For gene g

    cov(y_rg, y_sg) = v_g S_rs,    S_rs = [r = s] / n_r + Σ_c s_rc s_sc / n₀c.

Row r has n_r cells, a share s_rc of them in context c, which has n₀c controls. Effects against the same controls err
together (`EffectRows`).

1. Directions. The level of a perturbed gene itself is predicted apart (`OwnLevels`); in its row the mean of the other
   rows replaces it. The singular vectors V of the rest, Y = U D Vᵀ, turn rows into directions, Y V. Directions count as
   independent.

2. Model. In every direction k

    Y_k = M β_k + σ_k g + ε_k,    β_kj ~ N(0, τ_kj),  g ~ N(0, K),  ε_k ~ N(0, b_k S).

   M holds the part that perturbations have in common. It has a column for singles, one for combinations, and one for
   every mean that another model hands over, such as a network (`FitMean`). Each direction has its own signal σ_k²,
   noise b_k and variances τ_kj. All share the kernel K.

3. Kernel.

    K_rs = ω_r ω_s Σ_{i ∈ r} Σ_{j ∈ s} √(h_i h_j) κ(i, j) · (1 + c₁ s_r·s_s + c₂ s_rᵀ A s_s)
           + Σ_q e_q ⟨φ_q(r), φ_q(s)⟩ + e_c s_r·s_s + e_A s_rᵀ A s_s + [r = s] ν_r h_r
    κ(i, j) = a₀ [i = j] + a₁ [i = j] δ(i, j) + Σ_e ( a_e exp(−|x_i − x_j|² / m_e) + a'_e x_i·x_j )

   Genes. Members add up. A gene has an effect of its own, plus one that its vectors x predict, with a weight per source
   e. A source that predicts nothing gets no weight. In a combination every member counts ω, in (0, 1.5). A gene's
   strength h_i, relative to the mean, is known where it was perturbed alone. Strong effects are rare and heavy-tailed,
   so effects resemble one another in direction rather than in size. Doses of a compound share its effect, and share
   more the nearer their logarithms are, δ. Strengths between doses are interpolated (`DoseInterpolation`).

   Contexts. A context shares one part with all contexts, keeps a part of its own, c₁, and shares a part with contexts
   whose controls look alike, c₂: A = exp(−|level − level'|² / m). All perturbations of a context have a part in common,
   with weights of its own, e_c and e_A.

   Combinations. They interact alike where the sums of their members' effects are alike, and the differences between
   these: φ_q is Gaussian in them. A member that was never measured alone may have the effect of any that was: φ is the
   mean over them. ν is the part that does not come back in other rows, one for singles and one for combinations.

4. Hyper-parameters maximize the marginal likelihood of the training rows. Weak priors keep each near its start. Another
   prior pulls the weights of sources to zero, −log p = 10 √a: with few genes, sources cannot be told apart. The log
   τ_kj of all directions share a mean, which is learned. Shared hyper-parameters are learned from directions with more
   signal than sampling noise, and from at most 1,000 rows. Then every direction learns its own.

   Weak directions are many, and may follow another kernel than strong ones. Where b_k is free and ℓ = Σ_k ℓ_k, K can
   follow the weak ones, and the strong ones count as noise. So all is learned a second time: with b_k near the sampling
   noise, and with every ℓ_k times the deviation of its signal. This is kept if it predicts rows that are left out with
   5 % less squared error. The error of a row is [C⁻¹ Y]_i / [C⁻¹]_ii. Rows left out do not tell what a context adds of
   its own: with several contexts, the first is kept.

5. One factorization serves all directions. Let S = L Lᵀ, L⁻¹ K L⁻ᵀ = U Λ Uᵀ and T = L⁻ᵀ U. In the coordinates of T
   every covariance C_k = σ_k² K + b_k S + M T_k Mᵀ is diagonal but for the columns of M: D_k = σ_k² Λ + b_k. The
   gradient is

    ∂ℓ/∂K = ½ T ( Σ_k σ_k² [ D_k⁻¹ − H_k H_kᵀ − p_k p_kᵀ ] ) Tᵀ,
    p_k = C_k⁻¹ Y_k in coordinates of T,    H_k H_kᵀ = D_k⁻¹ M (T_k⁻¹ + Mᵀ D_k⁻¹ M)⁻¹ Mᵀ D_k⁻¹.

6. Answer. A question * has the mean M_* β̂ + σ_k K_*r C⁻¹ (Y_k − M β̂), with its variance, turned back by V
   (Rasmussen & Williams 2006, equations 2.25, 2.26, 2.41 and 2.42).
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from perturbflow.controls import Context
from perturbflow.embeddings import Embeddings
from perturbflow.genes.symbols import CONTROL, entities_of, members_of
from perturbflow.models.base import Artefact, Run
from perturbflow.models.closed_form.base import ClosedForm, TrainingSet
from perturbflow.models.effects import Effects
from perturbflow.models.gaussian_process.kernel import EffectRows, Questions, SetKernel, vectors_of
from perturbflow.models.gaussian_process.likelihood import Directions, Problem
from perturbflow.models.gaussian_process.own_gene import OwnLevels
from perturbflow.pairs import Pairs
from perturbflow.progress import progressed
from perturbflow.registry.params import Params

MOST_DIRECTIONS = 300
LEAST_SIGNAL = 0.5  # share of a direction's variance that shared weights are learned from
LEAST_DIRECTIONS = 3
LEAST_SHARE = 0.05  # of a direction's variance: signal starts at least there
MOST_LEARNED_FROM = 1000  # rows
LEAST_HELD_OUT = 20  # perturbations, to judge another model's means by

# Fits a mean that is no closed form. It gets an inner training set and the rows of pairs.h5ad with controls to start
# from, and returns effects by label.
FitMean = Callable[[TrainingSet, np.ndarray], Callable[[str], np.ndarray]]


class SetGP(ClosedForm):
    """One Gaussian process over sets of perturbed genes in contexts: own effects, vectors, interactions and doses.

    It also gives learned models their mean, and intervals their scale. The head of its module is a page of maths.

    Parameters
    ----------
    other_means
        By name, how to fit the means of other models, such as a network. Each enters as columns of M: its predictions
        of training perturbations, by inner folds that held them out.
    """

    def __init__(self, params: Params | None = None, other_means: Mapping[str, FitMean] | None = None) -> None:
        super().__init__(params)
        self.other_means = other_means or {}
        self.out_of_fold: dict[str, dict[str, np.ndarray]] = {}

    def learn(self, training: TrainingSet) -> Artefact:
        """Measure rows, turn them to directions, find hyper-parameters and condition on all rows."""
        rows = EffectRows.of(training)
        own = OwnLevels.of(rows, training)
        values = own.replaced(rows, training.genes)
        V = _directions(values)  # (genes, directions)
        Y, sampling = values @ V, rows.sampling.variances
        unit = sampling.mean()
        del values  # as large as the sums over all cells
        of_gene = V**2
        noise = unit * rows.variance @ of_gene
        kernel = SetKernel.of(rows, training, Y, sampling * (rows.variance @ of_gene).sum())
        asked = Questions(rows.labels, rows.shares, np.zeros(len(rows.contexts)))
        self.out_of_fold = self.out_of_fold or _out_of_fold(self.other_means, training)
        root_h, h = kernel.strength_of(rows.labels)
        n_members = np.array([len(members_of(label)) for label in rows.labels])
        kinds = (n_members == 1, n_members > 1)
        mean_n_members = np.array([n_members[kind].mean() if kind.any() else 0.0 for kind in kinds])
        others = [_in_directions(effects, rows.labels, V) for effects in self.out_of_fold.values()]
        M = _columns(n_members, root_h, mean_n_members, others)
        n_means = int((mean_n_members > 0).sum())
        start = _starts(Y, noise, M.shape[2], n_means)
        problem = Problem(kernel, asked, rows.sampling.in_units(unit), Y, M, h, start, np.log(noise), n_means)
        informative = _informative(Y, noise)
        found = problem.part(_learned_from(rows.labels, training.seed), informative).learned(kernel.weights)
        data = problem.diagonal(found.weights)
        of = problem.conditioned(data, start.around(found.directions, informative), found.strong_first)
        solved = data.solved(of)
        signal = np.exp(of.signal)
        return {
            **{f"kernel.{name}": value for name, value in kernel.state.items()},
            **{f"own.{name}": value for name, value in own.arrays().items()},
            **self._stored_means(),
            "weights": found.weights.values, "V": V, "labels": np.array(rows.labels, dtype=str), "shares": rows.shares,
            "mean_n_members": mean_n_members, "genes": np.array(training.genes, dtype=str),
            "alpha": data.T @ (solved.p * signal), "beta": solved.beta, "B": solved.B, "signal": signal,
            "T": data.T.astype(np.float32), "inverse": solved.inverse.astype(np.float32),
            "scaled": solved.scaled.astype(np.float32), "noise": np.exp(of.noise),
        }  # fmt: skip

    def _stored_means(self) -> Artefact:
        """Return the arrays of `out_of_fold`, as `restore` reads them."""
        stored: Artefact = {"others": np.array(list(self.out_of_fold), dtype=str)}
        for name, effects in self.out_of_fold.items():
            stored[f"predicted.{name}"] = np.stack(list(effects.values()))
            stored[f"predicted_for.{name}"] = np.array(list(effects), dtype=str)
        return stored

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
        self._last = ("", np.zeros(0))
        self._neighbours: dict[str, list[str]] = {}
        self.out_of_fold = {
            name: dict(zip(artefact[f"predicted_for.{name}"].tolist(), artefact[f"predicted.{name}"], strict=True))
            for name in artefact["others"].tolist()
        }

    def add_genes(self, pairs: Pairs, embeddings: Embeddings, seed: int) -> None:
        """Take in vectors of genes that the screen does not perturb; nothing is learned again."""
        self.kernel = SetKernel({**self.kernel.state, **vectors_of(self.asked.labels, embeddings)})
        self.asked = replace(self.asked, kept={})

    @property
    def looks_at_contexts(self) -> bool:
        """Whether answers differ between batches and cell types."""
        return "levels" in self.kernel.state

    def effect(self, perturbation: str) -> np.ndarray:
        """Return the posterior mean, (genes,), for contexts in the shares of training's controls."""
        return self.effect_in(perturbation)

    def effect_in(
        self, perturbation: str, context: Context | None = None, other_means: Mapping[str, np.ndarray] | None = None
    ) -> np.ndarray:
        """Return the posterior mean, (genes,), in a context.

        Parameters
        ----------
        other_means
            Effects by the models of `other_means`, by name, (genes,) each.
        """
        effect = self._on_others([perturbation], context, other_means)[0].copy()
        self._put_own(effect, perturbation, context)
        return effect

    def mean_effects(
        self,
        cells: np.ndarray,
        perturbations: Sequence[str],
        seed: int,
        context: Context | None = None,
        other_means: Mapping[str, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Return mean effects over a context, (perturbations, genes), all at once; those of other models likewise."""
        effects = self._on_others(perturbations, context, other_means).copy()
        effects[[label == CONTROL for label in perturbations]] = 0.0
        for effect, label in zip(effects, perturbations, strict=True):
            self._put_own(effect, label, context)
        return effects

    def uncertainty(
        self, perturbation: str, context: Context | None = None, other_means: Mapping[str, np.ndarray] | None = None
    ) -> np.ndarray:
        """Return the posterior variance of the effect, (genes,)."""
        return self.uncertainties([perturbation], context, other_means)[0]

    def uncertainties(
        self,
        perturbations: Sequence[str],
        context: Context | None = None,
        other_means: Mapping[str, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Return the posterior variances of effects, (perturbations, genes); effects of other models likewise."""
        K, questions = self.across(perturbations, context)
        itself = self.weights.covariance(self.kernel.terms(questions, questions))[0].diagonal()
        signal, T = self.artefact["signal"], self.artefact["T"]
        R = (K.astype(T.dtype) @ T).astype(float)  # (questions, rows); T in double precision would be large and slow
        of_g = np.outer(itself, signal) - (R**2 @ self.artefact["inverse"]) * signal**2
        M, _ = self.in_common(perturbations, other_means)
        columns = M - np.einsum("qi,iko,k->qko", R, self.artefact["scaled"], signal, optimize=True)
        variance = np.maximum(of_g, 0.0) + np.einsum("qko,kop,qkp->qk", columns, self.artefact["B"], columns)
        found = variance @ (self.artefact["V"] ** 2).T
        for of_label, label in zip(found, perturbations, strict=True):
            for gene in entities_of(label):
                if gene in self.column:
                    of_label[self.column[gene]] = self.own.at(gene, self.column[gene], context)[1]
        return found

    def _on_others(
        self, labels: Sequence[str], context: Context | None, other_means: Mapping[str, np.ndarray] | None
    ) -> np.ndarray:
        """Return posterior means as if no gene were perturbed itself, (labels, genes).

        Those of the last single question are kept: it is asked in dozens of batches, which change nothing but its own
        gene.
        """
        is_same = len(labels) == 1 and not self.looks_at_contexts and other_means is None
        if is_same and self._last[0] == labels[0]:
            return self._last[1]
        K, _ = self.across(labels, context)
        _, in_common = self.in_common(labels, other_means)
        effects = (K @ self.artefact["alpha"] + in_common) @ self.artefact["V"].T
        if is_same:
            self._last = (labels[0], effects)
        return effects

    def _put_own(self, effect: np.ndarray, perturbation: str, context: Context | None) -> None:
        """Put the effects on the perturbed genes themselves, and on their neighbours on the genome, in their place."""
        for gene in entities_of(perturbation):
            if gene in self.column:
                effect[self.column[gene]] = self.own.at(gene, self.column[gene], context)[0]
                for other in self._neighbours_of(gene):
                    effect[self.column[other]] += self.own.share * effect[self.column[gene]]

    def _neighbours_of(self, gene: str) -> list[str]:
        if gene not in self._neighbours:
            self._neighbours[gene] = self.own.neighbours_of(gene, self.artefact["genes"].tolist())
        return self._neighbours[gene]

    def across(self, labels: Sequence[str], context: Context | None) -> tuple[np.ndarray, Questions]:
        """Return K between questions and the rows, (questions, rows), and the questions."""
        questions = self.kernel.questions(labels, context)
        return self.with_rows(questions), questions

    def with_rows(self, questions: Questions) -> np.ndarray:
        """Return K between questions and the rows of training, (questions, rows)."""
        return self.weights.covariance(self.kernel.terms(questions, self.asked))[0]

    def in_common(
        self, labels: Sequence[str], other_means: Mapping[str, np.ndarray] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the columns of M of questions, (questions, directions, columns), and M β̂, (questions, directions).

        Means of other models are (questions, genes), or (genes,) of a single one.
        """
        known = self.out_of_fold
        if other_means is not None:
            # A measured perturbation keeps its out-of-fold prediction: its rows were conditioned on that.
            known = {
                name: dict(zip(labels, np.atleast_2d(other_means[name]), strict=True)) | of
                for name, of in known.items()
            }
        others = [_in_directions(of, labels, self.artefact["V"]) for of in known.values()]
        root_h, _ = self.kernel.strength_of(labels)
        n_members = np.array([len(members_of(label)) for label in labels])
        M = _columns(n_members, root_h, self.artefact["mean_n_members"], others)
        M = np.broadcast_to(M, (len(labels), len(self.artefact["beta"]), M.shape[2]))
        return M, np.einsum("qko,ko->qk", M, self.artefact["beta"])

    def fit(self, pairs: Pairs, embeddings: Embeddings, run: Run) -> Artefact:
        """Learn, and report the weights."""
        artefact = super().fit(pairs, embeddings, run)
        run.facts["mean"] = self.account()
        return artefact

    def account(self) -> dict[str, float]:
        """Return the learned weights of sources of vectors, contexts and combinations on this screen, by name."""
        a, omega, c, e, nu = self.weights.groups
        return {
            name: round(float(value), 4)
            for name, value in zip(self.weights.names, np.concatenate([a, omega, c, e, nu]), strict=True)
        }


def _directions(values: np.ndarray) -> np.ndarray:
    """Return the leading singular vectors, (genes, directions): all, or MOST_DIRECTIONS."""
    if min(values.shape) > 4 * MOST_DIRECTIONS:
        from sklearn.utils.extmath import randomized_svd  # the import takes a second, and most screens need none

        _, size, Vt = randomized_svd(values, MOST_DIRECTIONS, n_iter=4, random_state=0)
    else:
        _, size, Vt = np.linalg.svd(values, full_matrices=False)
    n = max(1, min(MOST_DIRECTIONS, int((size > 1e-8 * size[0]).sum())))
    # The sign of a singular vector is arbitrary. It is fixed here, so that equal data give equal numbers.
    sign = np.sign(Vt[np.arange(n), np.abs(Vt[:n]).argmax(axis=1)])
    return (Vt[:n] * sign[:, None]).T


def _starts(Y: np.ndarray, noise: np.ndarray, n_columns: int, n_means: int) -> Directions:
    """Return the starts of each direction's hyper-parameters: its variance minus noise counts mostly as signal."""
    size = np.maximum((Y**2).mean(axis=0), 1e-24)
    signal = np.maximum(size - noise, LEAST_SHARE * size)
    means = np.vstack([np.tile(0.3 * signal, (n_means, 1)), np.full((n_columns - n_means, len(size)), 0.3)])
    return Directions(np.log(0.7 * signal), np.log(np.maximum(noise, 0.3 * signal)), np.log(means))


def _informative(Y: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Return True for the directions that shared weights are learned from, (directions,)."""
    size = (Y**2).mean(axis=0)
    informative = size - noise > LEAST_SIGNAL * size
    if informative.sum() >= LEAST_DIRECTIONS:
        return informative
    return np.isin(np.arange(len(size)), np.argsort(noise - size, kind="stable")[:LEAST_DIRECTIONS])


def _columns(
    n_members: np.ndarray, root_h: np.ndarray, mean_n_members: np.ndarray, others: list[np.ndarray]
) -> np.ndarray:
    """Return M, (questions, directions or 1, columns): means of singles and of combinations, then those of others.

    Parameters
    ----------
    n_members, root_h
        Number of members and mean √h of questions, (questions,) each.
    mean_n_members
        Mean number of members of training's singles and combinations, 0 where there is none, (2,). Where one kind is
        missing, the other serves it in proportion to the members.
    others
        Means of other models in directions, (questions, directions) each.
    """
    is_single = n_members == 1
    kinds = [kind for kind, mean in zip((is_single, ~is_single), mean_n_members, strict=True) if mean]
    if len(kinds) == 1:
        kinds = [np.ones(len(n_members))]
    present = zip(kinds, mean_n_members[mean_n_members > 0], strict=True)
    means = np.stack([kind * root_h * n_members / mean for kind, mean in present], axis=1)[:, None]
    if not others:
        return means
    predicted = np.stack([table * kind[:, None] for table in others for kind in (is_single, ~is_single)], axis=2)
    return np.concatenate([np.broadcast_to(means, (*predicted.shape[:2], means.shape[2])), predicted], axis=2)


def _in_directions(effects: Mapping[str, np.ndarray], labels: Sequence[str], V: np.ndarray) -> np.ndarray:
    """Return another model's effects in directions, (labels, directions); zeros for labels that it lacks."""
    return np.stack([effects[label] @ V if label in effects else np.zeros(V.shape[1]) for label in labels])


def _learned_from(labels: list[str], seed: int) -> np.ndarray:
    """Return the rows that shared weights are learned from: all, or at most MOST_LEARNED_FROM, of sampled members.

    A row is kept if all of its members are sampled. So a combination keeps the singles of its members, and others that
    share a member with it.
    """
    members = [members_of(label) for label in labels]
    names = sorted({member for of_row in members for member in of_row})
    place = dict(zip(np.random.default_rng(seed).permutation(names).tolist(), range(len(names)), strict=True))
    last = np.array([max(place[member] for member in of_row) for of_row in members])
    n_kept = np.searchsorted(np.sort(last), np.arange(len(names)), side="right")  # with so many members
    return np.flatnonzero(last < (n_kept <= MOST_LEARNED_FROM).sum())


def _out_of_fold(others: Mapping[str, FitMean], training: TrainingSet) -> dict[str, dict[str, np.ndarray]]:
    """Return other models' predictions of training perturbations that inner folds held out, by name and label."""
    found: dict[str, dict[str, np.ndarray]] = {name: {} for name in others}
    has_combinations = (training.effects.n_members > 1).any()
    rounds: list[tuple[TrainingSet, Effects]] = []
    kinds = [False, True] if has_combinations else [True]  # of folds: over genes or over combinations
    for of_genes in kinds if others else []:
        rounds += itertools.islice(training.rounds(of_genes=of_genes, one_by_one=False), 0, None, 2)
    if sum(len(held_out.labels) for _, held_out in rounds) < LEAST_HELD_OUT:
        return {}
    for inner, held_out in progressed(rounds, "inner folds", len(rounds)):
        for name, fit in others.items():
            effect = fit(inner, training.pairs.rows[inner.controls])
            # Folds of combinations come first: a combination keeps the prediction of its own fold.
            found[name] |= {label: effect(label) for label in held_out.labels if label not in found[name]}
    return found
