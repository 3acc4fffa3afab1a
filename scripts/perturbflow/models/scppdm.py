"""scPPDM-style diffusion: denoise a latent of expression under two conditions, the cell's state and the perturbation.

After Liang et al. 2025 (arXiv 2510.11726), which has no public code. This is a reimplementation for CRISPR screens and
drugs alike: a perturbation is a set of genes or drugs, each with a dose where there is one.

1. Forward process. z_t = α_t z_0 + σ_t ε, with α² + σ² = 1 and t from 0 (cell) to 1 (noise).
2. Network. `Denoiser` predicts v = α ε − σ z_0 from z_t, t and two conditions: the control cell's state, and the
   perturbation. The conditions are never concatenated. Each has an attention of its own and is dropped independently in
   training, so that all four states {none, state, perturbation, both} are learned ("guided decomposable attention").
3. Sampling. Three ways from noise to cells: deterministic, second order, and ancestral. The noise of a sample is mostly
   the control cell's own, found by the sampler run backwards.
4. Model. A cell's latent shift is the difference between its sample with and without the perturbation.

Two models share the family. With `mean: learned` (scppdm) the network owns the mean effect and the spread. With
`mean: closed_form` (scppdm_hybrid) it learns how cells differ from the mean of their perturbation; the mean effect is
that of `set_gp`.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from perturbflow.errors import InputError
from perturbflow.models.base import Run
from perturbflow.models.effects import Effects
from perturbflow.models.latents.exported import ENCODER, ExportedLatent
from perturbflow.models.latents.pca import Latent, LatentSpace
from perturbflow.models.latents.vae import CountLatent
from perturbflow.models.learned import LearnedModel
from perturbflow.models.training.batches import Batch
from perturbflow.models.training.conditions import Conditions
from perturbflow.models.training.networks import GeneEncoder, TimeEmbedding, mlp
from perturbflow.pairs import Pairs
from perturbflow.registry.families import DiffusionParams, LatentFile

# --- forward process --------------------------------------------------------------------------------------------------


def cosine_schedule(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return α(t), σ(t) of z_t = α z_0 + σ ε with α² + σ² = 1 (Nichol & Dhariwal 2021, eq. 17, without the offset)."""
    angle = t * (math.pi / 2)
    return angle.cos(), angle.sin()


# --- network ----------------------------------------------------------------------------------------------------------

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
        products = (query.unsqueeze(-3) * key.unsqueeze(-4)).sum(dim=-1)  # (..., tokens, keys, heads)
        weights = (products / math.sqrt(query.shape[-1])).softmax(dim=-2)
        attended = (weights.unsqueeze(-1) * value.unsqueeze(-4)).sum(dim=-3)  # (..., tokens, heads, width / heads)
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
            (B, members), 1 where there is a member. Each member is attended to alone, and the results are summed: the
            effects of a combination's members add up unless the layers learn otherwise.
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
    """Predicts v (Salimans & Ho 2022) or ε (Ho et al. 2020) from a noised latent, under conditions that can be absent.

    Parameters
    ----------
    n_latent
        Dimensions of the latent.
    conditions
        The genes and drugs that can be perturbed.
    params
        Of the family.
    """

    def __init__(self, n_latent: int, conditions: Conditions, params: DiffusionParams) -> None:
        super().__init__()
        width, n_tokens, n_blocks = params.width, params.n_tokens, params.n_blocks
        self.n_tokens, self.width, self.condition_dropout = n_tokens, width, params.condition_dropout
        self.objective, self.alignment = params.objective, params.alignment
        self.gene_encoder = GeneEncoder(conditions, width, params.own_dropout)
        self.gene_tokens = mlp(width, width, n_tokens * width)
        self.state_tokens = nn.Linear(n_latent, n_tokens * width)
        self.noised_tokens = nn.Linear(n_latent, n_tokens * width)
        self.no_state = nn.Parameter(torch.randn(n_tokens, width) * 0.02)
        self.no_perturbation = nn.Parameter(torch.randn(n_tokens, width) * 0.02)
        self.control = nn.Parameter(torch.randn(n_tokens, width) * 0.02)
        self.time = TimeEmbedding(width)
        self.blocks = nn.ModuleList([Block(width, params.n_heads, params.dropout) for _ in range(n_blocks)])
        self.out = nn.Linear(n_tokens * width, n_latent)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.align_action = nn.Linear(width, width, bias=False)
        self.align_change = mlp(n_latent, width, width)

    def forward(
        self,
        z: Tensor,
        t: Tensor,
        state: Tensor,
        genes: Tensor,
        has_state: Tensor,
        has_perturbation: Tensor,
        context: Tensor | None = None,
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
            (B, members), -1 for none. All -1 is the control condition; a dropped condition is another input.
        has_state, has_perturbation
            (B,) booleans: False where the condition is dropped.
        context
            Vectors of contexts, (B, dimensions): a part of the perturbation's condition.
        """
        is_used = (genes >= 0).any(dim=0)
        is_used[0] = True
        genes = genes[:, is_used]  # columns without any member only take time
        shape = (self.n_tokens, self.width)
        state = torch.where(has_state[:, None, None], self.state_tokens(state).unflatten(1, shape), self.no_state)
        tokens = self.gene_tokens(self.gene_encoder(genes, context)).unflatten(2, shape)  # (B, members, tokens, width)
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
        """Mean squared error of v or of the noise at a random time, plus the alignment term where it has weight.

        The two conditions are dropped independently.
        """
        B = len(batch.target)
        device = batch.target.device
        t = torch.rand(B, device=device)
        noise = torch.randn_like(batch.target)
        alpha, sigma = (value[:, None] for value in cosine_schedule(t))
        kept = torch.rand(2, B, device=device) >= self.condition_dropout
        noised = alpha * batch.target + sigma * noise
        output = self(noised, t, batch.start, batch.genes, kept[0], kept[1], batch.context)
        truth = noise if self.objective == "noise" else alpha * noise - sigma * batch.target
        loss = nn.functional.mse_loss(output, truth)
        if not self.alignment:
            return {"loss": loss}
        aligned = self.aligned(batch)
        return {"loss": loss + self.alignment * aligned, "denoising": loss, "alignment": aligned}

    def aligned(self, batch: Batch) -> Tensor:
        """InfoNCE between perturbations and their changes (van den Oord et al. 2018, eq. 4; scPPDM's alignment loss).

        It classifies each change z_0 − state among the perturbations of the batch. Cells of the same perturbation are
        one candidate.
        """
        perturbed = (batch.genes >= 0).any(dim=1)
        if perturbed.sum() < 2:
            return torch.zeros((), device=batch.target.device)
        sets = batch.genes[perturbed].sort(dim=1).values
        candidates, own = sets.unique(dim=0, return_inverse=True)
        action = nn.functional.normalize(self.align_action(self.gene_encoder(candidates).sum(dim=1)), dim=-1)
        change = nn.functional.normalize(self.align_change((batch.target - batch.start)[perturbed]), dim=-1)
        return nn.functional.cross_entropy(change @ action.T / TEMPERATURE, own)


# --- sampling ---------------------------------------------------------------------------------------------------------
#
# A denoiser splits z_t into the clean latent ẑ_0 and the noise ε̂. A sampler is a function of such a denoiser, so that
# an exact one can replace a network in a test.

# z (B, D) and t () → clean latent and noise, both (B, D)
Denoise = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def split(objective: str, z: Tensor, t: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
    """Return ẑ_0 and ε̂ of a network's output.

    With objective v, v = α ε − σ z_0 (Salimans & Ho 2022), so ẑ_0 = α z − σ v and ε̂ = σ z + α v. With objective noise,
    ε̂ is the output (Ho et al. 2020), and ẑ_0 = (z − σ ε̂) / α. Pure noise (α = 0) leaves this undefined, see
    `last_time`.
    """
    alpha, sigma = cosine_schedule(t)
    if objective == "noise":
        return (z - sigma * output) / alpha, output
    return alpha * z - sigma * output, sigma * z + alpha * output


def last_time(objective: str) -> float:
    """Return the time at which sampling starts: 1, or less where pure noise leaves the latent undefined."""
    return 0.97 if objective == "noise" else 1.0


def ddim(denoise: Denoise, z: Tensor, times: Tensor) -> Tensor:
    """Follow the deterministic sampler from noise to cells or back (Song et al. 2021, eq. 12 with η = 0)."""
    for now, then in itertools.pairwise(times):
        clean, noise = denoise(z, now)
        alpha, sigma = cosine_schedule(then)
        z = alpha * clean + sigma * noise
    return z


def dpm(denoise: Denoise, z: Tensor, times: Tensor) -> Tensor:
    """Follow DPM-Solver++(2M) from noise to cells (Lu et al. 2022, algorithm 2).

    The first and the last step are of first order.
    z_s = (σ_s/σ_t) z_t − α_s (e^{−h} − 1) D with h = λ_s − λ_t and λ = log(α/σ). D = (1 + 1/2r) ẑ_0 − (1/2r) ẑ_0' with
    r = h'/h; ẑ_0' and h' are those of the step before.
    """
    before = h_before = z  # the first step does not read them
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


def ancestral(denoise: Denoise, z: Tensor, times: Tensor, fresh: Callable[[], Tensor]) -> Tensor:
    """Follow the posterior of the forward process from noise to cells.

    It is Ho et al. 2020, eq. 7; Song et al. 2021, eq. 16 with η = 1.

    Parameters
    ----------
    fresh
        Returns standard normal noise, of the shape of z.
    """
    for now, then in itertools.pairwise(times):
        clean, noise = denoise(z, now)
        (alpha, sigma), (alpha_s, sigma_s) = cosine_schedule(now), cosine_schedule(then)
        variance = (sigma_s / sigma) ** 2 * (1 - (alpha / alpha_s) ** 2)
        kept = (sigma_s**2 - variance).clamp(min=0).sqrt() * noise
        z = alpha_s * clean + kept + variance.clamp(min=0).sqrt() * fresh()
    return z


# --- model ------------------------------------------------------------------------------------------------------------


class Diffusion(LearnedModel):
    """Diffusion in latent space with two conditions and a guidance strength on each.

    ẑ = f(∅,∅) + s_state [f(state,∅) − f(∅,∅)] + s_perturbation [f(state,perturbation) − f(state,∅)], which is
    classifier-free guidance (Ho & Salimans 2022) factorized over the two conditions; at 1, 1 it is the conditional
    prediction.
    """

    params: DiffusionParams
    net: Denoiser

    def __init__(self, params: DiffusionParams) -> None:
        super().__init__(params)
        if params.width % params.n_heads:
            raise InputError(
                f"params width = {params.width} is not a multiple of n_heads = {params.n_heads}; choose a multiple."
            )
        self.files = (Path(params.latent.file),) if isinstance(params.latent, LatentFile) else ()
        self.has_exported_encoder = any(path.suffix == ENCODER for path in self.files)
        self.learns_residuals = self.has_closed_mean

    def network(self, latent: Latent, conditions: Conditions) -> Denoiser:
        """Return a new denoiser."""
        return Denoiser(latent.n_dimensions, conditions, self.params)

    def fit_latent(self, pairs: Pairs, effects: Effects, run: Run) -> Latent:
        """Fit the latent space of the params."""
        of = self.params
        if of.latent == "counts":
            return CountLatent.fit(pairs, of.n_latent, of.n_steps, of.batch_size, self.optimization, run)
        if self.has_exported_encoder:
            return ExportedLatent.fit(self.files[0], pairs, of.n_steps, of.batch_size, self.optimization, run)
        if self.files:
            return LatentSpace.from_loadings(self.files[0], pairs)
        return super().fit_latent(pairs, effects, run)

    def restore_latent(self, state: dict[str, Tensor]) -> Latent:
        """Return the latent space of an artefact."""
        if self.has_exported_encoder:
            return ExportedLatent.restored(state, self.files[0], self.genes)
        return CountLatent.restored(state) if self.params.latent == "counts" else super().restore_latent(state)

    def guided(
        self, z: Tensor, t: Tensor, state: Tensor, genes: Tensor, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return clean latent and noise in z_t, (B, n_latent) each, with guidance; t is one time for all cells, ()."""
        yes = torch.ones(len(z), dtype=torch.bool, device=z.device)
        times = t.expand(len(z))
        s_state, s_perturbation = self.params.guidance_state, self.params.guidance_perturbation
        output = self.net(z, times, state, genes, yes, yes, context)
        if s_state != 1.0 or s_perturbation != 1.0:
            state_only = self.net(z, times, state, genes, yes, ~yes)
            difference = s_perturbation * (output - state_only)
            output = state_only + difference
            if s_state != 1.0:
                none = self.net(z, times, state, genes, ~yes, ~yes)
                output = none + s_state * (state_only - none) + difference
        return split(self.params.objective, z, t, output)

    def flow(
        self,
        z: Tensor,
        state: Tensor,
        genes: Tensor,
        context: Tensor | None = None,
        *,
        to_noise: bool,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Sample cells from noise; or run the deterministic sampler backwards, from cells to their noise.

        Parameters
        ----------
        generator
            Of the fresh noise of the ancestral sampler. Without one the deterministic sampler replaces it.
        """
        times = torch.linspace(0.0, last_time(self.params.objective), self.params.n_sampling_steps + 1)
        denoise = partial(self.guided, state=state, genes=genes, context=context)
        if to_noise:
            return ddim(denoise, z, times)
        times = times.flip(0)
        if self.params.sampler == "ancestral" and generator is not None:
            half = (len(z) // 2, z.shape[1])  # perturbed and unperturbed cells share their noise
            return ancestral(denoise, z, times, lambda: torch.randn(half, generator=generator).repeat(2, 1))
        return (dpm if self.params.sampler == "dpm" else ddim)(denoise, z, times)

    def shift(
        self, z: Tensor, genes: Tensor, generator: torch.Generator | None, context: Tensor | None = None
    ) -> Tensor:
        """Return the difference between the cell sampled with and without the perturbation, from the same noise.

        The noise is the cell's own, found by the sampler run backwards under the control condition (dual diffusion
        implicit bridges, Su et al. 2023). A share of fresh noise makes outcomes a distribution.
        """
        control = torch.full_like(genes, -1)
        own = self.flow(z, z, control, to_noise=True)
        noise = own
        if generator is not None:
            share = self.params.fresh_noise
            noise = math.sqrt(1.0 - share**2) * own + share * torch.randn(z.shape, generator=generator)
        twice = None if context is None else context.repeat(2, 1)
        conditions = z.repeat(2, 1), torch.cat([genes, control]), twice
        both = self.flow(noise.repeat(2, 1), *conditions, to_noise=False, generator=generator)
        perturbed, unperturbed = both.chunk(2)
        return perturbed - unperturbed

    def mean_shift(self, z: Tensor, several: Sequence[Tensor], context: Tensor | None = None) -> Tensor:
        """Return the mean of the expected shifts. All share the cells' own noise and unperturbed samples."""
        control = torch.full_like(several[0], -1)
        own = self.flow(z, z, control, to_noise=True)
        after = partial(self.flow, own, z, to_noise=False)
        return sum(after(genes, context) for genes in several) / len(several) - after(control)
