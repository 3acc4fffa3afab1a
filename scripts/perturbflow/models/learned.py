"""What the learned families share: conditions, displacements in latent space, what unseen genes borrow, and the way back to cells."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from perturbflow.embeddings import Embeddings
from perturbflow.errors import InputError
from perturbflow.models.base import Artefact, Model, Run, start_cells
from perturbflow.models.batches import Batches, PairedCells
from perturbflow.models.conditions import Conditions
from perturbflow.models.effects import Effects
from perturbflow.models.latent import Latent, LatentSpace
from perturbflow.models.neighbours import Neighbours
from perturbflow.models.networks import GeneEncoder
from perturbflow.models.optimization import Learner, optimize
from perturbflow.models.own_gene import OwnGene
from perturbflow.pairs import Pairs
from perturbflow.symbols import members_of, without_dose

CELLS_PER_BLOCK = 2048


class LearnedModel(Model):
    """A network on latent differences between control and perturbed cells.

    A predicted cell is its control cell plus the decoded displacement in latent space: what the latent space leaves
    out of a cell stays as it was. A gene that training never perturbed borrows displacements from `Neighbours`, and its
    own level follows `OwnGene`.

    Parameters
    ----------
    n_latent, n_steps, batch_size, learning_rate, weight_decay, ema_decay, control_share, synthetic_share, shifted_share
        Shared by all learned families, see config/schemas/models.schema.yaml.
    """

    reads_blocks = True
    cells_per_draw: ClassVar[int] = 1
    learns_residuals: bool = False  # whether the network sees targets less the mean effect of their perturbation

    def __init__(
        self,
        *,
        n_latent: int,
        n_steps: int,
        batch_size: int,
        learning_rate: float,
        weight_decay: float,
        ema_decay: float,
        control_share: float,
        synthetic_share: float,
        shifted_share: float,
    ) -> None:
        self.n_latent, self.n_steps, self.batch_size = n_latent, n_steps, batch_size
        self.learning_rate, self.weight_decay, self.ema_decay = learning_rate, weight_decay, ema_decay
        self.control_share, self.synthetic_share, self.shifted_share = control_share, synthetic_share, shifted_share

    @abstractmethod
    def network(self, latent: Latent, conditions: Conditions) -> nn.Module:
        """Return a new network for cells of this latent space and these perturbations."""

    @abstractmethod
    def displace(self, start: Tensor, genes: Tensor, generator: torch.Generator) -> Tensor:
        """Return the latent displacement of start cells, (B, dimensions), zero where all gene indices are -1."""

    def fit_latent(self, pairs: Pairs, effects: Effects, run: Run) -> Latent:
        """Return the latent space that the network works in."""
        return LatentSpace.fit(pairs, effects, self.n_latent)

    def fit(self, pairs: Pairs, embeddings: Embeddings, run: Run) -> Artefact:
        """Fit the latent space, then train the network in it."""
        effects = Effects.of_training(pairs)
        self.latent = self.fit_latent(pairs, effects, run)
        self.own_gene = OwnGene.fit(pairs.roles("train"), effects)
        table = embeddings.standardized(effects.genes)
        self.conditions = Conditions(list(table.index), table.to_numpy())
        self.neighbours = Neighbours.fit(*Effects.with_disjoint_controls(pairs), dict(zip(table.index, table.to_numpy(float), strict=True)))
        self.genes = pairs.genes
        self.seen = effects.genes
        torch.manual_seed(run.seed)
        self.net = self.network(self.latent, self.conditions)
        shares = (self.control_share, self.synthetic_share, self.shifted_share, self.cells_per_draw)
        cells = {
            role: PairedCells(pairs.roles(role), self.latent, self.conditions, *shares, residual=self.learns_residuals)
            for role in ("train", "validation")
            if len(pairs.roles(role).perturbations)
        }
        learner = Learner(self.net, run.seed, self.n_steps, self.learning_rate, self.weight_decay, self.ema_decay)
        optimize(learner, Batches(cells["train"], cells.get("validation"), self.batch_size, run.seed), run, type(self).__name__.lower())
        self.net = learner.average.module.cpu().eval()
        run.facts["unseen_genes"] = {name: str(getattr(self.neighbours, name)) for name in ("bandwidth", "tempering", "strength")}
        return {
            "state": self.net.state_dict(),
            "latent": {name: torch.as_tensor(value) for name, value in self.latent.state().items()},
            "own_gene": torch.as_tensor(self.own_gene.coefficients),
            "neighbours": {
                **asdict(self.neighbours),
                "vectors": torch.as_tensor(self.neighbours.vectors),
                "sizes": torch.as_tensor(self.neighbours.sizes),
            },
            "condition_genes": self.conditions.genes,
            "genes": self.genes,
            "seen": self.seen,
        }

    def restore_latent(self, state: dict[str, Tensor]) -> Latent:
        """Return the latent space of an artefact."""
        return LatentSpace(**{name: value.numpy() for name, value in state.items()})

    def restore(self, artefact: Artefact) -> None:
        """Rebuild the network around its weights."""
        self.latent = self.restore_latent(artefact["latent"])
        self.own_gene = OwnGene(artefact["own_gene"].numpy())
        self.genes, self.seen = artefact["genes"], artefact["seen"]
        vectors = next(value for name, value in artefact["state"].items() if name.endswith("gene_encoder.vectors"))
        self.conditions = Conditions(artefact["condition_genes"], vectors.numpy())
        arrays = {name: artefact["neighbours"][name].numpy() for name in ("vectors", "sizes")}
        self.neighbours = Neighbours(**{**artefact["neighbours"], **arrays})
        self.net = self.network(self.latent, self.conditions)
        self.net.load_state_dict(artefact["state"])
        self.net.eval()

    def refusal(self, perturbation: str) -> str | None:
        """A gene that no cell was perturbed in has no place among the vectors that the network was built around; a new dose gets one."""
        if self.conditions.add_doses(perturbation):
            for module in self.net.modules():
                if isinstance(module, GeneEncoder):
                    module.follow(self.conditions)
        unknown = self.conditions.unknown(perturbation)
        if not unknown:
            return None
        return f"{', '.join(unknown)} has no embedding: no cell of this screen was perturbed in it. Ask a baseline, such as stacked"

    @torch.no_grad()
    def predict(self, cells: np.ndarray, perturbations: Sequence[str], n: int, seed: int) -> np.ndarray:
        """Move start cells in latent space and bring them back to expression, a block at a time."""
        start = start_cells(cells, n)
        z = self.latent.encode(start)
        predicted = np.empty((len(perturbations), n, start.shape[1]), dtype=np.float32)
        for p, perturbation in enumerate(perturbations):
            if reason := self.refusal(perturbation):
                raise InputError(f"{perturbation} cannot be predicted: {reason}.")
            rng = np.random.default_rng((seed, p))
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            for first in range(0, n, CELLS_PER_BLOCK):
                block = slice(first, first + CELLS_PER_BLOCK)
                moved = self._displacement(torch.from_numpy(z[block]), perturbation, rng, generator).numpy()
                predicted[p, block] = self.outcome(start[block], z[block], moved, perturbation, rng)
        return predicted

    def outcome(self, start: np.ndarray, z: np.ndarray, moved: np.ndarray, perturbation: str, rng: np.random.Generator) -> np.ndarray:
        """Return perturbed cells, (cells, genes): the start cell plus what its move changes.

        Parameters
        ----------
        start, z
            Start cells, log1p-normalized (cells, genes) and in latent space (cells, dimensions).
        moved
            Their displacement in latent space, (cells, dimensions).
        """
        return start + self.latent.change(moved) + self.own_shift(start, perturbation)

    def own_shift(self, start: np.ndarray, perturbation: str) -> np.ndarray:
        """Return what is known of the levels of unseen perturbed genes, (genes,)."""
        shift = np.zeros(len(self.genes))
        row = {gene: i for i, gene in enumerate(self.genes)}
        for gene in members_of(perturbation):
            if gene not in self.seen and gene in row:
                shift[row[gene]] += self.own_gene.shift(float(start[:, row[gene]].mean()))
        return shift

    def _displacement(self, z: Tensor, perturbation: str, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        """Return the latent displacement of cells; the part of unseen members is borrowed and scaled by its strength."""
        members = members_of(perturbation)
        seen = {without_dose(gene)[0] for gene in self.seen}  # a drug at another dose is known: its dose is a number
        unseen = [gene for gene in members if without_dose(gene)[0] not in seen]
        genes = self.conditions.index([perturbation]).expand(len(z), -1).clone()
        if not unseen:
            return self.displace(z, genes, generator)
        known = genes.clone()
        for gene in unseen:
            column = members.index(gene)
            vector = self.conditions.vectors[self.conditions.genes.index(gene)].numpy().astype(float)
            drawn = rng.choice(self.neighbours.genes, size=len(z), p=self.neighbours.weights(vector[None])[0])
            genes[:, column] = self.conditions.index(list(drawn))[:, 0]
            known[:, column] = -1
        noise = generator.get_state()
        borrowed = self.displace(z, genes, generator)
        if len(unseen) == len(members):
            return self.neighbours.strength * borrowed
        generator.set_state(noise)
        certain = self.displace(z, known, generator)
        return certain + self.neighbours.strength * (borrowed - certain)
