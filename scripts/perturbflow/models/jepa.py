"""JEPA: predict the embedding of a perturbed cell from the embedding of a control cell and the perturbation.

A joint-embedding predictive architecture in three stages, trained in the order A, C, B:

A. Embedding (Assran et al. 2023, arXiv 2301.08243, with cells for images and genes for patches). The embedding of one
   part of a cell predicts the embedding that a moving average of the encoder gives the other part. The parts are of its
   counts: each molecule falls to one of them by chance. If counts are Poisson given the cell's rates, the parts share
   the rates and no noise (count splitting, Neufeld et al. 2024). So one part can predict nothing of the other but the
   cell's state. Genes are hidden in the first part besides. The share of hidden genes falls to zero and the share of
   kept molecules rises to nearly all: training ends where inference starts. With the whole cell as target, as with
   images, the task would end in copying noise. Variance and covariance terms (VICReg, Bardes, Ponce & LeCun 2022, arXiv
   2105.04906) keep the embedding from collapsing. This stage uses no labels.
C. Way back to genes. Shares of genes from the embedding, by a negative binomial likelihood with the cell's library
   size, as in `latents.vae`. And a linear map from mean shifts of the embedding to mean effects on log1p expression. It
   is fitted to cells and to measured effects at once, so that effects come back in their true size.
B. Predictor. It gives mean and variance of the embedding after a perturbation, from the control embedding and the
   perturbation. It is compared with groups of cells that share perturbation, batch and cell type: cells are not paired.

With `mean: closed_form` the mean effect is that of `set_gp`, with the predictor's as one more term. The predictor is
trained again for every inner fold without the perturbations that the fold holds out, and counts as far as it predicts
those. With `mean: learned` the mean effect is the predictor's alone.
"""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from perturbflow.controls import Context
from perturbflow.errors import InputError
from perturbflow.genes.symbols import members_of
from perturbflow.io.artefacts import save_checkpoint
from perturbflow.models.base import Run
from perturbflow.models.closed_form.base import TrainingSet
from perturbflow.models.effects import Effects
from perturbflow.models.gaussian_process.set_gp import FitMean
from perturbflow.models.latents.pca import Latent
from perturbflow.models.latents.vae import WIDTH, Cells, CellSampler, NetworkLatent, negative_binomial
from perturbflow.models.learned import LearnedModel, Response, unseen_among
from perturbflow.models.neighbours import Neighbours
from perturbflow.models.training.batches import N_WATCHED, WATCHED, Batch, Batches, PairedCells, encoded
from perturbflow.models.training.conditions import Conditions
from perturbflow.models.training.learner import Learner, Optimization, resumable
from perturbflow.models.training.networks import GeneEncoder, mlp
from perturbflow.pairs import Pairs
from perturbflow.provenance.records import digest
from perturbflow.registry.families import JepaParams

# --- stage A: embedding -----------------------------------------------------------------------------------------------

logger = logging.getLogger(__name__)

HIDDEN = 256
LARGEST = 6.0  # standard deviations of a gene's input
LEAST_SPREAD = 0.05  # of the most variable gene's deviation: less variable genes are divided by this
FULL_FROM = 0.8  # of the training: from here on no gene is hidden, and most molecules are kept
KEPT_AT_FIRST, KEPT_AT_LAST = 0.5, 0.9  # share of molecules in the part that is embedded
RIDGE = 1e-3  # of the effect map, in units of the embedding's variance
# Below either, an embedding has collapsed: share of the dimensions, and of the standard deviation that VICReg asks for.
LEAST_RANK, LEAST_SD = 0.25, 0.1


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
    """Return the signs of a collapse, (B, D) → (): mean standard deviation and effective rank."""
    return {"embedding_sd": h.std(dim=0).mean(), "effective_rank": effective_rank(h)}


def collapse(watched: dict[str, float], n_embedding: int, remedy: str) -> str | None:
    """Return a complaint about the numbers of `watched_embedding`, with the remedy, or None."""
    if watched["embedding_sd"] >= LEAST_SD and watched["effective_rank"] >= LEAST_RANK * n_embedding:
        return None
    return (
        f"the embedding has collapsed: its mean standard deviation is {watched['embedding_sd']:.3g} and its effective "
        f"rank {watched['effective_rank']:.1f} of {n_embedding}; {remedy} in the model's params."
    )


def count_split(cells: Cells, kept: float) -> tuple[Tensor, Tensor]:
    """Return a share of every cell's molecules, and the others, as log1p expression on the cell's scale, (B, genes)."""
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
            Share of genes that random masking replaces by their mean; the others are scaled up to compensate.
        """
        x = self.standardized(x)
        if hidden > 0.0:
            x = x * (torch.rand_like(x) >= hidden) / (1.0 - hidden)
        return self.layers(x)


class MaskedPrediction(nn.Module):
    """Stage A: context encoder, target encoder and the predictor between their embeddings."""

    def __init__(self, encoder: Encoder, params: JepaParams) -> None:
        super().__init__()
        self.params = params
        self.register_buffer("progress", torch.zeros(()))
        self.encoder = encoder
        self.target_encoder = copy.deepcopy(encoder).requires_grad_(requires_grad=False)
        self.predictor = mlp(params.n_latent, WIDTH, params.n_latent)

    def losses(self, cells: Cells) -> dict[str, Tensor]:
        """Invariance, variance and covariance terms."""
        done = min(1.0, float(self.progress) / FULL_FROM)
        seen, other = count_split(cells, KEPT_AT_FIRST + (KEPT_AT_LAST - KEPT_AT_FIRST) * done)
        with torch.no_grad():
            target = self.target_encoder(other)
        context = self.encoder(seen, self.params.mask_rate * (1.0 - done))
        terms = {
            "invariance": (self.predictor(context) - target).pow(2).mean(),
            "variance": variance_term(context),
            "covariance": covariance_term(context),
        }
        weights = self.params.weights
        return {"loss": sum(getattr(weights, name) * value for name, value in terms.items()), **terms}

    def watch(self, cells: Cells) -> dict[str, Tensor]:
        """Watch the target embedding."""
        return watched_embedding(self.target_encoder(cells.x))

    def complaint(self, watched: dict[str, float]) -> str | None:
        """Return a complaint about a collapse, or None."""
        return collapse(watched, self.predictor[-1].out_features, "raise weights.variance or weights.covariance")

    def after_step(self, progress: float) -> None:
        """Update the target encoder: θ̄ ← d θ̄ + (1 − d) θ."""
        self.progress.fill_(progress)
        with torch.no_grad():
            for average, parameter in zip(self.target_encoder.parameters(), self.encoder.parameters(), strict=True):
                average.lerp_(parameter, 1.0 - self.params.target_decay)


# --- stage C: way back to genes ---------------------------------------------------------------------------------------


class Representation(nn.Module):
    """Encoder and decoder to counts: stage C.

    Parameters
    ----------
    encoder
        Of stage A. If its parameters ask for gradients, it learns from the likelihood.
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
        """Return a complaint about a collapse, or None."""
        if "effective_rank" not in watched:
            return None
        return collapse(watched, self.decoder[0].in_features, "lower learning_rate")


def shared_map(inner: np.ndarray, across: np.ndarray, shifts: np.ndarray, effects: np.ndarray) -> np.ndarray:
    """Return a linear map M that cells and perturbations share, (dimensions, genes).

    M minimizes ‖X − H M‖²/n + w ‖E − D M‖² + λ‖M‖². H and X are embeddings and expression of n cells minus the means of
    their groups; D and E are shifts and effects of the perturbations. w gives cells and perturbations the same total
    variance of the embedding. Effects alone would leave most directions undetermined; cells alone give effects a wrong
    size.

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
    params, optimization
        Of the model.
    """

    params: JepaParams
    optimization: Optimization

    @property
    def stops(self) -> bool:
        """Whether a collapse is an error; else it is a fact of the run."""
        return self.params.when_broken == "stop"

    def learner(self, network: nn.Module, seed: int, n_steps: int) -> Learner:
        """Return how a stage's network is optimized."""
        return Learner(network, seed, n_steps, self.optimization, stops=self.stops)

    def trained(self, run: Run, network: nn.Module, cells: CellSampler, n_steps: int, stage: str) -> nn.Module:
        """Return the averaged network after its training, whose history and complaints become facts of the run."""
        own = replace(run, checkpoints=run.checkpoints / stage, history=[], facts={})
        learner = self.learner(network, run.seed, n_steps)
        learner.optimize(Batches(cells, None, self.params.batch_size, run.seed), own, f"jepa {stage}")
        facts = {key: own.facts[key] for key in ("n_parameters", "complaint") if key in own.facts}
        run.facts[stage] = {**facts, "history": own.history}
        return learner.average.module.cpu().eval()

    def trained_briefly(self, seed: int, network: nn.Module, cells: CellSampler, n_steps: int, stage: str) -> nn.Module:
        """Return the same without checkpoints and history, watched at its end alone.

        A decoder that the embedding does not need is not trained.
        """
        if stage == "stage_c" and self.params.self_supervised:
            return network
        network = self.learner(network, seed, n_steps).optimize_briefly(cells, self.params.batch_size)
        with torch.no_grad():
            found = network.watch(cells.batch(N_WATCHED, (seed, WATCHED, 0)))
        watched = {name: float(value) for name, value in found.items()}
        if complaint := network.complaint(watched):
            if self.stops:
                raise InputError(f"training was stopped in an inner fold: {complaint}")
            logger.warning("jepa, inner fold, %s: %s", stage, complaint)
        return network


# Trains the network of a stage: from the network, cells to sample from, steps and the stage's name.
Optimized = Callable[[nn.Module, CellSampler, int, str], nn.Module]


class JepaLatent(NetworkLatent):
    """The latent space of stage A: standardized embeddings, and the effects of their shifts on genes.

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
        """Train stages A and C on training cells; resumes from checkpoints of the same training."""
        return cls._learned(pairs.roles("train"), run.seed, recipe, partial(recipe.trained, run))

    @classmethod
    def learned_briefly(cls, training: Pairs, seed: int, recipe: Recipe) -> "JepaLatent":
        """Train the same embedding on these cells, on the CPU, without checkpoints and without an unneeded decoder."""
        return cls._learned(training, seed, recipe, partial(recipe.trained_briefly, seed))

    @classmethod
    def _learned(cls, training: Pairs, seed: int, recipe: Recipe, optimized: Optimized) -> "JepaLatent":
        cells, n_genes, params = CellSampler(training.X), training.X.shape[1], recipe.params
        torch.manual_seed(seed)
        encoder = Encoder(n_genes, params.n_latent)
        encoder.fit_scale(training)
        n_steps = params.n_steps_decoder
        if params.self_supervised:
            stage_a = MaskedPrediction(encoder, params)
            encoder = optimized(stage_a, cells, params.n_steps_representation, "stage_a").target_encoder
        else:  # the encoder learns with the decoder, in as many steps as both have
            n_steps += params.n_steps_representation
        torch.manual_seed(seed + 1)
        stage_c = Representation(encoder.train(), params.n_latent, n_genes)
        latent = cls(optimized(stage_c, cells, n_steps, "stage_c"))
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
        """Centre and scale the embedding and fit M, mean effects ≈ mean shifts · M, in one pass over the cells.

        See `shared_map`. The group of a perturbed cell is its perturbation, that of a control its batch and cell type.
        """
        groups, n = training.groups, len(training.rows)
        sums = np.zeros((len(groups.n_cells), self.n_dimensions))
        inner = np.zeros((self.n_dimensions, self.n_dimensions))
        across = np.zeros((self.n_dimensions, len(training.genes)))
        for rows, X in training.blocks():
            h = self.encode(X).astype(np.float64)  # centre is 0 and scale 1 until now
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
        """Return the same embedding with an effect map that is fitted to the same cells and to these perturbations."""
        return JepaLatent(self.network, shared_map(*self._of_cells, shifts, effects))

    def mean_change(self, shifts: np.ndarray) -> np.ndarray:
        """Return mean shift · M, (genes,)."""
        return shifts.mean(axis=0) @ self.effect_map


# --- stage B: predictor -----------------------------------------------------------------------------------------------

# An action is ignored if the squared distance between predictions with right and wrong action is a smaller share of
# their squared distance to the start.
LEAST_ACTION = 1e-3
LOG_VARIANCES = (-6.0, 3.0)


class CellGroups:
    """Cells that share perturbation, batch and cell type. They are not paired: only their distributions compare.

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


class Predictor(nn.Module):
    """Stage B: mean and variance of the embedding after a perturbation.

    The shift is the sum of f(h, vector) over members, plus g(h, Σ vectors) for the interaction of a combination.
    Without a member it is zero.
    """

    def __init__(self, latent: JepaLatent, conditions: Conditions, params: JepaParams) -> None:
        super().__init__()
        width, dropout = params.width, params.dropout
        self.params, self.is_withheld = params, params.action == "withheld"
        n = latent.n_dimensions
        # Shifts times this have the squared norm of their effects on genes, up to one factor for all.
        U, s, _ = np.linalg.svd(latent.effect_map, full_matrices=False)
        in_genes = U * s * np.sqrt(n / max((s**2).sum(), 1e-12))
        self.register_buffer("in_genes", torch.from_numpy(in_genes.astype(np.float32)), persistent=False)
        self.gene_encoder = GeneEncoder(conditions, width, params.own_dropout, drops_together=True)
        self.direct = nn.Linear(width, 2 * n, bias=False)
        self.of_member = mlp(n + width, width, width, 2 * n, dropout=dropout)
        self.of_combination = mlp(n + width, width, 2 * n, dropout=dropout)
        with torch.no_grad():
            self.of_combination[-1].weight.mul_(0.1)
            self.of_combination[-1].bias.zero_()
        self.null_action = nn.Parameter(torch.zeros(width))
        self.own_log_variance = nn.Parameter(torch.full((n,), -2.0))

    def predicted(
        self, h: Tensor, genes: Tensor, has_action: Tensor | None = None, context: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
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
        context
            Vectors of contexts, (B, dimensions).
        """
        tokens, is_member = self.gene_encoder(genes, context), genes >= 0  # (B, members, width), (B, members)
        if has_action is None:
            has_action = torch.full((len(h),), not self.is_withheld, device=h.device)
        withheld = ~has_action & is_member.any(dim=1)
        first = torch.where(withheld[:, None], self.null_action, tokens[:, 0])
        tokens = torch.cat([first[:, None], tokens[:, 1:]], dim=1)
        is_member = torch.cat([is_member[:, :1], is_member[:, 1:] & ~withheld[:, None]], dim=1)
        joint = torch.cat([h[:, None].expand(-1, tokens.shape[1], -1), tokens], dim=-1)
        out = ((self.of_member(joint) + self.direct(tokens)) * is_member[..., None]).sum(dim=1)
        action = (tokens * is_member[..., None]).sum(dim=1)
        out = out + self.of_combination(torch.cat([h, action], dim=-1)) * (is_member.sum(dim=1, keepdim=True) > 1)
        shift, log_variance = out.chunk(2, dim=-1)
        return h + shift, (self.own_log_variance + log_variance).clamp(*LOG_VARIANCES)

    def losses(self, batch: Batch) -> dict[str, Tensor]:
        """Error of group means in units of genes, likelihood of the groups' cells, variance of an action's shifts."""
        groups = CellGroups(batch.group)
        withheld = 1.0 if self.is_withheld else self.params.action_dropout if self.training else 0.0
        has_action = torch.rand(groups.n, device=batch.start.device)[groups.member] >= withheld
        mean, log_variance = self.predicted(batch.start, batch.genes, has_action, batch.context)
        centre, shift = groups.mean(mean), mean - batch.start
        actions = batch.genes if batch.context is None else torch.cat([batch.genes, batch.context], dim=1)
        of_actions = CellGroups(actions.unique(dim=0, return_inverse=True)[1])
        error = (centre - groups.mean(batch.target)) @ self.in_genes
        spread = groups.mean((mean - centre[groups.member]).pow(2) + torch.exp(log_variance))[groups.member]
        terms = {
            "effect": error.pow(2)[groups.member].mean(),
            "world": 0.5 * ((batch.target - centre[groups.member]).pow(2) / spread + spread.log()).mean(),
            "steadiness": (shift - of_actions.mean(shift)[of_actions.member]).pow(2).mean(),
        }
        weights = self.params.weights
        return {"loss": sum(getattr(weights, name) * value for name, value in terms.items()), **terms}

    def watch(self, batch: Batch) -> dict[str, Tensor]:
        """Return numbers that show whether the predictor uses the action.

        action_share: share of the variance of predicted shifts that lies between actions. distance_*_action: mean
        squared distance between measured group means and those predicted with the right, a wrong and the null action.
        action_effect: squared distance between predictions with right and wrong action, as a share of their squared
        distance to the start. With one action alone there is no wrong one.
        """
        is_perturbed = (batch.genes >= 0).any(dim=1)
        start, genes = batch.start[is_perturbed], batch.genes[is_perturbed]
        groups = CellGroups(batch.group[is_perturbed])
        has_action = torch.full((len(start),), not self.is_withheld, device=start.device)
        context = None if batch.context is None else batch.context[is_perturbed]
        predicted = {
            "right": self.predicted(start, genes, has_action, context)[0],
            "null": self.predicted(start, genes, torch.zeros_like(has_action), context)[0],
        }
        watched = {}
        actions, action = genes.unique(dim=0, return_inverse=True)
        if len(actions) > 1:
            predicted["wrong"] = self.predicted(start, actions[(action + 1) % len(actions)], has_action, context)[0]
            shift, of_actions = predicted["right"] - start, CellGroups(action)
            between = of_actions.mean(shift)[of_actions.member] - shift.mean(dim=0)
            apart = (predicted["right"] - predicted["wrong"]).pow(2).mean()
            watched = {
                "action_share": between.pow(2).sum() / (shift - shift.mean(dim=0)).pow(2).sum().clamp(min=1e-12),
                "action_effect": apart / shift.pow(2).mean().clamp(min=1e-12),
            }
        measured = groups.mean(batch.target[is_perturbed])
        distances = {name: (groups.mean(cells) - measured).pow(2).mean() for name, cells in predicted.items()}
        return watched | {f"distance_{name}_action": distance for name, distance in distances.items()}

    def complaint(self, watched: dict[str, float]) -> str | None:
        """Return a complaint about these numbers, or None."""
        if watched.get("action_effect", np.inf) >= LEAST_ACTION:
            return None
        return (
            "the predictor ignores its action: with another perturbation it predicts the same (action_effect "
            f"{watched['action_effect']:.2g}); train longer, or lower action_dropout in the model's params."
        )


# --- probes of the embedding ------------------------------------------------------------------------------------------

MAX_CELLS = 4000
MAX_LABELS = 30  # the commonest
N_NEIGHBOURS = 15
N_FOLDS = 3


def separability(pairs: Pairs, latent: Latent, seed: int) -> dict[str, dict[str, float]]:
    """Return how well classifiers separate cells, by obs column.

    The numbers are balanced accuracies of a logistic regression (linear probe) and of the 15 nearest neighbours,
    cross-validated over cells: in the latent space, and in as many principal components of the same cells. Beside them
    stands chance, 1 / number of labels. There are at most 30 labels and 4,000 cells. Controls are no perturbation. A
    column with one label is left out.
    """
    found = {}
    for column in ("batch", "cell_type", "perturbation"):
        labels = pairs.obs[column].to_numpy(str)
        usable = np.flatnonzero(~pairs.is_control) if column == "perturbation" else np.arange(len(labels))
        rows = np.random.default_rng(seed).permutation(usable)
        shown = pd.Series(labels[rows]).value_counts().index[:MAX_LABELS]
        rows = np.sort(rows[np.isin(labels[rows], shown.to_numpy(str))][:MAX_CELLS])
        n_cells = pd.Series(labels[rows]).value_counts()
        commonest = n_cells.index[n_cells >= N_NEIGHBOURS].to_numpy(str)
        if len(commonest) < 2:
            continue
        rows = rows[np.isin(labels[rows], commonest)]
        X = pairs.X[rows].toarray()
        n_components = min(latent.n_dimensions, X.shape[1], len(X) - 1)
        spaces = {"embedding": latent.encode(X), "pca": PCA(n_components, random_state=0).fit_transform(X)}
        found[column] = {"n_labels": len(commonest), "n_cells": len(rows), "chance": round(1 / len(commonest), 4)}
        for space, z in spaces.items():
            classifiers = {"linear": LogisticRegression(max_iter=200), "knn": KNeighborsClassifier(N_NEIGHBOURS)}
            for name, classifier in classifiers.items():
                folds = StratifiedKFold(N_FOLDS, shuffle=True, random_state=0)
                predicted = cross_val_predict(make_pipeline(StandardScaler(), classifier), z, labels[rows], cv=folds)
                found[column][f"{space}_{name}"] = round(float(balanced_accuracy_score(labels[rows], predicted)), 4)
    return found


# --- model ------------------------------------------------------------------------------------------------------------

STARTS = 512  # control cells over which a mean effect is averaged
INNER_CELLS = 200_000  # perturbed cells of an inner fold
ROWS_AT_ONCE = 2**16  # cells over which a borrowed shift is averaged, over all neighbours


class Jepa(LearnedModel):
    """Embedding, predictor and decoder."""

    cells_together = 16
    params: JepaParams
    latent: JepaLatent
    net: Predictor
    _kept_mean: "PredictedMean | None" = None

    def __init__(self, params: JepaParams) -> None:
        super().__init__(params)
        self.stops_when_broken = params.when_broken == "stop"
        self.recipe = Recipe(params, self.optimization)

    def fit_latent(self, pairs: Pairs, effects: Effects, run: Run) -> JepaLatent:
        """Train stages A and C."""
        latent = JepaLatent.learned(pairs, run, self.recipe)
        run.facts["separability"] = separability(pairs.roles("train"), latent, run.seed)
        return latent

    def restore_latent(self, state: dict[str, Tensor]) -> JepaLatent:
        """Return the embedding of an artefact."""
        return JepaLatent.restored(state)

    def network(self, latent: JepaLatent, conditions: Conditions) -> Predictor:
        """Return a new predictor."""
        return Predictor(latent, conditions, self.params)

    def training_cells(self, pairs: Pairs, z: Tensor, conditions: Conditions, seed: int) -> PairedCells:
        """Return matched cells; shuffled actions give every perturbation the genes of another with as many members."""
        cells = super().training_cells(pairs, z, conditions, seed)
        if self.params.action == "shuffled":
            rng = np.random.default_rng(seed)
            n_members = (cells.genes >= 0).sum(dim=1).numpy()
            for n in np.unique(n_members):
                rows = rng.permutation(np.flatnonzero(n_members == n))
                cells.genes[rows] = cells.genes[np.roll(rows, 1)]
        return cells

    def shift(
        self, z: Tensor, genes: Tensor, generator: torch.Generator | None, context: Tensor | None = None
    ) -> Tensor:
        """Return the difference between the perturbed embedding, sampled, and the cell's own.

        The same noise serves both, so that control has a shift of zero.
        """
        mean, log_variance = self.net.predicted(z, genes, context=context)
        if generator is None:
            return mean - z
        _, own_log_variance = self.net.predicted(z, torch.full_like(genes, -1))
        noise = torch.randn(z.shape, generator=generator)
        return mean - z + (torch.exp(0.5 * log_variance) - torch.exp(0.5 * own_log_variance)) * noise

    # --- mean effects of the predictor ---

    def network_means(
        self, z: np.ndarray, perturbations: Sequence[str], context: Tensor | None
    ) -> dict[str, np.ndarray]:
        """Return the predictor's mean effects on cells."""
        return {"predictor": self._predicted_mean(z, context).of(perturbations)}

    def _predicted_mean(self, z: np.ndarray, context: Tensor | None) -> "PredictedMean":
        """Return the predictor's mean effects on cells by label, kept while the same cells are asked."""
        kept = self._kept_mean
        starts = torch.from_numpy(z[:: -(-len(z) // STARTS)])
        told = None if context is None else context[:: -(-len(z) // STARTS)]
        if kept is None or kept.net is not self.net or not kept.starts_from(starts, told):
            known = self.conditions, self.neighbours, frozenset(self.seen)
            kept = self._kept_mean = PredictedMean(self.latent, self.net, *known, starts, told)
        return kept

    def learned_mean(self, response: Response, rng: np.random.Generator) -> np.ndarray:
        """Return the predictor's mean effect, without its noise and without sampled neighbours."""
        return self.network_means(response.z, [response.perturbation], response.told)["predictor"][0]

    def mean_effects(
        self, cells: np.ndarray, perturbations: Sequence[str], seed: int, context: Context | None = None
    ) -> np.ndarray:
        """Return mean effects in a context, (perturbations, genes); see `LearnedModel.mean_effects`."""
        if self.has_closed_mean:
            return super().mean_effects(cells, perturbations, seed, context)
        means = self.means_in(context, perturbations)["predictor"]
        own_levels = [self.own_level_change(self.population, label) for label in perturbations]
        return (means + own_levels).astype(np.float32)

    def fit_network_means(self, cells: PairedCells, run: Run) -> dict[str, FitMean]:
        """Return how to train the predictor again for an inner fold of a mean in closed form."""
        return {"predictor": partial(self._predictor_of_fold, cells, run)}

    def _predictor_of_fold(
        self, cells: PairedCells, run: Run, inner: TrainingSet, start: np.ndarray
    ) -> Callable[[str], np.ndarray]:
        """Train on an inner training set and its half of the controls, and return mean effects by label.

        Parameters
        ----------
        start
            Rows of pairs.h5ad of the controls to start from.
        """
        rng = np.random.default_rng(run.seed)
        is_known = _cells_of(inner, rng)
        rows = cells.pairs.rows.searchsorted(rng.permutation(start)[:STARTS])  # rows of pairs.h5ad rise
        table = inner.embeddings.standardized(inner.effects.genes)
        conditions = Conditions(list(table.index), table.to_numpy(), self.conditions.contexts)
        neighbours = Neighbours.fit(*inner.halves, dict(zip(table.index, table.to_numpy(float), strict=True)))
        latent, net = self._trained_for_fold(cells, run, inner, is_known, conditions, start)
        z = cells.z[rows] if self.params.fold_embedding == "shared" else _encoded_rows(latent, cells.pairs, rows)
        told = None if cells.context is None else cells.context[rows]
        return PredictedMean(latent, net.eval(), conditions, neighbours, frozenset(inner.effects.genes), z, told)

    def _trained_for_fold(
        self,
        cells: PairedCells,
        run: Run,
        inner: TrainingSet,
        is_known: np.ndarray,
        conditions: Conditions,
        start: np.ndarray,
    ) -> tuple[JepaLatent, Predictor]:
        """Return embedding and predictor of an inner fold, from the disk if the same fold was trained before."""
        # A predictor belongs to the embedding that it was trained in.
        embedding = self.latent.network.centre.tolist() if self.params.fold_embedding == "shared" else None
        kept = run.checkpoints / run.identity / f"inner_{digest(inner.effects.labels, start.tolist(), embedding)}.ckpt"
        if trained := resumable(kept, "jepa, inner fold"):
            latent = JepaLatent.restored(trained["latent"])
            net = self.network(latent, conditions)
            net.load_state_dict(trained["state"])
            return latent, net
        known = inner.pairs.rematched(is_known | inner.controls, run.seed)
        latent, z = self._latent_of_fold(cells, run, inner, known)
        torch.manual_seed(run.seed)
        learner = Learner(self.network(latent, conditions), run.seed, self.params.n_steps, self.optimization)
        matched = self.training_cells(known, z, conditions, run.seed)
        net = learner.optimize_briefly(matched, self.params.batch_size)
        save_checkpoint(kept, {"latent": latent.state(), "state": net.state_dict()})
        logger.info("jepa: trained again for an inner fold, on %d perturbations", len(inner.effects.labels))
        return latent, net

    def _latent_of_fold(
        self, cells: PairedCells, run: Run, inner: TrainingSet, known: Pairs
    ) -> tuple[JepaLatent, Tensor]:
        """Return the embedding of an inner fold and the coordinates of its cells, (known, dimensions).

        Its map to effects is fitted to the effects of the fold's training set.
        """
        if self.params.fold_embedding == "own":
            latent = JepaLatent.learned_briefly(known, run.seed, self.recipe)
            return latent, encoded(known, latent)
        pairs, row = inner.pairs, cells.pairs.rows.searchsorted
        z = cells.z if pairs is cells.pairs else cells.z[row(pairs.rows)]
        shifts = pairs.groups.effects(pairs.groups.sums(z.numpy()), inner.half)
        shifts = shifts[np.isin(pairs.groups.labels, inner.effects.labels)]
        return self.latent.with_effects(shifts, inner.effects.values), cells.z[row(known.rows)]


def _cells_of(inner: TrainingSet, rng: np.random.Generator) -> np.ndarray:
    """Return True for at most INNER_CELLS perturbed cells of an inner training set, (cells,)."""
    groups = inner.pairs.groups
    is_of_inner = np.append(np.isin(groups.labels, inner.effects.labels), False)  # the last entry serves controls
    is_known = is_of_inner[np.minimum(groups.of_cell, len(groups.labels))]
    if is_known.sum() > INNER_CELLS:
        is_known &= rng.random(len(is_known)) < INNER_CELLS / is_known.sum()
    return is_known


def _encoded_rows(latent: JepaLatent, pairs: Pairs, rows: np.ndarray) -> Tensor:
    return torch.from_numpy(latent.encode(pairs.X[rows]))


@dataclass(frozen=True)
class PredictedMean:
    """Mean effects of a trained predictor on some control cells, by label.

    An unseen member has the weighted mean shift of its neighbours times the strength; see `Neighbours`.

    Attributes
    ----------
    latent, net, conditions, neighbours
        Of the training.
    seen
        Genes that training perturbed.
    z
        Embeddings of the control cells, (cells, dimensions).
    context
        Vectors of their contexts, (cells, dimensions), where the network is told of them.
    """

    latent: JepaLatent
    net: Predictor
    conditions: Conditions
    neighbours: Neighbours
    seen: frozenset[str]
    z: Tensor
    context: Tensor | None = None

    _lent: dict[tuple[str, ...], np.ndarray] = field(default_factory=dict)

    def starts_from(self, z: Tensor, context: Tensor | None) -> bool:
        """Return whether these are the control cells."""
        if context is not None and (self.context is None or not torch.equal(context, self.context)):
            return False
        return torch.equal(z, self.z) and (context is None) == (self.context is None)

    def __call__(self, perturbation: str) -> np.ndarray:
        """Return the mean effect of a perturbation, (genes,)."""
        return self.of([perturbation])[0]

    def of(self, perturbations: Sequence[str]) -> np.ndarray:
        """Return the mean effects of perturbations, (perturbations, genes)."""
        members = [members_of(label) for label in perturbations]
        unseen = [unseen_among(genes, self.seen) for genes in members]
        known = [tuple(gene for gene in genes if gene not in new) for genes, new in zip(members, unseen, strict=True)]
        shifts = self._mean_shifts(known, self.z)
        asked = list(dict.fromkeys(gene for genes in unseen for gene in genes))
        vectors = self.conditions.vectors[self.conditions.index(asked)[:, 0]].numpy().astype(float)
        weights = dict(zip(asked, self.neighbours.weights(vectors) if asked else [], strict=True))
        for shift, genes, new in zip(shifts, known, unseen, strict=True):
            for gene in new:
                shift += self.neighbours.strength * (weights[gene] @ self._lent_beside(genes))
        return shifts @ self.latent.effect_map

    def _lent_beside(self, known: tuple[str, ...]) -> np.ndarray:
        """Return the mean shifts that every neighbour adds to those of known genes, (neighbours, dimensions)."""
        if known not in self._lent:
            start = self.z[: max(1, ROWS_AT_ONCE // len(self.neighbours.genes))]
            with_others = self._mean_shifts([(*known, other) for other in self.neighbours.genes], start)
            self._lent[known] = with_others - self._mean_shifts([known], start)
        return self._lent[known]

    @torch.no_grad()
    def _mean_shifts(self, labels: Sequence[tuple[str, ...]], start: Tensor) -> np.ndarray:
        """Return mean shifts over start cells of several sets of genes, (sets, dimensions)."""
        each = dict.fromkeys(labels)  # in a ranking most are the empty set
        index = [self.conditions.index(genes)[:, 0].tolist() for genes in each]
        width = max(2, *map(len, index))
        genes = torch.tensor([[*entries, *[-1] * (width - len(entries))] for entries in index])
        found: list[Tensor] = []
        for some in genes.split(max(1, ROWS_AT_ONCE // len(start))):
            h = start.repeat(len(some), 1)
            context = None if self.context is None else self.context[: len(start)].repeat(len(some), 1)
            shifts = self.net.predicted(h, some.repeat_interleave(len(start), dim=0), context=context)[0] - h
            found.append(shifts.reshape(len(some), len(start), -1).mean(dim=1))
        place = {label: i for i, label in enumerate(each)}
        return torch.cat(found).numpy()[[place[label] for label in labels]]
