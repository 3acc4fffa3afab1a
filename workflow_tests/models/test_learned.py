"""The learned families: their parts against closed forms, and their promises on a screen with known effects."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Prepared
from learned import (
    LEARNED,
    QUICK,
    make_pairs_of_cells,
    quick,
    registered,
    trained,
)
from made_lines import made_lines

from perturbflow.embeddings import Embeddings
from perturbflow.errors import InputError
from perturbflow.genes.symbols import members_of
from perturbflow.io.artefacts import load_artefact, save_artefact
from perturbflow.models import counterfactual
from perturbflow.models.base import Model, Run, build
from perturbflow.models.effects import Effects
from perturbflow.models.gaussian_process.own_gene import OwnGene
from perturbflow.models.latents.pca import LatentSpace
from perturbflow.models.neighbours import Neighbours
from perturbflow.models.training.batches import PairedCells
from perturbflow.models.training.conditions import Conditions
from perturbflow.pairs import Pairs
from perturbflow.registry.families import FAMILIES


@pytest.fixture(scope="module")
def models(
    screen: tuple[Pairs, Embeddings], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Model, dict, Run]]:
    return {name: trained(name, *screen, tmp_path_factory.mktemp(name), **quick(name)) for name in LEARNED}


# --- parts ----------------------------------------------------------------------------------------------------------


def test_latent_space_keeps_training_effects_and_inverts(screen: tuple[Pairs, Embeddings]) -> None:
    pairs, _ = screen
    effects = Effects.of_training(pairs)
    latent = LatentSpace.fit(pairs, effects, 60)
    kept = effects.values @ latent.basis @ latent.basis.T
    assert np.linalg.norm(kept - effects.values) < 0.15 * np.linalg.norm(effects.values)
    z = latent.encode(pairs.X)
    np.testing.assert_allclose(latent.encode(latent.decode(z)), z, atol=1e-3)
    training = z[(pairs.obs["role"] == "train").to_numpy()]
    np.testing.assert_allclose(training.std(axis=0), 1.0, atol=0.02)


def test_latent_space_ignores_held_out_cells(screen: tuple[Pairs, Embeddings]) -> None:
    pairs, _ = screen
    seen = pairs.roles("train", "validation")
    a = LatentSpace.fit(pairs, Effects.of_training(pairs), 10)
    b = LatentSpace.fit(seen.roles("train"), Effects.of_training(seen), 10)
    np.testing.assert_allclose(a.basis, b.basis, atol=1e-6)


def test_own_gene_recovers_a_planted_knock_down(screen: tuple[Pairs, Embeddings]) -> None:
    pairs, _ = screen
    effects = Effects.of_training(pairs)
    training = pairs.roles("train")
    own = OwnGene.fit(training, effects)
    row = {gene: i for i, gene in enumerate(pairs.genes)}
    control = training.control_level
    for gene, effect in effects.single.items():
        assert own.effect(control[row[gene]]) == pytest.approx(effect[row[gene]], abs=0.45)
        assert own.effect(control[row[gene]]) < -0.4
    assert own.effect(0.01) >= -0.01
    few = Effects(effects.labels[:2], effects.values[:2])
    assert OwnGene.fit(training, few).effect(3.0) == 0.0


@pytest.mark.parametrize(("shared_part", "low", "high"), [(1.0, 0.8, 1.0), (0.0, 0.0, 0.3)])
def test_neighbours_believe_others_as_far_as_they_predict(shared_part: float, low: float, high: float) -> None:
    rng = np.random.default_rng(0)
    genes = [f"G{i:02d}" for i in range(20)]
    values = (
        shared_part * rng.normal(size=200)
        + (1 - shared_part) * rng.normal(size=(20, 200))
        + 0.01 * rng.normal(size=(20, 200))
    )
    effects = Effects(genes, values)
    neighbours = Neighbours.fit(effects, effects, {gene: rng.normal(size=4) for gene in genes})
    assert low <= neighbours.strength <= high
    weights = neighbours.weights(rng.normal(size=(5, 4)))
    np.testing.assert_allclose(weights.sum(axis=1), 1.0)


def test_neighbours_are_the_same_some_genes_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    genes = [f"G{i:02d}" for i in range(20)]
    effects = Effects(genes, rng.normal(size=200) + 0.5 * rng.normal(size=(20, 200)))
    vectors = {gene: rng.normal(size=4) for gene in genes}
    whole = Neighbours.fit(effects, effects, vectors)
    borrowed = whole.borrowed([effects.values])[0]
    monkeypatch.setattr("perturbflow.models.neighbours.GENES_AT_ONCE", 7)
    parts = Neighbours.fit(effects, effects, vectors)
    assert (parts.bandwidth, parts.tempering, parts.strength) == (whole.bandwidth, whole.tempering, whole.strength)
    np.testing.assert_allclose(parts.borrowed([effects.values])[0], borrowed)
    expected = np.stack([np.delete(effects.values, i, axis=0).mean(axis=0) for i in range(20)])
    equal = Neighbours(genes, whole.vectors, whole.sizes, whole.apart)  # the same weight for all
    np.testing.assert_allclose(equal.borrowed([effects.values])[0], expected)


def test_effects_of_disjoint_controls_share_no_noise(screen: tuple[Pairs, Embeddings]) -> None:
    pairs, _ = screen
    first, second = Effects.with_disjoint_controls(pairs)
    whole = Effects.of_training(pairs)
    assert first.labels == second.labels == whole.labels
    # Both halves have about as many controls per batch, so their mean is the effect against all controls.
    np.testing.assert_allclose((first.values + second.values) / 2, whole.values, atol=1e-4)
    assert np.abs(first.values - second.values).max() > 0.01


def test_shared_control_noise_is_not_taken_for_a_common_response() -> None:
    rng = np.random.default_rng(0)
    genes = [f"G{i:02d}" for i in range(12)]
    own = rng.normal(size=(12, 300))
    first, second = (Effects(genes, own - 1.5 * rng.normal(size=300)) for _ in range(2))
    vectors = {gene: rng.normal(size=4) for gene in genes}
    assert Neighbours.fit(first, second, vectors).strength < 0.3
    assert Neighbours.fit(first, first, vectors).strength > 0.7  # what sharing the controls would have led to


def test_neighbours_borrow_from_the_near_ones() -> None:
    rng = np.random.default_rng(1)
    genes = [f"G{i:02d}" for i in range(20)]
    centre = np.repeat([[0.0], [10.0]], 10, axis=0)
    patterns = rng.normal(size=(2, 100))
    values = np.repeat(patterns, 10, axis=0) + 0.1 * rng.normal(size=(20, 100))
    effects = Effects(genes, values)
    vectors = centre + 0.1 * rng.normal(size=(20, 1))
    neighbours = Neighbours.fit(effects, effects, dict(zip(genes, vectors, strict=True)))
    weights = neighbours.weights(np.array([[0.05], [9.9]]))
    assert weights[0, :10].sum() > 0.95
    assert weights[1, 10:].sum() > 0.95


def test_batches_pair_cells_of_one_stratum_and_depend_on_the_seed_alone(screen: tuple[Pairs, Embeddings]) -> None:
    cells, pairs, conditions = make_pairs_of_cells(screen, cells_together=8)
    first, again, other = cells.batch(64, (0, 1)), cells.batch(64, (0, 1)), cells.batch(64, (0, 2))
    for name in ("start", "target", "genes", "group"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.target, other.target)
    z = cells.z
    batch_of = pairs.obs["batch"].astype(str).to_numpy()
    for i in range(64):
        start = int(torch.nonzero((z == first.start[i]).all(dim=1))[0])
        target = int(torch.nonzero((z == first.target[i]).all(dim=1))[0])
        assert pairs.is_control[start]
        assert batch_of[start] == batch_of[target]
        members = [conditions.genes[g] for g in first.genes[i] if g >= 0]
        assert "+".join(members) == pairs.labels[target]
    for group in first.group.unique():
        assert len(first.genes[first.group == group].unique(dim=0)) == 1


def test_composed_combinations_add_the_effect_of_the_second_gene(screen: tuple[Pairs, Embeddings]) -> None:
    plain, _, _ = make_pairs_of_cells(screen)
    composed, _, _ = make_pairs_of_cells(screen, synthetic_share=1.0)
    assert composed.has_combinations
    a, b = plain.batch(200, (3,)), composed.batch(200, (3,))
    single = (a.genes >= 0).sum(dim=1) == 1
    changed = (b.genes != a.genes).any(dim=1)
    assert changed.sum() > 0.5 * single.sum()
    effect_of = dict(zip(composed.single_genes.tolist(), composed.single_effects, strict=True))
    for i in torch.nonzero(changed).squeeze(1).tolist():
        assert torch.allclose(b.target[i] - a.target[i], effect_of[int(b.genes[i, 1])], atol=1e-5)


def test_shifted_start_cells_have_the_mean_of_controls(screen: tuple[Pairs, Embeddings]) -> None:
    cells, pairs, _ = make_pairs_of_cells(screen, shifted_share=1.0)
    starts = torch.cat([cells.batch(500, (i,)).start for i in range(6)])
    controls = cells.z[torch.from_numpy(pairs.is_control)]
    assert (starts.mean(dim=0) - controls.mean(dim=0)).abs().max() < 0.35
    held_out, _, _ = make_pairs_of_cells(screen, role="validation", shifted_share=1.0)
    assert held_out.shifted_share == 0.0


# --- counterfactual -------------------------------------------------------------------------------------------------


def test_coupling_is_optimal_within_groups() -> None:
    start = torch.tensor([[0.0], [10.0], [0.0], [10.0]])
    target = torch.tensor([[9.0], [1.0], [9.0], [8.0]])
    group = torch.tensor([0, 0, 1, 2])
    order = counterfactual.coupled(start, target, group, torch.ones(1))
    assert start[order].squeeze(1).tolist() == [10.0, 0.0, 0.0, 10.0]


def test_coupling_looks_away_from_what_the_perturbation_did() -> None:
    # Along the second axis cells respond, by 0 or 8: what is left to tell their states is the first, though it tells
    # less.
    start = torch.tensor([[0.0, 0.0], [1.0, 0.1], [2.0, -0.1], [3.0, 0.0]])
    target = torch.tensor([[3.0, 8.0], [0.0, 0.0], [2.0, 8.0], [1.0, 0.0]])
    order = counterfactual.coupled(start, target, torch.zeros(4), torch.ones(2))
    assert start[order][:, 0].tolist() == [3.0, 0.0, 2.0, 1.0]


# --- promises of every learned family -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNED)
def test_held_out_combinations_are_predicted_better_than_no_change(
    name: str, models: dict, screen: tuple[Pairs, Embeddings]
) -> None:
    model, _, _ = models[name]
    test = screen[0].roles("test")
    for label in test.perturbations:
        rows = test.cells_of(label)
        start = test.X[test.control_index[rows, 0]].toarray()
        predicted = model.predict(start, [label], len(start), 0)[0].mean(axis=0) - start.mean(axis=0)
        measured = test.effect_of(label)
        assert np.corrcoef(predicted, measured)[0, 1] > 0.7
        assert np.linalg.norm(predicted - measured) < 0.85 * np.linalg.norm(measured)


@pytest.mark.parametrize("name", LEARNED)
def test_no_perturbation_leaves_cells_as_they_are(name: str, models: dict, screen: tuple[Pairs, Embeddings]) -> None:
    model, _, _ = models[name]
    controls = screen[0].roles("test")
    start = controls.X[controls.is_control].toarray()
    np.testing.assert_allclose(model.predict(start, ["control"], len(start), 0)[0], start, atol=1e-4)


@pytest.mark.parametrize("name", LEARNED)
def test_same_seed_same_cells_and_a_restored_model_is_the_same(
    name: str, models: dict, screen: tuple[Pairs, Embeddings], tmp_path: Path
) -> None:
    model, artefact, _ = models[name]
    start = screen[0].X[:20].toarray()
    first = model.predict(start, ["TF1+TF5"], 20, 1)
    np.testing.assert_array_equal(first, model.predict(start, ["TF1+TF5"], 20, 1))
    assert not np.array_equal(first, model.predict(start, ["TF1+TF5"], 20, 2))
    save_artefact(tmp_path / "model.ckpt", artefact)
    restored = build(*registered(name, **quick(name)))
    restored.restore(load_artefact(tmp_path / "model.ckpt"))
    np.testing.assert_allclose(restored.predict(start, ["TF1+TF5"], 20, 1), first, atol=1e-5)


@pytest.mark.parametrize("name", LEARNED)
def test_counterfactual_gives_a_distribution_per_cell_around_its_own_state(
    name: str, models: dict, screen: tuple[Pairs, Embeddings]
) -> None:
    model, _, _ = models[name]
    start = screen[0].X[:3].toarray()
    outcomes = model.counterfactual(start, ["TF1", "TF2"], 16, 0)
    assert outcomes.shape == (2, 3, 16, start.shape[1])
    assert outcomes.std(axis=2).max() > 1e-3
    nearest = np.linalg.norm(outcomes.mean(axis=2)[0][:, None] - start[None], axis=-1).argmin(axis=1)
    assert nearest.tolist() == [0, 1, 2]


@pytest.mark.parametrize("name", LEARNED)
def test_scored_cells_and_what_if_answers_are_the_same_population(name: str, models: dict) -> None:
    """`predict` meets the mean of the cells that it is given, `counterfactual` that of training's controls."""
    model, _, _ = models[name]
    start = model.population
    scored = model.predict(start, ["TF1+TF5"], len(start), 0)[0]
    asked = model.counterfactual(start, ["TF1+TF5"], 8, 0)[0].reshape(-1, start.shape[1])
    sampling = np.sqrt(scored.var(axis=0) / len(scored) + asked.var(axis=0) / len(asked))
    difference = np.abs(scored.mean(axis=0) - asked.mean(axis=0))
    effect = np.abs(scored.mean(axis=0) - start.mean(axis=0))
    assert (difference < 4.0 * sampling + 0.01).all()
    assert np.linalg.norm(difference) < 0.15 * np.linalg.norm(effect)
    spread = scored.std(axis=0), asked.std(axis=0)
    assert np.corrcoef(*spread)[0, 1] > 0.9
    assert np.median(spread[1] / np.maximum(spread[0], 1e-6)) == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("name", LEARNED)
def test_a_gene_without_a_vector_is_refused_and_an_unseen_one_is_borrowed(
    name: str, models: dict, screen: tuple[Pairs, Embeddings], tmp_path: Path
) -> None:
    model, _, _ = models[name]
    start = screen[0].X[:5].toarray()
    assert "no cell of this screen was perturbed in it" in model.refusal("NOWHERE1")
    with pytest.raises(InputError, match="NOWHERE1 has no embedding"):
        model.predict(start, ["NOWHERE1"], 5, 0)
    assert model.refusal("TF1") is None


def test_mean_effects_of_genes_never_perturbed_are_mixtures_of_their_neighbours(
    prepared: dict[str, Prepared], tmp_path: Path
) -> None:
    """They are the means of effects on cells, whose neighbours are sampled."""
    files = prepared["unseen_perturbation"]
    pairs, embeddings = Pairs.read(files.pairs), Embeddings.read(files.embeddings)
    model, _, _ = trained("counterfactual", pairs, embeddings, tmp_path, **{**QUICK, "n_steps": 150, "mean": "learned"})
    model.neighbours = replace(model.neighbours, strength=0.8)
    test = pairs.roles("test")
    rows = np.flatnonzero(test.is_control)
    asked = test.X[rows].toarray(), test.context_of(rows)
    unseen = [label for label in test.perturbations if len(members_of(label)) == 1]
    seen = pairs.roles("train").perturbations[0]
    found = model.mean_effects(asked[0], [*unseen, seen], 0, asked[1])
    for label, effect in zip([*unseen, seen], found, strict=True):
        of_cells = model.individual_effects(asked[0], label, 0, asked[1]).mean(axis=0)
        if label == seen:
            np.testing.assert_allclose(effect, of_cells, atol=1e-6)
        others = ~np.isin(pairs.genes, label)
        assert np.corrcoef(effect[others], of_cells[others])[0, 1] > 0.97
        assert np.linalg.norm(effect - of_cells) < 0.25 * np.linalg.norm(of_cells)
    fewer = model.mean_effects(asked[0][:10], unseen, 0, replace(asked[1], strata=asked[1].strata[:10]))
    assert not np.allclose(fewer, found[:-1]), "other cells, other means"


@pytest.mark.slow
@pytest.mark.parametrize("name", LEARNED)
def test_inner_folds_of_a_closed_mean_calibrate_its_intervals(
    name: str, models: dict, screen: tuple[Pairs, Embeddings]
) -> None:
    model, artefact, run = models[name]
    restored = build(*registered(name, **quick(name)))
    restored.restore(artefact)
    found = [of.held_out(screen[0].roles("train", "validation"), screen[1], 0) for of in (model, restored)]
    training = set(screen[0].roles("train").perturbations)
    if "mean" in run.facts:
        assert set(found[0].labels) == training
        assert {"unseen gene", "seen"} <= set(found[0].novelties)
        np.testing.assert_allclose(found[0].scores, found[1].scores, rtol=1e-5)
    else:
        assert found[0].labels == []


@pytest.mark.parametrize("name", LEARNED)
def test_history_and_facts_are_written(name: str, models: dict) -> None:
    _, _, run = models[name]
    assert [row["step"] for row in run.history] == list(range(100, quick(name)["n_steps"] + 1, 100))
    assert run.history[-1]["loss"] < run.history[0]["loss"]
    assert any("validation_loss" in row for row in run.history)
    assert run.facts["n_parameters"] > 0


def test_gene_table_of_a_model_names_what_training_saw(models: dict) -> None:
    _, artefact, _ = models["jepa"]
    assert set(artefact["seen"]) <= set(artefact["condition_genes"])
    assert pd.Index(artefact["genes"]).is_unique


@pytest.mark.parametrize("name", FAMILIES)
def test_a_class_names_the_params_of_its_declaration(name: str) -> None:
    """`build` goes by the class, so that a training does not depend on the declarations of other families."""
    module, of = FAMILIES[name].implementation.split(":")
    model = getattr(importlib.import_module(f"perturbflow.models.{module}"), of)
    assert get_type_hints(model)["params"] is FAMILIES[name].params


@pytest.mark.parametrize(("balance", "share"), [("perturbations", 0.25), ("screens", 0.5)])
def test_batches_are_balanced_over_perturbations_or_screens(balance: str, share: float) -> None:
    """A screen of 5 perturbations beside one of 15 others has a quarter of every batch, or half of it."""
    pairs = made_lines(2, 20, n_genes=10, n_cells=6, n_batches=1).pairs
    of_small = np.isin(pairs.labels, pairs.perturbations[:5])
    is_small = (pairs.obs["dataset"] == "line1").to_numpy()
    training = pairs.rematched(pairs.is_control | (of_small == is_small), 0)
    z = torch.from_numpy((training.obs["dataset"] == "line1").to_numpy(np.float32)[:, None])
    conditions = Conditions(training.perturbations, np.zeros((20, 2), np.float32))
    sampler = PairedCells(training, z, conditions, 0.0, 0.0, 0.0, 1, balance=balance)
    batch = sampler.batch(8000, (0, 0))
    is_of_small = batch.target[:, 0] == 1
    assert float(is_of_small.float().mean()) == pytest.approx(share, abs=0.03)
    _, n = torch.unique(batch.genes[is_of_small, 0], return_counts=True)
    assert len(n) == 5
    torch.testing.assert_close(n / n.sum(), torch.full((5,), 0.2), atol=0.03, rtol=0)
    torch.testing.assert_close(batch.target, sampler.batch(8000, (0, 0)).target)
