"""Trust: what answers like one kept, and whether neighbours agree; on made scores and effects with known answers."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import PERTURBED

from perturbflow.counterfactuals.trust import Kept, Neighbourhood, Trust
from perturbflow.embeddings import Embeddings
from perturbflow.models.calibration import LEVELS, Calibration, Scale, promised
from perturbflow.pairs import Pairs


def calibration(
    promise: np.ndarray, whole: np.ndarray, specific: np.ndarray, novelty: str = "unseen gene"
) -> Calibration:
    """Return held-out perturbations with these promises and correlations."""
    n = len(promise)
    accuracy = np.column_stack([promise, whole, specific])
    return Calibration([f"P{i}" for i in range(n)], [novelty] * n, np.ones((n, len(LEVELS))), np.ones(n), accuracy)


def test_a_promise_is_the_correlation_that_the_posterior_expects() -> None:
    """Truth is drawn around predictions with the variance that they state."""
    rng = np.random.default_rng(0)
    for sd in (0.3, 1.0, 3.0):
        effects = rng.normal(size=(200, 400))
        truth = effects + sd * rng.normal(size=effects.shape)
        kept = [np.corrcoef(a, b)[0, 1] for a, b in zip(effects, truth, strict=True)]
        said = [promised(effect, np.full(400, sd)) for effect in effects]
        assert np.mean(said) == pytest.approx(np.mean(kept), abs=0.01)


def test_held_out_effects_have_their_correlations() -> None:
    rng = np.random.default_rng(0)
    mean, own = rng.normal(size=(2, 300))
    genes = [f"G{i}" for i in range(300)]
    scale = Scale(np.ones(300), np.ones(300), mean)
    predicted, measured = np.stack([2 * mean, mean + own]), np.stack([mean + own, mean + own])
    found = Calibration.of(["A", "B"], ["seen"] * 2, predicted, measured, [0.1, 0.1], scale, genes)
    np.testing.assert_allclose(found.accuracy[0, 1:], [np.corrcoef(mean, mean + own)[0, 1], 0.0], atol=1e-9)
    np.testing.assert_allclose(found.accuracy[1, 1:], 1.0)
    assert (found + found).accuracy.shape == (4, 3)
    again = Calibration.from_arrays(found.arrays())
    np.testing.assert_allclose(again.accuracy, found.accuracy)


def test_answers_are_told_of_their_own_kind_and_promise() -> None:
    rng = np.random.default_rng(1)
    promise = np.linspace(0.05, 0.95, 100)
    keeps = calibration(promise, promise + rng.normal(0, 0.05, 100), promise)
    low, high = (Kept.of(keeps, "unseen gene", at) for at in (0.1, 0.9))
    assert low.n == high.n == 20
    assert low.median == pytest.approx(0.15, abs=0.06)
    assert high.median == pytest.approx(0.85, abs=0.06)
    assert Kept.of(keeps, "unseen member", 0.5) is None
    blind = calibration(promise, rng.normal(0.4, 0.05, 100), rng.normal(0.4, 0.05, 100))
    assert Kept.of(blind, "unseen gene", 0.1) == Kept.of(blind, "unseen gene", 0.9), "promises that order nothing"
    assert Kept.of(blind, "unseen gene", 0.1).n == 100


@pytest.mark.parametrize(
    ("whole", "specific", "words"),
    [
        (0.0, 0.0, "worth nothing: no better than chance"),
        (0.5, 0.0, "worth no more than the mean effect of training"),
        (0.5, 0.3, "worth something"),
    ],
)
def test_an_answer_says_first_what_it_is_worth(whole: float, specific: float, words: str) -> None:
    noise = np.random.default_rng(0).normal(0, 0.1, (2, 60))
    noise -= noise.mean(axis=1, keepdims=True)
    held_out = calibration(np.full(60, 0.5), whole + noise[0], specific + noise[1])
    kept = Kept.of(held_out, "unseen gene", 0.5)
    trust = Trust("unseen gene", 0.5, 0.1, True, 0.4, 0.1, 3, kept)
    assert trust.words.startswith(words)
    assert f"Of 60 genes never perturbed like this one, held out, the median correlation was {kept.median:.2f}" in (
        trust.words
    )
    assert replace(trust, kept=None).words.startswith("unknown")
    assert replace(trust, novelty="measured", kept=None).words.startswith("measured in training")


def test_neighbours_agree_where_their_effects_do(screen: tuple[Pairs, Embeddings]) -> None:
    """A gene beside copies of one effect has neighbours that agree, whoever they are."""
    pairs, _ = screen
    rng = np.random.default_rng(0)
    names = [*PERTURBED, "NEW", "UNKNOWN"]
    table = pd.DataFrame(rng.normal(size=(len(names), 4)), index=names, columns=["a:0", "a:1", "b:0", "b:1"])
    table.loc["UNKNOWN"] = np.nan
    table.loc["NEW", ["b:0", "b:1"]] = np.nan
    found = Neighbourhood(pairs.roles("train"), Embeddings(table))
    neighbours, sources, n_sources = found.of("NEW")
    assert n_sources == 1
    assert 0 <= neighbours <= 1
    assert np.isnan(sources)
    assert found.of("UNKNOWN")[2] == 0
    assert found.of(f"NEW+{found.genes[0]}") == pytest.approx(found.of("NEW"), nan_ok=True)
    near = found.nearest("NEW")["a"]
    assert set(found.names("NEW")) == {found.genes[i] for i in near}
    assert found.names(f"NEW+{found.genes[0]}")[0] == found.genes[0]
    found.directions[near] = found.directions[near[0]]
    assert found.of("NEW")[0] == pytest.approx(1.0)


def test_a_perturbation_measured_in_other_contexts_alone_is_called_so() -> None:
    here = Trust("measured", 0.5, 0.1, True, 0.4, 0.1, 3, None)
    assert here.words == "measured in training: an estimate from its own cells"
    assert "in other contexts alone" in replace(here, is_elsewhere=True).words
