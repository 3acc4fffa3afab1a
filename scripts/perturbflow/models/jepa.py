"""JEPA: predict the embedding of a perturbed cell from the embedding of a control cell and the perturbation.

A joint-embedding predictive architecture (Assran et al. 2023, arXiv 2301.08243; action-conditioned as in V-JEPA 2-AC,
arXiv 2506.09985). Three parts are trained together: a masked part that embeds a cell from some of its genes, the mask
shrinking to nothing, so that training ends where inference starts; a world model from control embedding and perturbation
to a distribution of perturbed embeddings; a decoder back to expression. Targets come from a moving average of the encoder;
the world model is compared with groups of perturbed cells, not with single ones, since cells are not truly paired;
variance and covariance terms (VICReg, Bardes et al. 2022, arXiv 2105.04906) keep the embedding from collapsing.
"""

import copy

import torch
from torch import Tensor, nn

from perturbflow.models.batches import Batch
from perturbflow.models.conditions import Conditions
from perturbflow.models.latent import LatentSpace
from perturbflow.models.learned import LearnedModel
from perturbflow.models.networks import GeneEncoder, mlp


def variance_term(h: Tensor) -> Tensor:
    """Mean hinge on the standard deviation of every dimension, max(0, 1 − sd) (VICReg, eq. 1), (B, D) → ()."""
    return torch.relu(1.0 - torch.sqrt(h.var(dim=0) + 1e-4)).mean()


def covariance_term(h: Tensor) -> Tensor:
    """Sum of squared off-diagonal covariances over D (VICReg, eq. 4), (B, D) → ()."""
    centred = h - h.mean(dim=0)
    covariance = centred.T @ centred / (len(h) - 1)
    return (covariance.pow(2).sum() - covariance.diagonal().pow(2).sum()) / h.shape[1]


def effective_rank(h: Tensor) -> Tensor:
    """Exponential of the entropy of normalized singular values (Roy & Vetterli 2007), (B, D) → ()."""
    values = torch.linalg.svdvals(h - h.mean(dim=0))
    share = values / values.sum().clamp(min=1e-12)
    return torch.exp(-(share * torch.log(share.clamp(min=1e-12))).sum())


class Groups:
    """Cells that share perturbation, batch and cell type: not truly paired, so only their distributions can be compared.

    Parameters
    ----------
    group
        (B,) of group codes.
    """

    def __init__(self, group: Tensor) -> None:
        codes, self.member = group.unique(return_inverse=True)
        self.n = len(codes)
        self.size = torch.bincount(self.member, minlength=self.n)

    def mean(self, values: Tensor) -> Tensor:
        """Return group means, (B, D) → (groups, D)."""
        summed = torch.zeros(self.n, values.shape[1], dtype=values.dtype, device=values.device)
        return summed.index_add(0, self.member, values) / self.size[:, None]


class Decoder(nn.Module):
    """Embedding to latent coordinates of expression: a linear map plus a small correction, so that shifts stay shifts."""

    def __init__(self, n_embedding: int, width: int, n_latent: int) -> None:
        super().__init__()
        self.linear = nn.Linear(n_embedding, n_latent)
        self.correction = mlp(n_embedding, width, n_latent)

    def forward(self, h: Tensor) -> Tensor:
        """(B, embedding) → (B, n_latent)."""
        return self.linear(h) + self.correction(h)


class World(nn.Module):
    """Encoder, target encoder, predictor and decoder."""

    def __init__(
        self,
        latent: LatentSpace,
        conditions: Conditions,
        width: int,
        n_embedding: int,
        dropout: float,
        own_dropout: float,
        action_dropout: float,
        mask_rate: float,
        target_decay: float,
        weights: dict[str, float],
    ) -> None:
        super().__init__()
        n_genes, n_latent = latent.basis.shape
        self.action_dropout, self.mask_rate, self.target_decay, self.weights = action_dropout, mask_rate, target_decay, weights
        self.register_buffer("progress", torch.zeros(()))
        # Genes seen by the encoder: expression as the latent space knows it, each gene in units of its own deviation.
        loadings = torch.as_tensor(latent.basis * latent.scale, dtype=torch.float32)
        self.register_buffer("loadings", loadings / loadings.norm(dim=1, keepdim=True).clamp(min=1e-3))
        self.gene_encoder = GeneEncoder(conditions, width, own_dropout)
        self.encoder = mlp(n_genes, width, width, n_embedding)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(requires_grad=False)
        self.fill = mlp(n_embedding, width, n_embedding)
        self.predictor = mlp(n_embedding + width, width, width, 2 * n_embedding, dropout=dropout)
        self.null_action = nn.Parameter(torch.zeros(width))
        self.own_log_variance = nn.Parameter(torch.full((n_embedding,), -2.0))
        self.decoder = Decoder(n_embedding, width, n_latent)

    def expression(self, z: Tensor) -> Tensor:
        """Latent coordinates to standardized genes, (B, n_latent) → (B, genes)."""
        return z @ self.loadings.T

    def predicted(self, h: Tensor, genes: Tensor, has_action: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of the embedding after a perturbation.

        The shift is a sum over members: without a member it is zero, so that no perturbation is no change. A withheld
        action is one member, the learned null.

        Parameters
        ----------
        h
            Embedding of control cells, (B, D).
        genes
            (B, members), -1 for none.
        has_action
            (B,), False where the perturbation is withheld.
        """
        tokens = self.gene_encoder(genes)  # (B, members, width)
        is_member = genes >= 0
        withheld = ~has_action
        first = torch.where(withheld[:, None], self.null_action, tokens[:, 0])
        tokens = torch.cat([first[:, None], tokens[:, 1:]], dim=1)
        is_member = torch.cat([(is_member[:, 0] | withheld)[:, None], is_member[:, 1:] & has_action[:, None]], dim=1)
        joint = torch.cat([h[:, None].expand(-1, tokens.shape[1], -1), tokens], dim=-1)
        out = self.predictor(joint) * is_member[..., None]
        shift, log_variance = out.sum(dim=1).chunk(2, dim=-1)
        return h + shift, (self.own_log_variance + log_variance).clamp(-6.0, 3.0)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Masked prediction, world model, VICReg and decoding; and monitors of collapse and of an ignored action."""
        start, target = self.expression(batch.start), self.expression(batch.target)
        with torch.no_grad():
            target_embedding = self.target_encoder(target)
        rate = self.mask_rate * max(0.0, 1.0 - 2.0 * float(self.progress)) if self.training else 0.0
        kept = (torch.rand_like(target) >= rate).to(target.dtype) / (1.0 - rate)
        context = self.encoder(target * kept)
        h = self.encoder(start)
        groups = Groups(batch.group)
        has_action = torch.rand(groups.n, device=h.device)[groups.member] >= (self.action_dropout if self.training else 0.0)
        mean, log_variance = self.predicted(h, batch.genes, has_action)
        centre = groups.mean(mean)
        spread = groups.mean((mean - centre[groups.member]).pow(2) + torch.exp(log_variance))
        error = (target_embedding - centre[groups.member]).pow(2) / spread[groups.member]
        decoded, measured = groups.mean(self.decoder(mean)), groups.mean(batch.target)
        terms = {
            "masked": (self.fill(context) - target_embedding).pow(2).mean(),
            "world": 0.5 * (error + spread[groups.member].log()).mean(),
            "steadiness": (mean - h - groups.mean(mean - h)[groups.member]).pow(2).mean(),
            "variance": variance_term(h) + variance_term(context),
            "covariance": covariance_term(h) + covariance_term(context),
            "decoding": (self.decoder(self.encoder(target)) - batch.target).pow(2).mean(),
            "effect": (decoded - measured).pow(2)[groups.member].mean(),
        }
        loss = sum(self.weights[name] * value for name, value in terms.items())
        monitors = {}
        if not self.training:
            with torch.no_grad():
                wrong, _ = self.predicted(h, batch.genes.roll(len(h) // 2, dims=0), has_action)
                after = groups.mean(target_embedding)
                monitors = {
                    "embedding_sd": target_embedding.std(dim=0).mean(),
                    "effective_rank": effective_rank(target_embedding),
                    "distance_right_action": (centre - after).pow(2).mean(),
                    "distance_wrong_action": (groups.mean(wrong) - after).pow(2).mean(),
                    "distance_no_action": (groups.mean(h) - after).pow(2).mean(),
                }
        return {"loss": loss, **terms, **monitors}

    def after_step(self, progress: float) -> None:
        """Move the target encoder: θ̄ ← d θ̄ + (1 − d) θ."""
        self.progress.fill_(progress)
        with torch.no_grad():
            for average, parameter in zip(self.target_encoder.parameters(), self.encoder.parameters(), strict=True):
                average.lerp_(parameter, 1.0 - self.target_decay)


class Jepa(LearnedModel):
    """A world model in embedding space, decoded to the difference that the perturbation makes.

    Parameters
    ----------
    width, n_embedding, dropout, own_dropout, action_dropout, mask_rate, target_decay, weights
        Of the network and its loss.
    """

    cells_per_draw = 32

    def __init__(
        self,
        *,
        width: int,
        n_embedding: int,
        dropout: float,
        own_dropout: float,
        action_dropout: float,
        mask_rate: float,
        target_decay: float,
        weights: dict[str, float],
        **shared: float,
    ) -> None:
        super().__init__(**shared)
        self.architecture = {
            "width": width, "n_embedding": n_embedding, "dropout": dropout, "own_dropout": own_dropout,
            "action_dropout": action_dropout, "mask_rate": mask_rate, "target_decay": target_decay, "weights": weights,
        }  # fmt: skip

    def network(self, latent: LatentSpace, conditions: Conditions) -> World:
        """Return a new world model."""
        return World(latent, conditions, **self.architecture)

    def displace(self, start: Tensor, genes: Tensor, generator: torch.Generator) -> Tensor:
        """Return the decoded difference between the perturbed embedding, sampled, and the cell's own.

        The same noise serves both, so that no perturbation makes no difference.
        """
        h = self.net.encoder(self.net.expression(start))
        yes = torch.ones(len(h), dtype=torch.bool)
        mean, log_variance = self.net.predicted(h, genes, yes)
        _, own_log_variance = self.net.predicted(h, torch.full_like(genes, -1), yes)
        noise = torch.randn(h.shape, generator=generator)
        perturbed = self.net.decoder(mean + torch.exp(0.5 * log_variance) * noise)
        return perturbed - self.net.decoder(h + torch.exp(0.5 * own_log_variance) * noise)
