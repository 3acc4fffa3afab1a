"""scPPDM-style diffusion: denoise a latent of expression under two conditions, the cell's state and the perturbation.

After Liang et al. 2025 (arXiv 2510.11726), which has no public code; this is a reimplementation for CRISPR screens, where
the set of perturbed genes takes the place of drug and dose. The two conditions reach the network through cross-attention
of their own ("guided decomposable attention"), are never concatenated, and are dropped independently in training, so
that all four states {none, state, perturbation, both} are learned and guidance factorizes.
"""

import itertools
import math

import torch
from torch import Tensor, nn

from perturbflow.errors import InputError
from perturbflow.models.batches import Batch
from perturbflow.models.latent import LatentSpace
from perturbflow.models.learned import LearnedModel
from perturbflow.models.networks import GeneEncoder, TimeEmbedding, mlp


def cosine_schedule(t: Tensor) -> tuple[Tensor, Tensor]:
    """Return α(t), σ(t) of z_t = α z_0 + σ ε with α² + σ² = 1 (Nichol & Dhariwal 2021, eq. 17, without the offset)."""
    angle = t * (math.pi / 2)
    return angle.cos(), angle.sin()


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
        query = self.query(h).unflatten(-1, heads).transpose(-3, -2)  # (..., heads, tokens, width / heads)
        key, value = (part.unflatten(-1, heads).transpose(-3, -2) for part in self.key_value(keys).chunk(2, dim=-1))
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.out(attended.transpose(-3, -2).flatten(-2))


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
    """Predicts v = α ε − σ z_0 from a noised latent (Salimans & Ho 2022), under conditions that can each be absent."""

    def __init__(
        self,
        n_latent: int,
        vectors: Tensor,
        width: int,
        n_tokens: int,
        n_blocks: int,
        n_heads: int,
        dropout: float,
        own_dropout: float,
        condition_dropout: float,
    ) -> None:
        super().__init__()
        self.n_tokens, self.width, self.condition_dropout = n_tokens, width, condition_dropout
        self.gene_encoder = GeneEncoder(vectors, width, own_dropout)
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

    def forward(self, z: Tensor, t: Tensor, state: Tensor, genes: Tensor, has_state: Tensor, has_perturbation: Tensor) -> Tensor:
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
        """Mean squared error of v at a random time, conditions dropped independently."""
        B = len(batch.target)
        device = batch.target.device
        t = torch.rand(B, device=device)
        noise = torch.randn_like(batch.target)
        alpha, sigma = (value[:, None] for value in cosine_schedule(t))
        kept = torch.rand(2, B, device=device) >= self.condition_dropout
        v = self(alpha * batch.target + sigma * noise, t, batch.start, batch.genes, kept[0], kept[1])
        return {"loss": nn.functional.mse_loss(v, alpha * noise - sigma * batch.target)}


class Diffusion(LearnedModel):
    """Diffusion in latent space with two conditions and a guidance strength on each.

    v̂ = v(∅,∅) + s_state [v(state,∅) − v(∅,∅)] + s_perturbation [v(state,perturbation) − v(state,∅)], which is classifier-free
    guidance (Ho & Salimans 2022) factorized over the two conditions; at 1, 1 it is the conditional prediction. A few-step
    deterministic sampler runs on it.

    Parameters
    ----------
    width, n_tokens, n_blocks, n_heads, dropout, own_dropout, condition_dropout
        Of the network.
    guidance_state, guidance_perturbation
        s_state and s_perturbation.
    n_sampling_steps
        Of the sampler.
    fresh_noise
        Share of noise that is not the cell's own, 0 to 1.
    """

    def __init__(
        self,
        *,
        width: int,
        n_tokens: int,
        n_blocks: int,
        n_heads: int,
        dropout: float,
        own_dropout: float,
        condition_dropout: float,
        guidance_state: float,
        guidance_perturbation: float,
        n_sampling_steps: int,
        fresh_noise: float,
        **shared: float,
    ) -> None:
        super().__init__(**shared)
        if width % n_heads:
            raise InputError(f"params width = {width} cannot be shared by n_heads = {n_heads}; choose a multiple of it.")
        self.architecture = {
            "width": width, "n_tokens": n_tokens, "n_blocks": n_blocks, "n_heads": n_heads,
            "dropout": dropout, "own_dropout": own_dropout, "condition_dropout": condition_dropout,
        }  # fmt: skip
        self.guidance_state, self.guidance_perturbation = guidance_state, guidance_perturbation
        self.n_sampling_steps, self.fresh_noise = n_sampling_steps, fresh_noise

    def network(self, latent: LatentSpace, vectors: Tensor) -> Denoiser:
        """Return a new denoiser."""
        return Denoiser(latent.n_dimensions, vectors, **self.architecture)

    def guided(self, z: Tensor, t: Tensor, state: Tensor, genes: Tensor) -> Tensor:
        """Return v̂ under both guidance strengths; what a strength of 1 makes superfluous is not computed."""
        yes, no = torch.ones(len(z), dtype=torch.bool), torch.zeros(len(z), dtype=torch.bool)
        both = self.net(z, t, state, genes, yes, yes)
        s_state, s_perturbation = self.guidance_state, self.guidance_perturbation
        if s_state == 1.0 and s_perturbation == 1.0:
            return both
        state_only = self.net(z, t, state, genes, yes, no)
        if s_state == 1.0:
            return state_only + s_perturbation * (both - state_only)
        none = self.net(z, t, state, genes, no, no)
        return none + s_state * (state_only - none) + s_perturbation * (both - state_only)

    def flow(self, z: Tensor, state: Tensor, genes: Tensor, *, to_noise: bool) -> Tensor:
        """Run the deterministic sampler from noise to cells, or backwards from cells to the noise that they come from.

        DDIM, z_s = α_s ẑ_0 + σ_s ε̂ with ẑ_0 = α z − σ v̂ and ε̂ = σ z + α v̂ (Song et al. 2021, eq. 12 with η = 0).
        """
        times = torch.linspace(0.0, 1.0, self.n_sampling_steps + 1)
        times = times if to_noise else times.flip(0)
        for now, then in itertools.pairwise(times):
            alpha, sigma = cosine_schedule(now)
            v = self.guided(z, now.expand(len(z)), state, genes)
            clean, noise = alpha * z - sigma * v, sigma * z + alpha * v
            alpha, sigma = cosine_schedule(then)
            z = alpha * clean + sigma * noise
        return z

    def displace(self, start: Tensor, genes: Tensor, generator: torch.Generator) -> Tensor:
        """Return the difference between the cell sampled with and without the perturbation, from the same noise.

        The noise is the cell's own, found by running the sampler backwards under the control condition (dual diffusion
        implicit bridges, Su et al. 2023), with a share of fresh noise that makes outcomes a distribution. No perturbation
        makes no difference.
        """
        control = torch.full_like(genes, -1)
        own = self.flow(start, start, control, to_noise=True)
        fresh = torch.randn(start.shape, generator=generator)
        noise = math.sqrt(1.0 - self.fresh_noise**2) * own + self.fresh_noise * fresh
        both = self.flow(noise.repeat(2, 1), start.repeat(2, 1), torch.cat([genes, control]), to_noise=False)
        perturbed, unperturbed = both.chunk(2)
        return perturbed - unperturbed
