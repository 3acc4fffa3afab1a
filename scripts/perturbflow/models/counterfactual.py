"""Counterfactual: transport each control cell to what it would have become, by flow matching between coupled cells.

Conditional flow matching (Lipman et al. 2023, arXiv 2210.02747) with couplings of least squared distance inside
perturbation, batch and cell type (Tong et al. 2024, arXiv 2302.00482). Per cell: abduction is the cell's own latent state,
known up to `state_noise`; action is the perturbation; prediction is the end of the flow. What it assumes: perturbations are
assigned without regard to the cell's state within batch and cell type (true of pooled screens), and a cell moves no further
than it must, which no data of unpaired cells can prove.
"""

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from perturbflow.models.batches import Batch
from perturbflow.models.conditions import Conditions
from perturbflow.models.latent import LatentSpace
from perturbflow.models.learned import LearnedModel
from perturbflow.models.networks import GeneEncoder, TimeEmbedding, mlp


def coupled(start: Tensor, target: Tensor, group: Tensor) -> Tensor:
    """Return the start cells reordered within groups so that the summed squared distance to the targets is least.

    Parameters
    ----------
    start, target
        (B, D).
    group
        (B,); cells change partners within a group only.
    """
    order = torch.arange(len(start))
    for value in group.unique():
        rows = torch.nonzero(group == value).squeeze(1)
        if len(rows) > 1:
            cost = torch.cdist(target[rows], start[rows]).pow(2)
            _, columns = linear_sum_assignment(cost.cpu().numpy())
            order[rows.cpu()] = rows[torch.as_tensor(columns)].cpu()
    return start[order.to(start.device)]


class Velocity(nn.Module):
    """v(z, t, c) = m(c) + u(z − t m(c), t, c) with c the sum of the members' vectors; zero without members.

    m is linear, so shifts of a combination's members add up; u transports what is left in a frame that moves with the shift,
    so that it meets cells where it has seen them, whatever the combination.
    """

    def __init__(
        self, n_latent: int, conditions: Conditions, width: int, n_layers: int, dropout: float, own_dropout: float, bridge_noise: float
    ) -> None:
        super().__init__()
        self.bridge_noise = bridge_noise
        self.gene_encoder = GeneEncoder(conditions, width, own_dropout)
        self.shift = nn.Linear(width, n_latent, bias=False)
        self.time = TimeEmbedding(32)
        self.layers = mlp(n_latent + 32 + width, *[width] * n_layers, n_latent, dropout=dropout)

    def forward(self, z: Tensor, t: Tensor, genes: Tensor) -> Tensor:
        """Return the velocity.

        Parameters
        ----------
        z
            (B, n_latent).
        t
            (B,), 0 control to 1 perturbed.
        genes
            (B, members), -1 for none.
        """
        action = self.gene_encoder(genes).sum(dim=1)
        shift = self.shift(action)
        residual = self.layers(torch.cat([z - t[:, None] * shift, self.time(t), action], dim=-1))
        return (shift + residual) * (genes >= 0).any(dim=1, keepdim=True)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Mean squared error of the velocity on the straight path between coupled cells, with a little noise around it."""
        start = coupled(batch.start, batch.target, batch.group)
        t = torch.rand(len(start), device=start.device)
        path = torch.lerp(start, batch.target, t[:, None]) + self.bridge_noise * torch.randn_like(start)
        shift = self.shift(self.gene_encoder(batch.genes).sum(dim=1))
        moved = batch.target - start
        velocity = nn.functional.mse_loss(self(path, t, batch.genes), moved)
        return {"loss": velocity + nn.functional.mse_loss(shift, moved), "velocity": velocity}


class Counterfactual(LearnedModel):
    """Flow from control to perturbed cells, cell by cell.

    Parameters
    ----------
    width, n_layers, dropout, own_dropout, bridge_noise
        Of the velocity and its training.
    state_noise
        Standard deviation of what is not known of a cell's own state; it spreads the outcomes of one cell.
    n_integration_steps
        Of the midpoint rule.
    """

    cells_per_draw = 32

    def __init__(
        self,
        *,
        width: int,
        n_layers: int,
        dropout: float,
        own_dropout: float,
        bridge_noise: float,
        state_noise: float,
        n_integration_steps: int,
        **shared: float,
    ) -> None:
        super().__init__(mean="learned", cells="shifted", **shared)
        self.architecture = {
            "width": width, "n_layers": n_layers, "dropout": dropout, "own_dropout": own_dropout, "bridge_noise": bridge_noise,
        }  # fmt: skip
        self.state_noise, self.n_integration_steps = state_noise, n_integration_steps

    def network(self, latent: LatentSpace, conditions: Conditions) -> Velocity:
        """Return a new velocity."""
        return Velocity(latent.n_dimensions, conditions, **self.architecture)

    def displace(self, start: Tensor, genes: Tensor, generator: torch.Generator) -> Tensor:
        """Integrate the flow from the cell's state, drawn within its uncertainty, and return how far it went."""
        state = start + self.state_noise * torch.randn(start.shape, generator=generator)
        z, step = state, 1.0 / self.n_integration_steps
        for i in range(self.n_integration_steps):
            t = torch.full((len(z),), i * step)
            halfway = z + 0.5 * step * self.net(z, t, genes)
            z = z + step * self.net(halfway, t + 0.5 * step, genes)
        return z - state

    def outcome(self, start: np.ndarray, z: np.ndarray, moved: np.ndarray, perturbation: str, rng: np.random.Generator) -> np.ndarray:
        """Return the start cells plus each one's own change."""
        return start + self.latent.change(moved) + self.own_shift(start, perturbation)
