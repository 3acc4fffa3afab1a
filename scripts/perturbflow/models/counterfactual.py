"""Counterfactual: transport each control cell to what it would have become, by flow matching between coupled cells.

Abduction, action, prediction (Pearl 2009, section 7.1), cell by cell:

1. Abduction. A cell's own state is its position along the directions that two halves of its molecules agree on
   (`States`). Each molecule falls to one of two halves (count splitting, Neufeld et al. 2024,
   doi:10.1093/biostatistics/kxac047). The halves share the cell's rates and no noise, so the covariance of one half's
   expression with the other's is that of the rates. Eigenvalues of its noise lie as far below zero as above: directions
   beyond the most negative one are states. Along each, the halves give the reliability ρ of a measured cell. A measured
   position s means the state ρ s, known up to √(ρ(1−ρ)).
2. Action. The perturbation.
3. Prediction. The end of a flow that starts in the cell. Conditional flow matching (Lipman et al. 2023,
   arXiv 2210.02747) trains it between perturbed cells and the controls that they are coupled with, inside perturbation,
   batch and cell type. Coupled cells are those of most likely the same state (`coupled`; minibatch optimal transport,
   Tong et al. 2024, arXiv 2302.00482, with the likelihood of a shared state for its cost).

The mean effect is that of `set_gp`; the flow gives each cell's deviation from it.

It assumes three things. (1) Within batch and cell type, perturbations are assigned without regard to the cell's state.
This holds for pooled screens, but for survival. (2) The part of a cell that the perturbation leaves alone shows its
state: two cells of one state that got different perturbations still look alike in most directions. (3) Cells of the
same state respond alike: any other difference between them, such as the efficacy of a guide, is noise here. No unpaired
data can prove (2) and (3). On simulated data, whose counterfactuals are known, the error is measured.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn

from perturbflow.models.base import Run
from perturbflow.models.effects import Effects
from perturbflow.models.latents.pca import LatentSpace
from perturbflow.models.learned import LearnedModel
from perturbflow.models.thinning import unit_of
from perturbflow.models.training.batches import Batch
from perturbflow.models.training.conditions import Conditions
from perturbflow.models.training.networks import GeneEncoder, TimeEmbedding, mlp
from perturbflow.pairs import Pairs
from perturbflow.registry.families import CounterfactualParams

# --- abduction: the state of a cell ----------------------------------------------------------------------------------

MAX_CELLS = 10_000
MAX_STATES = 16
HIGHEST_RELIABILITY = 0.98


@dataclass(frozen=True)
class States:
    """s = (x − mean) basis / scale.

    Attributes
    ----------
    mean
        (genes,).
    basis
        Orthonormal, (genes, states).
    scale
        Standard deviation of measured cells along each, within batch, cell type and perturbation, (states,).
    reliability
        ρ: share of that variance that is the cells' own, (states,).
    """

    mean: np.ndarray
    basis: np.ndarray
    scale: np.ndarray
    reliability: np.ndarray

    @classmethod
    def fit(cls, training: Pairs, most: int) -> "States":
        """Find the states of training cells, within perturbation, batch and cell type."""
        rows = np.arange(len(training.rows))
        rng = np.random.default_rng(0)
        if len(rows) > MAX_CELLS:
            rows = np.sort(rng.choice(rows, MAX_CELLS, replace=False))
        X, groups = training.X[rows], training.groups
        of_cell = np.minimum(groups.of_cell[rows], len(groups.labels))  # the two halves of controls are one group
        code = of_cell * (groups.stratum.max() + 1) + groups.stratum[rows]
        group = np.unique(code, return_inverse=True)[1]
        whole, *halves = (_Centred.of(table, group) for table in (X, *_halves(X, rng)))

        def across_halves(v: np.ndarray) -> np.ndarray:
            both = halves[0].across(halves[1].along(v)) + halves[1].across(halves[0].along(v))
            return both / (2 * len(rows))

        shared = LinearOperator((X.shape[1],) * 2, matvec=across_halves, dtype=np.float64)
        most = min(most, MAX_STATES, X.shape[1] - 2)
        start = np.random.default_rng(0).normal(size=X.shape[1])
        values, vectors = eigsh(shared, most, which="LA", v0=start, tol=1e-6)
        noise = -min(0.0, eigsh(shared, 1, which="SA", v0=start, tol=1e-3, return_eigenvectors=False)[0])
        order = np.argsort(-values)
        order = order[: max(1, int((values > noise).sum()))]
        basis = vectors[:, order] * np.sign(vectors[np.abs(vectors[:, order]).argmax(axis=0), order])
        a, b = (half.along(basis) for half in halves)
        # The directions were chosen for the covariance of these halves, which chance has raised by about the noise.
        covariance = (a * b).mean(axis=0) - noise
        agreement = np.clip(covariance / np.sqrt((a**2).mean(axis=0) * (b**2).mean(axis=0)), 0.01, 1.0)
        of_whole = 2 * agreement / (1 + agreement)  # Spearman 1910; Brown 1910
        reliability = np.minimum(of_whole, HIGHEST_RELIABILITY)
        scale = np.maximum(np.sqrt((whole.along(basis) ** 2).mean(axis=0)), 1e-3)
        return cls(np.asarray(training.control_level, dtype=np.float64), basis, scale, reliability)


@dataclass(frozen=True)
class _Centred:
    """Cells minus the mean of their group, in sparse form."""

    X: sparse.csr_matrix
    group: np.ndarray
    means: np.ndarray

    @classmethod
    def of(cls, X: sparse.csr_matrix, group: np.ndarray) -> "_Centred":
        indicator = sparse.csr_matrix((np.ones(len(group)), (group, np.arange(len(group)))))
        return cls(X, group, (indicator @ X).toarray() / np.asarray(indicator.sum(axis=1)))

    def along(self, v: np.ndarray) -> np.ndarray:
        """(genes, …) → (cells, …)."""
        return self.X @ v - (self.means @ v)[self.group]

    def across(self, v: np.ndarray) -> np.ndarray:
        """(cells, …) → (genes, …)."""
        sums = np.zeros((len(self.means), *v.shape[1:]))
        np.add.at(sums, self.group, v)
        return self.X.T @ v - self.means.T @ sums


def _halves(X: sparse.csr_matrix, rng: np.random.Generator) -> tuple[sparse.csr_matrix, sparse.csr_matrix]:
    """Return two halves of the counts of log1p-normalized cells, each normalized to the size of the whole."""
    X = X.tocsr().astype(np.float64)
    cell = np.repeat(np.arange(X.shape[0]), np.diff(X.indptr))
    normalized = np.expm1(X.data)
    unit = np.concatenate([unit_of(np.expm1(X[rows : rows + 1024].toarray())) for rows in range(0, X.shape[0], 1024)])
    k = np.rint(normalized / unit[cell]).astype(np.int64)
    first = rng.binomial(k, 0.5)
    total = np.bincount(cell, normalized, X.shape[0])

    def half(counts: np.ndarray) -> sparse.csr_matrix:
        size = np.maximum(np.bincount(cell, counts, X.shape[0]), 1.0)
        return sparse.csr_matrix((np.log1p(counts * (total / size)[cell]), X.indices, X.indptr), shape=X.shape)

    return half(first), half(k - first)


def effect_directions(training: Pairs, effects: Effects, most: int) -> np.ndarray:
    """Return orthonormal directions in which effects of training exceed sampling noise, (genes, at most so many).

    Without any effect, values in units of their standard errors are noise of variance 1. No singular value of P × G
    such numbers exceeds √P + √G (Marchenko & Pastur 1967). The first direction is always kept.
    """
    error = np.sqrt(np.maximum(training.squared_errors, 1e-8))
    values = effects.values.astype(np.float64)
    u, singular, _ = np.linalg.svd(values / error, full_matrices=False)
    n = min(most, max(1, int((singular > np.sqrt(len(values)) + np.sqrt(values.shape[1])).sum())))
    return np.linalg.qr(values.T @ u[:, :n])[0]


# --- prediction: coupled cells and the flow between them ----------------------------------------------------------


def coupled(start: Tensor, target: Tensor, group: Tensor, weights: Tensor) -> Tensor:
    """Return the start cell of each target, within groups, such that their states are most likely the same, (B,).

    Let Δ be the difference of states minus the group's mean shift e, and w = ρ / (1 − ρ²). The cost of a pair is
    Σ_k w_k Δ_k² minus the part that the perturbation can have caused: a response of unknown size changes the state
    along e. So the cost is

        Δᵀ (W⁻¹ + e eᵀ)⁻¹ Δ = Σ_k w_k Δ_k² − (Σ_k w_k Δ_k e_k)² / (1 + Σ_k w_k e_k²).

    Parameters
    ----------
    start, target
        Standardized states, (B, states).
    group
        (B,); cells change partners within a group only.
    weights
        w, (states,).
    """
    order = torch.arange(len(start))
    for value in group.unique():
        rows = torch.nonzero(group == value).squeeze(1)
        if len(rows) > 1:
            shift = target[rows].mean(dim=0) - start[rows].mean(dim=0)
            difference = (target[rows] - shift)[:, None] - start[rows][None]  # (targets, starts, states)
            along = (difference * weights * shift).sum(dim=-1)
            cost = (difference.pow(2) * weights).sum(dim=-1) - along.pow(2) / (1.0 + (weights * shift.pow(2)).sum())
            _, columns = linear_sum_assignment(cost.cpu().numpy())
            order[rows.cpu()] = rows[torch.as_tensor(columns, device=rows.device)].cpu()
    return order.to(start.device)


@dataclass(frozen=True)
class StateSpace(LatentSpace):
    """A linear latent space of the cells' states and of the directions of effects.

    Attributes
    ----------
    to_state
        (dimensions, states): from latent coordinates to standardized states.
    reliability
        ρ, (states,).
    """

    to_state: np.ndarray
    reliability: np.ndarray

    @classmethod
    def spanned(cls, training: Pairs, effects: Effects, most: int) -> "StateSpace":
        """Span states and effects of training cells, in at most so many dimensions."""
        states = States.fit(training, max(1, most // 2))
        of_effects = effect_directions(training, effects, most - len(states.reliability))
        basis = np.linalg.qr(np.hstack([states.basis, of_effects]))[0]
        sums, squares = np.zeros((2, basis.shape[1]))
        for _, X in training.blocks():
            z = X @ basis - states.mean @ basis
            sums, squares = sums + z.sum(axis=0), squares + (z**2).sum(axis=0)
        scale = np.sqrt(np.maximum(squares / len(training.rows) - (sums / len(training.rows)) ** 2, 1e-6))
        to_state = scale[:, None] * (basis.T @ states.basis) / states.scale
        return cls(states.mean, basis, scale, to_state, states.reliability)

    def state(self) -> dict[str, np.ndarray]:
        """Return the arrays to be stored."""
        return {**super().state(), "to_state": self.to_state, "reliability": self.reliability}


class Velocity(nn.Module):
    """v(z, t, c) = m(c) + u(ρ s(z − t m(c)), t, c), zero without members.

    c is the sum of the members' vectors, s the state and ρ its reliability.

    m is linear, so shifts of a combination's members add up. u transports the rest, in a frame that moves with the
    shift: so it meets cells in places known from training, for any combination.
    """

    def __init__(self, latent: StateSpace, conditions: Conditions, params: CounterfactualParams) -> None:
        super().__init__()
        width = params.width
        self.bridge_noise = params.bridge_noise
        n_latent, n_states = latent.to_state.shape
        self.register_buffer("to_state", torch.as_tensor(latent.to_state, dtype=torch.float32))
        self.register_buffer("reliability", torch.as_tensor(latent.reliability, dtype=torch.float32))
        self.gene_encoder = GeneEncoder(conditions, width, params.own_dropout)
        self.shift = nn.Linear(width, n_latent, bias=False)
        self.time = TimeEmbedding(32)
        self.layers = mlp(n_states + 32 + width, *[width] * params.n_layers, n_latent, dropout=params.dropout)

    def forward(
        self, z: Tensor, t: Tensor, genes: Tensor, unknown: Tensor | None = None, context: Tensor | None = None
    ) -> Tensor:
        """Return the velocity.

        Parameters
        ----------
        z
            (B, n_latent).
        t
            (B,), 0 control to 1 perturbed.
        genes
            (B, members), -1 for none.
        unknown
            Difference between the state and the most likely one, (B, states), in standard deviations of its posterior.
        context
            Vectors of contexts, (B, dimensions).
        """
        action = self.gene_encoder(genes, context).sum(dim=1)
        shift = self.shift(action)
        state = self.reliability * ((z - t[:, None] * shift) @ self.to_state)
        if unknown is not None:
            state = state + torch.sqrt(self.reliability * (1.0 - self.reliability)) * unknown
        residual = self.layers(torch.cat([state, self.time(t), action], dim=-1))
        return (shift + residual) * (genes >= 0).any(dim=1, keepdim=True)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Mean squared error of the velocity on the straight path between coupled cells, with some noise around it."""
        weights = self.reliability / (1.0 - self.reliability.pow(2))
        start = batch.start[coupled(batch.start @ self.to_state, batch.target @ self.to_state, batch.group, weights)]
        t = torch.rand(len(start), device=start.device)
        path = torch.lerp(start, batch.target, t[:, None]) + self.bridge_noise * torch.randn_like(start)
        shift = self.shift(self.gene_encoder(batch.genes, batch.context).sum(dim=1))
        difference = batch.target - start
        velocity = nn.functional.mse_loss(self(path, t, batch.genes, context=batch.context), difference)
        return {"loss": velocity + nn.functional.mse_loss(shift, difference), "velocity": velocity}


class Counterfactual(LearnedModel):
    """Flow from control to perturbed cells, cell by cell."""

    cells_together = 64
    params: CounterfactualParams
    net: Velocity

    def fit_latent(self, pairs: Pairs, effects: Effects, run: Run) -> StateSpace:
        """Span states and effects; the data decide how many of each."""
        latent = StateSpace.spanned(pairs.roles("train"), effects, self.params.n_latent)
        run.facts["states"] = {
            "n_states": len(latent.reliability),
            "n_dimensions": latent.n_dimensions,
            "reliability": [round(float(rho), 3) for rho in latent.reliability],
        }  # fmt: skip
        return latent

    def restore_latent(self, state: dict[str, Tensor]) -> StateSpace:
        """Return the latent space of an artefact."""
        return StateSpace(**{name: value.numpy() for name, value in state.items()})

    def network(self, latent: StateSpace, conditions: Conditions) -> Velocity:
        """Return a new velocity."""
        return Velocity(latent, conditions, self.params)

    def shift(
        self, z: Tensor, genes: Tensor, generator: torch.Generator | None, context: Tensor | None = None
    ) -> Tensor:
        """Integrate the flow by the midpoint rule, and return its end minus its start.

        With a generator the cell's state is sampled from its posterior; without one it is the most likely state.
        """
        n_states = len(self.net.reliability)
        unknown = None if generator is None else torch.randn((len(z), n_states), generator=generator)
        start, step = z, 1.0 / self.params.n_integration_steps
        for i in range(self.params.n_integration_steps):
            t = torch.full((len(z),), i * step)
            halfway = z + 0.5 * step * self.net(z, t, genes, unknown, context)
            z = z + step * self.net(halfway, t + 0.5 * step, genes, unknown, context)
        return z - start
