"""The forward process of diffusion in closed form, and three ways back: deterministic, second order, and ancestral.

A denoiser says what a noised latent z_t holds: the clean latent ẑ_0 and the noise ε̂, with z_t = α_t ẑ_0 + σ_t ε̂. A sampler is a function of
such a denoiser, so that an exact one can stand in for a network.
"""

import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

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
        z = alpha_s * clean + (sigma_s**2 - variance).clamp(min=0).sqrt() * noise + variance.clamp(min=0).sqrt() * draw()
    return z
