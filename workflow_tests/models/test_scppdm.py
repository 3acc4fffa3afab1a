"""scPPDM: forward process, samplers and guidance against closed forms; a network on known conditionals; the hybrid."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import Prepared, make_screen, merged, prepare
from learned import registered, small_conditions, trained
from made_counts import two_states
from scipy import sparse, stats
from torch import Tensor

from perturbflow.embeddings import Embeddings, rows_of
from perturbflow.errors import InputError
from perturbflow.models import scppdm as denoiser
from perturbflow.models import scppdm as diffusion
from perturbflow.models import scppdm as samplers
from perturbflow.models.base import Run, build
from perturbflow.models.closed_form.base import TrainingSet
from perturbflow.models.effects import Effects
from perturbflow.models.gaussian_process.set_gp import SetGP
from perturbflow.models.latents.pca import LatentSpace
from perturbflow.models.latents.vae import CellSampler, CountLatent, negative_binomial
from perturbflow.models.training import networks
from perturbflow.models.training.batches import Batch
from perturbflow.models.training.conditions import Conditions
from perturbflow.models.training.learner import Optimization
from perturbflow.pairs import Pairs
from perturbflow.registry.config import latent_files
from perturbflow.registry.families import DiffusionParams
from perturbflow.registry.plan import Plan
from perturbflow.train import train

QUICK = {"n_steps": 300, "batch_size": 64, "n_latent": 16}


@pytest.fixture(scope="module")
def hybrid(screen: tuple[Pairs, Embeddings], tmp_path_factory: pytest.TempPathFactory) -> tuple:
    return trained("scppdm_hybrid", *screen, tmp_path_factory.mktemp("hybrid"), **QUICK)


# --- network and samplers -------------------------------------------------------------------------------------------


def test_cosine_schedule_preserves_variance_and_ends_in_noise() -> None:
    t = torch.linspace(0, 1, 11)
    alpha, sigma = samplers.cosine_schedule(t)
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(11))
    assert (alpha[0], sigma[0]) == (1.0, 0.0)
    assert alpha[-1].abs() < 1e-6


def small_denoiser(condition_dropout: float = 0.2, **changes: object) -> denoiser.Denoiser:
    torch.manual_seed(0)
    small = {"width": 16, "n_blocks": 1, "n_heads": 2, "dropout": 0.0, "own_dropout": 0.0}
    params = DiffusionParams(**{**small, "condition_dropout": condition_dropout, **changes})
    net = denoiser.Denoiser(6, small_conditions(), params).eval()
    torch.nn.init.normal_(net.out.weight, std=0.2)
    torch.nn.init.normal_(net.gene_encoder.own)
    return net


def test_each_of_the_four_condition_states_reaches_the_network_alone() -> None:
    net = small_denoiser()
    z, t, state, genes = torch.randn(1, 6), torch.tensor([0.5]), torch.randn(1, 6), torch.tensor([[1, -1]])
    other_state, other_genes = torch.randn(1, 6), torch.tensor([[2, 3]])
    out = {}
    for has_state in (False, True):
        for has_perturbation in (False, True):
            masks = torch.tensor([has_state]), torch.tensor([has_perturbation])
            out[has_state, has_perturbation] = net(z, t, state, genes, *masks)
            moved_state = not torch.allclose(out[has_state, has_perturbation], net(z, t, other_state, genes, *masks))
            moved_genes = not torch.allclose(out[has_state, has_perturbation], net(z, t, state, other_genes, *masks))
            assert moved_state == has_state
            assert moved_genes == has_perturbation
    values = list(out.values())
    assert all(not torch.allclose(a, b) for i, a in enumerate(values) for b in values[i + 1 :])
    control = net(z, t, state, torch.tensor([[-1, -1]]), torch.tensor([True]), torch.tensor([True]))
    assert not torch.allclose(control, out[True, False])  # control is a condition, not a dropped one


def test_order_of_members_makes_no_difference() -> None:
    net = small_denoiser()
    arguments = torch.randn(1, 6), torch.tensor([0.5]), torch.randn(1, 6)
    yes = torch.tensor([True])
    torch.testing.assert_close(
        net(*arguments, torch.tensor([[1, 3]]), yes, yes), net(*arguments, torch.tensor([[3, 1]]), yes, yes)
    )


class GaussianDenoiser(torch.nn.Module):
    """The exact v of a Gaussian N(mean, sd²) per dimension: E[α ε − σ z_0 | z_t]."""

    def __init__(self, mean: Tensor, sd: Tensor) -> None:
        super().__init__()
        self.mean, self.sd = mean, sd

    def forward(self, z: Tensor, t: Tensor, *conditions: Tensor) -> Tensor:
        alpha, sigma = (value[:, None] for value in samplers.cosine_schedule(t))
        variance = alpha**2 * self.sd**2 + sigma**2
        clean = self.mean + alpha * self.sd**2 / variance * (z - alpha * self.mean)
        noise = sigma / variance * (z - alpha * self.mean)
        return alpha * noise - sigma * clean


def test_sampler_recovers_a_gaussian_and_runs_backwards() -> None:
    implementation, params = registered("scppdm", n_sampling_steps=60)
    model = build(implementation, params)
    model.net = GaussianDenoiser(torch.tensor([1.0, -2.0]), torch.tensor([0.5, 1.5]))
    torch.manual_seed(0)
    noise, genes = torch.randn(4000, 2), torch.zeros(4000, 1, dtype=torch.long)
    cells = model.flow(noise, noise, genes, to_noise=False)
    torch.testing.assert_close(cells.mean(dim=0), torch.tensor([1.0, -2.0]), atol=0.08, rtol=0)
    torch.testing.assert_close(cells.std(dim=0), torch.tensor([0.5, 1.5]), atol=0.08, rtol=0)
    back = model.flow(cells, cells, genes, to_noise=True)
    assert (back - noise).abs().mean() < 0.1


def test_a_width_that_heads_cannot_share_is_refused() -> None:
    implementation, params = registered("scppdm", width=64, n_heads=3)
    with pytest.raises(InputError, match="width = 64 is not a multiple of n_heads = 3"):
        build(implementation, params)


def test_guidance_strengths_combine_the_four_predictions() -> None:
    implementation, params = registered("scppdm", guidance_state=1.5, guidance_perturbation=3.0)
    model = build(implementation, params)
    model.net = small_denoiser()
    z, t, state, genes = torch.randn(4, 6), torch.tensor(0.3), torch.randn(4, 6), torch.tensor([[1, -1]] * 4)
    yes, no = torch.ones(4, dtype=torch.bool), torch.zeros(4, dtype=torch.bool)
    none, state_only, both = (
        model.net(z, t.expand(4), state, genes, *masks) for masks in ((no, no), (yes, no), (yes, yes))
    )
    expected = none + 1.5 * (state_only - none) + 3.0 * (both - state_only)
    torch.testing.assert_close(model.guided(z, t, state, genes), samplers.split("v", z, t, expected))
    model.params = replace(model.params, guidance_state=1.0, guidance_perturbation=1.0)
    torch.testing.assert_close(model.guided(z, t, state, genes), samplers.split("v", z, t, both))


def test_the_forward_process_has_its_closed_form() -> None:
    torch.manual_seed(0)
    clean, noise = torch.tensor([[2.0, -1.0]]).expand(20_000, 2), torch.randn(20_000, 2)
    for t in (0.1, 0.5, 0.9):
        alpha, sigma = samplers.cosine_schedule(torch.tensor(t))
        z = alpha * clean + sigma * noise
        torch.testing.assert_close(z.mean(dim=0), alpha * clean[0], atol=0.03, rtol=0)
        torch.testing.assert_close(z.std(dim=0), sigma.expand(2), atol=0.02, rtol=0)
        for objective, output in (("v", alpha * noise - sigma * clean), ("noise", noise)):
            found = samplers.split(objective, z, torch.tensor(t), output)
            torch.testing.assert_close(found[0], clean, atol=1e-4, rtol=0)
            torch.testing.assert_close(found[1], noise, atol=1e-4, rtol=0)


def exact_mixture(means: Tensor, covariances: Tensor, weights: Tensor) -> samplers.Denoise:
    """Return the exact denoiser of a Gaussian mixture, means (K, D), covariances (K, D, D), weights (K,)."""

    def denoise(z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        alpha, sigma = samplers.cosine_schedule(t)
        parts, logits = [], []
        for mean, covariance, weight in zip(means, covariances, weights, strict=True):
            total = alpha**2 * covariance + sigma**2 * torch.eye(len(mean))
            parts.append(mean + alpha * (z - alpha * mean) @ torch.linalg.inv(total) @ covariance)
            logits.append(weight.log() + torch.distributions.MultivariateNormal(alpha * mean, total).log_prob(z))
        share = torch.softmax(torch.stack(logits), dim=0)
        clean = (share[..., None] * torch.stack(parts)).sum(dim=0)
        return clean, (z - alpha * clean) / sigma.clamp(min=1e-6)

    return denoise


MIXTURE = (
    torch.tensor([[2.0, 0.0], [-1.0, 1.5]]),
    torch.tensor([[[0.3, 0.1], [0.1, 0.2]], [[0.1, -0.05], [-0.05, 0.4]]]),
    torch.tensor([0.3, 0.7]),
)


@pytest.mark.parametrize("sampler", ["ddim", "dpm", "ancestral"])
def test_samplers_recover_means_covariances_and_weights_of_a_mixture(sampler: str) -> None:
    means, covariances, weights = MIXTURE
    torch.manual_seed(0)
    noise, times = torch.randn(20_000, 2), torch.linspace(1.0, 0.0, 201)
    denoise = exact_mixture(*MIXTURE)
    run = {
        "ddim": lambda: samplers.ddim(denoise, noise, times),
        "dpm": lambda: samplers.dpm(denoise, noise, times),
        "ancestral": lambda: samplers.ancestral(denoise, noise, times, lambda: torch.randn_like(noise)),
    }
    cells = run[sampler]()
    is_first = cells[:, 0] > 0.5
    assert is_first.float().mean() == pytest.approx(float(weights[0]), abs=0.02)
    for mask, mean, covariance in zip((is_first, ~is_first), means, covariances, strict=True):
        torch.testing.assert_close(cells[mask].mean(dim=0), mean, atol=0.06, rtol=0)
        torch.testing.assert_close(torch.cov(cells[mask].T), covariance, atol=0.06, rtol=0)


def test_the_second_order_sampler_needs_fewer_steps() -> None:
    denoise = exact_mixture(*MIXTURE)
    torch.manual_seed(0)
    noise = torch.randn(2_000, 2)
    exact = samplers.ddim(denoise, noise, torch.linspace(1.0, 0.0, 2001))
    errors = [
        (sampler(denoise, noise, torch.linspace(1.0, 0.0, 16)) - exact).norm(dim=1).median()
        for sampler in (samplers.ddim, samplers.dpm)
    ]
    assert errors[1] < 0.5 * errors[0]


class KnownConditionals(torch.nn.Module):
    """The exact v of N(a·state + b·perturbation, sd²), whatever conditions are dropped: their term goes."""

    sd, of_state, of_perturbation = 0.5, torch.tensor([2.0, 0.0]), torch.tensor([0.0, -3.0])

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        state: Tensor,
        genes: Tensor,
        has_state: Tensor,
        has_perturbation: Tensor,
        context: None = None,
    ) -> Tensor:
        is_perturbed = has_perturbation[:, None] & (genes >= 0).any(dim=1, keepdim=True)
        mean = has_state[:, None] * self.of_state + is_perturbed * self.of_perturbation
        return GaussianDenoiser(mean, torch.full((2,), self.sd))(z, t)


@pytest.mark.parametrize(("s_state", "s_perturbation"), [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (2.0, 0.5), (1.0, 3.0)])
def test_each_guidance_strength_scales_its_own_condition(s_state: float, s_perturbation: float) -> None:
    implementation, params = registered(
        "scppdm", n_sampling_steps=60, guidance_state=s_state, guidance_perturbation=s_perturbation
    )
    model = build(implementation, params)
    model.net = KnownConditionals()
    torch.manual_seed(0)
    noise, genes = torch.randn(4000, 2), torch.zeros(4000, 1, dtype=torch.long)
    cells = model.flow(noise, noise, genes, to_noise=False)
    expected = s_state * KnownConditionals.of_state + s_perturbation * KnownConditionals.of_perturbation
    torch.testing.assert_close(cells.mean(dim=0), expected, atol=0.06, rtol=0)
    torch.testing.assert_close(cells.std(dim=0), torch.full((2,), KnownConditionals.sd), atol=0.05, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["v", "noise"])
def test_a_trained_network_samples_known_conditionals(objective: str) -> None:
    torch.manual_seed(0)
    conditions = Conditions(["A", "B"], np.eye(2))
    net = denoiser.Denoiser(
        2,
        conditions,
        DiffusionParams(width=32, n_tokens=1, n_blocks=1, n_heads=2, dropout=0.0, own_dropout=0.0, objective=objective),
    )
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    moves = torch.tensor([[2.0, 0.0], [0.0, -2.0]])
    for _ in range(1500):
        genes = torch.randint(-1, 2, (256, 1))
        start = torch.randn(256, 2)
        target = 0.5 * torch.randn(256, 2) + torch.where(genes >= 0, moves[genes[:, 0].clamp(min=0)], 0.0)
        optimizer.zero_grad()
        net.losses(Batch(start, target, genes, torch.zeros(256))).pop("loss").backward()
        optimizer.step()
    implementation, params = registered("scppdm", objective=objective, n_sampling_steps=30)
    model = build(implementation, params)
    model.net, model.conditions = net.eval(), conditions
    with torch.no_grad():
        for gene, mean in ((-1, torch.zeros(2)), (0, moves[0]), (1, moves[1])):
            cells = model.flow(torch.randn(1000, 2), torch.randn(1000, 2), torch.full((1000, 1), gene), to_noise=False)
            torch.testing.assert_close(cells.mean(dim=0), mean, atol=0.25, rtol=0)
            torch.testing.assert_close(cells.std(dim=0), torch.full((2,), 0.5), atol=0.2, rtol=0)


def test_alignment_tells_perturbations_by_their_changes() -> None:
    torch.manual_seed(0)
    net = small_denoiser(alignment=1.0).train()
    genes = torch.tensor([[0, -1], [1, -1], [2, -1], [1, 2], [2, 1], [-1, -1]]).repeat(20, 1)
    moves = torch.randn(5, 6)
    change = sum(torch.where(genes[:, [i]] >= 0, moves[genes[:, i].clamp(min=0)], 0.0) for i in (0, 1))
    start = torch.randn(len(genes), 6)
    batch = Batch(start, start + change, genes, torch.zeros(len(genes)))
    before = float(net.aligned(batch).detach())
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        net.aligned(batch).backward()
        optimizer.step()
    assert float(net.aligned(batch).detach()) < 0.2 * before
    assert set(net.losses(batch)) == {"loss", "denoising", "alignment"}
    assert set(small_denoiser().losses(batch)) == {"loss"}
    one = Batch(start[:1], start[:1], genes[:1], torch.zeros(1))
    assert float(net.aligned(one).detach()) == 0.0


# --- doses ----------------------------------------------------------------------------------------------------------


def test_doses_of_one_drug_share_a_vector_and_differ_in_strength() -> None:
    conditions = Conditions(["Aspirin@1", "Aspirin@10", "Aspirin@100", "KLF1", "JQ@x"], np.ones((5, 2)))
    assert conditions.base.tolist() == [0, 0, 0, 1, 2]
    assert conditions.log_dose[3:].tolist() == [0.0, 0.0]
    encoder = networks.GeneEncoder(conditions, 4, 0.0).eval()
    torch.nn.init.normal_(encoder.own)
    strength = encoder.strength(torch.arange(5)[:, None])[:, 0]
    assert strength[0] < strength[1] < strength[2]
    assert strength[3:].tolist() == [1.0, 1.0]
    vectors = encoder(torch.arange(5)[:, None])[:, 0]
    torch.testing.assert_close(vectors[0] / strength[0], vectors[2] / strength[2])


def test_a_drug_at_a_dose_finds_the_row_of_the_drug() -> None:
    table = pd.DataFrame({"a": [1.0, 2.0]}, index=["Aspirin", "JQ@5"])
    assert rows_of(table, ["Aspirin@10", "JQ@5", "Other@1"])["a"].tolist()[:2] == [1.0, 2.0]


@pytest.mark.slow
def test_a_screen_of_doses_is_learned_and_asked_for_another_dose(tmp_path: Path) -> None:
    """Plant an effect that grows with the dose: a dose between those of training has an effect between theirs."""
    labels = ["TF1@1", "TF1@100", "TF2@1", "TF2@100", "TF3@1", "TF3@100"]
    screen = make_screen(labels=["TF1", "TF1", "TF2", "TF2", "TF3", "TF3"], n_cells=40)
    screen.obs["perturbation"] = screen.obs["perturbation"].astype(object)
    rng = np.random.default_rng(0)
    X = screen.X.toarray()
    controls = np.flatnonzero(screen.obs["perturbation"] == "control")
    for lane in ("b1", "b2"):
        rows = np.flatnonzero((screen.obs["lane"] == lane) & (screen.obs["perturbation"] != "control"))
        screen.obs.iloc[rows, 0] = np.repeat(labels, 40)
        weak = rows[[label.endswith("@1") for label in np.repeat(labels, 40)]]
        level = X[controls[screen.obs["lane"].iloc[controls] == lane]].mean(axis=0)
        X[weak] = rng.poisson(rng.gamma(8.0, level / 8.0, (len(weak), len(level))))  # the low dose does nothing
    screen.X = sparse.csr_matrix(X)
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"train": labels[:4], "validation": [], "test": labels[4:]}))
    files = prepare(tmp_path, screen, {"kind": "file", "path": str(split), "validation_fraction": 0.1, "seed": 0})
    pairs, embeddings = Pairs.read(files.pairs), Embeddings.read(files.embeddings)
    spec = replace(
        pairs,
        obs=pairs.obs.assign(role=pairs.obs["role"].astype(object).where(pairs.obs["role"] != "validation", "train")),
    )
    model, _, _ = trained("scppdm", spec, embeddings, tmp_path, n_steps=400, batch_size=64, n_latent=12, latent="pca")
    cells = pairs.roles("test")
    start = cells.X[np.flatnonzero(cells.is_control)].toarray()
    sizes = [
        np.linalg.norm((model.predict(start, [label], len(start), 0)[0] - start).mean(axis=0))
        for label in ("TF1@1", "TF1@10", "TF1@100")
    ]
    assert sizes[0] < 0.6 * sizes[2]
    assert sizes[0] < sizes[1] < sizes[2]
    assert "no embedding" in model.refusal("NOBODY@10")


# --- latents --------------------------------------------------------------------------------------------------------


def test_negative_binomial_against_scipy() -> None:
    k, mean, shape = torch.tensor([0.0, 3.0, 40.0]), torch.tensor([0.5, 4.0, 30.0]), torch.tensor([0.7, 2.0, 10.0])
    expected = stats.nbinom.logpmf(k.numpy(), shape.numpy(), (shape / (shape + mean)).numpy())
    np.testing.assert_allclose(negative_binomial(k, mean, shape).numpy(), expected, rtol=1e-5)


def test_the_latent_of_counts_tells_states_apart_and_moves_between_them(tmp_path: Path) -> None:
    pairs, _, shares, state = two_states()
    drawn = CellSampler(pairs.X).batch(32, (0, 0))
    np.testing.assert_allclose(drawn.k.numpy(), np.rint(drawn.k.numpy()))
    latent = CountLatent.fit(
        pairs, 4, 300, 64, Optimization(1e-3, 0.0, 0.9), Run(seed=0, checkpoints=tmp_path, identity="test")
    )
    z = latent.encode(pairs.X)
    np.testing.assert_allclose(z.std(axis=0), 1.0, atol=0.02)
    move = np.tile(z[state == 1].mean(axis=0) - z[state == 0].mean(axis=0), (int((state == 0).sum()), 1))
    fold = latent.log_fold_change(z[state == 0], move).mean(axis=0)
    assert np.corrcoef(fold, np.log(shares[1] / shares[0]))[0, 1] > 0.95
    assert np.abs(latent.log_fold_change(z, 0 * z)).max() < 1e-5
    restored = CountLatent.restored(latent.state())
    assert np.array_equal(restored.encode(pairs.X), z)


def test_a_latent_from_a_file_spans_its_directions(screen: tuple[Pairs, Embeddings], tmp_path: Path) -> None:
    pairs, _ = screen
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(len(pairs.genes), 5)), index=pd.Index(pairs.genes, name="gene")).drop(
        index=pairs.genes[4]
    )
    table.to_csv(tmp_path / "loadings.tsv", sep="\t")
    latent = LatentSpace.from_loadings(tmp_path / "loadings.tsv", pairs)
    assert latent.n_dimensions == 5
    assert not latent.basis[4].any()
    known = np.delete(np.arange(len(pairs.genes)), 4)
    coefficients = np.linalg.lstsq(latent.basis[known], table.to_numpy(), rcond=None)[0]
    np.testing.assert_allclose(latent.basis[known] @ coefficients, table.to_numpy(), atol=1e-9)
    np.testing.assert_allclose(latent.encode(pairs.roles("train").X).std(axis=0), 1.0, atol=0.02)
    table["again"] = table[0]
    table.to_csv(tmp_path / "dependent.tsv", sep="\t")
    with pytest.raises(InputError, match="6 directions are linearly dependent"):
        LatentSpace.from_loadings(tmp_path / "dependent.tsv", pairs)


def test_a_training_is_not_resumed_with_another_content_of_its_file(
    prepared: dict[str, Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, identities = prepared["unseen_combination"], []
    monkeypatch.setattr(
        diffusion.Diffusion, "fit", lambda self, pairs, embeddings, run: identities.append(run.identity) or {}
    )
    implementation, params = registered("scppdm", latent={"file": str(tmp_path / "loadings.tsv")})
    for i, rows in enumerate(("TF1\t1\nTF2\t2\n", "TF1\t1\nTF2\t2\n", "TF1\t2\nTF2\t1\n")):
        (tmp_path / "loadings.tsv").write_text("gene\ta\n" + rows)
        outputs = tmp_path / f"seed_{i}/model.ckpt", tmp_path / f"seed_{i}/run.json"
        train(here.pairs, here.embeddings, here.audit, *outputs, implementation, params, 0)
        assert "params/loadings.tsv" in json.loads(outputs[1].read_text())["inputs_sha256"]
    assert identities[0] == identities[1] != identities[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [{"latent": "counts"}, {"latent": "pca"}, {"latent": "counts", "mean": "closed_form"}, {"objective": "noise"},
     {"sampler": "dpm"},
     {"sampler": "ancestral"}, {"alignment": 0.1}, {"guidance_state": 1.5, "guidance_perturbation": 2.0}],
    ids=str,
)  # fmt: skip
def test_every_option_trains_restores_and_predicts(
    changes: dict, screen: tuple[Pairs, Embeddings], tmp_path: Path
) -> None:
    model, artefact, _ = trained(
        "scppdm", *screen, tmp_path, **{"n_steps": 60, "batch_size": 32, "n_latent": 8, **changes}
    )
    cells = screen[0].roles("test").X[:12].toarray()
    predicted = model.predict(cells, ["TF1+TF2", "control"], 12, 0)
    assert np.isfinite(predicted).all()
    np.testing.assert_allclose(predicted[1], cells, atol=1e-5)
    implementation, params = registered("scppdm", n_steps=60, batch_size=32, n_latent=8, **changes)
    again = build(implementation, params)
    again.restore(artefact)
    np.testing.assert_array_equal(again.predict(cells, ["TF1+TF2", "control"], 12, 0), predicted)
    np.testing.assert_allclose(
        again.individual_effects(cells, "TF1", 0), model.individual_effects(cells, "TF1", 0), atol=1e-6
    )


def test_a_mean_of_expected_shifts_is_that_of_each(hybrid: tuple, screen: tuple[Pairs, Embeddings]) -> None:
    model, _, _ = hybrid
    z = torch.from_numpy(model.latent.encode(screen[0].X[:20]))
    several = [
        torch.randint(0, len(model.conditions.genes), (20, 2)),
        torch.full((20, 2), -1),
        torch.tensor([[0, -1]]).repeat(20, 1),
    ]
    expected = torch.stack([model.shift(z, genes, None) for genes in several])
    torch.testing.assert_close(model.mean_shift(z, several), expected.mean(dim=0), atol=1e-5, rtol=1e-4)
    assert expected[1].abs().max() < 1e-5 < expected[2].abs().max()


def test_a_missing_file_of_loadings_is_named(tmp_path: Path) -> None:
    path = tmp_path / "loadings.tsv"
    mine = {"select": {"datasets": ["renge2023"], "splits": ["unseen_perturbation"], "models": ["own"], "seeds": [0],
                       "counterfactuals": []},
            "models": {"own": {"family": "diffusion", "params": {"latent": {"file": str(path)}}}}}  # fmt: skip
    with pytest.raises(InputError, match=r"models.own.params.latent.file: there is no file"):
        Plan(merged(mine))
    path.write_text("gene\ta\nSOX2\t1\n")
    assert latent_files(Plan(merged(mine)).config["models"]["own"]) == [str(path)]


# --- the hybrid ------------------------------------------------------------------------------------------------------


def test_a_screen_is_counted_the_same_for_the_same_seed(hybrid: tuple, screen: tuple[Pairs, Embeddings]) -> None:
    model, _, _ = hybrid
    cells = screen[0].roles("test").X[:20].toarray()
    first, again, other = (model.predict(cells, ["TF1+TF2"], 40, seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_the_mean_of_the_hybrid_is_the_closed_form(hybrid: tuple, screen: tuple[Pairs, Embeddings]) -> None:
    model, artefact, run = hybrid
    pairs, embeddings = screen
    mean = SetGP().learned(TrainingSet.of(pairs.roles("train", "validation"), embeddings, 0))
    assert run.facts["mean"] == mean.account()
    test = pairs.roles("test")
    for label in test.perturbations[:2]:
        np.testing.assert_allclose(model.mean.effect(label), mean.effect(label))
        start = test.X[test.control_index[test.cells_of(label), 0]].toarray()
        moved = model.predict(start, [label], len(start), 0)[0].mean(axis=0) - start.mean(axis=0)
        expected = np.maximum(start.mean(axis=0) + mean.effect(label), 0.0) - start.mean(axis=0)
        assert np.abs(moved - expected).mean() < 0.01
    implementation, params = registered("scppdm_hybrid", **QUICK)
    again = build(implementation, params)
    again.restore(artefact)
    np.testing.assert_array_equal(again.predict(start, ["TF1+TF2"], 5, 0), model.predict(start, ["TF1+TF2"], 5, 0))


def test_residuals_have_no_mean_left(screen: tuple[Pairs, Embeddings]) -> None:
    from perturbflow.models.training.batches import PairedCells, encoded

    pairs, embeddings = screen
    effects = Effects.of_training(pairs)
    latent = LatentSpace.fit(pairs, effects, 12)
    table = embeddings.standardized(effects.genes)
    conditions = Conditions(list(table.index), table.to_numpy())
    cells = PairedCells(
        pairs.roles("train"), encoded(pairs.roles("train"), latent), conditions, 0.0, 1.0, 0.0, 1, residual=True
    )
    batches = [cells.batch(500, (i,)) for i in range(6)]
    change = torch.cat([batch.target - batch.start for batch in batches])
    genes = torch.cat([batch.genes for batch in batches])
    for i in range(3):
        mask = (genes[:, 0] == i) & (genes[:, 1] < 0)
        if mask.sum() > 50:
            assert change[mask].mean(dim=0).abs().mean() < 0.25
