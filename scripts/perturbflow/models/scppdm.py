"""scPPDM-style diffusion: denoise a latent of expression under two conditions, the cell's state and the perturbation.

After Liang et al. 2025 (arXiv 2510.11726), which has no public code; this is a reimplementation for CRISPR screens and drugs alike: a
perturbation is a set of genes or drugs, each with a dose where there is one. `denoiser` holds the network, `samplers` the way from noise
to cells, `recount` the way from the latent to cells that are counts.

Two models share the family. With `mean: learned` (scppdm) the network owns the mean and the spread. With `mean: closed_form` (scppdm_hybrid)
it is trained on what cells differ by from the mean of their perturbation, and the mean of a new perturbation is that of
`set_gp`, a Gaussian process over sets of genes.


The forward process of diffusion in closed form, and three ways back: deterministic, second order, and ancestral.

A denoiser says what a noised latent z_t holds: the clean latent ẑ_0 and the noise ε̂, with z_t = α_t ẑ_0 + σ_t ε̂. A sampler is a function of
such a denoiser, so that an exact one can stand in for a network.


The network of scPPDM: noised latent, time and two conditions, each through an attention of its own, to what the noise is.

"Guided decomposable attention" of Liang et al. 2025 (arXiv 2510.11726), reimplemented without public code: the cell's state and the
perturbation are never concatenated, and each is dropped independently in training, so that all four states {none, state, perturbation,
both} are learned.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perturbflow.errors import InputError
from perturbflow.models.base import Run
from perturbflow.models.effects import Effects
from perturbflow.models.latents.exported import ENCODER, ExternalLatent
from perturbflow.models.latents.pca import Latent, LatentSpace
from perturbflow.models.latents.vae import CountLatent
from perturbflow.models.learned import LearnedModel
from perturbflow.models.training.batches import Batch
from perturbflow.models.training.conditions import Conditions
from perturbflow.models.training.networks import GeneEncoder, TimeEmbedding, mlp
from perturbflow.pairs import Pairs

# --- denoiser ---

TEMPERATURE = 0.1  # of the alignment term


class Attention(nn.Module):
    """Attention from tokens to keys (Vaswani et al. 2017), without biases or dropout."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, h: Tensor, keys: Tensor) -> Tensor:
        """(..., tokens, width), (..., keys, width) → (..., tokens, width)."""
        heads = (self.n_heads, -1)
        query = self.query(h).unflatten(-1, heads)  # (..., tokens, heads, width / heads)
        key, value = (part.unflatten(-1, heads) for part in self.key_value(keys).chunk(2, dim=-1))
        # Two tokens by two keys: products and sums are several times as fast as a kernel made for long sequences.
        score = (query.unsqueeze(-3) * key.unsqueeze(-4)).sum(dim=-1) / math.sqrt(
            query.shape[-1]
        )  # (..., tokens, keys, heads)
        attended = (score.softmax(dim=-2).unsqueeze(-1) * value.unsqueeze(-4)).sum(
            dim=-3
        )  # (..., tokens, heads, width / heads)
        return self.out(attended.flatten(-2))


class Block(nn.Module):
    """Self-attention, one cross-attention per condition, and an MLP, each scaled and shifted by time."""

    def __init__(self, width: int, n_heads: int, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width, elementwise_affine=False) for _ in range(4)])
        self.modulate = nn.Linear(width, 8 * width)
        self.attend_self = Attention(width, n_heads)
        self.attend_state = Attention(width, n_heads)
        self.attend_perturbation = Attention(width, n_heads)
        self.layers = mlp(width, 2 * width, width, dropout=dropout)

    def forward(self, h: Tensor, time: Tensor, state: Tensor, perturbation: Tensor, members: Tensor) -> Tensor:
        """Update tokens.

        Parameters
        ----------
        h
            (B, tokens, width).
        time
            (B, width).
        state
            (B, tokens, width).
        perturbation
            (B, members, tokens, width).
        members
            (B, members), 1 where there is a member. Each member is attended to alone and the results are summed, so
            that effects of a combination's members add up unless the layers learn otherwise.
        """
        scale_shift = self.modulate(time)[:, None].chunk(8, dim=-1)

        def normed(i: int) -> Tensor:
            return self.norms[i](h) * (1 + scale_shift[2 * i]) + scale_shift[2 * i + 1]

        q = normed(0)
        h = h + self.attend_self(q, q)
        h = h + self.attend_state(normed(1), state)
        queries = normed(2)[:, None].expand(-1, perturbation.shape[1], -1, -1)
        h = h + (members[:, :, None, None] * self.attend_perturbation(queries, perturbation)).sum(dim=1)
        return h + self.layers(normed(3))


class Denoiser(nn.Module):
    """Predicts v = α ε − σ z_0 (Salimans & Ho 2022) or ε (Ho et al. 2020) from a noised latent, under conditions that can each be absent.

    Parameters
    ----------
    n_latent
        Dimensions of the latent.
    conditions
        The genes and drugs that can be perturbed.
    width, n_tokens, n_blocks, n_heads, dropout, own_dropout
        Of the network.
    condition_dropout
        Probability that a condition is dropped in training, the same for both and independent.
    objective
        v or noise.
    alignment
        Weight of the InfoNCE term.
    """

    def __init__(
        self,
        n_latent: int,
        conditions: Conditions,
        width: int,
        n_tokens: int,
        n_blocks: int,
        n_heads: int,
        dropout: float,
        own_dropout: float,
        condition_dropout: float,
        objective: str,
        alignment: float,
    ) -> None:
        super().__init__()
        self.n_tokens, self.width, self.condition_dropout = n_tokens, width, condition_dropout
        self.objective, self.alignment = objective, alignment
        self.gene_encoder = GeneEncoder(conditions, width, own_dropout)
        self.gene_tokens = mlp(width, width, n_tokens * width)
        self.state_tokens = nn.Linear(n_latent, n_tokens * width)
        self.noised_tokens = nn.Linear(n_latent, n_tokens * width)
        self.no_state = nn.Parameter(torch.randn(n_tokens, width) * 0.02)
        self.no_perturbation = nn.Parameter(torch.randn(n_tokens, width) * 0.02)
        self.control = nn.Parameter(torch.randn(n_tokens, width) * 0.02)
        self.time = TimeEmbedding(width)
        self.blocks = nn.ModuleList([Block(width, n_heads, dropout) for _ in range(n_blocks)])
        self.out = nn.Linear(n_tokens * width, n_latent)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.align_action = nn.Linear(width, width, bias=False)
        self.align_change = mlp(n_latent, width, width)

    def forward(
        self, z: Tensor, t: Tensor, state: Tensor, genes: Tensor, has_state: Tensor, has_perturbation: Tensor
    ) -> Tensor:
        """Return v.

        Parameters
        ----------
        z
            Noised latent, (B, n_latent).
        t
            (B,), 0 clean to 1 noise.
        state
            Latent of the control cell, (B, n_latent).
        genes
            (B, members), -1 for none; all -1 is the control condition, which is not the same as a dropped one.
        has_state, has_perturbation
            (B,) booleans: False where the condition is dropped.
        """
        is_used = (genes >= 0).any(dim=0)
        is_used[0] = True
        genes = genes[:, is_used]  # a column that no cell of the batch has a member in costs time and says nothing
        shape = (self.n_tokens, self.width)
        state = torch.where(has_state[:, None, None], self.state_tokens(state).unflatten(1, shape), self.no_state)
        tokens = self.gene_tokens(self.gene_encoder(genes)).unflatten(2, shape)  # (B, members, tokens, width)
        is_member = (genes >= 0).clone()
        is_control = ~is_member.any(dim=1)
        # Control and "dropped" are tokens too: they take the place of the first member.
        replaced = torch.where(has_perturbation[:, None, None], self.control, self.no_perturbation)
        use = (is_control | ~has_perturbation)[:, None, None]
        tokens = torch.cat([torch.where(use, replaced, tokens[:, 0])[:, None], tokens[:, 1:]], dim=1)
        is_member = is_member & has_perturbation[:, None]
        is_member[:, 0] = True
        h = self.noised_tokens(z).unflatten(1, shape)
        time = self.time(t)
        for block in self.blocks:
            h = block(h, time, state, tokens, is_member.to(h.dtype))
        return self.out(h.flatten(1))

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Mean squared error of v or of the noise at a random time, conditions dropped independently; and alignment, if it has weight."""
        B = len(batch.target)
        device = batch.target.device
        t = torch.rand(B, device=device)
        noise = torch.randn_like(batch.target)
        alpha, sigma = (value[:, None] for value in cosine_schedule(t))
        kept = torch.rand(2, B, device=device) >= self.condition_dropout
        output = self(alpha * batch.target + sigma * noise, t, batch.start, batch.genes, kept[0], kept[1])
        truth = noise if self.objective == "noise" else alpha * noise - sigma * batch.target
        loss = nn.functional.mse_loss(output, truth)
        if not self.alignment:
            return {"loss": loss}
        aligned = self.aligned(batch)
        return {"loss": loss + self.alignment * aligned, "denoising": loss, "alignment": aligned}

    def aligned(self, batch: Batch) -> Tensor:
        """InfoNCE between perturbations and the changes that they make (van den Oord et al. 2018, eq. 4; scPPDM's alignment loss).

        A change z_0 − state has to find its own perturbation among those of the batch; cells of the same perturbation are one candidate.
        """
        perturbed = (batch.genes >= 0).any(dim=1)
        if perturbed.sum() < 2:
            return torch.zeros((), device=batch.target.device)
        sets = batch.genes[perturbed].sort(dim=1).values
        candidates, own = sets.unique(dim=0, return_inverse=True)
        action = nn.functional.normalize(self.align_action(self.gene_encoder(candidates).sum(dim=1)), dim=-1)
        change = nn.functional.normalize(self.align_change((batch.target - batch.start)[perturbed]), dim=-1)
        with torch.autocast(change.device.type, enabled=False):  # with layers in bfloat16 too
            return nn.functional.cross_entropy(change.float() @ action.float().T / TEMPERATURE, own)


# --- samplers ---

# z (B, D) and t () → clean latent and noise, both (B, D)
Denoise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def cosine_schedule(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return α(t), σ(t) of z_t = α z_0 + σ ε with α² + σ² = 1 (Nichol & Dhariwal 2021, eq. 17, without the offset)."""
    angle = t * (math.pi / 2)
    return angle.cos(), angle.sin()


def split(objective: str, z: Tensor, t: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """Return ẑ_0 and ε̂ of a network's output.

    v: v = α ε − σ z_0 (Salimans & Ho 2022), so ẑ_0 = α z − σ v and ε̂ = σ z + α v. noise: ε̂ is the output (Ho et al. 2020), and
    ẑ_0 = (z − σ ε̂) / α, which pure noise (α = 0) leaves undefined: the last time is `last_time`.
    """
    alpha, sigma = cosine_schedule(t)
    if objective == "noise":
        return (z - sigma * output) / alpha, output
    return alpha * z - sigma * output, sigma * z + alpha * output


def last_time(objective: str) -> float:
    """Return where sampling starts: all noise, or where a predicted noise still says something of the latent."""
    return 0.97 if objective == "noise" else 1.0


def ddim(denoise: Denoise, z: Tensor, times: Tensor) -> Tensor:
    """Follow the deterministic sampler along times, from noise to cells or back (Song et al. 2021, eq. 12 with η = 0)."""
    for now, then in itertools.pairwise(times):
        clean, noise = denoise(z, now)
        alpha, sigma = cosine_schedule(then)
        z = alpha * clean + sigma * noise
    return z


def dpm(denoise: Denoise, z: Tensor, times: Tensor) -> Tensor:
    """Follow DPM-Solver++(2M) from noise to cells (Lu et al. 2022, algorithm 2); first and last step are of first order.

    z_s = (σ_s/σ_t) z_t − α_s (e^{−h} − 1) D, h = λ_s − λ_t, λ = log(α/σ), D = (1 + 1/2r) ẑ_0 − (1/2r) ẑ_0', r = h'/h of the step before.
    """
    before = h_before = z  # of no step as yet, and not read in the first
    for i, (now, then) in enumerate(itertools.pairwise(times)):
        clean, _ = denoise(z, now)
        (alpha, sigma), (alpha_s, sigma_s) = cosine_schedule(now), cosine_schedule(then)
        h = torch.log(alpha_s / sigma_s.clamp(min=1e-12)) - torch.log(alpha.clamp(min=1e-12) / sigma)
        D = clean
        if 0 < i < len(times) - 2:
            ratio = h / (2 * h_before)
            D = (1 + ratio) * clean - ratio * before
        z = (sigma_s / sigma) * z - alpha_s * torch.expm1(-h) * D
        before, h_before = clean, h
    return z


def ancestral(denoise: Denoise, z: Tensor, times: Tensor, draw: Callable[[], Tensor]) -> Tensor:
    """Follow the posterior of the forward process from noise to cells (Ho et al. 2020, eq. 7; Song et al. 2021, eq. 16 with η = 1).

    Parameters
    ----------
    draw
        Fresh standard normal noise, of the shape of z.
    """
    for now, then in itertools.pairwise(times):
        clean, noise = denoise(z, now)
        (alpha, sigma), (alpha_s, sigma_s) = cosine_schedule(now), cosine_schedule(then)
        variance = (sigma_s / sigma) ** 2 * (1 - (alpha / alpha_s) ** 2)
        z = (
            alpha_s * clean
            + (sigma_s**2 - variance).clamp(min=0).sqrt() * noise
            + variance.clamp(min=0).sqrt() * draw()
        )
    return z


# --- diffusion ---


class Diffusion(LearnedModel):
    """Diffusion in latent space with two conditions and a guidance strength on each.

    ẑ = f(∅,∅) + s_state [f(state,∅) − f(∅,∅)] + s_perturbation [f(state,perturbation) − f(state,∅)], which is classifier-free
    guidance (Ho & Salimans 2022) factorized over the two conditions; at 1, 1 it is the conditional prediction.

    Parameters
    ----------
    latent
        pca, counts, or {"file": table of gene loadings, or an encoder}, see `LatentSpace.from_loadings` and `ExternalLatent`.
    width, n_tokens, n_blocks, n_heads, dropout, own_dropout, condition_dropout, objective, alignment
        Of the network and its training, see `Denoiser`.
    guidance_state, guidance_perturbation
        s_state and s_perturbation.
    dose_guidance
        γ of s_perturbation · 2 sigmoid(γ d), d the standardized log dose: above 0 a higher dose is guided more; 0 leaves it to training.
    sampler, n_sampling_steps
        ddim, dpm or ancestral, and its steps.
    fresh_noise
        Share of noise that is not the cell's own, 0 to 1.
    """

    def __init__(
        self,
        *,
        latent: str | dict[str, str],
        width: int,
        n_tokens: int,
        n_blocks: int,
        n_heads: int,
        dropout: float,
        own_dropout: float,
        condition_dropout: float,
        objective: str,
        alignment: float,
        guidance_state: float,
        guidance_perturbation: float,
        dose_guidance: float,
        sampler: str,
        n_sampling_steps: int,
        fresh_noise: float,
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        if width % n_heads:
            raise InputError(
                f"params width = {width} cannot be shared by n_heads = {n_heads}; choose a multiple of it."
            )
        self.architecture: dict[str, Any] = {
            "width": width, "n_tokens": n_tokens, "n_blocks": n_blocks, "n_heads": n_heads, "dropout": dropout,
            "own_dropout": own_dropout, "condition_dropout": condition_dropout, "objective": objective, "alignment": alignment,
        }  # fmt: skip
        self.latent_kind, self.objective = latent, objective
        self.files = (Path(latent["file"]),) if isinstance(latent, dict) else ()
        self.has_external_encoder = any(path.suffix == ENCODER for path in self.files)
        self.learns_residuals = self.has_closed_mean
        self.guidance_state, self.guidance_perturbation, self.dose_guidance = (
            guidance_state,
            guidance_perturbation,
            dose_guidance,
        )
        self.sampler, self.n_sampling_steps, self.fresh_noise = sampler, n_sampling_steps, fresh_noise

    def network(self, latent: Latent, conditions: Conditions) -> Denoiser:
        """Return a new denoiser."""
        return Denoiser(latent.n_dimensions, conditions, **self.architecture)

    def fit_latent(self, pairs: Pairs, effects: Effects, run: Run) -> Latent:
        """Fit the latent space of the params."""
        if self.latent_kind == "counts":
            return CountLatent.fit(pairs, self.n_latent, self.n_steps, self.batch_size, self.optimization, run)
        if isinstance(self.latent_kind, dict):
            if self.has_external_encoder:
                return ExternalLatent.fit(self.files[0], pairs, self.n_steps, self.batch_size, self.optimization, run)
            return LatentSpace.from_loadings(self.files[0], pairs)
        return super().fit_latent(pairs, effects, run)

    def restore_latent(self, state: dict[str, Tensor]) -> Latent:
        """Return the latent space of an artefact."""
        if self.has_external_encoder:
            return ExternalLatent.restored(state, self.files[0], self.genes)
        return CountLatent.restored(state) if self.latent_kind == "counts" else super().restore_latent(state)

    def guided(self, z: Tensor, t: Tensor, state: Tensor, genes: Tensor) -> tuple[Tensor, Tensor]:
        """Return what z_t is taken to hold, clean latent and noise, with guidance; t is one time for all cells, ()."""
        yes = torch.ones(len(z), dtype=torch.bool, device=z.device)
        times = t.expand(len(z))
        s_state, s_perturbation = self.guidance_state, self.strength(genes)
        output = self.net(z, times, state, genes, yes, yes)
        if s_state != 1.0 or (s_perturbation != 1.0).any():
            state_only = self.net(z, times, state, genes, yes, ~yes)
            difference = s_perturbation * (output - state_only)
            output = state_only + difference
            if s_state != 1.0:
                none = self.net(z, times, state, genes, ~yes, ~yes)
                output = none + s_state * (state_only - none) + difference
        return split(self.objective, z, t, output)

    def strength(self, genes: Tensor) -> Tensor:
        """Return s_perturbation of every cell, (B, 1): it rises with the log dose of its members, where it is to and they have one."""
        s = torch.full((len(genes), 1), self.guidance_perturbation)
        if not self.dose_guidance:
            return s
        index = genes.clamp(min=0)
        n_members = (genes >= 0).sum(dim=1, keepdim=True).clamp(min=1)
        dose = (self.conditions.log_dose[index] * (genes >= 0)).sum(dim=1, keepdim=True) / n_members
        return s * 2.0 * torch.sigmoid(self.dose_guidance * dose)

    def flow(
        self, z: Tensor, state: Tensor, genes: Tensor, *, to_noise: bool, generator: torch.Generator | None = None
    ) -> Tensor:
        """Sample cells from noise; or run the deterministic sampler backwards from cells to the noise that they come from.

        Parameters
        ----------
        generator
            Of the fresh noise of the ancestral sampler; without it the deterministic one stands in.
        """
        times = torch.linspace(0.0, last_time(self.objective), self.n_sampling_steps + 1)
        denoise = partial(self.guided, state=state, genes=genes)
        if to_noise:
            return ddim(denoise, z, times)
        times = times.flip(0)
        if self.sampler == "ancestral" and generator is not None:
            half = (len(z) // 2, z.shape[1])  # perturbed and unperturbed cells share their noise
            return ancestral(denoise, z, times, lambda: torch.randn(half, generator=generator).repeat(2, 1))
        return (dpm if self.sampler == "dpm" else ddim)(denoise, z, times)

    def displace(self, start: Tensor, genes: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the difference between the cell sampled with and without the perturbation, from the same noise.

        The noise is the cell's own, found by running the sampler backwards under the control condition (dual diffusion
        implicit bridges, Su et al. 2023), with a share of fresh noise that makes outcomes a distribution. No perturbation
        makes no difference.
        """
        control = torch.full_like(genes, -1)
        own = self.flow(start, start, control, to_noise=True)
        noise = own
        if generator is not None:
            fresh = torch.randn(start.shape, generator=generator)
            noise = math.sqrt(1.0 - self.fresh_noise**2) * own + self.fresh_noise * fresh
        both = self.flow(
            noise.repeat(2, 1), start.repeat(2, 1), torch.cat([genes, control]), to_noise=False, generator=generator
        )
        perturbed, unperturbed = both.chunk(2)
        return perturbed - unperturbed

    def mean_displacement(self, start: Tensor, several: Sequence[Tensor]) -> Tensor:
        """Return the mean of the expected displacements: the cells' own noise, and what becomes of it without a perturbation, are the same for all."""
        control = torch.full_like(several[0], -1)
        own = self.flow(start, start, control, to_noise=True)
        after = partial(self.flow, own, start, to_noise=False)
        return sum(after(genes) for genes in several) / len(several) - after(control)
