"""One Gaussian process for the mean effect of any set of perturbed genes in any context.

Data. Row r is a perturbation p, a set of genes or compounds, in a context c, a batch × cell type. y_r, (genes,), is the mean of its cells minus the
mean of the controls of c. Its errors are those of sampling, for gene g

    cov(y_rg, y_sg) = v_g S_rs,    S_rs = [r = s] / n_r + Σ_c s_rc s_sc / n₀c,

with n_r cells, n₀c controls, and s_rc the share of a row's cells in c: effects against the same controls err together (`effect_rows`).

1. Directions. The level of a perturbed gene itself is predicted apart (`OwnLevels`), and replaced in its row by the mean of the other rows. The
   singular vectors V of what is left, Y = U D Vᵀ, turn it to directions, Y V, which are taken for independent.

2. Model. In every direction k

    Y_k = M β_k + σ_k g + ε_k,    β_kj ~ N(0, τ_kj),  g ~ N(0, K),  ε_k ~ N(0, b_k S).

   M holds what perturbations have in common: one column for singles and one for combinations, and one for every mean that is handed over, as that of
   a network (`FitMean`). Signal σ_k², noise b_k and the variances τ_kj are a direction's own; the kernel K is that of all.

3. Kernel.

    K_rs = ω_r ω_s Σ_{i ∈ r} Σ_{j ∈ s} √(h_i h_j) κ(i, j) · (1 + c₁ s_r·s_s + c₂ s_rᵀ A s_s)  +  Σ_q e_q ⟨φ_q(r), φ_q(s)⟩  +  e_c s_r·s_s + e_A s_rᵀ A s_s  +  [r = s] ν_r h_r
    κ(i, j) = a₀ [i = j] + a₁ [i = j] δ(i, j) + Σ_e ( a_e exp(−|x_i − x_j|² / m_e) + a'_e x_i·x_j )

   Members add up. A gene has an effect of its own, and what its vectors x say, one weight per source e: a source that says nothing gets none. In a
   combination every member counts ω, in (0, 1.5). The strength h_i of a gene, relative to the mean, is known where it was perturbed alone: strong
   effects are rare and heavy-tailed, so that effects resemble one another in direction rather than in size. Doses of a compound share its effect, and
   share more the nearer they are by logarithm, δ; strengths between doses are interpolated (`DoseInterpolation`).
   A context shares what all contexts share, keeps something of its own, c₁, and shares more with contexts whose controls look alike,
   A = exp(−|level − level'|² / m); what all perturbations of a context share has weights of its own, e_c and e_A. Combinations interact alike, φ_q Gaussian, where the sums of their members' effects, and the differences between
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
from dataclasses import replace

import numpy as np

from perturbflow.controls import Context
from perturbflow.embeddings import Embeddings
from perturbflow.genes.symbols import entities_of, members_of
from perturbflow.models.base import Artefact, Run
from perturbflow.models.closed_form.base import MeanShift, TrainingSet
from perturbflow.models.gaussian_process.kernel import EffectRows, Questions, SetKernel, places_of
from perturbflow.models.gaussian_process.likelihood import Directions, Problem
from perturbflow.models.gaussian_process.own_gene import OwnLevels
from perturbflow.pairs import Pairs
from perturbflow.progress import progressed
from perturbflow.registry.params import Params

MOST_DIRECTIONS = 300
LEAST_SIGNAL = 0.5  # share of a direction's variance that shared weights are learned from
LEAST_DIRECTIONS = 3
LEAST_SHARE = 0.05  # of a direction's variance that signal is taken for at least
MOST_LEARNED_FROM = 1000  # rows
LEAST_HELD_OUT = 20  # perturbations, to judge another model's means by

# Fits a mean that is no closed form: from an inner training and rows of pairs.h5ad that hold the controls to start from, to effects by label.
FitMean = Callable[[TrainingSet, np.ndarray], Callable[[str], np.ndarray]]


class SetGP(MeanShift):
    """One Gaussian process over sets of perturbed genes in contexts: own effects, gene vectors, interactions, doses and contexts in one model.

    Its mean is that of the learned models, too, and its posterior variance the scale of intervals. The page of maths is the head of its module.

    Parameters
    ----------
    other_means
        By name, how to fit means that are no closed forms, as that of a network. Each enters as columns of M: its
        predictions of training perturbations, by inner folds that held them out.
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
        Y, unit = values @ V, rows.sampling.diagonal().mean()
        of_gene = V**2
        noise = unit * rows.variance @ of_gene
        kernel = SetKernel.of(rows, training, Y, rows.sampling.diagonal() * (rows.variance @ of_gene).sum())
        asked = Questions(rows.labels, rows.shares, np.zeros(len(rows.contexts)))
        self.out_of_fold = self.out_of_fold or _out_of_fold(self.other_means, training)
        root_h, h = kernel.strength_of(rows.labels)
        orders = np.array([len(members_of(label)) for label in rows.labels])
        mean_orders = np.array([orders[kind].mean() if kind.any() else 0.0 for kind in (orders == 1, orders > 1)])
        M = _columns(orders, root_h, mean_orders, [_said(said, rows.labels, V) for said in self.out_of_fold.values()])
        n_means = int((mean_orders > 0).sum())
        problem = Problem(kernel, asked, rows.sampling / unit, Y, M, h, _starts(Y, noise, M.shape[2], n_means), n_means)
        telling = _telling(Y, noise)
        weights, found = problem.part(_learned_from(rows.labels, training.seed), telling).learned(kernel.weights)
        data = problem.diagonal(weights)
        of = Problem.conditioned(data, problem.start.around(found, telling))
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

    def effect_in(
        self, perturbation: str, context: Context | None = None, other_means: Mapping[str, np.ndarray] | None = None
    ) -> np.ndarray:
        """Return the posterior mean, (genes,), in a context.

        Parameters
        ----------
        other_means
            Effects by the models of `other_means`, by name, (genes,) each.
        """
        effect = (
            self._across(perturbation, context)[0] @ self.artefact["alpha"]
            + self._in_common(perturbation, other_means)[1]
        )[0] @ self.artefact["V"].T
        for gene in entities_of(perturbation):
            if gene in self.column:
                effect[self.column[gene]] = self.own.at(gene, self.column[gene], context)[0]
                for other in self.own.neighbours_of(gene, self.artefact["genes"].tolist()):
                    effect[self.column[other]] += self.own.share * effect[self.column[gene]]
        return effect

    def uncertainty(
        self, perturbation: str, context: Context | None = None, other_means: Mapping[str, np.ndarray] | None = None
    ) -> np.ndarray:
        """Return the posterior variance of the effect, (genes,)."""
        K, questions = self._across(perturbation, context)
        itself = self.weights.covariance(self.kernel.terms(questions, questions))[0]
        signal, R = self.artefact["signal"], K @ self.artefact["T"]  # (1, rows)
        of_g = itself[0, 0] * signal - (R**2 @ self.artefact["inverse"])[0] * signal**2
        columns = self._in_common(perturbation, other_means)[0][0] - np.einsum(
            "i,iko,k->ko", R[0], self.artefact["scaled"], signal
        )
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

    def _in_common(
        self, perturbation: str, other_means: Mapping[str, np.ndarray] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the columns of M of a question, (1, directions, columns), and M β̂, (1, directions)."""
        known = self.out_of_fold
        if other_means is not None:
            # A perturbation that training measured was conditioned on its out-of-fold prediction: its answer rests on the same.
            known = {name: {perturbation: other_means[name]} | of for name, of in known.items()}
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
        return {
            name: round(float(value), 4)
            for name, value in zip(self.weights.names, np.concatenate([a, omega, c, e, nu]), strict=True)
        }


def _directions(values: np.ndarray) -> np.ndarray:
    """Return the leading singular vectors, (genes, directions): all, or MOST_DIRECTIONS."""
    if min(values.shape) > 4 * MOST_DIRECTIONS:
        from sklearn.utils.extmath import randomized_svd  # a second to import, and most screens need none

        _, size, Vt = randomized_svd(values, MOST_DIRECTIONS, n_iter=4, random_state=0)
    else:
        _, size, Vt = np.linalg.svd(values, full_matrices=False)
    n = max(1, min(MOST_DIRECTIONS, int((size > 1e-8 * size[0]).sum())))
    # The sign of a singular vector is arbitrary: fixed, so that equal data give equal numbers.
    return (Vt[:n] * np.sign(Vt[np.arange(n), np.abs(Vt[:n]).argmax(axis=1)])[:, None]).T


def _starts(Y: np.ndarray, noise: np.ndarray, n_columns: int, n_means: int) -> Directions:
    """Return where a direction's own start: its variance, minus noise, is signal for the most part; some of it may be noise that is not known of."""
    size = np.maximum((Y**2).mean(axis=0), 1e-24)
    signal = np.maximum(size - noise, LEAST_SHARE * size)
    means = np.vstack([np.tile(0.3 * signal, (n_means, 1)), np.full((n_columns - n_means, len(size)), 0.3)])
    return Directions(np.log(0.7 * signal), np.log(np.maximum(noise, 0.3 * signal)), np.log(means))


def _telling(Y: np.ndarray, noise: np.ndarray) -> np.ndarray:
    """Return the directions that shared weights are learned from, (directions,)."""
    size = (Y**2).mean(axis=0)
    telling = size - noise > LEAST_SIGNAL * size
    if telling.sum() >= LEAST_DIRECTIONS:
        return telling
    return np.isin(np.arange(len(size)), np.argsort(noise - size, kind="stable")[:LEAST_DIRECTIONS])


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
    means = np.stack(
        [kind * root_h * orders / mean for kind, mean in zip(kinds, mean_orders[mean_orders > 0], strict=True)], axis=1
    )[:, None]
    if not others:
        return means
    said = np.stack([table * kind[:, None] for table in others for kind in (is_single, ~is_single)], axis=2)
    return np.concatenate([np.broadcast_to(means, (*said.shape[:2], means.shape[2])), said], axis=2)


def _said(said: Mapping[str, np.ndarray], labels: Sequence[str], V: np.ndarray) -> np.ndarray:
    """Return what another model says in directions, (labels, directions); zeros where it says nothing."""
    return np.stack([said[label] @ V if label in said else np.zeros(V.shape[1]) for label in labels])


def _learned_from(labels: list[str], seed: int) -> np.ndarray:
    """Return the rows that shared weights are learned from: of all perturbations, or of as many as have MOST_LEARNED_FROM rows together."""
    rows = places_of(labels)
    drawn = (
        np.random.default_rng(seed).permutation(sorted(rows)).tolist()
        if len(labels) > MOST_LEARNED_FROM
        else sorted(rows)
    )
    ends = np.cumsum([len(rows[name]) for name in drawn])
    return np.sort(
        np.concatenate([rows[name] for name, end in zip(drawn, ends, strict=True) if end <= MOST_LEARNED_FROM])
    )


def _out_of_fold(others: Mapping[str, FitMean], training: TrainingSet) -> dict[str, dict[str, np.ndarray]]:
    """Return what others say of training perturbations that inner folds held out, by name and label."""
    found: dict[str, dict[str, np.ndarray]] = {name: {} for name in others}
    kinds = [of_genes for of_genes in (False, True) if of_genes or (training.effects.order > 1).any()] if others else []
    rounds = [
        one
        for of_genes in kinds
        for one in itertools.islice(training.rounds(of_genes=of_genes, one_by_one=False), 0, None, 2)
    ]
    if sum(len(held_out.labels) for _, held_out in rounds) < LEAST_HELD_OUT:
        return {}
    for inner, held_out in progressed(rounds, "inner folds", len(rounds)):
        for name, fit in others.items():
            effect = fit(inner, training.pairs.rows[inner.controls])
            found[name] |= {
                label: effect(label) for label in held_out.labels if label not in found[name]
            }  # a combination by its own fold
    return found
