"""A new context: what other contexts measured, and no more than theory allows, on lines with known effects."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
from made_lines import Lines, asked, effects_of, effects_of_ceiling, least_error, made_lines, mean_share

from perturbflow.controls import MOST_CONTEXTS
from perturbflow.embeddings import Embeddings
from perturbflow.models.base import build
from perturbflow.models.closed_form.base import TrainingSet
from perturbflow.models.gaussian_process import kernel
from perturbflow.pairs import Pairs
from perturbflow.registry.families import FAMILIES
from perturbflow.splits.contexts import Support

SETTINGS = {"one line": (1, None), "three lines": (3, None), "few-shot": (3, 0.33)}


@cache
def held_out(setting: str) -> tuple[Lines, Pairs, TrainingSet, str]:
    """Return lines, the cells with roles, training, and the line that is held out."""
    n_sources, support = SETTINGS[setting]
    lines, line = made_lines(n_sources + 1), f"line{n_sources}"
    pairs = lines.held_out(line, None if support is None else Support(support))
    return lines, pairs, TrainingSet.of(pairs.roles("train"), Embeddings(pd.DataFrame()), 0), line


@cache
def scores(name: str, setting: str) -> tuple[float, float]:
    """Return the squared error of a model as a share of the energy, and r of centred effects."""
    lines, pairs, training, line = held_out(setting)
    model = build(FAMILIES[name].implementation, {})
    found = (effects_of_ceiling if FAMILIES[name].kind == "ceiling" else effects_of)(model, training, pairs)
    return lines.errors(found, line)


def test_lines_of_many_batches_are_contexts_and_batches_are_not() -> None:
    _, pairs, training, _ = held_out("three lines")
    assert pairs.obs["batch"].nunique() > MOST_CONTEXTS
    assert training.pairs.context_keys == ("dataset", "cell_type")
    assert set(training.effects_by_context) == {(f"line{i}", f"line{i}") for i in range(3)}
    _, _, few, _ = held_out("one line")
    assert few.pairs.context_keys == ("batch", "cell_type"), "three batches may be days"
    kernel = build("gaussian_process.set_gp:SetGP", {}).learned(training).kernel
    assert kernel.contexts == [f"line{i}|line{i}" for i in range(3)]
    known = training.pairs.context_of(np.flatnonzero(training.pairs.obs["dataset"] == "line1"))
    assert kernel.questions(["P000"], known).shares.tolist() == [[0.0, 1.0, 0.0]]
    new = pairs.roles("test")
    of_new = kernel.questions(["P000"], asked(new, "P000"))
    assert of_new.shares.tolist() == [[0.0, 0.0, 0.0]]
    assert (of_new.alike > 0).all()


def test_effects_of_a_line_are_against_controls_of_their_batches() -> None:
    """The mean over batches of the differences within them, so that batches of a line are no effect."""
    lines, _, training, _ = held_out("three lines")
    for line in ("line0", "line2"):
        for label in ("P000", "P007"):
            found = training.effects_by_context[line, line][label]
            assert np.abs(found - lines.effects[line, label]).max() < 0.35  # noise of 36 cells
            assert np.corrcoef(found, lines.effects[line, label])[0, 1] > 0.98


@pytest.mark.parametrize("name", ["transfer", "gaussian_process"])
def test_the_conserved_part_is_recovered_and_no_more_than_theory_allows(name: str) -> None:
    least = least_error(3)
    error, r = scores(name, "three lines")
    assert 0.9 * least < error < least + 0.12
    best = np.sqrt((0.30 - 1 / (1 / 0.30 + 3 / 0.21)) / 0.51)  # of the posterior mean
    assert 0.85 * best < r < 1.1 * best


def test_one_source_is_no_better_than_nothing_as_it_is_and_helps_where_it_is_shrunken() -> None:
    raw, shrunken = scores("same_elsewhere", "one line"), scores("transfer", "one line")
    assert raw[0] > 0.9
    assert least_error(1) < shrunken[0] < raw[0] - 0.05
    assert scores("same_elsewhere", "three lines")[0] < raw[0] - 0.2, "an average over lines has less of each"


def test_a_few_perturbations_of_the_line_tell_its_mean() -> None:
    for name in ("other_contexts_mean", "transfer", "gaussian_process"):
        assert scores(name, "few-shot")[0] < scores(name, "three lines")[0] - 0.03, name


def test_the_lines_own_mean_is_a_ceiling_of_means_and_knows_no_perturbation() -> None:
    error, r = scores("context_mean", "three lines")
    assert error == pytest.approx(1 - 2 * mean_share(0.30, 0.21), abs=0.08)
    assert abs(r) < 0.15
    assert error < scores("other_contexts_mean", "three lines")[0] - 0.2


def test_the_mean_of_other_contexts_counts_each_once(singles: dict[str, np.ndarray]) -> None:
    lines, _, training, _ = held_out("three lines")
    model = build(FAMILIES["other_contexts_mean"].implementation, {}).learned(training)
    expected = np.mean([np.mean(list(of.values()), axis=0) for of in training.effects_by_context.values()], axis=0)
    for label in (lines.labels[0], "never measured"):
        np.testing.assert_allclose(model.effect(label), expected, rtol=1e-6)


def test_the_nearest_context_is_that_whose_controls_are_most_alike() -> None:
    _, _, training, _ = held_out("three lines")
    model = build(FAMILIES["nearest_context"].implementation, {}).learned(training)
    for line in ("line0", "line1", "line2"):
        here = training.pairs.context_of(np.flatnonzero(training.pairs.is_of_context((line, line))))
        np.testing.assert_allclose(model.effect_in("P003", here), training.effects_by_context[line, line]["P003"])
        mean = np.mean(list(training.effects_by_context[line, line].values()), axis=0)
        np.testing.assert_allclose(model.effect_in("never measured", here), mean, rtol=1e-5)


def test_of_very_many_rows_a_sample_tells_lines_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others have one row over all lines. That is nearer than lines that are not told apart at all."""
    lines, pairs, _, line = held_out("few-shot")
    found, errors = {}, {}
    for name, (most, least) in {"all": (10**6, 20), "some": (60, 10), "none": (60, 10**6)}.items():
        monkeypatch.setattr(kernel, "MOST_ROWS", most)
        monkeypatch.setattr(kernel, "LEAST_BY_CONTEXT", least)
        training = TrainingSet.of(pairs.roles("train").select(np.ones(len(pairs.roles("train").rows), bool)),
                                  Embeddings(pd.DataFrame()), 0)  # fmt: skip
        model = build(FAMILIES["gaussian_process"].implementation, {})
        errors[name] = lines.errors(effects_of(model, training, pairs), line)[0]
        found[name] = model.artefact["labels"], model.looks_at_contexts
    labels, looks = found["some"]
    assert looks
    assert len(labels) <= 60
    assert set(labels) == set(lines.labels)
    assert len(found["all"][0]) > 90
    assert not found["none"][1]
    assert len(found["none"][0]) == 30
    assert max(errors["all"], errors["some"]) < errors["none"] - 0.02
