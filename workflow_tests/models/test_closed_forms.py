"""Closed forms that learn from several perturbations at once.

Each is right where its assumption holds, and is judged on perturbations that it has not seen.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from made_effects import N_GENES, NO_VECTORS, TARGETS, doubles, error, make_training, vectors
from scipy import sparse

from perturbflow import pairs as of_pairs
from perturbflow.controls import Context
from perturbflow.embeddings import Embeddings
from perturbflow.genes.symbols import members_of
from perturbflow.models.base import Run, build
from perturbflow.models.closed_form.ablations import BatchOnly, ShuffledLabels
from perturbflow.models.closed_form.base import ClosedForm, TrainingSet, least_error
from perturbflow.models.closed_form.baselines import Additive, LatentSum
from perturbflow.models.closed_form.ceilings import InterpolatedDuplicate
from perturbflow.models.closed_form.regressions import KernelRidge
from perturbflow.models.closed_form.transfers import Transfer
from perturbflow.models.gaussian_process.set_gp import SetGP
from perturbflow.pairs import Pairs
from perturbflow.registry.families import FAMILIES


def family(name: str) -> ClosedForm:
    """Return a new model of a family."""
    return build(FAMILIES[name].implementation, {})


# --- sums -----------------------------------------------------------------------------------------------------------


def test_the_matching_mean_is_half_the_sum_and_the_mean_effect_for_the_unseen(singles: dict[str, np.ndarray]) -> None:
    training = make_training(singles)
    model = family("matching_mean").learned(training)
    of = training.effects.of
    np.testing.assert_allclose(model.effect("G1+G2"), (of("G1") + of("G2")) / 2)
    np.testing.assert_allclose(model.effect("G1+G99"), (of("G1") + training.effects.values.mean(axis=0)) / 2)
    np.testing.assert_allclose(model.effect("G99"), training.effects.values.mean(axis=0))


@pytest.mark.parametrize("factor", [0.4, 0.8, 1.0])
def test_the_shrunken_sum_finds_the_planted_factor(factor: float, singles: dict[str, np.ndarray]) -> None:
    training = make_training({**singles, **doubles(singles, factor)})
    model = family("shrunken_additive").learned(training)
    assert model.artefact["factors"][0] == pytest.approx(factor, abs=0.03)
    np.testing.assert_allclose(model.effect("G3"), training.effects.of("G3"))
    assert error(model, "G0+G7", factor * (singles["G0"] + singles["G7"])) < 0.1


def test_without_combinations_the_shrunken_sum_is_the_sum(singles: dict[str, np.ndarray]) -> None:
    training = make_training(singles)
    assert family("shrunken_additive").learned(training).artefact["factors"].tolist() == [1.0, 1.0]


def test_sums_of_unseen_members_have_constants_of_their_own(singles: dict[str, np.ndarray]) -> None:
    """Members' effects share nothing: an unseen member adds noise alone, and inner folds over genes find that out."""
    some = {gene: singles[gene] - np.mean(list(singles.values()), axis=0) for gene in sorted(TARGETS)}
    pairs = doubles(some)
    known = {label: value for label, value in {**some, **pairs}.items() if sorted(TARGETS)[0] not in members_of(label)}
    unseen = [label for label in pairs if label not in known]
    training = make_training(known)
    shrunken = family("shrunken_additive").learned(training)
    assert shrunken.artefact["factors"][1] < shrunken.artefact["factors"][0]
    latent = family("latent_additive").learned(training)
    by_genes, by_combinations = (
        sum(error(latent._chosen[name], label, pairs[label]) for label in unseen) for name in ("unseen", "seen")
    )
    assert sum(error(latent, label, pairs[label]) for label in unseen) == by_genes
    assert by_genes <= by_combinations


def test_members_seen_in_combinations_alone_are_told_apart_in_the_latent_sum(singles: dict[str, np.ndarray]) -> None:
    some = {gene: singles[gene] for gene in sorted(TARGETS)[:6]}
    training = make_training({**some, **doubles(singles)})
    unseen = "+".join(sorted(["G8", sorted(TARGETS)[0]]))
    truth = sum(singles[gene] for gene in members_of(unseen))
    latent, plain = family("latent_additive").learned(training), Additive().learned(training)
    assert error(latent, unseen, truth) < 0.35 < error(plain, unseen, truth)


def test_the_latent_sum_of_enough_directions_is_ridge_regression_on_members(singles: dict[str, np.ndarray]) -> None:
    from sklearn.linear_model import Ridge

    training = make_training(singles)
    ours = LatentSum(1000, 0.7).learned(training)
    indicators = np.array(
        [[gene in members_of(label) for gene in training.effects.genes] for label in training.effects.labels], float
    )
    theirs = Ridge(alpha=0.7).fit(indicators, training.effects.values)
    predicted = np.stack([ours.effect(label) for label in training.effects.labels])
    np.testing.assert_allclose(predicted, theirs.predict(indicators), atol=1e-4)


# --- gene vectors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "worst"), [("ridge", 0.2), ("nearest_perturbation", 1.0), ("random_forest", 1.0)])
def test_an_unseen_gene_is_told_from_its_vector(name: str, worst: float, singles: dict[str, np.ndarray]) -> None:
    table = vectors()
    rng = np.random.default_rng(0)
    programmes = rng.normal(size=(3, N_GENES))
    model = family(name).learned(make_training(singles, table))
    mean = np.mean(list(singles.values()), axis=0)
    ours, theirs = 0.0, 0.0
    for gene in ("G30", "G31", "G32"):
        truth = table.table.loc[gene].to_numpy() @ programmes
        ours, theirs = (
            ours + error(model, gene, truth),
            theirs + float(np.linalg.norm(mean - truth) / np.linalg.norm(truth)),
        )
    assert ours < theirs
    assert ours / 3 < worst


@pytest.mark.parametrize("name", ["ridge", "nearest_perturbation", "random_forest", "covariance_response"])
def test_a_known_gene_keeps_its_effect_and_members_add_up(name: str, singles: dict[str, np.ndarray]) -> None:
    training = make_training(singles, vectors())
    model = family(name).learned(training)
    np.testing.assert_allclose(model.effect("G1"), training.effects.of("G1"))
    np.testing.assert_allclose(model.effect("G1+G30"), training.effects.of("G1") + model.effect("G30"))


@pytest.mark.parametrize("name", ["ridge", "nearest_perturbation", "random_forest"])
def test_without_a_vector_a_gene_gets_the_mean_effect(name: str, singles: dict[str, np.ndarray]) -> None:
    table = vectors().table.copy()
    table.loc["G30"] = np.nan
    training = make_training(singles, Embeddings(table))
    mean = np.mean([training.effects.of(gene) for gene in singles], axis=0)
    for embeddings in (Embeddings(table), NO_VECTORS):
        model = family(name).learned(replace(training, embeddings=embeddings))
        np.testing.assert_allclose(model.effect("G30"), mean)


def test_the_dual_form_is_ridge_regression(singles: dict[str, np.ndarray]) -> None:
    from sklearn.linear_model import Ridge

    rng = np.random.default_rng(0)
    X, Y, new = rng.normal(size=(10, 4)), rng.normal(size=(10, 7)), rng.normal(size=(3, 4))
    X -= X.mean(axis=0)
    scale = (X**2).sum(axis=1).mean()
    expected = Ridge(alpha=0.5 * scale).fit(X, Y).predict(new)
    np.testing.assert_allclose(KernelRidge(0.5).regress(X, Y, new), expected, atol=1e-8)


def test_sources_are_told_apart_by_the_name_before_the_colon() -> None:
    table = pd.DataFrame({"a_b:0": [1.0, np.nan], "a_b:x_1": [2.0, np.nan], "c:0": [3.0, 4.0]}, index=["G1", "G2"])
    embeddings = Embeddings(table)
    assert embeddings.sources == ["a_b", "c"]
    assert embeddings.of_source("a_b").table.index.tolist() == ["G1"]


def test_a_target_moves_what_covaries_with_it() -> None:
    rng = np.random.default_rng(0)
    loadings = np.zeros((15, N_GENES))
    for gene in range(15):
        loadings[gene, [gene, 40 + gene]] = 1.0, 0.5
    drop = {f"G{i}": -1.0 * loadings[i] for i in range(12)}
    training = make_training(drop, Embeddings(pd.DataFrame(index=[f"G{i}" for i in range(15)])), n=100)
    controls = np.flatnonzero(training.pairs.is_control)
    X = training.pairs.X.toarray()
    X[controls] = 3.0 + rng.normal(size=(len(controls), 15)) @ loadings
    training = TrainingSet.of(replace(training.pairs, X=sparse.csr_matrix(X)), training.embeddings, 0)
    effect = family("covariance_response").learned(training).effect("G13")
    assert effect[13] == pytest.approx(-1.0, abs=0.3)
    assert effect[53] == pytest.approx(effect[13] / 2, abs=0.1)
    assert np.abs(np.delete(effect, [13, 53])).max() < 0.3


# --- contexts -------------------------------------------------------------------------------------------------------


def test_transfer_adds_a_share_of_the_centred_effect_that_grows_with_contexts(singles: dict[str, np.ndarray]) -> None:
    for batches, share in ((1, 0.25), (2, 0.5), (3, 0.6), (4, 0.6)):
        model = Transfer().learned(make_training(singles, batches=batches))
        mean = np.mean(list(singles.values()), axis=0)
        np.testing.assert_allclose(model.effect("G0"), mean + share * (singles["G0"] - mean), atol=0.15)
        np.testing.assert_allclose(model.effect("G77"), mean, atol=0.15)


def test_transfer_weighs_contexts_alike(singles: dict[str, np.ndarray]) -> None:
    training = make_training({"G0": singles["G0"], "G1": singles["G1"]}, batches=2)
    obs = training.pairs.obs
    in_second = (obs["perturbation"] == "G0").to_numpy() & (obs["batch"] == "b1").to_numpy()
    keep = ~in_second | (np.cumsum(in_second) <= 12)  # 40 cells in one batch, 12 in the other
    X = training.pairs.X.toarray()
    X[in_second] += 1.0
    pairs = replace(training.pairs, X=sparse.csr_matrix(X)).select(keep)
    model = Transfer().learned(TrainingSet.of(pairs, NO_VECTORS, 0))
    # Means of contexts: half of the extra in the second; centred: half of it again, in one of two contexts; of that a
    # half.
    mean = (singles["G0"] + singles["G1"]).mean() / 2
    np.testing.assert_allclose(model.effect("G77").mean(), mean + 0.25, atol=0.05)
    np.testing.assert_allclose(
        model.effect("G0").mean(), mean + 0.25 + 0.5 * (singles["G0"].mean() - mean + 0.25), atol=0.05
    )


def test_contexts_with_few_cells_or_no_controls_do_not_count(singles: dict[str, np.ndarray]) -> None:
    training = make_training({"G0": singles["G0"]}, batches=3)
    obs = training.pairs.obs
    few = (obs["perturbation"] == "G0").to_numpy() & (obs["batch"] == "b1").to_numpy()
    no_controls = (obs["perturbation"] == "control").to_numpy() & (obs["batch"] == "b2").to_numpy()
    pairs = training.pairs.select(~(few & (np.cumsum(few) > 9)) & ~no_controls)
    assert set(TrainingSet.of(pairs, NO_VECTORS, 0).effects_by_context) == {("b0", "t")}


def test_a_context_that_is_held_out_takes_nothing_else_with_it(singles: dict[str, np.ndarray]) -> None:
    pairs = make_training(singles, batches=3).pairs
    others = pairs.without_context(("b1", "t"))
    anew = pairs.select((pairs.obs["batch"] != "b1").to_numpy())
    np.testing.assert_array_equal(others.rows, anew.rows)
    assert others.effects_by_context.keys() == anew.effects_by_context.keys() == {("b0", "t"), ("b2", "t")}
    for context, effects in anew.effects_by_context.items():
        assert effects.keys() == others.effects_by_context[context].keys() == set(singles)
        for label, effect in effects.items():
            np.testing.assert_array_equal(others.effects_by_context[context][label], effect)


@pytest.mark.parametrize("most", [of_pairs.VALUES_OF_SUMS, 0])
def test_cells_are_read_once_however_many_folds_and_contexts(
    most: int, singles: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the finest groups are too many for their sums, once more for contexts, and for all without each context."""
    read: list[int] = []
    blocks = Pairs.blocks

    def counted(pairs: Pairs, rows: np.ndarray | None = None) -> Iterator:
        read.append(len(pairs.rows))
        return blocks(pairs, rows)

    monkeypatch.setattr(Pairs, "blocks", counted)
    monkeypatch.setattr(of_pairs, "VALUES_OF_SUMS", most)
    training = make_training(singles, batches=3)
    n = len(training.pairs.rows)
    SetGP().learned(training)
    assert read == ([n] if most else [n, n])
    read.clear()
    SetGP().held_out(training.pairs, NO_VECTORS, 0)
    assert read == ([] if most else [n, *[n - n // 3] * 6])


def test_sums_of_the_finest_groups_are_those_of_another_pass(
    singles: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = make_training({**singles, **doubles(singles)}, batches=3).pairs
    groups = np.unique(made.labels, return_inverse=True)[1], np.arange(len(made.labels)) % 2, made.strata == "b1|t"
    known = {}
    for most in (of_pairs.VALUES_OF_SUMS, 0):
        monkeypatch.setattr(of_pairs, "VALUES_OF_SUMS", most)
        cells = made.select(np.ones(len(made.rows), dtype=bool))
        known[most] = [cells.sums, cells.without_context(("b1", "t")).sums, *cells.effects_by_context.values()]
        known[most] += [
            cells.sums_over(group[mask].astype(int), mask, group.max() + 1)
            for group in groups
            for mask in (np.ones(len(group), dtype=bool), made.strata == "b0|t", np.arange(len(group)) % 3 == 0)
        ]
    for found, expected in zip(*known.values(), strict=True):
        tables = [found, expected] if isinstance(found, tuple) else [found.values(), expected.values()]
        for one, other in zip(*tables, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


# --- inner folds ----------------------------------------------------------------------------------------------------


def test_held_out_perturbations_do_not_reach_the_inner_training(singles: dict[str, np.ndarray]) -> None:
    training = make_training({**singles, **doubles(singles)})
    for of_genes in (True, False):
        times: dict[str, int] = {}
        for inner, held_out in training.rounds(of_genes=of_genes):
            assert not set(inner.effects.labels) & set(held_out.labels)
            assert set(inner.effects.labels) | set(held_out.labels) == set(training.effects.labels)
            if of_genes:
                fold_genes = set.intersection(*[set(members_of(label)) for label in held_out.labels])
                assert not any(fold_genes & set(members_of(label)) for label in inner.effects.labels)
            for label in held_out.labels:
                times[label] = times.get(label, 0) + 1
        tested = {label for label in training.effects.labels if of_genes or len(members_of(label)) > 1}
        assert set(times) == tested


def test_what_is_learned_is_judged_against_other_controls(singles: dict[str, np.ndarray]) -> None:
    training = make_training(singles)
    first, second = training.halves
    for inner, held_out in training.rounds(of_genes=True):
        label = inner.effects.labels[0]
        learned_from_first = np.array_equal(inner.effects.of(label), first.of(label))
        judged = second if learned_from_first else first
        np.testing.assert_array_equal(held_out.values[0], judged.of(held_out.labels[0]))


def test_the_candidate_with_the_least_error_is_chosen(singles: dict[str, np.ndarray]) -> None:
    training = make_training(singles, vectors())
    chosen = least_error([KernelRidge(1e4), KernelRidge(0.03)], training, of_genes=True)
    assert chosen.ridge == 0.03


# --- ablations and ceilings -----------------------------------------------------------------------------------------


def test_shuffled_labels_know_the_mean_but_not_who_is_who(singles: dict[str, np.ndarray]) -> None:
    training = make_training({**singles, **doubles(singles)}, vectors())
    shuffled, honest = ShuffledLabels(), SetGP()
    for model in (shuffled, honest):
        model.fit(training.pairs, training.embeddings, Run(seed=3))
    errors = [
        np.mean(
            [error(model, f"{a}+{b}", singles[a] + singles[b], off=(a, b)) for a, b in (("G0", "G7"), ("G2", "G9"))]
        )
        for model in (shuffled, honest)
    ]
    assert errors[0] > 5 * errors[1]
    assert set(shuffled.artefact["labels"]) == set(honest.artefact["labels"])


def test_batch_only_tells_batches_apart_and_nothing_else(singles: dict[str, np.ndarray]) -> None:
    training = make_training(singles, batches=2)
    X = training.pairs.X.toarray()
    moved = ~training.pairs.is_control & (training.pairs.obs["batch"] == "b1").to_numpy()
    X[moved, 5] += 2.0
    pairs = replace(training.pairs, X=sparse.csr_matrix(X))
    model = BatchOnly()
    model.fit(pairs, NO_VECTORS, Run(seed=0))
    start = pairs.X[pairs.is_control][:60].toarray()

    def change(batch: str) -> np.ndarray:
        predicted = model.predict(
            start, ["G0", "G1"], 60, 0, Context(np.repeat(f"{batch}|t", 60), {f"{batch}|t": start.mean(axis=0)})
        )
        np.testing.assert_array_equal(predicted[0], predicted[1])
        return predicted[0].mean(axis=0) - start.mean(axis=0)

    first, second, unknown = map(change, ("b0", "b1", "new"))
    assert second[5] - first[5] == pytest.approx(2.0, abs=0.1)
    assert np.abs(np.delete(second - first, 5)).max() < 0.1
    assert unknown[5] == pytest.approx((first[5] + second[5]) / 2, abs=0.1)


@pytest.fixture
def held_out_pairs() -> Callable[[np.ndarray], Pairs]:
    """Return a function that makes a screen: one held-out perturbation, in halves, and two of training."""

    def make(effect: np.ndarray) -> Pairs:
        training = make_training(
            {"G1": np.ones(N_GENES), "G2": np.ones(N_GENES), "G3": effect, "extra": np.zeros(N_GENES)}, n=60
        )
        obs = training.pairs.obs.copy()
        is_test = obs["perturbation"].isin(["G3", "extra"]).to_numpy()
        obs.loc[is_test, "role"] = "test"
        obs.loc[obs["perturbation"] == "extra", ["perturbation", "is_control"]] = ["control", True]
        halves = obs["perturbation"].to_numpy() == "G3"
        obs.loc[halves, "half"] = np.resize(["a", "b"], halves.sum())
        return replace(training.pairs, obs=obs)

    return make


def test_the_interpolated_duplicate_is_the_duplicate_where_sure_and_the_mean_effect_where_not(
    held_out_pairs: Callable,
) -> None:
    effect = np.where(np.arange(N_GENES) < 20, -2.0, 0.0)
    pairs = held_out_pairs(effect)
    model = InterpolatedDuplicate()
    model.fit(pairs, NO_VECTORS, Run(seed=0))
    cells = pairs.X[model.rows("G3", 100, 0)].toarray()
    mean = model.predict(cells, ["G3"], len(cells), 0)[0].mean(axis=0)
    control = pairs.roles("test").mean_of(np.flatnonzero(pairs.roles("test").is_control))
    np.testing.assert_allclose((mean - control)[:20], -2.0, atol=0.15)  # sure: as measured
    assert (mean - control)[20:].mean() > 0.5  # nothing measured: as the training perturbations do
    assert len(model.artefact["rows"]) == 30
