"""What the learned families share: conditions, displacements in latent space, what unseen genes borrow, and the way back to cells."""

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from perturbflow.embeddings import Embeddings
from perturbflow.errors import InputError
from perturbflow.genes.symbols import CONTROL, entity_of, members_of
from perturbflow.models.base import Artefact, Model, Run, off_level, start_cells
from perturbflow.models.calibration import Calibration
from perturbflow.models.closed_form.base import Training
from perturbflow.models.effects import Effects
from perturbflow.models.gaussian_process.own_gene import OwnGene
from perturbflow.models.gaussian_process.set_gp import FitPart, SetGP
from perturbflow.models.latents.pca import Latent, LatentSpace
from perturbflow.models.neighbours import Neighbours
from perturbflow.models.thinning import Change, change_of, changed, drawn_mean_change, recounted
from perturbflow.models.training.batches import Batches, PairedCells, encoded
from perturbflow.models.training.conditions import Conditions
from perturbflow.models.training.loop import Learner, Optimization, optimize
from perturbflow.models.training.networks import GeneEncoder
from perturbflow.pairs import Context, Pairs

CELLS_PER_BLOCK = 2048
CENTRED_FROM = 16  # cells: fewer say little of where their mean is
POPULATION = 512  # control cells that a mean effect is the mean over
BORROWED = 16  # draws of whom an unseen gene borrows from, to average over


def unseen_among(members: Sequence[str], seen: Collection[str]) -> list[str]:
    """Return the members that training did not see; a drug at another dose is seen: its dose is a number."""
    names = set(map(entity_of, seen))
    return [member for member in members if entity_of(member) not in names]


class LearnedModel(Model):
    """A network on latent differences between control and perturbed cells.

    A predicted cell is its control cell, changed by what its displacement in latent space means for its genes: what the latent space leaves
    out of a cell stays as it was. A gene that training never perturbed borrows displacements from `Neighbours`, and its
    own level follows `OwnGene`.

    Parameters
    ----------
    mean
        learned: the mean change of cells is that of their displacements; closed_form: that of `SetGP`.
    cells
        counts: cells of whole counts, see `recount`; shifted: control cells plus the change.
    n_latent, n_steps, batch_size, learning_rate, weight_decay, ema_decay, control_share, synthetic_share, shifted_share
        Shared by all learned families, see config/schemas/models.schema.yaml.
    precision, compiled
        Of families that offer them, see `Optimization`.
    """

    reads_blocks = True
    cells_per_draw: ClassVar[int] = 1
    stops_when_broken: bool = True  # whether a network that complains of itself ends the training
    _last: "_OfPopulation | None" = None
    learns_residuals: bool = False  # whether the network sees targets less the mean effect of their perturbation

    def __init__(
        self,
        *,
        mean: str,
        cells: str,
        n_latent: int,
        n_steps: int,
        batch_size: int,
        learning_rate: float,
        weight_decay: float,
        ema_decay: float,
        control_share: float,
        synthetic_share: float,
        shifted_share: float,
        precision: str = "float32",
        compiled: bool = False,
    ) -> None:
        self.has_closed_mean, self.cells = mean == "closed_form", cells
        self.n_latent, self.n_steps, self.batch_size = n_latent, n_steps, batch_size
        self.optimization = Optimization(learning_rate, weight_decay, ema_decay, precision, compiled)
        self.control_share, self.synthetic_share, self.shifted_share = control_share, synthetic_share, shifted_share

    @abstractmethod
    def network(self, latent: Any, conditions: Conditions) -> nn.Module:
        """Return a new network for cells of this latent space and these perturbations."""

    @abstractmethod
    def displace(self, start: Tensor, genes: Tensor, generator: torch.Generator | None) -> Tensor:
        """Return the latent displacement of start cells, (B, dimensions), zero where all gene indices are -1; without a generator the expected one."""

    def mean_displacement(self, start: Tensor, several: Sequence[Tensor]) -> Tensor:
        """Return the mean of the expected displacements of the same cells under several gene indices, (B, dimensions)."""
        return sum(self.displace(start, genes, None) for genes in several) / len(several)

    def fit_latent(self, pairs: Pairs, effects: Effects, run: Run) -> Latent:
        """Return the latent space that the network works in."""
        return LatentSpace.fit(pairs, effects, self.n_latent)

    def paired(self, pairs: Pairs, z: Tensor, conditions: Conditions, seed: int) -> PairedCells:
        """Return matched cells to draw batches from; z are their latent coordinates, (cells, dimensions)."""
        shares = (self.control_share, self.synthetic_share, self.shifted_share, self.cells_per_draw)
        return PairedCells(pairs, z, conditions, *shares, residual=self.learns_residuals)

    def other_parts(self, cells: PairedCells, run: Run) -> dict[str, FitPart]:
        """Return, by name, what a mean in closed form also hears; `other_effects` are the same of the trained model."""
        return {}

    def other_effects(self, z: np.ndarray, perturbation: str) -> dict[str, Callable[[], np.ndarray]]:
        """Return, by name, how to get mean effects on cells in latent space, (genes,)."""
        return {}

    def fit(self, pairs: Pairs, embeddings: Embeddings, run: Run) -> Artefact:
        """Fit the latent space, train the network in it and, for a mean in closed form, choose that."""
        effects = Effects.of_training(pairs)
        self.latent = self.fit_latent(pairs, effects, run)
        self.own_gene = OwnGene.fit(pairs.roles("train"), effects)
        table = embeddings.standardized(effects.genes)
        self.conditions = Conditions(list(table.index), table.to_numpy())
        self.neighbours = Neighbours.fit(
            *Effects.with_disjoint_controls(pairs), dict(zip(table.index, table.to_numpy(float), strict=True))
        )
        self.genes = pairs.genes
        self.seen = effects.genes
        self.population, self._last = _population(pairs.roles("train")), None
        torch.manual_seed(run.seed)
        self.net = self.network(self.latent, self.conditions)
        cells = {
            role: self.paired(of_role := pairs.roles(role), encoded(of_role, self.latent), self.conditions, run.seed)
            for role in ("train", "validation")
            if len(pairs.roles(role).perturbations)
        }
        learner = Learner(self.net, run.seed, self.n_steps, self.optimization, stops=self.stops_when_broken)
        optimize(
            learner,
            Batches(cells["train"], cells.get("validation"), self.batch_size, run.seed),
            run,
            type(self).__name__.lower(),
        )
        self.net = learner.average.module.cpu().eval()
        run.facts["unseen_genes"] = {
            name: str(getattr(self.neighbours, name)) for name in ("bandwidth", "tempering", "strength")
        }
        artefact: Artefact = {
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
            "population": torch.from_numpy(self.population),
        }
        if self.has_closed_mean:
            self.mean = SetGP(self.other_parts(cells["train"], run)).learned(Training.of(pairs, embeddings, run.seed))
            run.facts["mean"] = self.mean.account()
            words = {name: value.tolist() for name, value in self.mean.artefact.items() if value.dtype.kind == "U"}
            arrays = {name: torch.as_tensor(value) for name, value in self.mean.artefact.items() if name not in words}
            artefact |= {"mean": {**words, **arrays}}
        return artefact

    def restore_latent(self, state: dict[str, Tensor]) -> Latent:
        """Return the latent space of an artefact."""
        return LatentSpace(**{name: value.numpy() for name, value in state.items()})

    def restore(self, artefact: Artefact) -> None:
        """Rebuild the network around its weights."""
        self.genes, self.seen = artefact["genes"], artefact["seen"]
        self.latent = self.restore_latent(artefact["latent"])
        self.own_gene = OwnGene(artefact["own_gene"].numpy())
        self.population, self._last = artefact["population"].numpy(), None
        vectors = next(value for name, value in artefact["state"].items() if name.endswith("gene_encoder.vectors"))
        self.conditions = Conditions(artefact["condition_genes"], vectors.numpy())
        arrays = {name: artefact["neighbours"][name].numpy() for name in ("vectors", "sizes")}
        self.neighbours = Neighbours(**{**artefact["neighbours"], **arrays})
        self.net = self.network(self.latent, self.conditions)
        self.net.load_state_dict(artefact["state"])
        self.net.eval()
        if self.has_closed_mean:
            self.mean = SetGP()
            values = artefact["mean"].items()
            self.mean.restore(
                {
                    name: np.array(value, dtype=str) if isinstance(value, list) else value.numpy()
                    for name, value in values
                }
            )

    def refusal(self, perturbation: str) -> str | None:
        """A gene that no cell was perturbed in has no place among the vectors that the network was built around; a new dose gets one."""
        if self.conditions.add_doses(perturbation):
            for module in self.net.modules():
                if isinstance(module, GeneEncoder):
                    module.follow(self.conditions)
        unknown = self.conditions.unknown(perturbation)
        if not unknown:
            return None
        return f"{', '.join(unknown)} has no embedding: no cell of this screen was perturbed in it. Ask a closed form, such as set_gp"

    @torch.no_grad()
    def predict(
        self, cells: np.ndarray, perturbations: Sequence[str], n: int, seed: int, context: Context | None = None
    ) -> np.ndarray:
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
                predicted[p, block] = self.outcome(start[block], z[block], moved, perturbation, rng, context)
        return predicted

    def outcome(
        self,
        start: np.ndarray,
        z: np.ndarray,
        moved: np.ndarray,
        perturbation: str,
        rng: np.random.Generator,
        context: Context | None = None,
    ) -> np.ndarray:
        """Return perturbed cells, (cells, genes): the mean change that is predicted, and around it what the cells differ in.

        A mean in closed form is met as it is: what the displacements of many cells have in common is taken off where they are residuals.

        Parameters
        ----------
        start, z
            Start cells, log1p-normalized (cells, genes) and in latent space (cells, dimensions).
        moved
            Their displacement in latent space, (cells, dimensions).
        context
            As of `predict`.
        """
        if perturbation == CONTROL:
            return start.copy()
        if self.learns_residuals and len(moved) >= CENTRED_FROM:
            moved = moved - moved.mean(axis=0)
        mean = self.mean_effect(start, z, moved, perturbation, rng, context) + off_level(start, context)
        if self.cells == "shifted":
            return start + mean
        return recounted(start, mean, self.latent.fold(z, moved), rng)

    def mean_effect(
        self,
        start: np.ndarray,
        z: np.ndarray,
        moved: np.ndarray,
        perturbation: str,
        rng: np.random.Generator,
        context: Context | None = None,
    ) -> np.ndarray:
        """Return the mean effect on these cells, (genes,)."""
        if self.has_closed_mean:
            return self.mean.effect_in(perturbation, context, self._said(z, perturbation))
        return self.mean_change(start, z, moved, perturbation, rng) + self.own_shift(start, perturbation)

    def _said(self, z: np.ndarray, perturbation: str) -> dict[str, np.ndarray] | None:
        """Return what the network itself says of the mean effect, where the closed form hears it."""
        names = self.mean.artefact["others"].tolist()
        return (
            {name: effect() for name, effect in self.other_effects(z, perturbation).items() if name in names}
            if names
            else None
        )

    def uncertainty(self, perturbation: str, context: Context | None = None) -> np.ndarray | None:
        """Return the posterior variance of a mean in closed form, (genes,)."""
        if not self.has_closed_mean:
            return None
        z = self.latent.encode(self.population) if self.mean.artefact["others"].tolist() else self.population[:0]
        return self.mean.uncertainty(perturbation, context, self._said(z, perturbation))

    # Single cells: a mean effect is one of a population, here training controls. What a cell differs by from the population's mean is its own,
    # so its answer is the same whoever else is asked; and the mean over cells that are asked is theirs, not the population's.

    @torch.no_grad()
    def counterfactual(
        self, cells: np.ndarray, perturbations: Sequence[str], samples: int, seed: int, context: Context | None = None
    ) -> np.ndarray:
        """Return what each of these cells might become, (perturbations, cells, samples, genes)."""
        outcomes = np.empty((len(perturbations), len(cells), samples, cells.shape[1]), dtype=np.float32)
        for p, perturbation in enumerate(perturbations):
            if perturbation == CONTROL:
                outcomes[p] = cells[:, None]
                continue
            population = self._of_population(perturbation)
            rng = np.random.default_rng((seed, p))
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            start = np.repeat(cells, samples, axis=0)
            flat = outcomes[p].reshape(-1, cells.shape[1])
            for first in range(0, len(start), CELLS_PER_BLOCK):
                block = slice(first, first + CELLS_PER_BLOCK)
                z = self.latent.encode(start[block])
                moved = self._displacement(torch.from_numpy(z), perturbation, rng, generator).numpy()
                for rows, place in _places(context, np.arange(len(start))[block] // samples):
                    flat[first + rows] = population.outcome(start[first + rows], z[rows], moved[rows], place, rng)
        return outcomes

    @torch.no_grad()
    def individual_effects(
        self, cells: np.ndarray, perturbation: str, seed: int, context: Context | None = None
    ) -> np.ndarray:
        """Return the mean effect of the population and what each cell's own differs from it by, (cells, genes)."""
        if perturbation == CONTROL:
            return np.zeros_like(cells)
        population = self._of_population(perturbation)
        effects = self._expected_change(cells, perturbation) - population.expected_change
        for rows, place in _places(context, np.arange(len(cells))):
            effects[rows] += population.mean(place)
        return effects.astype(np.float32)

    def _expected_change(self, cells: np.ndarray, perturbation: str) -> np.ndarray:
        """Return what expected displacements change in each cell's expected expression, (cells, genes)."""
        z, rng = torch.from_numpy(self.latent.encode(cells)), np.random.default_rng(0)
        moved = self._displacement(z, perturbation, rng, None)
        return self.latent.change(z.numpy(), moved.numpy(), np.expm1(cells).sum(axis=1))

    def _of_population(self, perturbation: str) -> "_OfPopulation":
        """Return what a perturbation does to the population; the last one asked is kept, as questions come block by block."""
        if self._last is None or self._last.perturbation != perturbation:
            if reason := self.refusal(perturbation):
                raise InputError(f"{perturbation} cannot be answered: {reason}.")
            self._last = _OfPopulation(self, perturbation)
        return self._last

    def held_out(self, pairs: Pairs, embeddings: Embeddings, seed: int) -> Calibration:
        """Return what inner folds of a mean in closed form have shown; nothing where the network owns the mean."""
        return self.mean.held_out(pairs, embeddings, seed) if self.has_closed_mean else Calibration.none()

    def mean_change(
        self, start: np.ndarray, z: np.ndarray, moved: np.ndarray, perturbation: str, rng: np.random.Generator
    ) -> np.ndarray:
        """Return what displacements change in the mean of the cells, (genes,)."""
        told = self.latent.mean_change(moved)
        return drawn_mean_change(start, self.latent.fold(z, moved), rng) if told is None else told

    def own_shift(self, start: np.ndarray, perturbation: str) -> np.ndarray:
        """Return what is known of the levels of unseen perturbed genes, (genes,)."""
        shift = np.zeros(len(self.genes))
        row = {gene: i for i, gene in enumerate(self.genes)}
        for gene in map(entity_of, unseen_among(members_of(perturbation), self.seen)):
            if gene in row:
                shift[row[gene]] += self.own_gene.shift(float(start[:, row[gene]].mean()))
        return shift

    def _displacement(
        self, z: Tensor, perturbation: str, rng: np.random.Generator, generator: torch.Generator | None
    ) -> Tensor:
        """Return the latent displacement of cells; the part of unseen members is borrowed and scaled by its strength.

        Without a generator that is the expected one, of what is borrowed the mean over `BORROWED` draws.
        """
        members = members_of(perturbation)
        unseen = unseen_among(members, self.seen)
        known = self.conditions.index([perturbation]).expand(len(z), -1).clone()
        if not unseen:
            return self.displace(z, known, generator)
        known[:, [members.index(gene) for gene in unseen]] = -1
        noise = generator and generator.get_state()
        if generator is None:
            borrowed = self.mean_displacement(
                z, [self._drawn(perturbation, unseen, known, rng) for _ in range(BORROWED)]
            )
        else:
            borrowed = self.displace(z, self._drawn(perturbation, unseen, known, rng), generator)
        if len(unseen) == len(members):
            return self.neighbours.strength * borrowed
        if generator is not None:
            generator.set_state(noise)
        certain = self.displace(z, known, generator)
        return certain + self.neighbours.strength * (borrowed - certain)

    def _drawn(self, perturbation: str, unseen: list[str], known: Tensor, rng: np.random.Generator) -> Tensor:
        """Return gene indices of every cell, (cells, members), with those whom unseen members borrow from in their place."""
        genes, members = known.clone(), members_of(perturbation)
        for gene in unseen:
            vector = self.conditions.vectors[self.conditions.genes.index(gene)].numpy().astype(float)
            drawn = rng.choice(self.neighbours.genes, size=len(genes), p=self.neighbours.weights(vector[None])[0])
            genes[:, members.index(gene)] = self.conditions.index(list(drawn))[:, 0]
        return genes


def _places(context: Context | None, cells: np.ndarray) -> Iterator[tuple[np.ndarray, Context | None]]:
    """Yield some of a context's cells by where they are, as positions among them."""
    if context is None:
        yield np.arange(len(cells)), None
    else:
        yield from Context(context.strata[cells], context.levels).places()


class _OfPopulation:
    """What a perturbation does to the population; each part is found when it is asked for."""

    def __init__(self, model: LearnedModel, perturbation: str) -> None:
        self.model, self.perturbation = model, perturbation
        self._means: dict[str, np.ndarray] = {}
        self._changes: dict[str, Change] = {}

    @cached_property
    def z(self) -> np.ndarray:
        """The population in latent space, (cells, dimensions)."""
        return self.model.latent.encode(self.model.population)

    @cached_property
    def moved(self) -> np.ndarray:
        """Its displacements, (cells, dimensions)."""
        generator = torch.Generator().manual_seed(0)
        return self.model._displacement(
            torch.from_numpy(self.z), self.perturbation, np.random.default_rng(0), generator
        ).numpy()

    @cached_property
    def centre(self) -> np.ndarray:
        """Their mean, where displacements are residuals; else 0, (dimensions,)."""
        return self.moved.mean(axis=0) if self.model.learns_residuals else np.zeros(self.z.shape[1], dtype=np.float32)

    @cached_property
    def expected_change(self) -> np.ndarray:
        """The mean of what expected displacements change in its cells, (genes,)."""
        return self.model._expected_change(self.model.population, self.perturbation).mean(axis=0)

    def mean(self, place: Context | None) -> np.ndarray:
        """Return the mean effect in one batch and cell type, (genes,)."""
        if (name := self._name(place)) not in self._means:
            moved = self.z[:0] if self.model.has_closed_mean else self.moved - self.centre
            self._means[name] = self.model.mean_effect(
                self.model.population, self.z, moved, self.perturbation, np.random.default_rng(0), place
            )
        return self._means[name]

    def outcome(
        self, start: np.ndarray, z: np.ndarray, moved: np.ndarray, place: Context | None, rng: np.random.Generator
    ) -> np.ndarray:
        """Return what cells of one batch and cell type become, (cells, genes); z and moved are where they are in latent space, and go."""
        if self.model.cells == "counts":
            if (name := self._name(place)) not in self._changes:
                fold = self.model.latent.fold(self.z, self.moved - self.centre)
                self._changes[name] = change_of(self.model.population, self.mean(place), fold, np.random.default_rng(0))
            return changed(start, self._changes[name], self.model.latent.fold(z, moved - self.centre), rng)
        own = self.model.latent.change(z, moved, np.expm1(start).sum(axis=1)) - self.expected_change
        return start + self.mean(place) + own

    def _name(self, place: Context | None) -> str:
        """Return the place, where the mean depends on it."""
        return (
            str(place.strata[0]) if place and self.model.has_closed_mean and self.model.mean.looks_at_contexts else ""
        )


def _population(training: Pairs) -> np.ndarray:
    """Return at most POPULATION training controls, (cells, genes), the same for the same screen."""
    rows = np.flatnonzero(training.is_control)
    if len(rows) > POPULATION:
        rows = np.sort(np.random.default_rng(0).choice(rows, POPULATION, replace=False))
    return training.X[rows].toarray()
