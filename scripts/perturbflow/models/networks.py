"""Building blocks that the learned families share."""

import itertools
import math

import torch
from torch import Tensor, nn


def mlp(*sizes: int, dropout: float = 0.0) -> nn.Sequential:
    """Return linear layers with SiLU between them."""
    layers: list[nn.Module] = []
    for i, (n_in, n_out) in enumerate(itertools.pairwise(sizes)):
        layers.append(nn.Linear(n_in, n_out))
        if i < len(sizes) - 2:
            layers += [nn.SiLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


class TimeEmbedding(nn.Module):
    """Sinusoids of t ∈ [0, 1] through two layers (Vaswani et al. 2017, section 3.5)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        half = width // 2
        self.register_buffer("frequencies", torch.exp(torch.linspace(0.0, math.log(1000.0), half)))
        self.layers = mlp(2 * half, width, width)

    def forward(self, t: Tensor) -> Tensor:
        """(B,) → (B, width)."""
        angles = t[:, None] * self.frequencies
        return self.layers(torch.cat([angles.sin(), angles.cos()], dim=-1))


class GeneEncoder(nn.Module):
    """A vector per perturbed gene: from its embedding, plus what training learned of this very gene.

    The own part is dropped at random in training, so that the embedding part has to stand alone for genes that
    training never saw perturbed: for them the own part is zero.

    Parameters
    ----------
    vectors
        Standardized gene embeddings, (genes, dimensions).
    width
        Size of the vector.
    own_dropout
        Probability that a gene's own part is dropped in a training step.
    """

    def __init__(self, vectors: Tensor, width: int, own_dropout: float) -> None:
        super().__init__()
        self.register_buffer("vectors", vectors)
        self.project = nn.Linear(vectors.shape[1], width)
        self.own = nn.Parameter(torch.zeros(len(vectors), width))
        self.own_dropout = own_dropout

    def forward(self, genes: Tensor) -> Tensor:
        """(B, members) of indices, -1 for none → (B, members, width), zero where there is none."""
        index = genes.clamp(min=0)
        own = self.own[index]
        if self.training:
            kept = torch.rand(genes.shape, device=genes.device) >= self.own_dropout
            own = own * kept[..., None]
        return (self.project(self.vectors[index]) + own) * (genes >= 0)[..., None]
