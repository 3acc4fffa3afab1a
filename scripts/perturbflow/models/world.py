"""Stage B of the JEPA: a world model from control embedding and perturbation to a distribution of perturbed embeddings.

Action-conditioned as in V-JEPA 2-AC (Assran et al. 2025, arXiv 2506.09985); the action is a set of gene vectors. Cells are not truly paired, so
that predictions are compared with groups of cells that share perturbation, batch and cell type: by their mean, in the units of what it does
to genes, and by the likelihood of a Gaussian with the group's predicted mean and spread. The perturbation is withheld at random and a
learned null stands in, so that what the action adds can be read off (BioJEPA's predictor ignored it, unseen).
"""

import numpy as np
import torch
from torch import Tensor, nn

from perturbflow.models.batches import Batch
from perturbflow.models.conditions import Conditions
from perturbflow.models.networks import GeneEncoder, mlp
from perturbflow.models.representation import JepaLatent

LEAST_ACTION = 1e-3  # below: ignored; squared distance of predictions with right and wrong action, of their squared distance to the start
LOG_VARIANCES = (-6.0, 3.0)


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


class World(nn.Module):
    """Predictor of the embedding after a perturbation.

    The shift is f(h, Σ vectors) for a combination's interaction plus f(h, vector) of every member, and nothing without a member.

    Parameters
    ----------
    width, dropout
        Of the layers.
    own_dropout
        See `GeneEncoder`.
    action_dropout
        How often the perturbation is withheld in training.
    is_withheld
        Whether it always is.
    weights
        Of the terms `effect`, `world` and `steadiness`.
    """

    def __init__(
        self,
        latent: JepaLatent,
        conditions: Conditions,
        width: int,
        dropout: float,
        own_dropout: float,
        action_dropout: float,
        weights: dict[str, float],
        *,
        is_withheld: bool,
    ) -> None:
        super().__init__()
        self.action_dropout, self.is_withheld, self.weights = action_dropout, is_withheld, weights
        n = latent.n_dimensions
        # Shifts times this have the squared norm of their effects on genes, up to one factor for all.
        U, s, _ = np.linalg.svd(latent.effect_map, full_matrices=False)
        in_genes = U * s * np.sqrt(n / max((s**2).sum(), 1e-12))
        self.register_buffer("in_genes", torch.from_numpy(in_genes.astype(np.float32)), persistent=False)
        self.gene_encoder = GeneEncoder(conditions, width, own_dropout, drops_together=True)
        self.direct = nn.Linear(width, 2 * n, bias=False)
        self.of_member = mlp(n + width, width, width, 2 * n, dropout=dropout)
        self.of_combination = mlp(n + width, width, 2 * n, dropout=dropout)
        with torch.no_grad():
            self.of_combination[-1].weight.mul_(0.1)
            self.of_combination[-1].bias.zero_()
        self.null_action = nn.Parameter(torch.zeros(width))
        self.own_log_variance = nn.Parameter(torch.full((n,), -2.0))

    def predicted(self, h: Tensor, genes: Tensor, has_action: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return mean and log-variance of the embedding after a perturbation, (B, D) each.

        No perturbation is no change. A withheld action is one member, the learned null.

        Parameters
        ----------
        h
            Embedding of control cells, (B, D).
        genes
            (B, members), -1 for none.
        has_action
            (B,), False where the perturbation is withheld; None withholds none, or all where they always are.
        """
        tokens, is_member = self.gene_encoder(genes), genes >= 0  # (B, members, width), (B, members)
        if has_action is None:
            has_action = torch.full((len(h),), not self.is_withheld, device=h.device)
        withheld = ~has_action & is_member.any(dim=1)
        tokens = torch.cat([torch.where(withheld[:, None], self.null_action, tokens[:, 0])[:, None], tokens[:, 1:]], dim=1)
        is_member = torch.cat([is_member[:, :1], is_member[:, 1:] & ~withheld[:, None]], dim=1)
        joint = torch.cat([h[:, None].expand(-1, tokens.shape[1], -1), tokens], dim=-1)
        out = ((self.of_member(joint) + self.direct(tokens)) * is_member[..., None]).sum(dim=1)
        action = (tokens * is_member[..., None]).sum(dim=1)
        out = out + self.of_combination(torch.cat([h, action], dim=-1)) * (is_member.sum(dim=1, keepdim=True) > 1)
        shift, log_variance = out.chunk(2, dim=-1)
        return h + shift, (self.own_log_variance + log_variance).clamp(*LOG_VARIANCES)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Error of group means in units of genes, likelihood of the groups' cells, and how much shifts of one action differ."""
        groups = Groups(batch.group)
        withheld = 1.0 if self.is_withheld else self.action_dropout if self.training else 0.0
        has_action = torch.rand(groups.n, device=batch.start.device)[groups.member] >= withheld
        mean, log_variance = self.predicted(batch.start, batch.genes, has_action)
        centre, shift = groups.mean(mean), mean - batch.start
        of_actions = Groups(batch.genes.unique(dim=0, return_inverse=True)[1])
        error = (centre - groups.mean(batch.target)) @ self.in_genes
        spread = groups.mean((mean - centre[groups.member]).pow(2) + torch.exp(log_variance))[groups.member]
        terms = {
            "effect": error.pow(2)[groups.member].mean(),
            "world": 0.5 * ((batch.target - centre[groups.member]).pow(2) / spread + spread.log()).mean(),
            "steadiness": (shift - of_actions.mean(shift)[of_actions.member]).pow(2).mean(),
        }
        return {"loss": sum(self.weights[name] * value for name, value in terms.items()), **terms}

    def watch(self, batch: Batch) -> dict[str, Tensor]:
        """Return what tells whether the action is used.

        Share of the variance of predicted shifts that lies between actions; mean squared distance of measured group means to those predicted
        with the right, a wrong and the null action; and the squared distance of predictions with right and wrong action, of that to the start.
        Where there is one action alone, no other can be wrong.
        """
        is_perturbed = (batch.genes >= 0).any(dim=1)
        start, target, genes, group = (getattr(batch, name)[is_perturbed] for name in ("start", "target", "genes", "group"))
        groups, told = Groups(group), torch.full((len(start),), not self.is_withheld, device=start.device)
        predicted = {"right": self.predicted(start, genes, told)[0], "null": self.predicted(start, genes, torch.zeros_like(told))[0]}
        watched = {}
        actions, action = genes.unique(dim=0, return_inverse=True)
        if len(actions) > 1:
            predicted["wrong"] = self.predicted(start, actions[(action + 1) % len(actions)], told)[0]
            shift, of_actions = predicted["right"] - start, Groups(action)
            between = of_actions.mean(shift)[of_actions.member] - shift.mean(dim=0)
            watched = {
                "action_share": between.pow(2).sum() / (shift - shift.mean(dim=0)).pow(2).sum().clamp(min=1e-12),
                "action_effect": (predicted["right"] - predicted["wrong"]).pow(2).mean() / shift.pow(2).mean().clamp(min=1e-12),
            }
        measured = groups.mean(target)
        return watched | {f"distance_{name}_action": (groups.mean(cells) - measured).pow(2).mean() for name, cells in predicted.items()}

    def complaint(self, watched: dict[str, float]) -> str | None:
        """Return what is wrong with these numbers, or None."""
        if watched.get("action_effect", np.inf) >= LEAST_ACTION:
            return None
        return (
            "the world model ignores its action: with another perturbation it predicts the same "
            f"(action_effect {watched['action_effect']:.2g}); train longer, or lower action_dropout in the model's params."
        )
