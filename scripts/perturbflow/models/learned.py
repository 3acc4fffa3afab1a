"""The base of the learned families: from control cells to perturbed cells through a latent space.

1. Latent space. A cell x has coordinates z = encode(x). `latents/` holds the spaces.
2. Network. It gives each cell a latent shift, given its coordinates and the perturbed genes. Every family has its own.
   With `context: controls` it is also told of the cell's context, see `Contexts`.
3. Unseen genes. A gene that training never perturbed borrows shifts from genes that it did, see `Neighbours`.
4. Mean effect. It is the mean of the shifts (`mean: learned`) or that of `SetGP` (`mean: closed_form`).
5. Perturbed cells. Counts of a control cell are thinned or added to, see `thinning`. The log fold change of a gene has
   two parts: each cell's own, from its latent shift; and one that all cells have in common. The common part is found on
   a population of control cells, such that their mean changes by the mean effect. `Response` does this.

`predict` takes the cells that it is given for the population: their mean is exact, as a score of means asks.
`counterfactual` takes controls of training: the answer for a cell does not depend on which other cells are asked.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from perturbflow.controls import Context
from perturbflow.embeddings import Embeddings
from perturbflow.errors import InputError
from perturbflow.genes.symbols import CONTROL, entity_of, members_of
from perturbflow.models import thinning
from perturbflow.models.base import Artefact, Model, Run, off_level, start_cells
from perturbflow.models.calibration import Calibration
from perturbflow.models.closed_form.base import TrainingSet
from perturbflow.models.effects import Effects
from perturbflow.models.gaussian_process.own_gene import OwnGene
from perturbflow.models.gaussian_process.set_gp import FitMean, SetGP
from perturbflow.models.latents.pca import Latent, LatentSpace
from perturbflow.models.neighbours import Neighbours
from perturbflow.models.training.batches import Batches, PairedCells, encoded
from perturbflow.models.training.conditions import Conditions
from perturbflow.models.training.contexts import Contexts
from perturbflow.models.training.learner import Learner, Optimization
from perturbflow.models.training.networks import GeneEncoder
from perturbflow.pairs import Pairs
from perturbflow.registry.families import NetworkParams

CELLS_PER_BLOCK = 2048
CENTRED_FROM = 16  # cells: the mean of fewer is mostly chance
POPULATION = 512  # training controls over which a mean effect is averaged
BORROWED = 16  # samples of neighbours over which the shift of an unseen gene is averaged


def unseen_among(members: Sequence[str], seen: Collection[str]) -> list[str]:
    """Return the members that training did not see. A drug at another dose counts as seen: its dose is a number."""
    names = set(map(entity_of, seen))
    return [member for member in members if entity_of(member) not in names]


class LearnedModel(Model):
    """A network on latent differences between control and perturbed cells.

    A family gives `network` and `shift`. It may give a latent space, and mean effects of its network.
    """

    params: NetworkParams
    reads_blocks = True
    keeps_trainings = True
    cells_together: ClassVar[int] = 1  # cells of one perturbation that a batch takes together
    stops_when_broken: bool = True  # whether a network that complains of itself ends the training
    learns_residuals: bool = False  # whether the network sees targets minus the mean effect of their perturbation
    # The last perturbation, the controls whose responses are kept, and the strength of these.
    _asked: tuple[str, np.ndarray | None, float] = ("", None, 1.0)
    _responses: "dict[str, Response]"  # by context
    # The last cells that mean effects were asked on, and those of all neighbours on them.
    _lent: tuple[bytes, np.ndarray] = (b"", np.zeros((0, 0)))

    def __init__(self, params: NetworkParams) -> None:
        super().__init__(params)
        self.has_closed_mean = params.mean == "closed_form"
        self.optimization = Optimization(params.learning_rate, params.weight_decay, params.ema_decay)

    # --- what a family gives ---

    @abstractmethod
    def network(self, latent: Any, conditions: Conditions) -> nn.Module:
        """Return a new network for cells of this latent space and these perturbations."""

    @abstractmethod
    def shift(
        self, z: Tensor, genes: Tensor, generator: torch.Generator | None, context: Tensor | None = None
    ) -> Tensor:
        """Return the latent shift of cells, (B, dimensions); zero where all gene indices are -1.

        Parameters
        ----------
        z
            Latent coordinates of control cells, (B, dimensions).
        genes
            Indices of the perturbed genes, (B, members), -1 for none.
        generator
            Of the noise of a sample; None asks for the expected shift.
        context
            Vectors of the cells' contexts, (B, dimensions), where the network is told of them.
        """

    def mean_shift(self, z: Tensor, several: Sequence[Tensor], context: Tensor | None = None) -> Tensor:
        """Return the mean of the cells' expected shifts under several gene indices, (B, dimensions)."""
        return sum(self.shift(z, genes, None, context) for genes in several) / len(several)

    def fit_latent(self, pairs: Pairs, effects: Effects, run: Run) -> Latent:
        """Return the latent space that the network works in."""
        return LatentSpace.fit(pairs, effects, self.params.n_latent)

    def restore_latent(self, state: dict[str, Tensor]) -> Latent:
        """Return the latent space of an artefact."""
        return LatentSpace(**{name: value.numpy() for name, value in state.items()})

    def training_cells(self, pairs: Pairs, z: Tensor, conditions: Conditions, seed: int) -> PairedCells:
        """Return matched cells to sample batches from; z are their latent coordinates, (cells, dimensions)."""
        of = self.params
        shares = (of.control_share, of.synthetic_share, of.shifted_share, self.cells_together)
        return PairedCells(pairs, z, conditions, *shares, residual=self.learns_residuals, balance=of.balance)

    def network_means(
        self, z: np.ndarray, perturbations: Sequence[str], context: Tensor | None
    ) -> dict[str, np.ndarray]:
        """Return, by name, mean effects on cells in latent space, for a mean in closed form to use.

        Those are (perturbations, genes) each.
        """
        return {}

    def fit_network_means(self, cells: PairedCells, run: Run) -> dict[str, FitMean]:
        """Return, by name, how to fit the same means without the perturbations of an inner fold."""
        return {}

    # --- training ---

    def fit(self, pairs: Pairs, embeddings: Embeddings, run: Run) -> Artefact:
        """Fit the latent space, train the network in it and fit a mean in closed form."""
        training, effects = pairs.roles("train"), Effects.of_training(pairs)
        self.genes, self.seen = pairs.genes, effects.genes
        self.latent = self.fit_latent(pairs, effects, run)
        self.own_gene = OwnGene.fit(training, effects)
        table = embeddings.standardized(effects.genes)
        vectors = dict(zip(table.index, table.to_numpy(float), strict=True))
        contexts = Contexts.of(training) if self.params.context == "controls" else None
        self.conditions = Conditions(list(table.index), table.to_numpy(), contexts)
        self.neighbours = Neighbours.fit(*Effects.with_disjoint_controls(pairs), vectors)
        self.population = _population(training)
        cells = self._train(pairs, run)
        run.facts["unseen_genes"] = {
            name: str(getattr(self.neighbours, name)) for name in ("bandwidth", "tempering", "strength")
        }
        if self.has_closed_mean:
            means = self.fit_network_means(cells, run)
            self.mean = SetGP(other_means=means).learned(TrainingSet.of(pairs, embeddings, run.seed))
            run.facts["mean"] = self.mean.account()
        return self._artefact()

    def _train(self, pairs: Pairs, run: Run) -> PairedCells:
        """Train the network, and return its training cells."""
        torch.manual_seed(run.seed)
        net = self.network(self.latent, self.conditions)
        roles = {role: pairs.roles(role) for role in ("train", "validation")}
        cells = {
            role: self.training_cells(of_role, encoded(of_role, self.latent), self.conditions, run.seed)
            for role, of_role in roles.items()
            if len(of_role.perturbations)
        }
        learner = Learner(net, run.seed, self.params.n_steps, self.optimization, stops=self.stops_when_broken)
        batches = Batches(cells["train"], cells.get("validation"), self.params.batch_size, run.seed)
        learner.optimize(batches, run, type(self).__name__.lower())
        self.net = learner.average.module.cpu().eval()
        return cells["train"]

    def _artefact(self) -> Artefact:
        """Return all that `restore` needs: tensors, numbers and texts."""
        artefact: Artefact = {
            "state": self.net.state_dict(),
            "latent": {name: torch.as_tensor(value) for name, value in self.latent.state().items()},
            "own_gene": torch.as_tensor(self.own_gene.coefficients),
            "neighbours": self.neighbours.state(),
            "condition_genes": self.conditions.genes,
            "genes": self.genes,
            "seen": self.seen,
            "population": torch.from_numpy(self.population),
        }
        if self.conditions.contexts is not None:
            artefact["contexts"] = self.conditions.contexts.state()
        return artefact | ({"mean": _as_tensors(self.mean.artefact)} if self.has_closed_mean else {})

    def restore(self, artefact: Artefact) -> None:
        """Rebuild the model around its weights."""
        self.genes, self.seen = artefact["genes"], artefact["seen"]
        self.latent = self.restore_latent(artefact["latent"])
        self.own_gene = OwnGene(artefact["own_gene"].numpy())
        self.neighbours = Neighbours.restored(artefact["neighbours"])
        self.population = artefact["population"].numpy()
        vectors = next(value for name, value in artefact["state"].items() if name.endswith("gene_encoder.vectors"))
        contexts = Contexts.restored(artefact["contexts"]) if "contexts" in artefact else None
        self.conditions = Conditions(artefact["condition_genes"], vectors.numpy(), contexts)
        self.net = self.network(self.latent, self.conditions)
        self.net.load_state_dict(artefact["state"])
        self.net.eval()
        if self.has_closed_mean:
            self.mean = SetGP()
            self.mean.restore(_as_arrays(artefact["mean"]))

    def add_genes(self, pairs: Pairs, embeddings: Embeddings, seed: int) -> None:
        """Take in the vectors of further genes: they borrow the shifts of genes that training perturbed."""
        table = embeddings.standardized(self.seen)
        self.conditions.add_genes(list(table.index), table.to_numpy())
        if self.has_closed_mean:
            self.mean.add_genes(pairs, embeddings, seed)

    def mean_effects(
        self, cells: np.ndarray, perturbations: Sequence[str], seed: int, context: Context | None = None
    ) -> np.ndarray:
        """Return mean effects over cells, (perturbations, genes).

        A mean in closed form is that of training's controls in this context. There the effects on single cells have
        exactly this mean; on few other cells they have it but for chance.
        """
        if self.has_closed_mean:
            means = self.means_in(context, perturbations) if self.mean.out_of_fold else None
            return self.mean.mean_effects(cells, perturbations, seed, context, means)
        effects = np.empty((len(perturbations), cells.shape[1]), dtype=np.float32)
        for effect, label in zip(effects, perturbations, strict=True):
            if label != CONTROL and unseen_among([label], self.seen) and len(members_of(label)) == 1:
                effect[:] = self._borrowed_effect(cells, label, context)
            else:
                effect[:] = self.individual_effects(cells, label, seed, context).mean(axis=0)
        return effects

    def _borrowed_effect(self, cells: np.ndarray, gene: str, context: Context | None) -> np.ndarray:
        """Return the mean effect of a gene that training never saw perturbed, (genes,).

        A cell borrows the shift of one neighbour j with the probability w_j, so the mean effect is Σ_j w_j m_j. The
        means m_j, under shifts of the strength of borrowed ones, are the same for all such genes.
        """
        self._refuse_unknown(gene)
        where = b"" if context is None else "|".join(context.strata.tolist()).encode()
        asked = hashlib.sha256(np.ascontiguousarray(cells).tobytes() + where).digest()
        if self._lent[0] != asked:
            strength = self.neighbours.strength
            means = [self._effects(cells, name, context, strength).mean(axis=0) for name in self.neighbours.genes]
            self._lent = asked, np.stack(means)
        vector = self.conditions.vectors[self.conditions.genes.index(gene)].numpy().astype(float)
        borrowed = self.neighbours.weights(vector[None])[0] @ self._lent[1]
        return borrowed + self.own_level_change(self.population, gene)

    def refusal(self, perturbation: str) -> str | None:
        """Return why a perturbation has no answer: a gene has no vector. A new dose of a known drug gets one."""
        if self.conditions.add_doses(perturbation):
            for module in self.net.modules():
                if isinstance(module, GeneEncoder):
                    module.follow(self.conditions)
        unknown = self.conditions.unknown(perturbation)
        if not unknown:
            return None
        return (
            f"{', '.join(unknown)} has no embedding: no cell of this screen was perturbed in it. "
            "Ask a closed form, such as set_gp"
        )

    # --- latent shifts ---

    def contexts_of(self, context: Context | None, n: int) -> Tensor | None:
        """Return the vectors of n cells' contexts, (n, dimensions); None where the network is not told of them."""
        return None if self.conditions.contexts is None else self.conditions.contexts.of_cells(context, n)

    def shifts(
        self,
        z: np.ndarray,
        perturbation: str,
        rng: np.random.Generator,
        generator: torch.Generator | None,
        context: Tensor | None = None,
    ) -> np.ndarray:
        """Return latent shifts of control cells, (cells, dimensions); unseen members borrow theirs.

        Parameters
        ----------
        z
            Latent coordinates of the cells, (cells, dimensions).
        rng, generator
            Of the neighbours that unseen members borrow from, and of the network's noise. Without a generator the
            shifts are expected ones, averaged over `BORROWED` samples of neighbours.
        context
            As `contexts_of` returns it.
        """
        start, members = torch.from_numpy(z), members_of(perturbation)
        unseen = unseen_among(members, self.seen)
        known = self.conditions.index([perturbation]).expand(len(z), -1).clone()
        if not unseen:
            return self.shift(start, known, generator, context).numpy()
        known[:, [members.index(gene) for gene in unseen]] = -1
        noise = generator and generator.get_state()
        if generator is None:
            samples = [self._with_neighbours(perturbation, unseen, known, rng) for _ in range(BORROWED)]
            borrowed = self.mean_shift(start, samples, context)
        else:
            borrowed = self.shift(start, self._with_neighbours(perturbation, unseen, known, rng), generator, context)
        if len(unseen) == len(members):
            return (self.neighbours.strength * borrowed).numpy()
        if generator is not None:
            generator.set_state(noise)
        certain = self.shift(start, known, generator, context)
        return (certain + self.neighbours.strength * (borrowed - certain)).numpy()

    def _with_neighbours(self, perturbation: str, unseen: list[str], known: Tensor, rng: np.random.Generator) -> Tensor:
        """Return gene indices of every cell, (cells, members); a sampled neighbour replaces each unseen member."""
        genes, members = known.clone(), members_of(perturbation)
        for gene in unseen:
            vector = self.conditions.vectors[self.conditions.genes.index(gene)].numpy().astype(float)
            weights = self.neighbours.weights(vector[None])[0]
            sampled = rng.choice(self.neighbours.genes, size=len(genes), p=weights)
            genes[:, members.index(gene)] = self.conditions.index(list(sampled))[:, 0]
        return genes

    # --- mean effects ---

    def learned_mean(self, response: "Response", rng: np.random.Generator) -> np.ndarray:
        """Return the mean effect of the network's own shifts on a population, (genes,)."""
        mean = self.latent.mean_change(response.shifts)
        if mean is not None:
            return mean
        lfc = self.latent.log_fold_change(response.z, response.shifts)
        return thinning.mean_effect_of(response.population, lfc, rng)

    def own_level_change(self, population: np.ndarray, perturbation: str) -> np.ndarray:
        """Return the expected change of the levels of unseen perturbed genes themselves, (genes,)."""
        change = np.zeros(len(self.genes))
        row = {gene: i for i, gene in enumerate(self.genes)}
        for gene in map(entity_of, unseen_among(members_of(perturbation), self.seen)):
            if gene in row:
                change[row[gene]] += self.own_gene.effect(float(population[:, row[gene]].mean()))
        return change

    def network_means_in_use(
        self, z: np.ndarray, perturbation: str, context: Tensor | None
    ) -> dict[str, np.ndarray] | None:
        """Return the network's mean effects, where the mean in closed form was fitted with them; else None."""
        return self.network_means(z, [perturbation], context) if self.mean.out_of_fold else None

    def means_in(self, context: Context | None, perturbations: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the network's mean effects on training's controls, as if they were in a context, by name."""
        z = self.latent.encode(self.population)
        if context is None or self.conditions.contexts is None:
            return self.network_means(z, perturbations, self.contexts_of(None, len(z)))
        total: dict[str, np.ndarray] = {}
        for rows, place in context.places():
            for name, means in self.network_means(z, perturbations, self.contexts_of(place, len(z))).items():
                total[name] = total.get(name, 0.0) + means * (len(rows) / len(context.strata))
        return total

    def uncertainty(self, perturbation: str, context: Context | None = None) -> np.ndarray | None:
        """Return the posterior variance of a mean in closed form, (genes,)."""
        found = self.uncertainties([perturbation], context)
        return None if found is None else found[0]

    def uncertainties(self, perturbations: Sequence[str], context: Context | None = None) -> np.ndarray | None:
        """Return the posterior variances of means in closed form, (perturbations, genes)."""
        if not self.has_closed_mean:
            return None
        means = self.means_in(context, perturbations) if self.mean.out_of_fold else None
        return self.mean.uncertainties(perturbations, context, means)

    def held_out(self, pairs: Pairs, embeddings: Embeddings, seed: int) -> Calibration:
        """Return the errors of a mean in closed form in inner folds; none where the network owns the mean."""
        return self.mean.held_out(pairs, embeddings, seed) if self.has_closed_mean else Calibration.none()

    # --- cells ---

    @torch.no_grad()
    def predict(
        self, cells: np.ndarray, perturbations: Sequence[str], n: int, seed: int, context: Context | None = None
    ) -> np.ndarray:
        """Return perturbed cells whose mean is exact, a block at a time; see the head of this module."""
        start = start_cells(cells, n)
        predicted = np.empty((len(perturbations), n, start.shape[1]), dtype=np.float32)
        told = self.contexts_of(context, n)
        for p, perturbation in enumerate(perturbations):
            if reason := self.refusal(perturbation):
                raise InputError(f"{perturbation} cannot be predicted: {reason}.")
            rng, generator = _randomness(seed, p)
            for first in range(0, n, CELLS_PER_BLOCK):
                block = slice(first, first + CELLS_PER_BLOCK)
                if perturbation == CONTROL:
                    predicted[p, block] = start[block]
                else:
                    response = Response(self, perturbation, start[block], rng, generator, _rows(told, block))
                    predicted[p, block] = response.of_population(context)
        return predicted

    @torch.no_grad()
    def counterfactual(
        self, cells: np.ndarray, perturbations: Sequence[str], samples: int, seed: int, context: Context | None = None
    ) -> np.ndarray:
        """Return samples of each cell after each perturbation, (perturbations, cells, samples, genes)."""
        outcomes = np.empty((len(perturbations), len(cells), samples, cells.shape[1]), dtype=np.float32)
        start, of_cell = np.repeat(cells, samples, axis=0), np.repeat(np.arange(len(cells)), samples)
        told = self.contexts_of(context, len(cells))
        for p, perturbation in enumerate(perturbations):
            if perturbation == CONTROL:
                outcomes[p] = cells[:, None]
                continue
            self._refuse_unknown(perturbation)
            rng, generator = _randomness(seed, p)
            flat = outcomes[p].reshape(-1, cells.shape[1])
            for first in range(0, len(start), CELLS_PER_BLOCK):
                block = slice(first, first + CELLS_PER_BLOCK)
                z = self.latent.encode(start[block])
                shifts = self.shifts(z, perturbation, rng, generator, _rows(told, of_cell[block]))
                for rows, place in _places(context, of_cell[block]):
                    response = self._response_of_training(perturbation, place)
                    flat[first + rows] = response.of_cells(start[first + rows], z[rows], shifts[rows], place, rng)
        return outcomes

    @torch.no_grad()
    def individual_effects(
        self, cells: np.ndarray, perturbation: str, seed: int, context: Context | None = None
    ) -> np.ndarray:
        """Return the mean effect plus each cell's own deviation from it, (cells, genes)."""
        if perturbation == CONTROL:
            return np.zeros_like(cells)
        return self._effects(cells, perturbation, context).astype(np.float32)

    @torch.no_grad()
    def _effects(
        self, cells: np.ndarray, perturbation: str, context: Context | None, strength: float = 1.0
    ) -> np.ndarray:
        """Return `individual_effects` under shifts of a strength."""
        places = list(_places(context, np.arange(len(cells))))
        responses = [self._response_of_training(perturbation, place, strength) for _, place in places]  # refuses first
        effects = self.expected_change(cells, perturbation, self.contexts_of(context, len(cells)), strength)
        for (rows, place), response in zip(places, responses, strict=True):
            effects[rows] = (effects[rows] - response.expected_change) + response.mean_effect(place)
        return effects

    def expected_change(
        self, cells: np.ndarray, perturbation: str, context: Tensor | None, strength: float = 1.0
    ) -> np.ndarray:
        """Return how expected shifts of a strength change each cell's expected expression, (cells, genes)."""
        z = self.latent.encode(cells)
        shifts = strength * self.shifts(z, perturbation, np.random.default_rng(0), None, context)
        return self.latent.change(z, shifts, np.expm1(cells).sum(axis=1))

    def _refuse_unknown(self, perturbation: str) -> None:
        if reason := self.refusal(perturbation):
            raise InputError(f"{perturbation} cannot be answered: {reason}.")

    def _response_of_training(
        self, perturbation: str, context: Context | None = None, strength: float = 1.0
    ) -> "Response":
        """Return the response of training's controls, as if they were in a context where the network is told of it.

        Those to the last perturbation are kept: cells are asked block by block.
        """
        if self._asked[::2] != (perturbation, strength) or self._asked[1] is not self.population:
            self._refuse_unknown(perturbation)
            self._asked, self._responses = (perturbation, self.population, strength), {}
        name = _name_of(context) if self.conditions.contexts else ""
        if name not in self._responses:
            rng, generator = np.random.default_rng(0), torch.Generator().manual_seed(0)
            told = self.contexts_of(context, len(self.population))
            self._responses[name] = Response(self, perturbation, self.population, rng, generator, told, strength)
        return self._responses[name]


class Response:
    """The response of a population of control cells to a perturbation, and through it that of any cell.

    Parameters
    ----------
    model
        A trained model.
    perturbation
        A canonical label other than control.
    population
        Control cells, log1p-normalized, (cells, genes).
    rng, generator
        Of all that is random in the response.
    told
        Vectors of the contexts that the cells are asked in, as `LearnedModel.contexts_of` returns them.
    strength
        Of the shifts, relative to those of the network.
    """

    def __init__(
        self,
        model: LearnedModel,
        perturbation: str,
        population: np.ndarray,
        rng: np.random.Generator,
        generator: torch.Generator,
        told: Tensor | None = None,
        strength: float = 1.0,
    ) -> None:
        self.model, self.perturbation, self.population, self.rng, self.told = model, perturbation, population, rng, told
        self.z, self.strength = model.latent.encode(population), strength
        shifts = strength * model.shifts(self.z, perturbation, rng, generator, told)
        # Residuals have no mean of their own; of a sample of them it is chance.
        is_centred = model.learns_residuals and len(shifts) >= CENTRED_FROM
        self.centre = shifts.mean(axis=0) if is_centred else np.zeros(self.z.shape[1], dtype=np.float32)
        self.shifts = shifts - self.centre
        self._means: dict[str, np.ndarray] = {}
        self._changes: dict[str, thinning.CommonChange] = {}

    def mean_effect(self, context: Context | None) -> np.ndarray:
        """Return the mean effect in a context, (genes,)."""
        if (name := self._name(context)) not in self._means:
            model = self.model
            if model.has_closed_mean:
                network_means = model.network_means_in_use(self.z, self.perturbation, self.told)
                self._means[name] = model.mean.effect_in(self.perturbation, context, network_means)
            else:
                own_level = model.own_level_change(self.population, self.perturbation)
                self._means[name] = model.learned_mean(self, self.rng) + own_level
        return self._means[name]

    @cached_property
    def expected_change(self) -> np.ndarray:
        """The mean change of the population by expected shifts, (genes,)."""
        return self.model.expected_change(self.population, self.perturbation, self.told, self.strength).mean(axis=0)

    def of_population(self, context: Context | None) -> np.ndarray:
        """Return the population after the perturbation, (cells, genes), at the level of its context."""
        mean_effect = self.mean_effect(context) + off_level(self.population, context)
        return thinning.with_mean_effect(self.population, mean_effect, self._log_fold_change(), self.rng)

    def of_cells(
        self, cells: np.ndarray, z: np.ndarray, shifts: np.ndarray, context: Context | None, rng: np.random.Generator
    ) -> np.ndarray:
        """Return other cells of one batch and cell type after the perturbation, (cells, genes).

        Parameters
        ----------
        cells, z, shifts
            Control cells, their latent coordinates and shifts.
        """
        if (name := self._name(context)) not in self._changes:
            self._changes[name] = thinning.common_change(
                self.population, self.mean_effect(context), self._log_fold_change(), np.random.default_rng(0)
            )
        own = self.model.latent.log_fold_change(z, shifts - self.centre)
        return thinning.applied(cells, self._changes[name], own, rng)

    def _log_fold_change(self) -> np.ndarray:
        return self.model.latent.log_fold_change(self.z, self.shifts)

    def _name(self, context: Context | None) -> str:
        """Return a name for the context, if the mean effect depends on it."""
        depends = context is not None and self.model.has_closed_mean and self.model.mean.looks_at_contexts
        return _name_of(context) if depends else ""


def _as_tensors(artefact: Artefact) -> dict[str, Tensor | list[str]]:
    """Return the arrays of a closed form as a checkpoint may hold them: tensors, and lists of texts."""
    return {
        name: value.tolist() if value.dtype.kind == "U" else torch.as_tensor(value) for name, value in artefact.items()
    }


def _as_arrays(stored: dict[str, Tensor | list[str]]) -> Artefact:
    """Undo `_as_tensors`."""
    return {
        name: np.array(value, dtype=str) if isinstance(value, list) else value.numpy() for name, value in stored.items()
    }


def _randomness(seed: int, p: int) -> tuple[np.random.Generator, torch.Generator]:
    """Return the generators of the p-th perturbation that is asked for."""
    rng = np.random.default_rng((seed, p))
    return rng, torch.Generator().manual_seed(int(rng.integers(2**62)))


def _rows(of_cells: Tensor | None, rows: slice | np.ndarray) -> Tensor | None:
    """Return some rows of what cells have, if they have it."""
    return None if of_cells is None else of_cells[rows]


def _name_of(context: Context | None) -> str:
    """Return the batches and cell types of a context as one word, empty for none."""
    return "" if context is None else "|".join(sorted(context.shares))


def _places(context: Context | None, cells: np.ndarray) -> Iterator[tuple[np.ndarray, Context | None]]:
    """Yield some of a context's cells by batch and cell type, as positions among them."""
    if context is None:
        yield np.arange(len(cells)), None
    else:
        yield from replace(context, strata=context.strata[cells]).places()


def _population(training: Pairs) -> np.ndarray:
    """Return at most POPULATION training controls, (cells, genes), the same for the same screen."""
    rows = np.flatnonzero(training.is_control)
    if len(rows) > POPULATION:
        rows = np.sort(np.random.default_rng(0).choice(rows, POPULATION, replace=False))
    return training.X[rows].toarray()
