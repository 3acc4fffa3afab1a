"""Stages A and C of the JEPA: an embedding of cells that learns without labels, and the way back to genes.

Stage A (Assran et al. 2023, arXiv 2301.08243, with cells for images and genes for patches): the embedding of one part of a cell predicts the
embedding that a moving average of the encoder gives the other part. The parts are of its counts, each molecule falling to one of them by
chance: if counts are Poisson given the cell's rates, the parts share the rates and no noise (count splitting, Neufeld et al. 2024), so that
what one tells of the other is what the cell is. In the first part genes are hidden besides. The share of hidden genes falls to zero and that of
molecules kept rises to nearly all, so that training ends where inference starts; were the target the whole cell, as it is with images, the
task would end in copying noise. Variance and covariance terms (VICReg, Bardes, Ponce & LeCun 2022, arXiv 2105.04906) keep the embedding from
collapsing. Cells come from the training role; no label is looked at.

Stage C: shares of genes from the embedding, by a negative binomial likelihood with the cell's library size, as in `autoencoder`; and a linear
map from mean shifts of the embedding to mean effects on log1p expression, fitted to cells and to measured effects at once, so that
effects come back in their true size and not only states.
"""

import copy
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from perturbflow.errors import InputError
from perturbflow.models.autoencoder import WIDTH, Cells, DrawnCells, NetworkLatent, negative_binomial
from perturbflow.models.base import Run
from perturbflow.models.batches import N_WATCHED, WATCHED, Batches
from perturbflow.models.effects import Effects
from perturbflow.models.networks import mlp
from perturbflow.models.optimization import Learner, Optimization, optimize, optimize_briefly
from perturbflow.pairs import Pairs

logger = logging.getLogger(__name__)

HIDDEN = 256
LARGEST = 6.0  # standard deviations of a gene's input
LEAST_SPREAD = 0.05  # of the most variable gene's deviation: less variable genes are not blown up further
FULL_FROM = 0.8  # of the training: no gene is hidden any more, and most molecules are kept
KEPT_AT_FIRST, KEPT_AT_LAST = 0.5, 0.9  # share of molecules in the part that is embedded
RIDGE = 1e-3  # of the effect map, in units of the embedding's variance
LEAST_RANK, LEAST_SD = 0.25, 0.1  # below: collapsed; share of the dimensions, and of the standard deviation that VICReg asks for


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


def watched_embedding(h: Tensor) -> dict[str, Tensor]:
    """Return what tells a collapse, (B, D): mean standard deviation and effective rank."""
    return {"embedding_sd": h.std(dim=0).mean(), "effective_rank": effective_rank(h)}


def collapse(watched: dict[str, float], n_embedding: int, remedy: str) -> str | None:
    """Return what is wrong with the numbers of `watched_embedding`, and what helps, or None."""
    if watched["embedding_sd"] >= LEAST_SD and watched["effective_rank"] >= LEAST_RANK * n_embedding:
        return None
    return (
        f"the embedding has collapsed: its mean standard deviation is {watched['embedding_sd']:.3g} and its effective rank "
        f"{watched['effective_rank']:.1f} of {n_embedding}; {remedy} in the model's params."
    )


def count_split(cells: Cells, kept: float) -> tuple[Tensor, Tensor]:
    """Return two parts of every cell, log1p expression on the cells' own scale, (B, genes) each: a share of its molecules, and the others."""
    first = torch.zeros_like(cells.k)
    is_there = cells.k.nonzero(as_tuple=True)
    counts = cells.k[is_there]
    first[is_there] = torch.binomial(counts, torch.full_like(counts, kept))
    return torch.log1p(first * (cells.unit / kept)), torch.log1p((cells.k - first) * (cells.unit / (1.0 - kept)))


class Encoder(nn.Module):
    """Log1p expression to an embedding; every gene in units of its own standard deviation in training cells."""

    def __init__(self, n_genes: int, n_embedding: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(n_genes))
        self.register_buffer("sd", torch.ones(n_genes))
        self.layers = mlp(n_genes, HIDDEN, n_embedding)

    def fit_scale(self, training: Pairs) -> None:
        """Take over means and deviations of genes over cells."""
        sums, squares = (table.sum(axis=0) / len(training.rows) for table in training.sums)
        sd = np.sqrt(np.maximum(squares - sums**2, 0.0))
        self.mean.copy_(torch.from_numpy(sums))
        self.sd.copy_(torch.from_numpy(np.maximum(sd, max(LEAST_SPREAD * sd.max(), 1e-6))))

    def standardized(self, x: Tensor) -> Tensor:
        """(B, genes) → (B, genes)."""
        return ((x - self.mean) / self.sd).clamp(-LARGEST, LARGEST)

    def forward(self, x: Tensor, hidden: float = 0.0) -> Tensor:
        """(B, genes) → (B, n_embedding).

        Parameters
        ----------
        hidden
            Share of genes to be hidden at random, by their mean; the others are scaled up for it.
        """
        x = self.standardized(x)
        if hidden > 0.0:
            x = x * (torch.rand_like(x) >= hidden) / (1.0 - hidden)
        return self.layers(x)


class MaskedPrediction(nn.Module):
    """Stage A: context encoder, target encoder and the predictor between their embeddings.

    Parameters
    ----------
    mask_rate
        Share of hidden genes at the start.
    target_decay
        Of the moving average, per step.
    weights
        Of the terms `invariance`, `variance` and `covariance`.
    """

    def __init__(self, encoder: Encoder, n_embedding: int, mask_rate: float, target_decay: float, weights: dict[str, float]) -> None:
        super().__init__()
        self.mask_rate, self.target_decay, self.weights = mask_rate, target_decay, weights
        self.register_buffer("progress", torch.zeros(()))
        self.encoder = encoder
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(requires_grad=False)
        self.predictor = mlp(n_embedding, WIDTH, n_embedding)

    def losses(self, cells: Cells) -> dict[str, Tensor]:
        """Invariance, variance and covariance terms."""
        done = min(1.0, float(self.progress) / FULL_FROM)
        seen, other = count_split(cells, KEPT_AT_FIRST + (KEPT_AT_LAST - KEPT_AT_FIRST) * done)
        with torch.no_grad():
            target = self.target_encoder(other)
        context = self.encoder(seen, self.mask_rate * (1.0 - done))
        terms = {
            "invariance": (self.predictor(context) - target).pow(2).mean(),
            "variance": variance_term(context),
            "covariance": covariance_term(context),
        }
        return {"loss": sum(self.weights[name] * value for name, value in terms.items()), **terms}

    def watch(self, cells: Cells) -> dict[str, Tensor]:
        """Watch the target embedding."""
        return watched_embedding(self.target_encoder(cells.x))

    def complaint(self, watched: dict[str, float]) -> str | None:
        """Tell a collapse."""
        return collapse(watched, self.predictor[-1].out_features, "raise weights.variance or weights.covariance")

    def after_step(self, progress: float) -> None:
        """Move the target encoder: θ̄ ← d θ̄ + (1 − d) θ."""
        self.progress.fill_(progress)
        with torch.no_grad():
            for average, parameter in zip(self.target_encoder.parameters(), self.encoder.parameters(), strict=True):
                average.lerp_(parameter, 1.0 - self.target_decay)


class Representation(nn.Module):
    """Encoder and decoder to counts: stage C.

    Parameters
    ----------
    encoder
        Of stage A; one whose parameters ask for gradients learns from the likelihood.
    """

    def __init__(self, encoder: Encoder, n_embedding: int, n_genes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.decoder = mlp(n_embedding, WIDTH, n_genes)
        self.log_shape = nn.Parameter(torch.zeros(n_genes))
        self.register_buffer("centre", torch.zeros(n_embedding))
        self.register_buffer("scale", torch.ones(n_embedding))

    def embed(self, x: Tensor) -> Tensor:
        """log1p expression, (B, genes) → (B, n_embedding)."""
        return self.encoder(x)

    def log_share(self, h: Tensor) -> Tensor:
        """(B, n_embedding) → log share of every gene, (B, genes)."""
        return torch.log_softmax(self.decoder(h), dim=-1)

    def losses(self, cells: Cells) -> dict[str, Tensor]:
        """Negative log likelihood of the counts, per gene."""
        library = cells.k.sum(dim=1, keepdim=True)
        mean = library * torch.exp(self.log_share(self.embed(cells.x)))
        return {"loss": -negative_binomial(cells.k, mean, torch.exp(self.log_shape)).mean()}

    def watch(self, cells: Cells) -> dict[str, Tensor]:
        """Watch the embedding, where it is learned here."""
        is_learned = any(parameter.requires_grad for parameter in self.encoder.parameters())
        return watched_embedding(self.embed(cells.x)) if is_learned else {}

    def complaint(self, watched: dict[str, float]) -> str | None:
        """Tell a collapse."""
        return collapse(watched, self.decoder[0].in_features, "lower learning_rate") if "effective_rank" in watched else None


def shared_map(inner: np.ndarray, across: np.ndarray, shifts: np.ndarray, effects: np.ndarray) -> np.ndarray:
    """Return a linear map that cells and perturbations share, (dimensions, genes).

    With H and X embeddings and expression of n cells less the means of their groups, D and E shifts and effects of the perturbations, M minimizes
    ‖X − H M‖²/n + w ‖E − D M‖² + λ‖M‖², and w gives cells and perturbations the same total variance of the embedding. Effects alone would
    leave most directions open; cells alone give them the size of what cells differ in.

    Parameters
    ----------
    inner, across
        H'H/n, (dimensions, dimensions), and H'X/n, (dimensions, genes).
    shifts, effects
        D, (perturbations, dimensions), and E, (perturbations, genes).
    """
    weight = np.trace(inner) / max((shifts**2).sum(), 1e-12)
    inner, across = inner + weight * shifts.T @ shifts, across + weight * shifts.T @ effects
    ridge = RIDGE * np.trace(inner) / len(inner) * np.eye(len(inner))
    return np.linalg.solve(inner + ridge, across).astype(np.float32)


@dataclass(frozen=True)
class Recipe:
    """How an embedding is learned.

    Attributes
    ----------
    is_self_supervised
        If not, stage A is left out, and the encoder learns with the decoder, in as many steps as both have.
    n_embedding
        Dimensions.
    n_steps
        Of stages A and C.
    batch_size
        Cells per step.
    optimization
        Of all stages.
    masked
        Params of `MaskedPrediction`.
    stops
        Whether a collapse is an error; else it is a fact of the run.
    """

    is_self_supervised: bool
    n_embedding: int
    n_steps: tuple[int, int]
    batch_size: int
    optimization: Optimization
    masked: dict[str, Any]
    stops: bool

    def learner(self, network: nn.Module, seed: int, n_steps: int) -> Learner:
        """Return how a stage's network is optimized."""
        return Learner(network, seed, n_steps, self.optimization, stops=self.stops)

    def trained(self, run: Run, network: nn.Module, cells: DrawnCells, n_steps: int, stage: str) -> nn.Module:
        """Return the averaged network after its training; what was watched goes into the run's history, and what is wrong into its facts."""
        own = replace(run, checkpoints=run.checkpoints / stage, history=[], facts={})
        learner = self.learner(network, run.seed, n_steps)
        optimize(learner, Batches(cells, None, self.batch_size, run.seed), own, f"jepa {stage}")
        run.facts[stage] = {key: own.facts[key] for key in ("n_parameters", "complaint") if key in own.facts} | {"history": own.history}
        return learner.average.module.cpu().eval()

    def trained_briefly(self, seed: int, network: nn.Module, cells: DrawnCells, n_steps: int, stage: str) -> nn.Module:
        """Return the same without checkpoints and history; watched at its end alone, and not trained at all if the embedding does not ask for it."""
        if stage == "stage_c" and self.is_self_supervised:
            return network
        network = optimize_briefly(self.learner(network, seed, n_steps), cells, self.batch_size)
        with torch.no_grad():
            watched = {name: float(value) for name, value in network.watch(cells.batch(N_WATCHED, (seed, WATCHED, 0))).items()}
        if complaint := network.complaint(watched):
            if self.stops:
                raise InputError(f"training was stopped in an inner fold: {complaint}")
            logger.warning("jepa, inner fold, %s: %s", stage, complaint)
        return network


# Trains the network of a stage: from the network, cells to draw from, steps and the stage's name.
Optimized = Callable[[nn.Module, DrawnCells, int, str], nn.Module]


class JepaLatent(NetworkLatent):
    """Cells in the embedding of stage A, standardized, and what moves there mean for their genes.

    Parameters
    ----------
    network
        A trained encoder and decoder.
    effect_map
        M, (dimensions, genes), see `fit_effect_map`.
    """

    def __init__(self, network: Representation, effect_map: np.ndarray | None = None) -> None:
        super().__init__(network)
        if effect_map is not None:  # else `fit_effect_map` makes it
            self.effect_map = effect_map

    @classmethod
    def learned(cls, pairs: Pairs, run: Run, recipe: Recipe) -> "JepaLatent":
        """Train stages A and C on the cells of the training role; goes on from checkpoints of the same training."""
        return cls._learned(pairs.roles("train"), run.seed, recipe, partial(recipe.trained, run))

    @classmethod
    def learned_briefly(cls, training: Pairs, seed: int, recipe: Recipe) -> "JepaLatent":
        """Train the same embedding on these cells, on the CPU, without checkpoints, and without a decoder where the embedding does not need it."""
        return cls._learned(training, seed, recipe, partial(recipe.trained_briefly, seed))

    @classmethod
    def _learned(cls, training: Pairs, seed: int, recipe: Recipe, optimized: Optimized) -> "JepaLatent":
        cells, n_genes = DrawnCells(training.X), training.X.shape[1]
        torch.manual_seed(seed)
        encoder = Encoder(n_genes, recipe.n_embedding)
        encoder.fit_scale(training)
        n_steps = sum(recipe.n_steps)
        if recipe.is_self_supervised:
            n_first, n_steps = recipe.n_steps
            encoder = optimized(MaskedPrediction(encoder, recipe.n_embedding, **recipe.masked), cells, n_first, "stage_a").target_encoder
        torch.manual_seed(seed + 1)
        latent = cls(optimized(Representation(encoder.train(), recipe.n_embedding, n_genes), cells, n_steps, "stage_c"))
        latent.fit_effect_map(training)
        return latent

    @classmethod
    def restored(cls, state: dict[str, Tensor]) -> "JepaLatent":
        """Rebuild encoder and decoder around their weights."""
        weights = dict(state)
        effect_map = weights.pop("effect_map").numpy()
        network = Representation(Encoder(effect_map.shape[1], len(effect_map)), *effect_map.shape)
        network.load_state_dict(weights)
        return cls(network, effect_map)

    def state(self) -> dict[str, Tensor]:
        """Return weights and effect map."""
        return {**super().state(), "effect_map": torch.from_numpy(self.effect_map)}

    def fit_effect_map(self, training: Pairs) -> None:
        """Centre and scale the embedding and fit M: mean effects ≈ mean shifts · M, by ridge regression. One pass over the cells.

        See `shared_map`; what cells are less is the mean of their perturbation, of controls that of their batch and cell type.
        """
        groups, n = training.groups, len(training.rows)
        sums = np.zeros((len(groups.n_cells), self.n_dimensions))
        inner, across = np.zeros((self.n_dimensions, self.n_dimensions)), np.zeros((self.n_dimensions, len(training.genes)))
        for rows, X in training.blocks():
            h = self.encode(X).astype(np.float64)  # centre 0 and scale 1 as yet
            sums += groups.indicator(rows) @ h
            inner += h.T @ h
            across += (X.T @ h).T
        centre = sums.sum(axis=0) / n
        scale = np.sqrt(np.maximum(np.diag(inner) / n - centre**2, 1e-6))
        self.network.centre.copy_(torch.from_numpy(centre))
        self.network.scale.copy_(torch.from_numpy(scale))
        means = sums / np.maximum(groups.n_cells, 1)[:, None]
        within = (inner - means.T @ sums) / n, (across - means.T @ training.sums[0]) / n
        shifts = groups.effects((sums - groups.n_cells[:, None] * centre) / scale)
        self._of_cells = within[0] / np.outer(scale, scale), within[1] / scale[:, None]
        self.effect_map = shared_map(*self._of_cells, shifts, Effects.of_training(training).values)

    def with_effects(self, shifts: np.ndarray, effects: np.ndarray) -> "JepaLatent":
        """Return the same embedding with an effect map fitted to the same cells and to these perturbations, see `shared_map`."""
        return JepaLatent(self.network, shared_map(*self._of_cells, shifts, effects))

    def mean_change(self, moved: np.ndarray) -> np.ndarray:
        """Return mean shift · M, (genes,)."""
        return moved.mean(axis=0) @ self.effect_map
