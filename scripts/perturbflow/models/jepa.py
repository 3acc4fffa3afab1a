"""JEPA: predict the embedding of a perturbed cell from the embedding of a control cell and the perturbation.

A joint-embedding predictive architecture in three stages: `representation` holds A, an embedding of cells that learns without labels, and C, the
way back to genes; `world` holds B, the world model. A, C and B are trained in this order, each on what the one before has left, so that
nothing of a perturbation's label is in the embedding.

With `mean: closed_form` the mean effect is that of `set_gp`, with the world model's as one more term: trained anew without the perturbations that a
fold holds out, it is believed as far as it predicts those. With `mean: learned` it is the world model's alone.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from perturbflow.artefacts import save_checkpoint
from perturbflow.models.base import Run
from perturbflow.models.batches import PairedCells, encoded
from perturbflow.models.conditions import Conditions
from perturbflow.models.effects import Effects
from perturbflow.models.learned import LearnedModel, unseen_among
from perturbflow.models.neighbours import Neighbours
from perturbflow.models.optimization import Learner, optimize_briefly, resumable
from perturbflow.models.probes import separability
from perturbflow.models.representation import JepaLatent, Recipe
from perturbflow.models.set_gp import FitPart
from perturbflow.models.shift import Training
from perturbflow.models.world import World
from perturbflow.pairs import Pairs
from perturbflow.records import digest
from perturbflow.symbols import members_of

logger = logging.getLogger(__name__)

STARTS = 512  # control cells that a mean effect is the mean over
INNER_CELLS = 200_000  # perturbed ones of an inner fold
ROWS_AT_ONCE = 2**16  # cells that what is borrowed is the mean over


class Jepa(LearnedModel):
    """Embedding, world model and decoder.

    Parameters
    ----------
    self_supervised
        Whether there is a stage A; without, the encoder learns from the decoder's likelihood alone, in as many steps.
    n_steps_representation, n_steps_decoder, mask_rate, target_decay
        Of stages A and C.
    fold_embedding
        Of inner folds. shared: that of the whole training, which has seen the cells that a fold holds out, without their labels; own: learned
        anew without those cells.
    action
        given; withheld: the world model never sees the perturbation; shuffled: it sees that of another one.
    when_broken
        stop: a collapsed embedding or an ignored action ends the training; report: it is written down.
    width, dropout, own_dropout, action_dropout, weights
        Of the networks and their losses.
    """

    cells_per_draw = 16
    latent: JepaLatent

    def __init__(
        self,
        *,
        self_supervised: bool,
        n_steps_representation: int,
        n_steps_decoder: int,
        mask_rate: float,
        target_decay: float,
        fold_embedding: str,
        action: str,
        when_broken: str,
        width: int,
        dropout: float,
        own_dropout: float,
        action_dropout: float,
        weights: dict[str, float],
        **shared: Any,
    ) -> None:
        super().__init__(**shared)
        self.self_supervised, self.action, self.stops_when_broken = self_supervised, action, when_broken == "stop"
        self.embeds_folds_anew = fold_embedding == "own"
        self.n_steps_before = (n_steps_representation, n_steps_decoder)
        vicreg = {name: weights[name] for name in ("invariance", "variance", "covariance")}
        self.masked: dict[str, Any] = {"mask_rate": mask_rate, "target_decay": target_decay, "weights": vicreg}
        self.architecture: dict[str, Any] = {
            "width": width, "dropout": dropout, "own_dropout": own_dropout, "action_dropout": action_dropout,
            "weights": {name: weight for name, weight in weights.items() if name not in vicreg}, "is_withheld": action == "withheld",
        }  # fmt: skip

    @property
    def recipe(self) -> Recipe:
        """How the embedding is learned."""
        return Recipe(
            is_self_supervised=self.self_supervised,
            n_embedding=self.n_latent,
            n_steps=self.n_steps_before,
            batch_size=self.batch_size,
            optimization=self.optimization,
            masked=self.masked,
            stops=self.stops_when_broken,
        )

    def fit_latent(self, pairs: Pairs, effects: Effects, run: Run) -> JepaLatent:
        """Train stages A and C."""
        latent = JepaLatent.learned(pairs, run, self.recipe)
        run.facts["separability"] = separability(pairs.roles("train"), latent, run.seed)
        return latent

    def restore_latent(self, state: dict[str, Tensor]) -> JepaLatent:
        """Return the embedding of an artefact."""
        return JepaLatent.restored(state)

    def network(self, latent: JepaLatent, conditions: Conditions) -> World:
        """Return a new world model."""
        return World(latent, conditions, **self.architecture)

    def paired(self, pairs: Pairs, z: Tensor, conditions: Conditions, seed: int) -> PairedCells:
        """Return matched cells; with shuffled actions every perturbation has the genes of another of its order."""
        cells = super().paired(pairs, z, conditions, seed)
        if self.action == "shuffled":
            rng = np.random.default_rng(seed)
            order = (cells.genes >= 0).sum(dim=1).numpy()
            for n_members in np.unique(order):
                rows = rng.permutation(np.flatnonzero(order == n_members))
                cells.genes[rows] = cells.genes[np.roll(rows, 1)]
        return cells

    def other_parts(self, cells: PairedCells, run: Run) -> dict[str, FitPart]:
        """Return the world model, to be trained anew for inner folds of a mean in closed form."""
        return {"world": partial(self._inner_world, cells, run)}

    def _inner_world(self, cells: PairedCells, run: Run, inner: Training, start: np.ndarray) -> Callable[[str], np.ndarray]:
        """Train on what an inner training knows and on its half of the controls, and return mean effects by label.

        Parameters
        ----------
        start
            Rows of pairs.h5ad that hold the controls to start from.
        """
        groups, is_of_inner = inner.pairs.groups, np.isin(inner.pairs.groups.labels, inner.effects.labels)
        is_perturbed = groups.of_cell < len(groups.labels)
        is_known = is_perturbed & is_of_inner[np.where(is_perturbed, groups.of_cell, 0)]
        rng = np.random.default_rng(run.seed)
        if is_known.sum() > INNER_CELLS:
            is_known &= rng.random(len(is_known)) < INNER_CELLS / is_known.sum()
        rows = cells.pairs.rows.searchsorted(rng.permutation(start)[:STARTS])  # rows of pairs.h5ad rise
        table = inner.embeddings.standardized(inner.effects.genes)
        conditions = Conditions(list(table.index), table.to_numpy())
        neighbours = Neighbours.fit(*inner.halves, dict(zip(table.index, table.to_numpy(float), strict=True)))
        embedding = None if self.embeds_folds_anew else self.latent.network.centre.tolist()  # what was trained in another is of no use
        kept = run.checkpoints / run.identity / f"inner_{digest(inner.effects.labels, start.tolist(), embedding)}.ckpt"
        if trained := resumable(kept, "jepa, inner fold"):
            latent = JepaLatent.restored(trained["latent"])
            net = self.network(latent, conditions)
            net.load_state_dict(trained["state"])
        else:
            known = inner.pairs.rematched(is_known | inner.controls, run.seed)
            latent, z = self._fold_latent(cells, run, inner, known)
            torch.manual_seed(run.seed)
            net = self.network(latent, conditions)
            matched = self.paired(known, z, conditions, run.seed)
            net = optimize_briefly(Learner(net, run.seed, self.n_steps, self.optimization), matched, self.batch_size)
            if run.is_first_process:  # so that no fold is trained again if the job ends before the last
                save_checkpoint(kept, {"latent": latent.state(), "state": net.state_dict()})
            logger.info("jepa: trained anew for an inner fold, on %d perturbations", is_of_inner.sum())
        starts = torch.from_numpy(latent.encode(cells.pairs.X[rows])) if self.embeds_folds_anew else cells.z[rows]
        return partial(_mean_effect, latent, net.eval(), conditions, neighbours, set(inner.effects.genes), starts)

    def _fold_latent(self, cells: PairedCells, run: Run, inner: Training, known: Pairs) -> tuple[JepaLatent, Tensor]:
        """Return the embedding of an inner fold, its map fitted to the effects that the fold knows, and where its cells are, (known, dimensions)."""
        if self.embeds_folds_anew:
            latent = JepaLatent.learned_briefly(known, run.seed, self.recipe)
            return latent, encoded(known, latent)
        pairs, row = inner.pairs, cells.pairs.rows.searchsorted
        z = cells.z if pairs is cells.pairs else cells.z[row(pairs.rows)]
        shifts = pairs.groups.effects(pairs.groups.sums(z.numpy()), inner.half)[np.isin(pairs.groups.labels, inner.effects.labels)]
        return self.latent.with_effects(shifts, inner.effects.values), cells.z[row(known.rows)]

    def other_effects(self, z: np.ndarray, perturbation: str) -> dict[str, Callable[[], np.ndarray]]:
        """Return how to get the world model's mean effect on cells."""
        start = torch.from_numpy(z[:: -(-len(z) // STARTS)])
        return {
            "world": partial(_mean_effect, self.latent, self.net, self.conditions, self.neighbours, set(self.seen), start, perturbation)
        }

    def mean_change(self, start: np.ndarray, z: np.ndarray, moved: np.ndarray, perturbation: str, rng: np.random.Generator) -> np.ndarray:
        """Return the world model's mean effect: what its noise and the draw of neighbours would add is left out."""
        return self.other_effects(z, perturbation)["world"]()

    def displace(self, start: Tensor, genes: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the difference between the perturbed embedding, sampled, and the cell's own.

        The same noise serves both, so that no perturbation makes no difference.
        """
        mean, log_variance = self.net.predicted(start, genes)
        if generator is None:
            return mean - start
        _, own_log_variance = self.net.predicted(start, torch.full_like(genes, -1))
        noise = torch.randn(start.shape, generator=generator)
        return mean - start + (torch.exp(0.5 * log_variance) - torch.exp(0.5 * own_log_variance)) * noise


@torch.no_grad()
def _mean_effect(
    latent: JepaLatent, net: World, conditions: Conditions, neighbours: Neighbours, seen: set[str], z: Tensor, perturbation: str
) -> np.ndarray:
    """Return the mean effect on cells, (genes,): an unseen member has the mean of those that it borrows from, by weight and strength."""

    def shifts(labels: list[list[str]], start: Tensor) -> np.ndarray:
        """(labels, dimensions), means over start cells."""
        width = max(2, *map(len, labels))
        genes = torch.tensor([[*map(conditions.genes.index, members), *[-1] * (width - len(members))] for members in labels])
        moved = net.predicted(start.repeat(len(labels), 1), genes.repeat_interleave(len(start), dim=0))[0] - start.repeat(len(labels), 1)
        return moved.reshape(len(labels), len(start), -1).mean(dim=1).numpy()

    members = members_of(perturbation)
    unseen = unseen_among(members, seen)
    known = [gene for gene in members if gene not in unseen]
    moved = shifts([known], z)
    start = z[: max(1, ROWS_AT_ONCE // len(neighbours.genes))]
    for gene in unseen:
        vector = conditions.vectors[conditions.genes.index(gene)].numpy().astype(float)
        borrowed = neighbours.weights(vector[None]) @ shifts([[*known, other] for other in neighbours.genes], start)
        moved = moved + neighbours.strength * (borrowed - shifts([known], start))
    return latent.mean_change(moved)
