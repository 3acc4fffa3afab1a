"""The JEPA: its terms by hand, its stages on planted cells, its stopping, and the knowledge of its inner folds."""

import itertools
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Prepared
from learned import QUICK_JEPA, registered, trained
from scipy import sparse

import perturbflow.models.jepa as jepa_module
from perturbflow.embeddings import Embeddings
from perturbflow.errors import InputError
from perturbflow.genes.symbols import CONTROL, members_of
from perturbflow.models import jepa as probes
from perturbflow.models import jepa as representation
from perturbflow.models.base import Run, build
from perturbflow.models.closed_form.base import TrainingSet
from perturbflow.models.effects import Effects
from perturbflow.models.gaussian_process import set_gp
from perturbflow.models.jepa import (
    Encoder,
    JepaLatent,
    MaskedPrediction,
    Predictor,
    Recipe,
    Representation,
    count_split,
    covariance_term,
    effective_rank,
    separability,
    shared_map,
    variance_term,
)
from perturbflow.models.latents.vae import Cells, CellSampler
from perturbflow.models.training.batches import Batch, PairedCells
from perturbflow.models.training.conditions import Conditions
from perturbflow.models.training.learner import Learner, Optimization
from perturbflow.pairs import Pairs
from perturbflow.registry.families import JepaParams, JepaWeights

WEIGHTS = {"invariance": 25.0, "variance": 1.0, "covariance": 0.04}
PREDICTOR = JepaParams(width=32, dropout=0.0, own_dropout=0.0, weights=JepaWeights(steadiness=0.1))


@pytest.fixture(scope="module")
def jepa(screen: tuple[Pairs, Embeddings], tmp_path_factory: pytest.TempPathFactory) -> tuple:
    return trained("jepa", *screen, tmp_path_factory.mktemp("jepa"), **QUICK_JEPA)


def planted_cells(
    n: int = 600, n_genes: int = 40, n_programmes: int = 4, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return log1p-normalized cells, (n, genes), and the programmes behind their Poisson rates, (n, programmes)."""
    rng = np.random.default_rng(seed)
    programmes = rng.normal(size=(n, n_programmes))
    k = rng.poisson(np.exp(0.7 * programmes @ rng.normal(size=(n_programmes, n_genes)) / 2 + 1.5))
    return np.log1p(k * (200.0 / k.sum(axis=1, keepdims=True))).astype(np.float32), programmes


def cells_of(X: np.ndarray) -> Cells:
    drawn = CellSampler(sparse.csr_matrix(X))
    return drawn.batch(len(X), (0, 0, 0))


# --- stage A --------------------------------------------------------------------------------------------------------


def test_vicreg_terms_against_hand_computed_values() -> None:
    h = torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 4.0]])
    # Columns have variances 1 and 4, covariance 2: only the first has a hinge, 1 − √(1 + 1e-4) < 0, so both are zero.
    assert variance_term(h) == pytest.approx(0.0, abs=1e-6)
    assert covariance_term(h) == pytest.approx(2 * 2.0**2 / 2)
    assert variance_term(torch.zeros(5, 3)) == pytest.approx(1 - 0.01, abs=1e-6)
    assert effective_rank(torch.randn(500, 1) @ torch.randn(1, 8)) == pytest.approx(1.0, abs=1e-3)


def masked(
    n_genes: int = 7, n_embedding: int = 6, weights: dict[str, float] = WEIGHTS, decay: float = 0.9
) -> MaskedPrediction:
    torch.manual_seed(0)
    params = JepaParams(n_latent=n_embedding, target_decay=decay, weights=JepaWeights(**weights))
    return MaskedPrediction(Encoder(n_genes, n_embedding), params)


def test_target_encoder_is_the_moving_average_of_the_encoder() -> None:
    net = masked()
    before = [parameter.clone() for parameter in net.target_encoder.parameters()]
    for parameter in net.encoder.parameters():
        parameter.data += 1.0
    net.after_step(0.5)
    for old, new, encoder in zip(before, net.target_encoder.parameters(), net.encoder.parameters(), strict=True):
        torch.testing.assert_close(new, 0.9 * old + 0.1 * encoder)
        assert not new.requires_grad


def test_no_gradient_reaches_the_target_encoder_and_all_terms_count() -> None:
    net = masked(40)
    losses = net.losses(cells_of(planted_cells(64)[0]))
    losses["loss"].backward()
    assert all(parameter.grad is None for parameter in net.target_encoder.parameters())
    assert all(parameter.grad is not None for parameter in net.encoder.parameters())
    torch.testing.assert_close(losses["loss"], sum(WEIGHTS[name] * losses[name] for name in WEIGHTS))


def test_parts_of_a_cell_share_its_rates_and_no_noise() -> None:
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    rates = np.array([0.5, 3.0, 20.0, 8.0])
    k = rng.poisson(rates, (20_000, 4)).astype(np.float32)
    one = rng.uniform(0.5, 2.0, (20_000, 1)).astype(np.float32)
    first, second = count_split(
        Cells(torch.from_numpy(np.log1p(k * one)), torch.from_numpy(k), torch.from_numpy(one)), 0.7
    )
    counts = [torch.expm1(first) / torch.from_numpy(one) * 0.7, torch.expm1(second) / torch.from_numpy(one) * 0.3]
    torch.testing.assert_close(sum(counts), torch.from_numpy(k), atol=1e-3, rtol=1e-4)
    for part, share in zip(counts, (0.7, 0.3), strict=True):
        np.testing.assert_allclose(part.numpy(), np.rint(part.numpy()), atol=1e-3)
        np.testing.assert_allclose(part.mean(dim=0).numpy(), share * rates, rtol=0.05)
    for gene in range(4):
        assert abs(np.corrcoef(counts[0][:, gene], counts[1][:, gene])[0, 1]) < 0.03


def test_nothing_is_hidden_when_training_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    net = masked(40)
    cells, asked = cells_of(planted_cells(32)[0]), []
    monkeypatch.setattr(
        Encoder, "forward", lambda self, x, hidden=0.0: asked.append((x, hidden)) or self.layers(self.standardized(x))
    )
    for progress in (0.0, 0.4, 0.8, 1.0):
        net.after_step(progress)
        net.losses(cells)
    hidden = [share for _, share in asked[1::2]]
    assert hidden == pytest.approx([0.5, 0.25, 0.0, 0.0])
    share_seen = [float(torch.expm1(x).sum() / torch.expm1(cells.x).sum()) for x, _ in asked[1::2]]
    np.testing.assert_allclose(share_seen, 1.0, atol=0.1)  # parts are on the scale of whole cells


def recipe(*, stops: bool = True) -> Recipe:
    params = JepaParams(
        n_latent=8, n_steps_representation=300, n_steps_decoder=100, batch_size=64,
        when_broken="stop" if stops else "report",
    )  # fmt: skip
    return Recipe(params, Optimization(5e-3, 0.0, 0.9))


def stage_a(weights: dict[str, float], tmp_path: Path, *, stops: bool) -> tuple[MaskedPrediction, Run]:
    X, _ = planted_cells()
    net = masked(40, 32, weights)
    run = Run(seed=0, checkpoints=tmp_path, identity="test")
    return recipe(stops=stops).trained(run, net, CellSampler(sparse.csr_matrix(X)), 300, "stage_a"), run


@pytest.mark.slow
def test_without_vicreg_the_embedding_collapses_and_the_training_says_so(tmp_path: Path) -> None:
    alone = {"invariance": 25.0, "variance": 0.0, "covariance": 0.0}
    with pytest.raises(InputError, match="training was stopped at step 200 of 300: the embedding has collapsed"):
        stage_a(alone, tmp_path / "stop", stops=True)
    _, run = stage_a(alone, tmp_path / "report", stops=False)
    assert "the embedding has collapsed" in run.facts["stage_a"]["complaint"]
    _, run = stage_a(WEIGHTS, tmp_path / "vicreg", stops=True)
    assert "complaint" not in run.facts["stage_a"]
    assert run.facts["stage_a"]["history"][-1]["effective_rank"] > 9
    assert [row["step"] for row in run.facts["stage_a"]["history"]] == [100, 200, 300]


def test_the_embedding_holds_what_governs_a_cell(tmp_path: Path) -> None:
    X, programmes = planted_cells()
    net, _ = stage_a(WEIGHTS, tmp_path, stops=True)
    with torch.no_grad():
        h = net.target_encoder(torch.from_numpy(X)).numpy()
    h = np.column_stack([h, np.ones(len(h))])
    fitted = h[:300] @ np.linalg.lstsq(h[300:], programmes[300:], rcond=None)[0]
    left = ((fitted - programmes[:300]) ** 2).mean(axis=0) / programmes[:300].var(axis=0)
    assert left.max() < 0.35


# --- stage C --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_effects_of_training_come_back_in_their_size(jepa: tuple, screen: tuple[Pairs, Embeddings]) -> None:
    model, _, _ = jepa
    training = screen[0].roles("train")
    effects = Effects.of_training(training)
    shifts = training.groups.effects(training.groups.sums(model.latent.encode(training.X)))
    decoded = shifts @ model.latent.effect_map
    slope = (decoded * effects.values).sum() / (decoded**2).sum()
    assert slope == pytest.approx(1.0, abs=0.1)
    assert ((decoded - effects.values) ** 2).sum() < 0.3 * (effects.values**2).sum()
    np.testing.assert_allclose(model.latent.mean_change(shifts[:1]), decoded[0], rtol=1e-5)


def test_a_map_that_cells_and_effects_share_is_recovered() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=(3, 20))
    h, shifts = rng.normal(size=(500, 3)), rng.normal(size=(6, 3))
    of_cells = h.T @ h / 500, h.T @ (h @ true) / 500
    np.testing.assert_allclose(shared_map(*of_cells, shifts, shifts @ true), true, atol=0.02)
    other = shared_map(*of_cells, shifts, 2 * shifts @ true)
    assert 1.2 < (other * true).sum() / (true**2).sum() < 1.8  # cells and perturbations weigh alike


def test_cells_tell_the_map_nothing_of_effects(
    screen: tuple[Pairs, Embeddings], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = screen[0].roles("train")
    latent = JepaLatent(Representation(Encoder(len(training.genes), 5), 5, len(training.genes)))
    told: list[np.ndarray] = []
    monkeypatch.setattr(representation, "shared_map", lambda *tables: told.extend(tables) or shared_map(*tables))
    latent.fit_effect_map(training)
    within = told[:2]
    standardized = latent.encode(training.X)
    np.testing.assert_allclose(standardized.mean(axis=0), 0.0, atol=1e-4)
    np.testing.assert_allclose(standardized.std(axis=0), 1.0, atol=1e-4)
    X = training.X.toarray()
    h = latent.encode(training.X).astype(float)
    group = training.groups.of_cell
    mean_of = lambda values: np.stack([values[group == g].mean(axis=0) for g in group])  # noqa: E731
    np.testing.assert_allclose(within[0], (h - mean_of(h)).T @ (h - mean_of(h)) / len(h), atol=1e-4)
    np.testing.assert_allclose(within[1], (h - mean_of(h)).T @ (X - mean_of(X)) / len(h), atol=1e-4)


def test_an_embedding_survives_being_written(jepa: tuple, screen: tuple[Pairs, Embeddings]) -> None:
    latent = jepa[0].latent
    again = JepaLatent.restored(latent.state())
    X = screen[0].X[:30]
    np.testing.assert_array_equal(again.encode(X), latent.encode(X))
    moved = np.ones((30, latent.n_dimensions), dtype=np.float32)
    np.testing.assert_array_equal(again.mean_change(moved), latent.mean_change(moved))
    np.testing.assert_array_equal(
        again.log_fold_change(latent.encode(X), moved), latent.log_fold_change(latent.encode(X), moved)
    )


# --- stage B --------------------------------------------------------------------------------------------------------


class FlatLatent:
    """An embedding whose dimensions are its genes."""

    n_dimensions = 4
    effect_map = np.eye(4)


def predictor(**changes: object) -> Predictor:
    torch.manual_seed(0)
    conditions = Conditions([f"G{i}" for i in range(5)], torch.randn(5, 3).numpy())
    return Predictor(FlatLatent(), conditions, replace(PREDICTOR, **changes))


def test_no_perturbation_is_no_change_and_members_have_no_order() -> None:
    net, h = predictor().eval(), torch.randn(6, 4)
    mean, log_variance = net.predicted(h, torch.full((6, 2), -1))
    torch.testing.assert_close(mean, h, rtol=0, atol=0)
    torch.testing.assert_close(log_variance, net.own_log_variance.expand(6, -1))
    one, other = (net.predicted(h, torch.tensor([pair]).expand(6, -1))[0] for pair in ([1, 3], [3, 1]))
    torch.testing.assert_close(one, other)
    alone = [net.predicted(h, torch.tensor([[gene, -1]]).expand(6, -1))[0] - h for gene in (1, 3)]
    assert (one - h - alone[0] - alone[1]).abs().max() > 1e-4  # combinations may be more than a sum


def test_a_withheld_action_is_one_null_whatever_the_perturbation() -> None:
    net, h = predictor(action="withheld").eval(), torch.randn(6, 4)
    with torch.no_grad():
        net.null_action += 1.0
    null = net.predicted(h, torch.tensor([[1, -1]]).expand(6, -1))[0]
    torch.testing.assert_close(net.predicted(h, torch.tensor([[2, 3]]).expand(6, -1))[0], null)
    assert (null - h).abs().max() > 1e-3
    torch.testing.assert_close(net.predicted(h, torch.full((6, 2), -1))[0], h, rtol=0, atol=0)
    told = predictor().eval()
    told.load_state_dict(net.state_dict())
    some = torch.tensor([True, False] * 3)
    mixed = told.predicted(h, torch.tensor([[1, -1]]).expand(6, -1), some)[0]
    torch.testing.assert_close(mixed[~some], null[~some])
    assert (mixed[some] - null[some]).abs().max() > 1e-3


def planted_batch(shifts: torch.Tensor, sd: torch.Tensor, n: int = 512) -> Batch:
    """Return groups of cells of a linear world: single effects are shifts, a pair's is half of the sum."""
    group = torch.arange(n) // 32
    pairs = torch.tensor([[0, -1], [1, -1], [2, -1], [3, -1], [4, -1], [0, 1], [2, 3], [-1, -1]])
    genes = pairs[torch.randint(0, len(pairs), (group.max() + 1,))][group]
    is_member = (genes >= 0)[..., None]
    moved = (shifts[genes.clamp(min=0)] * is_member).sum(dim=1) * torch.where((genes >= 0).sum(dim=1) > 1, 0.5, 1.0)[
        :, None
    ]
    start, own = torch.randn(2, n, 4)
    return Batch(0.3 * start, 0.3 * own + moved + sd * torch.randn(n, 4), genes, group)


@pytest.fixture(scope="module")
def planted() -> tuple[Predictor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    shifts, sd = torch.randn(5, 4), torch.tensor([0.2, 0.5, 1.0, 0.4])
    net = predictor(own_dropout=0.3)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    for _ in range(800):
        optimizer.zero_grad()
        net.losses(planted_batch(shifts, sd))["loss"].backward()
        optimizer.step()
        schedule.step()
    return net.eval(), shifts, sd


@pytest.mark.slow
@torch.no_grad()
def test_a_planted_linear_world_is_recovered_interactions_too(planted: tuple) -> None:
    net, shifts, _ = planted
    h = 0.3 * torch.randn(500, 4)
    singles = [([[gene, -1]], shifts[gene]) for gene in range(5)]
    expected, predicted = [], []
    for genes, shift in (
        *singles,
        ([[0, 1]], 0.5 * (shifts[0] + shifts[1])),
        ([[2, 3]], 0.5 * (shifts[2] + shifts[3])),
    ):
        moved = (net.predicted(h, torch.tensor(genes).expand(500, -1))[0] - h).mean(dim=0)
        torch.testing.assert_close(moved, shift, atol=0.15, rtol=0)
        expected.append(shift)
        predicted.append(moved)
    slope = (torch.stack(predicted) * torch.stack(expected)).sum() / torch.stack(expected).pow(2).sum()
    assert slope == pytest.approx(1.0, abs=0.05)


@torch.no_grad()
@pytest.mark.slow
def test_predicted_spread_covers_what_happens(planted: tuple) -> None:
    net, shifts, sd = planted
    torch.manual_seed(5)
    batch = planted_batch(shifts, sd, 8192)
    mean, log_variance = net.predicted(batch.start, batch.genes)
    sampled = mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)
    covered = []
    for genes in batch.genes.unique(dim=0):
        same = (batch.genes == genes).all(dim=1)
        if (genes >= 0).any():
            low, high = torch.quantile(sampled[same], torch.tensor([0.05, 0.95]), dim=0)
            covered.append(((batch.target[same] >= low) & (batch.target[same] <= high)).float().mean(dim=0))
    np.testing.assert_allclose(torch.stack(covered).mean(dim=0).numpy(), 0.9, atol=0.04)


@torch.no_grad()
def test_what_is_watched_tells_a_used_action_from_an_ignored_one(planted: tuple) -> None:
    net, shifts, sd = planted
    batch = planted_batch(shifts, sd, 2048)
    watched = {name: float(value) for name, value in net.watch(batch).items()}
    assert watched["distance_right_action"] < 0.2 * min(
        watched["distance_wrong_action"], watched["distance_null_action"]
    )
    assert watched["action_share"] > 0.8
    assert net.complaint(watched) is None
    deaf = predictor(action="withheld").eval()
    watched = {name: float(value) for name, value in deaf.watch(batch).items()}
    assert watched["action_effect"] == pytest.approx(0.0, abs=1e-9)
    assert "ignores its action" in deaf.complaint(watched)


@torch.no_grad()
def test_a_wrong_action_is_wrong_in_every_batch_of_cells(planted: tuple) -> None:
    net, shifts, sd = planted
    batch = planted_batch(shifts, sd, 2048)
    of_batches = Batch(
        batch.start, batch.target, batch.genes, batch.group * 64 + torch.arange(2048) % 64
    )  # groups of single cells
    whole, parts = ({name: float(value) for name, value in net.watch(cells).items()} for cells in (batch, of_batches))
    for name in ("action_share", "action_effect"):
        assert parts[name] == pytest.approx(whole[name], rel=0.01)
    alone = Batch(
        *(
            getattr(batch, name)[(batch.genes == batch.genes[0]).all(dim=1)]
            for name in ("start", "target", "genes", "group")
        )
    )
    watched = net.watch(alone)
    assert set(watched) == {"distance_right_action", "distance_null_action"}
    assert net.complaint(watched) is None


def test_what_is_known_of_a_gene_itself_is_dropped_for_all_cells_or_none() -> None:
    net = predictor(own_dropout=0.5).train()
    with torch.no_grad():
        net.gene_encoder.own += 1.0
    genes = torch.tensor([[1, 3]] * 50)
    vectors = torch.stack([net.gene_encoder(genes) for _ in range(40)])  # (steps, cells, members, width)
    torch.testing.assert_close(vectors, vectors[:, :1].expand_as(vectors))
    assert len(vectors[:, 0, 0].unique(dim=0)) == 2


# --- the whole ------------------------------------------------------------------------------------------------------


def test_monitors_are_written_at_every_epoch(jepa: tuple) -> None:
    _, _, run = jepa
    for row in run.history:
        assert {
            "action_share",
            "distance_right_action",
            "distance_wrong_action",
            "distance_null_action",
            "action_effect",
        } <= set(row)
        assert "validation_distance_right_action" in row
    last = run.history[-1]
    assert last["distance_right_action"] < last["distance_null_action"]
    assert last["distance_right_action"] < last["distance_wrong_action"]
    assert last["validation_distance_right_action"] < last["validation_distance_null_action"]
    for row in run.facts["stage_a"]["history"]:
        assert {"invariance", "variance", "covariance", "embedding_sd", "effective_rank"} <= set(row)
    assert run.facts["stage_a"]["history"][-1]["embedding_sd"] > 0.3
    assert run.facts["stage_a"]["history"][-1]["effective_rank"] > 4
    assert set(run.facts["separability"]) >= {"perturbation"}


def test_an_embedding_that_learns_with_its_decoder_is_watched_too(tmp_path: Path) -> None:
    X, _ = planted_cells()
    run = Run(seed=0, checkpoints=tmp_path, identity="test")
    encoder = Encoder(40, 8)
    recipe().trained(run, Representation(encoder, 8, 40), CellSampler(sparse.csr_matrix(X)), 100, "stage_c")
    assert run.facts["stage_c"]["history"][-1]["effective_rank"] > 2
    frozen = Representation(encoder.requires_grad_(requires_grad=False), 8, 40)
    assert frozen.watch(cells_of(X)) == {}
    assert frozen.complaint({}) is None
    flat = Representation(Encoder(40, 8), 8, 40)
    with torch.no_grad():
        flat.encoder.layers[-1].weight.zero_()
        watched = {name: float(value) for name, value in flat.watch(cells_of(X)).items()}
    assert "the embedding has collapsed" in flat.complaint(watched)


@pytest.mark.slow
def test_an_ignored_action_stops_the_training_or_is_reported(screen: tuple[Pairs, Embeddings], tmp_path: Path) -> None:
    short = {
        "n_steps": 100,
        "n_steps_representation": 50,
        "n_steps_decoder": 20,
        "batch_size": 64,
        "n_latent": 8,
        "mean": "learned",
    }
    with pytest.raises(InputError, match="training was stopped at step 100 of 100: the predictor ignores its action"):
        trained("jepa", *screen, tmp_path / "stop", action="withheld", **short)
    _, _, run = trained("jepa_null_action", *screen, tmp_path / "report", **short)
    assert "ignores its action" in run.facts["complaint"]


def test_ablations_differ_from_the_model_in_what_they_say_alone() -> None:
    _, whole = registered("jepa")
    expected = {
        "jepa_off": {"self_supervised": False},
        "jepa_null_action": {"action": "withheld", "when_broken": "report"},
        "jepa_no_vicreg": {"weights": {**whole["weights"], "variance": 0, "covariance": 0}, "when_broken": "report"},
        "jepa_shuffled": {"action": "shuffled"},
    }
    for name, differing in expected.items():
        _, params = registered(name)
        assert {key: value for key, value in params.items() if value != whole[key]} == differing


def test_shuffled_actions_are_those_of_another_perturbation_of_the_same_order(screen: tuple[Pairs, Embeddings]) -> None:
    pairs, embeddings = screen
    training = pairs.roles("train")
    table = embeddings.standardized(Effects.of_training(training).genes)
    conditions = Conditions(list(table.index), table.to_numpy())
    z = torch.randn(len(training.rows), 3)
    right, wrong = (
        build(*registered(name)).training_cells(training, z, conditions, 0).genes for name in ("jepa", "jepa_shuffled")
    )
    order = [(genes >= 0).sum(dim=1) for genes in (right, wrong)]
    torch.testing.assert_close(*order)
    assert (right != wrong).any(dim=1).all()
    assert sorted(map(tuple, right.tolist())) == sorted(map(tuple, wrong.tolist()))


def predictor_of_fold(
    jepa: tuple, pairs: Pairs, embeddings: Embeddings, folder: Path, kind: str, *, spoil: bool, own: bool
) -> tuple[list[str], Callable[[str], np.ndarray], int]:
    """Return the labels that a fold holds out, its prediction of a label, and the number of controls it starts from.

    Held-out cells and the other controls are spoilt, or not.

    With an embedding of its own, the whole training's is spoilt altogether.
    """
    model, _, _ = jepa
    training = TrainingSet.of(pairs.roles("train", "validation"), embeddings, 0)
    kinds = {"combinations": [], "genes": []}
    for of_genes in (False, True):
        for fold in itertools.islice(training.rounds(of_genes=of_genes, one_by_one=False), 0, None, 2):
            kinds["genes" if set(training.effects.genes) - set(fold[0].effects.genes) else "combinations"].append(fold)
    inner, held_out = max(kinds[kind], key=lambda fold: len(fold[1].labels))
    start = training.pairs.rows[inner.controls]
    cells = training.pairs
    known = np.isin(cells.labels, inner.effects.labels) | cells.groups.is_of_half(inner.half)
    if spoil:
        cells = replace(cells, X=sparse.csr_matrix(np.where(known[:, None], cells.X.toarray(), 7.0).astype(np.float32)))
        inner = replace(inner, pairs=cells)
    table = embeddings.standardized(training.effects.genes)
    z = torch.from_numpy(model.latent.encode(training.pairs.X))
    if spoil:
        z = torch.where(torch.from_numpy(known & (not own))[:, None], z, 100.0)
    paired = PairedCells(cells, z, Conditions(list(table.index), table.to_numpy()), 0.1, 0.0, 0.7, 32)
    run = Run(seed=0, checkpoints=folder, identity="test")
    return held_out.labels, model.fit_network_means(paired, run)["predictor"](inner, start), len(start)


@pytest.mark.parametrize("own", [False, True], ids=["shared_embedding", "own_embedding"])
@pytest.mark.parametrize("kind", ["combinations", "genes"])
def test_inner_folds_know_nothing_of_what_they_hold_out(
    jepa: tuple, screen: tuple[Pairs, Embeddings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, own: bool
) -> None:
    monkeypatch.setattr(set_gp, "LEAST_HELD_OUT", 1)
    params = replace(
        jepa[0].params, n_steps=20, n_steps_representation=20, n_steps_decoder=20,
        fold_embedding="own" if own else "shared",
    )  # fmt: skip
    monkeypatch.setattr(jepa[0], "params", params)
    monkeypatch.setattr(jepa[0], "recipe", Recipe(params, jepa[0].optimization))
    labels, effect, n_starts = predictor_of_fold(jepa, *screen, tmp_path / "clean", kind, spoil=False, own=own)
    again, effect_of_spoilt, _ = predictor_of_fold(jepa, *screen, tmp_path / "spoilt", kind, spoil=True, own=own)
    assert labels == again
    clean, spoilt = (np.stack([said(label) for label in labels]) for said in (effect, effect_of_spoilt))
    np.testing.assert_array_equal(clean, spoilt)
    assert np.abs(clean).max() > 1e-4
    monkeypatch.setattr(Learner, "optimize_briefly", None)  # what is there is not trained again
    _, resumed, _ = predictor_of_fold(jepa, *screen, tmp_path / "clean", kind, spoil=False, own=own)
    np.testing.assert_array_equal(clean, np.stack([resumed(label) for label in labels]))
    monkeypatch.setitem(jepa[0].latent.network._buffers, "centre", jepa[0].latent.network.centre + 1.0)
    with nullcontext() if own else pytest.raises(TypeError):  # what was trained in another embedding is
        predictor_of_fold(jepa, *screen, tmp_path / "clean", kind, spoil=False, own=own)
    # Where all are too many to ask, the first are asked: they have to be any.
    starts, rows = effect.z, screen[0].roles("train", "validation").rows
    assert len(starts) == min(n_starts, jepa_module.STARTS)
    in_file = effect.latent.encode(screen[0].X[rows[screen[0].roles("train", "validation").is_control]])
    place = [int(np.abs(in_file - start).sum(axis=1).argmin()) for start in starts.numpy()]
    assert place != sorted(place)


@pytest.mark.slow
def test_an_embedding_that_collapses_in_a_fold_stops_the_training_or_is_told(caplog: pytest.LogCaptureFixture) -> None:
    cells = CellSampler(sparse.csr_matrix(planted_cells()[0]))
    alone = {"invariance": 25.0, "variance": 0.0, "covariance": 0.0}
    with pytest.raises(InputError, match="stopped in an inner fold: the embedding has collapsed"):
        recipe().trained_briefly(0, masked(40, 32, alone), cells, 300, "stage_a")
    recipe(stops=False).trained_briefly(0, masked(40, 32, alone), cells, 300, "stage_a")
    assert "jepa, inner fold, stage_a: the embedding has collapsed" in caplog.text
    recipe().trained_briefly(0, masked(40, 32, WEIGHTS), cells, 300, "stage_a")


def test_halves_of_controls_are_those_that_effects_are_measured_against(screen: tuple[Pairs, Embeddings]) -> None:
    training = screen[0].roles("train")
    groups = training.groups
    halves = [groups.is_of_half(half) for half in (0, 1)]
    assert (halves[0] | halves[1]).tolist() == training.is_control.tolist()
    assert not (halves[0] & halves[1]).any()
    for half, effects in (
        (1, Effects.with_disjoint_controls(training)[0]),
        (0, Effects.with_disjoint_controls(training)[1]),
    ):
        spoilt = training.X.toarray().astype(np.float64)
        spoilt[halves[1 - half]] = 1e6
        np.testing.assert_allclose(groups.effects(groups.sums(spoilt), half), effects.values, atol=1e-3)


def test_rematched_cells_have_controls_among_the_kept(screen: tuple[Pairs, Embeddings]) -> None:
    training = screen[0].roles("train")
    kept = training.rematched(training.groups.is_of_half(0) | (training.labels == training.perturbations[0]), 0)
    matched = kept.control_index[~kept.is_control]
    assert kept.is_control[matched].all()
    strata = kept.strata
    assert (strata[matched] == strata[~kept.is_control][:, None]).all()
    assert (kept.control_index[kept.is_control] == -1).all()


def test_a_planted_label_is_told_and_a_random_one_is_not(
    screen: tuple[Pairs, Embeddings], monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = screen[0].roles("train")
    rng = np.random.default_rng(0)
    X = rng.normal(size=(len(pairs.rows), 6)).astype(np.float32)
    side = np.where(X[:, 0] > 0, "right", "left")
    obs = pairs.obs.assign(batch=side, cell_type=rng.permutation(side), perturbation="one")

    class Identity:
        n_dimensions = 6

        def encode(self, X: np.ndarray) -> np.ndarray:
            return X

    told = separability(replace(pairs, X=sparse.csr_matrix(X), obs=obs), Identity(), 0)
    assert set(told) == {"batch", "cell_type"}
    assert told["batch"]["embedding_linear"] > 0.95
    assert told["batch"]["pca_linear"] > 0.95
    assert abs(told["cell_type"]["embedding_linear"] - 0.5) < 0.1
    rare = np.where(np.arange(len(side)) < 20, "rare", "common")
    obs = obs.assign(cell_type=rare)
    monkeypatch.setattr(probes, "MAX_CELLS", 100)
    assert "cell_type" not in separability(
        replace(pairs, X=sparse.csr_matrix(X), obs=obs), Identity(), 0
    )  # too few are left in the sample
    assert told["batch"]["chance"] == 0.5


def test_facts_can_be_written(jepa: tuple) -> None:
    facts = json.loads(json.dumps(jepa[2].facts))
    assert pd.DataFrame(facts["stage_a"]["history"]).notna().all().all()


@pytest.mark.slow
def test_a_ranking_and_an_answer_have_the_same_mean_effects(
    prepared: dict[str, Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many at once are those one by one, also of genes that borrow; effects on training's controls have this mean."""
    monkeypatch.setattr(set_gp, "LEAST_HELD_OUT", 1)
    files = prepared["unseen_perturbation"]
    pairs, embeddings = Pairs.read(files.pairs), Embeddings.read(files.embeddings)
    steps = {"n_steps": 20, "n_steps_representation": 20, "n_steps_decoder": 20}
    model, _, _ = trained("jepa", pairs, embeddings, tmp_path, **{**QUICK_JEPA, **steps, "when_broken": "report"})
    assert model.mean.out_of_fold["predictor"]
    unseen = next(label for label in pairs.roles("test").perturbations if len(members_of(label)) == 1)
    first, second = model.seen[:2]
    labels = [unseen, first, f"{first}+{second}", "+".join(sorted([first, unseen])), CONTROL]
    cells = model.population[:10]
    at_once, variances = model.mean_effects(cells, labels, 0), model.uncertainties(labels)
    for label, effect, variance in zip(labels[:-1], at_once, variances, strict=False):
        np.testing.assert_allclose(model.mean_effects(cells, [label], 0)[0], effect, rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(model.uncertainty(label), variance, rtol=1e-4, atol=1e-8)
        of_cells = model.individual_effects(model.population, label, 0).mean(axis=0)
        np.testing.assert_allclose(of_cells, effect, rtol=1e-3, atol=1e-5)
    assert not at_once[-1].any(), "no perturbation is no change"
    # What an unseen gene borrows is the weighted mean over its neighbours, one by one.
    z = torch.from_numpy(model.latent.encode(model.population))
    vector = model.conditions.vectors[model.conditions.index([unseen])[0, 0]].numpy().astype(float)
    weights = model.neighbours.weights(vector[None])[0]
    with torch.no_grad():
        shifts = [
            model.shift(z, model.conditions.index([gene]).expand(len(z), -1), None).mean(dim=0).numpy()
            for gene in model.neighbours.genes
        ]
    borrowed = model.neighbours.strength * weights @ np.stack(shifts) @ model.latent.effect_map
    found = model.network_means(z.numpy(), [unseen], None)["predictor"][0]
    np.testing.assert_allclose(found, borrowed, rtol=1e-3, atol=1e-5)
