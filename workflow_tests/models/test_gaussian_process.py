"""The Gaussian process over sets of genes.

Its likelihood and answers are those of the dense formulas, and each part is right where it should speak.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import Prepared
from made_effects import N_GENES, NO_VECTORS, TARGETS, doubles, error, make_training, vectors
from scipy import sparse
from scipy.stats import multivariate_normal

from perturbflow.counterfactuals.design import Measured, for_rest, for_target
from perturbflow.embeddings import Embeddings
from perturbflow.genes.symbols import members_of
from perturbflow.models.base import Run, build
from perturbflow.models.closed_form import base
from perturbflow.models.closed_form.base import TrainingSet
from perturbflow.models.closed_form.baselines import Additive
from perturbflow.models.gaussian_process import likelihood as marginal_likelihood
from perturbflow.models.gaussian_process import set_gp
from perturbflow.models.gaussian_process.kernel import EffectRows, Questions, SetKernel
from perturbflow.models.gaussian_process.likelihood import Directions, Problem
from perturbflow.models.gaussian_process.posterior import Posterior
from perturbflow.models.gaussian_process.set_gp import SetGP
from perturbflow.pairs import Pairs
from perturbflow.registry.families import FAMILIES

PROGRAMMES = np.random.default_rng(0).normal(size=(3, N_GENES))


# --- the mathematics --------------------------------------------------------------------------------------------------


@pytest.fixture
def learning(singles: dict[str, np.ndarray]) -> tuple[Problem, SetKernel, Directions]:
    """Return what hyper-parameters of 23 rows in two contexts are learned from."""
    training = make_training({**singles, **doubles(singles, 0.7)}, vectors(), n=12, noise=1.0, batches=2)
    rows = EffectRows.of(training)
    V = np.linalg.svd(rows.values, full_matrices=False)[2][:5].T
    Y = rows.values @ V
    kernel = SetKernel.of(rows, training, Y, np.zeros(len(Y)))
    asked = Questions(rows.labels, rows.shares, np.zeros(2))
    orders = np.array([len(members_of(label)) for label in rows.labels])
    M = np.stack([orders == 1, orders == 2], axis=1)[:, None].astype(float)
    start = Directions(np.log(Y.var(axis=0)), np.log(0.1 * Y.var(axis=0)), np.log(np.tile(Y.var(axis=0), (2, 1))))
    S, ones = rows.sampling.in_units(rows.sampling.variances[0]), np.ones(len(Y))
    return Problem(kernel, asked, S, Y, M, ones, start, start.noise - 1.0, 2), kernel, start


def test_the_likelihood_is_that_of_a_dense_normal(learning: tuple[Problem, SetKernel, Directions]) -> None:
    learned, kernel, of = learning
    weights = kernel.weights
    solved = learned.diagonal(weights).solved(of)
    dense, K = 0.0, weights.covariance(learned.terms)[0]
    K[np.diag_indices(len(K))] += np.where(learned.asked.is_combination, *weights.groups[4][::-1])
    for k in range(5):
        C = np.exp(of.signal[k]) * K + np.exp(of.noise[k]) * (learned.root @ learned.root.T)
        C += learned.M[:, 0] @ np.diag(np.exp(of.means[:, k])) @ learned.M[:, 0].T
        dense -= multivariate_normal(np.zeros(len(C)), C).logpdf(learned.Y[:, k])
    constants = 5 * (len(learned.Y) * np.log(2 * np.pi) / 2 + np.log(np.diag(learned.root)).sum())
    assert solved.losses.sum() == pytest.approx(dense - constants, rel=1e-9)


def test_rows_left_out_are_predicted_by_the_others(learning: tuple[Problem, SetKernel, Directions]) -> None:
    learned, kernel, of = learning
    weights = kernel.weights
    data = learned.diagonal(weights)
    errors = data.solved(of).left_out(data)
    K = weights.covariance(learned.terms)[0]
    K[np.diag_indices(len(K))] += np.where(learned.asked.is_combination, *weights.groups[4][::-1])
    others = np.arange(1, len(K))
    for k in range(5):
        C = np.exp(of.signal[k]) * K + np.exp(of.noise[k]) * (learned.root @ learned.root.T)
        C += learned.M[:, 0] @ np.diag(np.exp(of.means[:, k])) @ learned.M[:, 0].T
        predicted = C[0, others] @ np.linalg.solve(C[np.ix_(others, others)], learned.Y[others, k])
        assert errors[0, k] == pytest.approx(learned.Y[0, k] - predicted, rel=1e-8)


@pytest.mark.parametrize(("error", "strong_first"), [(0.96, False), (0.94, True)])
def test_strong_directions_come_first_where_that_predicts_rows_left_out_clearly_better(
    learning: tuple[Problem, SetKernel, Directions], monkeypatch: pytest.MonkeyPatch, error: float, strong_first: bool
) -> None:
    learned, kernel, _ = learning
    monkeypatch.setattr(marginal_likelihood, "minimized", lambda loss, start, n_steps: start)
    monkeypatch.setattr(Problem, "_error_left_out", lambda _, of: error if of.strong_first else 1.0)
    assert not learned.learned(kernel.weights).strong_first  # in two contexts
    vars(learned)["terms"] = replace(learned.terms, contexts=[])
    monkeypatch.setattr(Problem, "_by_weights", lambda *_: np.zeros(len(kernel.weights.values)))
    assert learned.learned(kernel.weights).strong_first is strong_first


def test_the_gradient_is_that_of_differences(
    learning: tuple[Problem, SetKernel, Directions], monkeypatch: pytest.MonkeyPatch
) -> None:
    learned, kernel, _ = learning
    seen: list[tuple[Callable, np.ndarray]] = []

    def kept(loss: Callable, start: np.ndarray, n_steps: int) -> np.ndarray:
        seen.append((loss, start))
        return start

    monkeypatch.setattr(marginal_likelihood, "minimized", kept)
    for strong_first in (False, True):
        learned._likeliest(kernel.weights, strong_first)
        learned.conditioned(learned.diagonal(kernel.weights), learned.start, strong_first)
    for loss, start in seen:
        here = start + 0.3 * np.random.default_rng(0).normal(size=len(start))
        _, gradient = loss(here)
        steps = 1e-5 * np.eye(len(here))
        by_differences = [(loss(here + step)[0] - loss(here - step)[0]) / 2e-5 for step in steps]
        np.testing.assert_allclose(gradient, by_differences, atol=1e-5)


def test_answers_and_their_variance_are_those_of_the_dense_formulas(singles: dict[str, np.ndarray]) -> None:
    training = make_training({**singles, **doubles(singles, 0.7)}, vectors(), n=12, noise=1.0)
    model = SetGP().learned(training)
    rows, of = EffectRows.of(training), model.artefact
    values = model.own.replaced(rows, training.genes)
    asked = ["G0+G7", "G3", "G31"]
    questions, V = model.kernel.questions(asked), of["V"]
    both = Questions([*rows.labels, *asked], np.ones((len(rows.labels) + 3, 1)), np.zeros(1))
    n = len(rows.labels)
    K = model.weights.covariance(model.kernel.terms(both, both))[0]
    nu, (_, h) = model.weights.groups[4], model.kernel.strength_of(rows.labels)
    is_double = np.array(["+" in label for label in rows.labels])
    root_h, _ = model.kernel.strength_of(both.labels)
    M = np.stack([root_h * [("+" in label) == kind for label in both.labels] for kind in (False, True)], axis=1)
    S = rows.sampling.matrix / rows.sampling.variances.mean()
    means, variances = np.zeros((2, 3, V.shape[1]))
    for k in range(V.shape[1]):
        # Noise and τ of a direction from what is stored: D = σ² Λ + b, B = (T⁻¹ + Mᵀ C⁻¹ M)⁻¹.
        signal = of["signal"][k]
        white = np.linalg.inv(np.linalg.cholesky(S))
        eigenvalues = np.maximum(
            np.linalg.eigvalsh(white @ (K[:n, :n] + np.diag(h * np.where(is_double, nu[1], nu[0]))) @ white.T), 0
        )
        noise = np.median(1.0 / np.sort(of["inverse"][:, k])[::-1] - signal * eigenvalues)
        C = signal * (K[:n, :n] + np.diag(h * np.where(is_double, nu[1], nu[0]))) + noise * S
        tau = np.linalg.inv(np.linalg.inv(of["B"][k]) - M[:n].T @ np.linalg.solve(C, M[:n]))
        whole = C + M[:n] @ tau @ M[:n].T
        across = signal * K[n:, :n] + M[n:] @ tau @ M[:n].T
        means[:, k] = across @ np.linalg.solve(whole, values @ V[:, k])
        itself = signal * np.diag(K)[n:] + np.einsum("qi,ij,qj->q", M[n:], tau, M[n:])
        variances[:, k] = itself - np.einsum("qi,iq->q", across, np.linalg.solve(whole, across.T))
    for i, label in enumerate(asked):
        others = ~np.isin(training.genes, members_of(label))
        np.testing.assert_allclose(model.effect(label)[others], (means[i] @ V.T)[others], atol=2e-3)
        np.testing.assert_allclose(
            model.uncertainty(label)[others], (V**2 @ variances[i])[others], rtol=0.05, atol=1e-5
        )
    assert len(questions.labels) == 3


@pytest.mark.slow
def test_sampling_errors_of_effects_against_the_same_controls_hang_together() -> None:
    """The covariance that is written down is that of many draws."""
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(300):
        training = make_training(
            {"G0": np.zeros(N_GENES), "G1": np.zeros(N_GENES)}, n=10, noise=1.0, batches=2, seed=int(rng.integers(1e9))
        )
        rows = EffectRows.of(training)
        drawn.append(rows.values)
    assert rows.labels == ["G0", "G0", "G1", "G1"]
    measured = np.einsum("drg,dsg->rs", drawn, drawn) / len(drawn) / N_GENES
    np.testing.assert_allclose(measured, rows.sampling.matrix, atol=0.01)
    assert rows.sampling.matrix[0, 2] == pytest.approx(1 / 20)
    np.testing.assert_allclose(rows.variance.mean(), 1.0, atol=0.1)


def test_sampling_of_some_rows_is_that_part_of_all() -> None:
    training = make_training({f"G{i}": np.zeros(N_GENES) for i in range(4)}, n=10, noise=1.0, batches=2)
    sampling, some = EffectRows.of(training).sampling, np.array([1, 4, 6])
    np.testing.assert_allclose(sampling.variances, sampling.matrix.diagonal())
    np.testing.assert_allclose(sampling.part(some).matrix, sampling.matrix[np.ix_(some, some)])
    np.testing.assert_allclose(sampling.in_units(0.3).matrix, sampling.matrix / 0.3)


def test_an_answer_does_not_depend_on_the_questions_before(singles: dict[str, np.ndarray]) -> None:
    """The last answer is kept: neither who got it, nor another training may change it."""
    model = SetGP().learned(make_training(singles, vectors(), n=12, noise=1.0))
    fresh = {label: copy(model).effect(label) for label in ("G3", "G31")}
    for label in ("G3", "G3", "G31", "G3"):
        answer = model.effect(label)
        np.testing.assert_array_equal(answer, fresh[label])
        answer[:] = 0.0
    model.learned(make_training(singles, vectors(), n=12, noise=1.0, seed=1))
    assert not np.array_equal(model.effect("G3"), fresh["G3"])


def test_an_unseen_gene_has_its_own_level_in_every_batch(singles: dict[str, np.ndarray]) -> None:
    """Nine batches are no contexts: an answer is the same in all of them but for the perturbed gene itself."""
    training = make_training(singles, vectors(), n=3, batches=9)
    model = SetGP().learned(training)
    assert not model.looks_at_contexts
    asked = [training.pairs.context_of(np.flatnonzero(training.pairs.strata == f"b{batch}|t")) for batch in (0, 8)]
    first, last = (model.effect_in("G31", context) for context in asked)
    column = training.row["G31"]
    np.testing.assert_array_equal(np.delete(first, column), np.delete(last, column))
    assert first[column] != last[column]


# --- what it knows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [0.5, 1.0])
def test_it_beats_the_sum_where_it_fails_and_keeps_up_where_it_holds(
    factor: float,
    singles: dict[str, np.ndarray],
) -> None:
    training = make_training({**singles, **doubles(singles, factor)}, vectors(), n=12, noise=1.0)
    model, plain = SetGP().learned(training), Additive().learned(training)
    labels = ["G0+G7", "G2+G9", "G11+G4"]
    ours, theirs = (
        np.mean([error(one, label, factor * sum(singles[g] for g in members_of(label))) for label in labels])
        for one in (model, plain)
    )
    assert ours < (0.6 if factor < 1 else 1.0) * theirs


def test_it_believes_vectors_that_tell_and_not_those_that_do_not(singles: dict[str, np.ndarray]) -> None:
    table = vectors().table
    noise = pd.DataFrame(
        np.random.default_rng(5).normal(size=(len(table), 3)),
        index=table.index,
        columns=["noise:0", "noise:1", "noise:2"],
    )
    model = SetGP().learned(make_training(singles, Embeddings(table.join(noise))))
    weights = model.account()
    assert weights["known near"] + weights["known linear"] > 5 * (weights["noise near"] + weights["noise linear"])
    others = np.arange(N_GENES) != 30
    assert np.corrcoef(model.effect("G30")[others], (table.loc["G30"].to_numpy() @ PROGRAMMES)[others])[0, 1] > 0.5


def test_it_sets_the_level_of_an_unseen_target() -> None:
    effects = {gene: np.where(np.arange(N_GENES) == int(gene[1:]), -2.0, 0.0) for gene in TARGETS}
    model = SetGP().learned(make_training(effects, vectors()))
    assert model.effect("G30")[30] == pytest.approx(-2.0, abs=0.3)
    assert model.effect("G3+G30")[3] == pytest.approx(-2.0, abs=0.3)
    assert np.abs(np.delete(model.effect("G30"), 30)).max() < 0.2


def test_a_context_has_its_own_part_of_an_effect_and_a_new_one_the_shared_part(singles: dict[str, np.ndarray]) -> None:
    training = make_training(singles, batches=3)
    X = training.pairs.X.toarray()
    rng = np.random.default_rng(3)
    extra = {gene: rng.normal(size=3) @ PROGRAMMES for gene in TARGETS}
    for gene, value in extra.items():
        X[(training.pairs.labels == gene) & (training.pairs.obs["batch"] == "b1").to_numpy()] += value
    pairs = replace(training.pairs, X=sparse.csr_matrix(X))
    model = SetGP().learned(TrainingSet.of(pairs, vectors(), 0))
    controls = np.flatnonzero(pairs.is_control)
    places = {batch: pairs.context_of(controls[pairs.strata[controls] == f"{batch}|t"]) for batch in ("b0", "b1")}
    of = {batch: model.effect_in("G3", place) for batch, place in places.items()}
    moved, planted = np.delete(of["b1"] - of["b0"], 3), np.delete(extra["G3"], 3)
    assert np.corrcoef(moved, planted)[0, 1] > 0.95
    assert 0.5 < moved @ planted / (planted @ planted) < 1.1
    new = replace(pairs.context_of(controls[:5]), strata=np.array(["b9|t"]), levels={"b9|t": pairs.control_level})
    shared = model.effect_in("G3", new) - of["b0"]  # two of three contexts are alike
    assert 0.0 < shared @ extra["G3"] / (extra["G3"] @ extra["G3"]) < 0.6
    assert model.uncertainty("G3", new).mean() > 2 * model.uncertainty("G3", places["b0"]).mean()


def test_doses_share_an_effect_and_no_dose_has_none() -> None:
    rng = np.random.default_rng(2)
    effects = {}
    for i in range(6):
        shape = rng.normal(size=N_GENES)
        effects |= {f"C{i}@{dose}": shape * dose / (dose + 10) for dose in (1, 10, 100, 1000)}
    truth = effects.pop("C0@10")
    training = make_training(effects, n=20, noise=0.5)
    model = SetGP().learned(training)
    assert error(model, "C0@10", truth) < 0.6 * error(Additive().learned(training), "C0@10", truth)
    assert np.linalg.norm(model.effect("C0@3")) < np.linalg.norm(model.effect("C0@100"))
    assert np.abs(model.effect("C0@0")).max() < 1e-8
    assert np.isfinite(model.effect("NOBODY@3")).all()


def test_it_is_surer_of_what_it_knows_better(singles: dict[str, np.ndarray]) -> None:
    model = SetGP().learned(make_training({**singles, **doubles(singles)}, vectors(), n=12, noise=1.0))
    for sure in (("G3", "G30", "NOBODY"), ("G0+G7", "G0+NOBODY", "NOBODY1+NOBODY2")):
        variances = [model.uncertainty(label).mean() for label in sure]
        assert variances == sorted(variances)
    assert all((model.uncertainty(label) >= 0).all() for label in ("G3", "G0+G7", "NOBODY"))


def test_intervals_in_its_own_units_hold_what_is_measured(singles: dict[str, np.ndarray]) -> None:
    training = make_training({**singles, **doubles(singles)}, vectors(), n=12, noise=1.0)
    found = SetGP().held_out(training.pairs, training.embeddings, 0)
    assert {"unseen gene", "unseen member", "seen"} == set(found.novelties)
    assert 0.5 < found.for_novelty("seen").reach(0.9) < 4.0


def test_folds_end_where_enough_is_held_out(singles: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    training = make_training({**singles, **doubles(singles)}, vectors(), n=12, noise=1.0)
    all_folds = SetGP().held_out(training.pairs, training.embeddings, 0)
    monkeypatch.setattr(base, "ENOUGH_HELD_OUT", 1)
    fits: list[str] = []
    learned = SetGP.learned
    monkeypatch.setattr(SetGP, "learned", lambda self, inner: fits.append("") or learned(self, inner))
    found = SetGP().held_out(training.pairs, training.embeddings, 0)
    assert len(fits) == 2, "one fold of combinations, one of genes"
    assert set(found.novelties) == set(all_folds.novelties)
    assert len(found.labels) < len(all_folds.labels)


# --- another model's means --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knows", [True, False])
def test_another_model_is_heard_as_far_as_it_predicts_what_it_was_not_trained_on(
    screen: tuple[Pairs, Embeddings], monkeypatch: pytest.MonkeyPatch, knows: bool
) -> None:
    monkeypatch.setattr(set_gp, "LEAST_HELD_OUT", 2)
    training = TrainingSet.of(screen[0].roles("train", "validation"), screen[1], 0)
    rng = np.random.default_rng(0)
    true = {
        label: value.astype(float)
        for label, value in zip(training.effects.labels, training.effects.values, strict=True)
    }
    truth = {**true, "NEW1": true[training.effects.labels[0]] - true[training.effects.labels[1]]}
    noise = {label: rng.normal(size=len(training.genes)) * 0.3 for label in truth}
    asked = []

    def part(inner: TrainingSet, start: np.ndarray) -> Callable[[str], np.ndarray]:
        assert training.pairs.is_control[training.pairs.rows.searchsorted(start)].all()
        asked.append(set(inner.effects.labels))
        return (truth if knows else noise).__getitem__

    model = SetGP(other_means={"world": part}).learned(training)
    assert asked
    assert set(model.out_of_fold["world"]) == set(training.effects.labels)
    silent = SetGP().learned(training)
    said = {"world": (truth if knows else noise)["NEW1"]}
    distance = [np.linalg.norm(one.effect_in("NEW1", None, said) - said["world"]) for one in (model, silent)]
    assert distance[0] < 0.7 * distance[1] if knows else distance[0] > 0.7 * distance[1]
    again = SetGP()
    again.restore(model.artefact)
    np.testing.assert_array_equal(again.effect_in("NEW1", None, said), model.effect_in("NEW1", None, said))
    # What training measured was conditioned on what folds without it said. Anything else here would count as an effect
    # of its own.
    known = training.effects.labels[0]
    louder = {"world": 3.0 * model.out_of_fold["world"][known]}
    np.testing.assert_array_equal(model.effect_in(known, None, louder), model.effect_in(known))
    np.testing.assert_array_equal(model.uncertainty(known, None, louder), model.uncertainty(known))


# --- honesty and bad input --------------------------------------------------------------------------------------------


def test_it_knows_nothing_of_cells_that_are_held_out(screen: tuple[Pairs, Embeddings]) -> None:
    pairs, embeddings = screen
    is_held_out = (pairs.obs["role"] != "train").to_numpy()
    X = pairs.X.toarray()
    X[is_held_out] = np.random.default_rng(0).random(X[is_held_out].shape)
    effects = [
        SetGP().learned(TrainingSet.of(cells, embeddings, 0)).effect("TF1+TF2")
        for cells in (pairs, replace(pairs, X=sparse.csr_matrix(X)))
    ]
    np.testing.assert_array_equal(*effects)


@pytest.mark.parametrize("kind", ["unseen_perturbation", "unseen_combination", "unseen_context"])
def test_it_serves_every_held_out_perturbation_of_a_screen(kind: str, prepared: dict[str, Prepared]) -> None:
    cells = Pairs.read(prepared[kind].pairs)
    model = build(FAMILIES["gaussian_process"].implementation, {})
    artefact = model.fit(cells.fitted_on("test"), Embeddings.read(prepared[kind].embeddings), Run(seed=0))
    again = SetGP()
    again.restore(artefact)
    test = cells.roles("test")
    for label in [*test.perturbations, "NEVER_HEARD", "NEVER_HEARD+TF1", "TF1+TF2+TF3"]:
        context = test.context_of(test.cells_of(label)) if label in test.perturbations else None
        effect, variance = model.effect_in(label, context), model.uncertainty(label, context)
        assert effect.shape == variance.shape == (len(cells.genes),)
        assert np.isfinite(effect).all() and np.isfinite(variance).all()
        np.testing.assert_array_equal(again.effect_in(label, context), effect)


def test_the_order_of_cells_makes_no_difference(singles: dict[str, np.ndarray]) -> None:
    training = make_training({**singles, **doubles(singles)}, vectors(), batches=2)
    order = np.random.default_rng(0).permutation(len(training.pairs.rows))
    pairs = training.pairs
    shuffled = Pairs(
        pairs.X[order], pairs.obs.iloc[order], pairs.genes, pairs.control_index[order], np.arange(len(order))
    )
    effects = [SetGP().learned(TrainingSet.of(cells, vectors(), 0)).effect("G0+G7") for cells in (pairs, shuffled)]
    np.testing.assert_allclose(*effects, atol=1e-3)


@pytest.mark.parametrize(
    "labels", [["G0"], ["G0", "G1"], ["G0", "G1", "G2"], ["G0+G1"], ["G0+G1", "G2+G3", "G0+G3"], ["A@1", "A@10", "B@0"]]
)
def test_very_few_perturbations_are_answered_for(labels: list[str]) -> None:
    rng = np.random.default_rng(0)
    model = SetGP().learned(make_training({label: rng.normal(size=N_GENES) for label in labels}, vectors()))
    for label in [*labels, "G0+G2", "G30", "NOBODY"]:
        assert np.isfinite(model.effect(label)).all()
        assert np.isfinite(model.uncertainty(label)).all()


def test_a_combination_of_very_many_unknown_members_has_an_answer(singles: dict[str, np.ndarray]) -> None:
    model = SetGP().learned(make_training({**singles, **doubles(singles)}, vectors()))
    label = "+".join(f"NOBODY{i}" for i in range(12))
    assert np.isfinite(model.effect(label)).all()
    assert np.isfinite(model.uncertainty(label)).all()


def test_vectors_that_tell_nothing_are_no_trouble(singles: dict[str, np.ndarray]) -> None:
    genes = [*TARGETS, "G30"]
    table = pd.DataFrame(1.0, index=genes, columns=["constant:0", "constant:1"])
    table["elsewhere:0"] = np.nan
    table["twice:0"] = table["twice:1"] = np.arange(len(genes), dtype=float)
    table["huge:0"] = 1e12 * np.arange(len(genes))
    model = SetGP().learned(make_training(singles, Embeddings(table)))
    assert "constant near" not in model.account()
    assert "elsewhere near" not in model.account()
    assert np.isfinite(model.effect("G30")).all()
    assert np.isfinite(SetGP().learned(make_training(singles, NO_VECTORS)).effect("G30")).all()
    nothing = {gene: np.zeros(N_GENES) for gene in TARGETS}
    assert np.abs(SetGP().learned(make_training(nothing, vectors(), noise=0.0)).effect("G30")).max() < 1e-6


def test_a_sample_of_rows_brings_combinations_with_the_singles_of_their_members() -> None:
    genes = [f"G{i}" for i in range(60)]
    labels = [*genes, *(f"{a}+{b}" for i, a in enumerate(genes) for b in genes[i + 1 :])]  # 1,830
    kept = [labels[i] for i in set_gp._learned_from(labels, 0)]
    singles, combinations = ([name for name in kept if ("+" in name) is of_two] for of_two in (False, True))
    assert 900 < len(kept) <= set_gp.MOST_LEARNED_FROM
    assert {member for name in combinations for member in members_of(name)} == set(singles)
    assert len(combinations) == len(singles) * (len(singles) - 1) / 2
    assert kept != [labels[i] for i in set_gp._learned_from(labels, 1)]
    assert set_gp._learned_from(labels[:1000], 0).tolist() == list(range(1000))


def test_of_very_many_rows_some_are_learned_from(
    singles: dict[str, np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    training = make_training({**singles, **doubles(singles)}, vectors())
    whole = SetGP().learned(training)
    monkeypatch.setattr(set_gp, "MOST_LEARNED_FROM", 15)
    monkeypatch.setattr(set_gp, "MOST_DIRECTIONS", 4)
    some = SetGP().learned(training)
    assert some.artefact["V"].shape == (N_GENES, 4)
    truth = singles["G0"] + singles["G7"]
    assert error(some, "G0+G7", truth) < error(whole, "G0+G7", truth) + 0.1


# --- joint posterior ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def posterior(screen: tuple) -> tuple[SetGP, Posterior]:
    """Return a model, and its joint posterior of measured and new perturbations."""
    pairs, embeddings = screen
    model = SetGP()
    model.fit(pairs, embeddings, Run(seed=0))
    return model, Posterior.of(model, ["TF1", "TF2+TF5", "TF3+TF7", "TF2", "TF7"])


def test_the_joint_posterior_has_the_means_and_variances_of_single_answers(
    posterior: tuple[SetGP, Posterior],
) -> None:
    model, joint = posterior
    effects, variances = model.mean_effects(np.zeros((0, 0)), joint.labels, 0), model.uncertainties(joint.labels)
    kept = ~np.isin(model.artefact["genes"], [gene for label in joint.labels for gene in members_of(label)])
    np.testing.assert_allclose((joint.mean @ joint.V.T)[:, kept], effects[:, kept], atol=1e-6)
    units = np.eye(len(joint.signal))
    of_directions = np.stack([joint.covariance(unit).diagonal() for unit in units], axis=1)
    np.testing.assert_allclose((of_directions @ (joint.V**2).T)[:, kept], variances[:, kept], rtol=1e-3, atol=1e-7)
    np.testing.assert_allclose(of_directions.sum(axis=1), joint.variance, rtol=1e-4)
    assert joint.variance[0] < joint.variance[1], "a measured perturbation is known better"


def test_a_measurement_leaves_the_variance_that_conditioning_leaves(posterior: tuple[SetGP, Posterior]) -> None:
    """Adding one by one is conditioning on all at once."""
    _, joint = posterior
    measured = Measured.of(joint)
    before = measured.C.copy()
    assert (measured.gains(np.array([False, True, True, True, True])) > 0).all()
    for i in (1, 3):
        measured.add(i)
    at = [1, 3]
    for C, own, after in zip(before, measured.own, measured.C, strict=True):
        noisy = C[np.ix_(at, at)] + np.diag(own[at])
        np.testing.assert_allclose(after, C - C[:, at] @ np.linalg.solve(noisy, C[at]), atol=1e-9)


def test_the_joint_posterior_knows_contexts(posterior: tuple[SetGP, Posterior], screen: tuple) -> None:
    """Each question in a context of its own has the mean and variance of a single answer there."""
    model, _ = posterior
    pairs, labels = screen[0].roles("train"), ["TF1", "TF2+TF5"]
    joint = Posterior.of(model, [*labels, *labels], each_in=np.repeat(model.kernel.contexts, 2).tolist())
    kept = ~np.isin(model.artefact["genes"], ["TF1", "TF2", "TF5"])
    for i, name in enumerate(model.kernel.contexts):
        there = pairs.context_of(np.flatnonzero(pairs.is_control & (pairs.strata == name)))
        effects, variances = model.mean_effects(np.zeros((0, 0)), labels, 0, there), model.uncertainties(labels, there)
        rows = [2 * i, 2 * i + 1]
        np.testing.assert_allclose((joint.mean[rows] @ joint.V.T)[:, kept], effects[:, kept], atol=1e-6)
        of_directions = np.stack([joint.covariance(one).diagonal() for one in np.eye(len(joint.signal))], axis=1)[rows]
        np.testing.assert_allclose((of_directions @ (joint.V**2).T)[:, kept], variances[:, kept], rtol=1e-3, atol=1e-7)
    assert not np.allclose(joint.mean[:2], joint.mean[2:])


def test_the_same_perturbation_elsewhere_tells_most_of_it_here() -> None:
    """K is genes ⊗ contexts: the first choice for A in context 2 is A in context 1, with the gain of the formula."""
    genes, contexts = 0.3 + 0.7 * np.eye(3), np.array([[1.0, 0.8], [0.8, 1.0]])
    K = np.kron(genes, contexts)  # A1, A2, B1, B2, C1, C2
    joint = Posterior(
        labels=["A", "A", "B", "B", "C", "C"], mean=np.zeros((6, 1)), K=K, R=np.zeros((6, 1)),
        columns=np.zeros((6, 1, 1)), nugget=np.zeros(6), signal=np.ones(1), inverse=np.zeros((1, 1)),
        noise=np.full(1, 0.1), V=np.ones((1, 1)),
    )  # fmt: skip
    target = np.arange(6) == 1
    choice = for_rest(joint, ~target, target, 2)
    assert choice.places.tolist() == [0, 3]
    np.testing.assert_allclose(choice.gains[0], 0.8**2 / 1.1)


def test_a_design_prefers_what_others_resemble_and_never_repeats() -> None:
    """Of five that are alike and three that are alone, one of the five is first; then those alone tell nothing."""
    K = np.eye(8)
    K[:5, :5] = 0.9 + 0.1 * np.eye(5)
    joint = Posterior(
        labels=list("ABCDEFGH"), mean=np.zeros((8, 1)), K=K, R=np.zeros((8, 1)), columns=np.zeros((8, 1, 1)),
        nugget=np.zeros(8), signal=np.ones(1), inverse=np.zeros((1, 1)), noise=np.full(1, 0.1), V=np.ones((1, 1)),
    )  # fmt: skip
    everyone = np.ones(8, dtype=bool)
    choice = for_rest(joint, everyone, everyone, 8)
    assert choice.places[0] < 5
    assert sorted(choice.places) == list(range(8))
    assert (np.diff(choice.left) < 0).all()
    np.testing.assert_allclose(choice.gains[0], 4 * 0.9**2 / 1.1 / 8)
    towards = for_target(joint, np.ones(1), everyone, 0.0, 4, seed=0)
    assert (towards.places < 5).sum() == 1, "of those that are alike one is tried"
