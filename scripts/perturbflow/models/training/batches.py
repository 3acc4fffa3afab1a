"""Batches of matched control and perturbed cells in latent coordinates, the same for the same seed and step."""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from perturbflow.genes.symbols import members_of
from perturbflow.models.latents.pca import Latent
from perturbflow.models.training.conditions import Conditions
from perturbflow.pairs import Pairs

STEPS_PER_EPOCH = 100
N_WATCHED = 1024
WATCHED, VALIDATED = 2**30, 2**31  # in place of an epoch: no training has as many


@dataclass(frozen=True)
class Batch:
    """Matched cells in latent coordinates: B start cells, and B targets with their perturbations.

    Attributes
    ----------
    start, target
        (B, dimensions).
    genes
        (B, members) of gene indices, -1 for none; all -1 for control.
    group
        (B,): equal where cells share perturbation, batch and cell type. Within a group any start fits any target.
    context
        (B, dimensions): vectors of the targets' contexts; None where the network is not told of them.
    """

    start: Tensor
    target: Tensor
    genes: Tensor
    group: Tensor
    context: Tensor | None = None

    def __len__(self) -> int:
        return len(self.genes)

    def to(self, device: torch.device) -> "Batch":
        """Move all tensors."""
        context = None if self.context is None else self.context.to(device)
        return Batch(
            self.start.to(device), self.target.to(device), self.genes.to(device), self.group.to(device), context
        )


def encoded(pairs: Pairs, latent: Latent) -> Tensor:
    """Return latent coordinates of all cells, (cells, dimensions), in one pass over the cells."""
    z = torch.empty(len(pairs.rows), latent.n_dimensions)
    for rows, X in pairs.blocks():
        z[rows] = torch.from_numpy(latent.encode(X))
    return z


class Sampler(Protocol):
    """Cells that batches are sampled from."""

    def batch(self, size: int, seed: tuple[int, ...]) -> Any:
        """Return a batch that depends on the seed alone."""


class PairedCells:
    """Samples batches of matched cells, the same for the same seed and step.

    Every training perturbation is sampled equally often, or every screen and within it every perturbation. Controls
    have a share of their own: the target of a control cell is another control of its stratum. This teaches the
    difference between two cells without a perturbation.

    Parameters
    ----------
    pairs
        Cells of one role.
    z
        Their latent coordinates, (cells, dimensions).
    conditions
        Gene indices, and contexts.
    control_share
        Share of controls in a batch.
    synthetic_share
        Share of composed combinations: targets plus the mean effect of another single perturbation. They assume
        additivity, which measured combinations can correct. Used only where training holds combinations.
    shifted_share
        Share of start cells that are perturbed training cells, of the same batch and cell type, minus the mean effect
        of their perturbation. Screens with a hundred controls have thousands of these cells. Without them a network
        memorizes its few controls.
    cells_together
        Cells of one perturbation that are sampled together. 1 mixes best; more gives groups to couple within.
    residual
        Whether targets are perturbed cells minus the mean effect of their perturbation, for a model with a given mean.
    balance
        perturbations, or screens: datasets are sampled equally often, whatever their cells and perturbations.
    """

    def __init__(
        self,
        pairs: Pairs,
        z: Tensor,
        conditions: Conditions,
        control_share: float,
        synthetic_share: float,
        shifted_share: float,
        cells_together: int,
        *,
        residual: bool = False,
        balance: str = "perturbations",
    ) -> None:
        self.cells_together = cells_together
        self.pairs, self.z = pairs, z
        groups = pairs.groups
        self.labels = pairs.perturbations
        self.genes = conditions.index(self.labels)
        cells = [pairs.cells_of(label) for label in self.labels]
        self.label, self.weight = np.arange(len(cells)), None
        if balance == "screens":
            cells, self.label, self.weight = _by_screen(cells, pairs.obs["dataset"].astype(str).to_numpy())
        self.cells = np.concatenate(cells)
        self.n_cells = np.array([len(rows) for rows in cells])
        self.first_cell = np.concatenate([[0], np.cumsum(self.n_cells)[:-1]])
        self.control_index = pairs.control_index
        self.control_share = control_share
        strata = pairs.obs.groupby(["role", "batch", "cell_type"], observed=True)
        self.stratum = strata.ngroup().to_numpy()
        self.controls = [
            rows[pairs.is_control[rows]] for rows in strata.indices.values() if pairs.is_control[rows].any()
        ]
        effects = torch.from_numpy(groups.effects(groups.sums(z.numpy())).astype(np.float32))
        # The last row is the effect of no perturbation.
        self.effect = torch.cat([effects, torch.zeros(1, z.shape[1])])
        self.perturbation = np.where(pairs.is_control, len(self.labels), groups.of_cell)
        self.residual = residual
        # In validation all starts are controls, and no combination is composed.
        is_training = bool((pairs.obs["role"] == "train").all())
        self.shifted_share = shifted_share if is_training else 0.0
        self.by_stratum = np.argsort(self.stratum, kind="stable")
        self.stratum_size = np.bincount(self.stratum)
        self.stratum_first = np.concatenate([[0], np.cumsum(self.stratum_size)[:-1]])
        is_single = np.array([len(members_of(label)) == 1 for label in self.labels])
        single = [label for label, alone in zip(self.labels, is_single, strict=True) if alone]
        self.has_combinations = len(single) < len(self.labels)
        self.synthetic_share = synthetic_share if is_training and self.has_combinations and len(single) > 1 else 0.0
        self.single_effects = torch.zeros_like(effects[is_single]) if residual else effects[is_single]
        self.single_genes = conditions.index(single)[:, 0] if single else torch.zeros(0, dtype=torch.long)
        self.base = conditions.base
        self.context = None if conditions.contexts is None else conditions.contexts.of_pairs(pairs)

    def shifted(self, rows: np.ndarray) -> Tensor:
        """Return cells minus the mean effect of their perturbation, (rows, dimensions)."""
        return self.z[rows] - self.effect[self.perturbation[rows]]

    def batch(self, size: int, seed: tuple[int, ...]) -> Batch:
        """Return a batch that depends on the seed alone."""
        rng = np.random.default_rng(seed)
        sample = np.arange(size) // self.cells_together
        n_samples = int(sample[-1]) + 1
        n = len(self.label)
        drawn = rng.integers(0, n, n_samples) if self.weight is None else rng.choice(n, n_samples, p=self.weight)
        place = drawn[sample]
        label = self.label[place]
        target = self.cells[self.first_cell[place] + rng.integers(0, self.n_cells[place])]
        start = self.control_index[target, rng.integers(0, self.control_index.shape[1], size)]
        genes = self.genes[label].clone()
        is_control = np.flatnonzero(rng.random(size) < self.control_share)
        for i in is_control:
            pool = self.controls[rng.integers(len(self.controls))]
            start[i], target[i] = pool[rng.integers(0, len(pool), 2)]
        genes[is_control] = -1
        before = self.z[start]
        is_shifted = np.flatnonzero(rng.random(size) < self.shifted_share)
        stratum = self.stratum[target[is_shifted]]
        any_cell = self.by_stratum[self.stratum_first[stratum] + rng.integers(0, self.stratum_size[stratum])]
        before[is_shifted] = self.shifted(any_cell)
        z = self.shifted(target) if self.residual else self.z[target]
        if self.synthetic_share:
            other = rng.integers(0, len(self.single_genes), n_samples)[sample]
            is_composed = (rng.random(n_samples) < self.synthetic_share)[sample]
            is_other_gene = self.base[self.single_genes[other]] != self.base[genes[:, 0]]
            is_composed &= (((genes >= 0).sum(dim=1) == 1) & is_other_gene).numpy()
            z[is_composed] += self.single_effects[other[is_composed]]
            genes[is_composed, 1] = self.single_genes[other[is_composed]]
        group = sample * (self.stratum.max() + 1) + self.stratum[target]
        group[is_control] = -1 - self.stratum[target[is_control]]
        context = None if self.context is None else self.context[target]
        return Batch(before, z, genes, torch.from_numpy(group), context)


def _by_screen(cells: list[np.ndarray], dataset: np.ndarray) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Return cells by perturbation × dataset, the perturbation of each, and how often each is sampled.

    Parameters
    ----------
    cells
        Rows of every perturbation.
    dataset
        Of every cell.
    """
    parts = [
        (i, name, rows[dataset[rows] == name]) for i, rows in enumerate(cells) for name in np.unique(dataset[rows])
    ]
    names, of_part, n = np.unique([name for _, name, _ in parts], return_inverse=True, return_counts=True)
    return [rows for *_, rows in parts], np.array([i for i, *_ in parts]), 1.0 / (len(names) * n[of_part])


def sampled_ahead(cells: Sampler, size: int, seeds: Iterable[tuple[int, ...]]) -> Iterator[Any]:
    """Yield a batch per seed. A thread samples the next batch while one is in use."""
    with ThreadPoolExecutor(1) as thread:
        ahead: Future | None = None
        for seed in seeds:
            last, ahead = ahead, thread.submit(cells.batch, size, seed)
            if last is not None:
                yield last.result()
        if ahead is not None:
            yield ahead.result()


class _Stream(IterableDataset):
    """The batches of one epoch."""

    def __init__(self, cells: Sampler, size: int, seed: int, epoch: int, n_batches: int) -> None:
        self.cells, self.size, self.seeds = cells, size, [(seed, epoch, i) for i in range(n_batches)]

    def __iter__(self) -> Iterator[Batch]:
        yield from sampled_ahead(self.cells, self.size, self.seeds)


class Batches:
    """Batches that depend on seed and epoch, so that a resumed training sees the same batches."""

    def __init__(self, training: Sampler, validation: Sampler | None, size: int, seed: int) -> None:
        self.training, self.validation, self.size, self.seed = training, validation, size, seed
        self._watched: list[Batch] | None = None

    def of_epoch(self, n_done: int) -> IterableDataset:
        """Return the training's batches of the epoch that begins after so many steps."""
        return _Stream(self.training, self.size, self.seed, n_done // STEPS_PER_EPOCH, STEPS_PER_EPOCH)

    def watched(self) -> list[Batch]:
        """Return a batch of training cells and one of validation cells where there are any: always the same ones."""
        if self._watched is None:
            kinds = [cells for cells in (self.training, self.validation) if cells is not None]
            self._watched = [cells.batch(N_WATCHED, (self.seed, WATCHED, 0)) for cells in kinds]
        return self._watched

    def validated(self) -> IterableDataset | None:
        """Return four fixed batches of validation perturbations, where there are any."""
        return None if self.validation is None else _Stream(self.validation, self.size, self.seed, VALIDATED, 4)
