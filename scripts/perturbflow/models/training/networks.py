"""Building blocks of the learned families."""

import itertools
import math

import torch
from torch import Tensor, nn

from perturbflow.models.training.conditions import Conditions


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
    """A vector per perturbed gene or drug: a projection of its embedding plus a part of its own, scaled by its dose.

    Training learns the own part, and drops it at random: then the projection has to serve alone, as it does for genes
    that training never perturbed. Their own part is zero. At a dose d the vector is scaled by
    2 sigmoid(a (log(1 + d) − m) / s). m and s are mean and deviation of log(1 + d) over the screen's doses; a is
    learned (scPPDM, eq. 16: strength rises with log dose and saturates). Without a dose the factor is 1.

    In a context with the vector c (`Contexts`) a vector v becomes v (1 + A c) + B c (Perez et al. 2018, FiLM).

    Parameters
    ----------
    conditions
        The entries that indices refer to.
    width
        Size of the vector.
    own_dropout
        Probability that a gene's own part is dropped in a training step.
    drops_together
        Whether it is dropped for all cells of the step or none. Under a loss on means over cells, a part that is
        dropped in some cells would be learned too large, to make up for these.
    """

    def __init__(self, conditions: Conditions, width: int, own_dropout: float, *, drops_together: bool = False) -> None:
        super().__init__()
        self.drops_together = drops_together
        self.register_buffer("vectors", conditions.vectors)
        self.register_buffer("base", conditions.base, persistent=False)
        self.register_buffer("log_dose", conditions.log_dose, persistent=False)
        self.project = nn.Linear(conditions.vectors.shape[1], width)
        self.own = nn.Parameter(torch.zeros(int(conditions.base.max()) + 1, width))
        self.dose_slope = nn.Parameter(torch.ones(()))
        self.own_dropout = own_dropout
        self.in_context: nn.Linear | None = None
        if conditions.contexts is not None:
            self.in_context = nn.Linear(conditions.contexts.n_dimensions, 2 * width, bias=False)

    def follow(self, conditions: Conditions) -> None:
        """Take over entries that were added: new doses of known drugs."""
        self.vectors, self.base, self.log_dose = conditions.vectors, conditions.base, conditions.log_dose

    def strength(self, genes: Tensor) -> Tensor:
        """(B, members) of indices → (B, members), 1 without a dose."""
        return 2.0 * torch.sigmoid(self.dose_slope * self.log_dose[genes.clamp(min=0)])

    def forward(self, genes: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, members) of indices, -1 for none → (B, members, width), zero where there is none.

        Parameters
        ----------
        context
            Vectors of contexts, (B, dimensions); None: the average context, or a network that is told of none.
        """
        index = genes.clamp(min=0)
        own = self.own[self.base[index]]
        if self.training:
            shape = (len(self.own),) if self.drops_together else genes.shape
            kept = torch.rand(shape, device=genes.device) >= self.own_dropout
            own = own * (kept[self.base[index]] if self.drops_together else kept)[..., None]
        scale = self.strength(genes) * (genes >= 0)
        vectors = self.project(self.vectors[index]) + own
        if self.in_context is not None and context is not None:
            gain, offset = self.in_context(context)[:, None].chunk(2, dim=-1)
            vectors = vectors * (1.0 + gain) + offset
        return vectors * scale[..., None]
