"""The mean of learned models: its losses, its choice of a mix and a gain, and what it reads."""

from dataclasses import replace

import numpy as np
import pytest
from scipy import sparse

from perturbflow.embeddings import Embeddings
from perturbflow.models import conditional_mean
from perturbflow.models.conditional_mean import ConditionalMean
from perturbflow.models.shift import Training
from perturbflow.models.stacked import Stacked
from perturbflow.pairs import Pairs


def test_losses_of_perfect_and_useless_predictions() -> None:
    rng = np.random.default_rng(0)
    truth, reference, everything = rng.normal(size=(6, 40)), rng.normal(size=40), np.ones(40, dtype=bool)
    none = np.zeros(40, dtype=bool)
    np.testing.assert_allclose(conditional_mean.losses(truth, truth, reference, everything, none), 0.0, atol=1e-12)
    useless = conditional_mean.losses(np.zeros_like(truth), truth, reference, everything, none)
    assert useless[:, 0].mean() == pytest.approx(1.0)
    np.testing.assert_allclose(useless[:, 1], 1.0)
    np.testing.assert_allclose(useless[:, 3], 0.5)
    one = np.tile(truth[0], (6, 1))  # the same for all: nothing is nearer to its own than to the others, on average
    assert conditional_mean.losses(one, truth, reference, everything, none)[:, 3].mean() == pytest.approx(0.5)


def candidates_table(n: int, better: int | None, error: float = 0.0, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    n_candidates = len(conditional_mean.MIXES) * len(conditional_mean.GAINS)
    tables = 0.5 + 0.1 * rng.normal(size=(1, n, 4)) + 0.001 * np.arange(n_candidates)[:, None, None]
    if better is not None:
        tables[better, :, 1:] -= 0.2
        tables[better, :, 0] += error
        tables[better, :, 0] -= 0.05
    return tables


def test_a_mix_is_taken_where_it_is_better_and_costs_no_error() -> None:
    n_gains = len(conditional_mean.GAINS)
    better = 3 * n_gains + 2
    assert conditional_mean._chosen(conditional_mean.MIXES, candidates_table(40, better)) == (3, conditional_mean.GAINS[2], 40)
    worse = candidates_table(40, better, error=0.2)  # than the best part alone, in error
    few = candidates_table(conditional_mean.LEAST_HELD_OUT - 1, better)
    for tables in (worse, few):
        assert conditional_mean._chosen(conditional_mean.MIXES, tables)[:2] == (0, 1.0)


def test_the_four_cases() -> None:
    measured, known = {"A", "B", "A+C"}, {"A", "B", "C"}
    cases = {label: conditional_mean.case_of(label, measured, known) for label in ("A", "B+C", "D", "A+D", "C", "A+C")}
    assert cases == {"A": "measured", "B+C": "seen", "D": "unseen gene", "A+D": "unseen member", "C": "seen", "A+C": "measured"}


def test_a_shrunken_mean_gets_its_spread_back() -> None:
    """Plant a screen whose stacked prediction is drawn to the mean: the gain undoes it."""
    rng = np.random.default_rng(0)
    centre, own = rng.normal(size=(1, 60)), rng.normal(size=(40, 60))
    truth = centre + own
    said = {"stacked": centre + own / 1.5 + 0.02 * rng.normal(size=own.shape), "latent": centre + own / 2, "sum": centre + 2 * own}
    tables = [
        conditional_mean.losses(
            conditional_mean._mixed(said, mix, gain, np.repeat(centre, 40, axis=0)), truth, centre[0], np.ones(60, bool), np.zeros(60, bool)
        )
        for mix in conditional_mean.MIXES
        for gain in conditional_mean.GAINS
    ]
    mix, gain, _ = conditional_mean._chosen(conditional_mean.MIXES, np.stack(tables))
    recovered = conditional_mean._mixed(said, conditional_mean.MIXES[mix], gain, centre)
    assert np.linalg.norm(recovered - truth) < 0.5 * np.linalg.norm(said["stacked"] - truth)


def test_with_few_to_learn_from_the_mean_is_stacked(screen: tuple[Pairs, Embeddings]) -> None:
    pairs, embeddings = screen
    training = Training.of(pairs, embeddings, 0)
    mean, stacked = ConditionalMean().learned(training), Stacked().learned(training)
    assert "by 0 held out" in mean.account()["unseen member"] or "1 stacked, gain 1" in mean.account()["unseen member"]
    np.testing.assert_allclose(mean.effect("TF2+TF8"), stacked.effect("TF2+TF8"))


def test_the_mean_reads_training_cells_alone(screen: tuple[Pairs, Embeddings]) -> None:
    pairs, embeddings = screen
    is_held_out = (pairs.obs["role"] != "train").to_numpy()
    X = pairs.X.toarray()
    X[is_held_out] = np.random.default_rng(0).random(X[is_held_out].shape)
    spoilt = replace(pairs, X=sparse.csr_matrix(X))
    means = [ConditionalMean().learned(Training.of(cells, embeddings, 0)).effect("TF1+TF2") for cells in (pairs, spoilt)]
    np.testing.assert_array_equal(*means)


@pytest.mark.parametrize("knows", [True, False])
def test_a_part_that_is_no_closed_form_is_mixed_in_as_far_as_it_predicts(
    screen: tuple[Pairs, Embeddings], monkeypatch: pytest.MonkeyPatch, knows: bool
) -> None:
    monkeypatch.setattr(conditional_mean, "LEAST_HELD_OUT", 2)
    training = Training.of(screen[0].roles("train", "validation"), screen[1], 0)
    truth = dict(zip(training.effects.labels, training.effects.values, strict=True))
    noise = np.random.default_rng(0).normal(size=len(training.genes))
    asked = []

    def part(inner: Training, start: np.ndarray) -> object:
        assert training.pairs.is_control[training.pairs.rows.searchsorted(start)].all()
        asked.append(inner.effects.labels)
        return (lambda label: truth[label]) if knows else (lambda label: noise)

    mean = ConditionalMean({"world": part}).learned(training)
    assert asked
    chosen = [words for words in mean.account().values() if "by 0" not in words]
    assert all(("world" in words) == knows for words in chosen)
    again = ConditionalMean()
    again.restore(mean.artefact)
    label = training.effects.labels[0]
    np.testing.assert_array_equal(again.effect(label, {"world": lambda: truth[label]}), mean.effect(label, {"world": lambda: truth[label]}))
