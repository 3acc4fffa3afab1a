"""scPPDM-style diffusion: denoise a latent of expression under two conditions, the cell's state and the perturbation.

After Liang et al. 2025 (arXiv 2510.11726), which has no public code; this is a reimplementation for CRISPR screens and drugs alike: a
perturbation is a set of genes or drugs, each with a dose where there is one. `denoiser` holds the network, `samplers` the way from noise
to cells, `recount` the way from the latent to cells that are counts.

Two models share the family. With `mean: learned` (scppdm) the network owns the mean and the spread. With `mean: closed_form` (scppdm_hybrid)
it is trained on what cells differ by from the mean of their perturbation, and the mean of a new perturbation is that of
`set_gp`, a Gaussian process over sets of genes.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perturbflow.errors import InputError
from perturbflow.models.autoencoder import CountLatent
from perturbflow.models.base import Run
from perturbflow.models.conditions import Conditions
from perturbflow.models.denoiser import Denoiser
from perturbflow.models.effects import Effects
from perturbflow.models.external import ENCODER, ExternalLatent
from perturbflow.models.latent import Latent, LatentSpace
from perturbflow.models.learned import LearnedModel
from perturbflow.models.samplers import ancestral, ddim, dpm, last_time, split
from perturbflow.pairs import Pairs


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
            raise InputError(f"params width = {width} cannot be shared by n_heads = {n_heads}; choose a multiple of it.")
        self.architecture: dict[str, Any] = {
            "width": width, "n_tokens": n_tokens, "n_blocks": n_blocks, "n_heads": n_heads, "dropout": dropout,
            "own_dropout": own_dropout, "condition_dropout": condition_dropout, "objective": objective, "alignment": alignment,
        }  # fmt: skip
        self.latent_kind, self.objective = latent, objective
        self.files = (Path(latent["file"]),) if isinstance(latent, dict) else ()
        self.has_external_encoder = any(path.suffix == ENCODER for path in self.files)
        self.learns_residuals = self.has_closed_mean
        self.guidance_state, self.guidance_perturbation, self.dose_guidance = guidance_state, guidance_perturbation, dose_guidance
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

    def flow(self, z: Tensor, state: Tensor, genes: Tensor, *, to_noise: bool, generator: torch.Generator | None = None) -> Tensor:
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
        both = self.flow(noise.repeat(2, 1), start.repeat(2, 1), torch.cat([genes, control]), to_noise=False, generator=generator)
        perturbed, unperturbed = both.chunk(2)
        return perturbed - unperturbed

    def mean_displacement(self, start: Tensor, several: Sequence[Tensor]) -> Tensor:
        """Return the mean of the expected displacements: the cells' own noise, and what becomes of it without a perturbation, are the same for all."""
        control = torch.full_like(several[0], -1)
        own = self.flow(start, start, control, to_noise=True)
        after = partial(self.flow, own, start, to_noise=False)
        return sum(after(genes) for genes in several) / len(several) - after(control)
