"""The network of scPPDM: noised latent, time and two conditions, each through an attention of its own, to what the noise is.

"Guided decomposable attention" of Liang et al. 2025 (arXiv 2510.11726), reimplemented without public code: the cell's state and the
perturbation are never concatenated, and each is dropped independently in training, so that all four states {none, state, perturbation,
both} are learned.
"""

import math

import torch
from torch import Tensor, nn

from perturbflow.models.batches import Batch
from perturbflow.models.conditions import Conditions
from perturbflow.models.networks import GeneEncoder, TimeEmbedding, mlp
from perturbflow.models.samplers import cosine_schedule

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
        score = (query.unsqueeze(-3) * key.unsqueeze(-4)).sum(dim=-1) / math.sqrt(query.shape[-1])  # (..., tokens, keys, heads)
        attended = (score.softmax(dim=-2).unsqueeze(-1) * value.unsqueeze(-4)).sum(dim=-3)  # (..., tokens, heads, width / heads)
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
