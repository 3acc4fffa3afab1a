"""What the learned families share: conditions, paired batches, and a training loop that survives being killed."""

import logging
import math
import sys
import time
import warnings
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import ClassVar

import numpy as np
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, IterableDataset

from perturbflow.embeddings import Embeddings
from perturbflow.errors import InputError
from perturbflow.models.base import Artefact, Model, Run, start_cells
from perturbflow.models.effects import Effects
from perturbflow.models.latent import LatentSpace
from perturbflow.models.neighbours import Neighbours
from perturbflow.models.own_gene import OwnGene
from perturbflow.pairs import Pairs
from perturbflow.symbols import members_of

logger = logging.getLogger(__name__)

STEPS_PER_EPOCH = 100
SECONDS_BETWEEN_LINES = 10.0
CELLS_PER_BLOCK = 2048


# --- data -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Matched cells, in latent coordinates: B start cells, what perturbation they got, and cells that did get it.

    Attributes
    ----------
    start, target
        (B, dimensions).
    genes
        (B, members) of gene indices, -1 for none; all -1 for control.
    group
        (B,): equal where cells share perturbation, batch and cell type, so that any start goes with any target.
    """

    start: Tensor
    target: Tensor
    genes: Tensor
    group: Tensor

    def to(self, device: torch.device) -> "Batch":
        """Move all tensors."""
        return Batch(*(getattr(self, name).to(device) for name in ("start", "target", "genes", "group")))


class Conditions:
    """The perturbed genes that a model knows, as indices of their vectors.

    Parameters
    ----------
    genes
        Gene symbols, in the order of `vectors`.
    vectors
        Standardized embeddings, (genes, dimensions).
    """

    def __init__(self, genes: Sequence[str], vectors: np.ndarray) -> None:
        self.genes = list(genes)
        self.vectors = torch.as_tensor(np.asarray(vectors), dtype=torch.float32)
        self._index = {gene: i for i, gene in enumerate(self.genes)}

    def index(self, labels: Sequence[str], width: int = 2) -> Tensor:
        """Return gene indices of the members, (labels, members), padded with -1."""
        members = [members_of(label) for label in labels]
        width = max([width, *map(len, members)])
        table = torch.full((len(labels), width), -1, dtype=torch.long)
        for row, genes in enumerate(members):
            for column, gene in enumerate(genes):
                table[row, column] = self._index[gene]
        return table

    def unknown(self, label: str) -> list[str]:
        """Return the members that have no vector."""
        return [gene for gene in members_of(label) if gene not in self._index]


class PairedCells:
    """Draws batches of matched cells, the same for the same seed and step.

    Every training perturbation is drawn equally often, controls with a share of their own: a control cell's target is
    another control of its stratum, which teaches what no perturbation does.

    Parameters
    ----------
    pairs
        Cells of one role.
    latent
        Fitted on training cells.
    conditions
        Gene indices.
    effects
        Mean effects of training perturbations, for synthetic combinations.
    control_share
        Share of controls in a batch.
    synthetic_share
        Share of targets to which the mean effect of another single perturbation is added: composed combinations, an
        assumption of additivity that measured combinations can correct. Used only where training holds combinations.
    shifted_share
        Share of start cells that are no controls but perturbed training cells of the same batch and cell type less the mean
        effect of their perturbation. Screens with a hundred controls have thousands of these; without them a network learns
        its few controls by heart.
    cells_per_draw
        Cells of one perturbation that are drawn together: 1 mixes best, more gives groups to couple within.
    """

    def __init__(
        self,
        pairs: Pairs,
        latent: LatentSpace,
        conditions: Conditions,
        effects: Effects,
        control_share: float,
        synthetic_share: float,
        shifted_share: float,
        cells_per_draw: int,
    ) -> None:
        self.cells_per_draw = cells_per_draw
        self.z = torch.from_numpy(latent.encode(pairs.X))
        self.labels = pairs.perturbations
        self.genes = conditions.index(self.labels)
        cells = [pairs.cells_of(label) for label in self.labels]
        self.cells = np.concatenate(cells)
        self.n_cells = np.array([len(rows) for rows in cells])
        self.first_cell = np.concatenate([[0], np.cumsum(self.n_cells)[:-1]])
        self.control_index = pairs.control_index
        self.control_share = control_share
        strata = pairs.obs.groupby(["role", "batch", "cell_type"], observed=True)
        self.stratum = strata.ngroup().to_numpy()
        self.controls = [rows[pairs.is_control[rows]] for rows in strata.indices.values() if pairs.is_control[rows].any()]
        effect_of = dict(zip(effects.labels, latent.encode_effect(effects.values), strict=True))
        none = np.zeros(latent.n_dimensions, dtype=np.float32)
        self.shifted = self.z - torch.from_numpy(np.stack([effect_of.get(label, none) for label in pairs.labels]))
        # Only training cells have a measured effect to be taken back; in validation all starts are controls.
        is_training = set(self.labels) <= set(effect_of)
        self.shifted_share = shifted_share if is_training else 0.0
        self.by_stratum = np.argsort(self.stratum, kind="stable")
        self.stratum_size = np.bincount(self.stratum)
        self.stratum_first = np.concatenate([[0], np.cumsum(self.stratum_size)[:-1]])
        single = effects.single
        self.has_combinations = any(len(members_of(label)) > 1 for label in effects.labels)
        self.synthetic_share = synthetic_share if is_training and self.has_combinations and len(single) > 1 else 0.0
        self.single_effects = torch.from_numpy(latent.encode_effect(np.stack(list(single.values())))) if single else None
        self.single_genes = conditions.index(list(single))[:, 0] if single else None

    def batch(self, size: int, seed: tuple[int, ...]) -> Batch:
        """Return a batch that depends on the seed alone."""
        rng = np.random.default_rng(seed)
        draw = np.arange(size) // self.cells_per_draw
        n_draws = draw[-1] + 1
        drawn = rng.integers(0, len(self.labels), n_draws)[draw]
        target = self.cells[self.first_cell[drawn] + rng.integers(0, self.n_cells[drawn])]
        start = self.control_index[target, rng.integers(0, self.control_index.shape[1], size)]
        genes = self.genes[drawn].clone()
        is_control = np.flatnonzero(rng.random(size) < self.control_share)
        for i in is_control:
            pool = self.controls[rng.integers(len(self.controls))]
            start[i], target[i] = pool[rng.integers(0, len(pool), 2)]
        genes[is_control] = -1
        before = self.z[start]
        is_shifted = np.flatnonzero(rng.random(size) < self.shifted_share)
        stratum = self.stratum[target[is_shifted]]
        any_cell = self.by_stratum[self.stratum_first[stratum] + rng.integers(0, self.stratum_size[stratum])]
        before[is_shifted] = self.shifted[any_cell]
        z = self.z[target]
        if self.synthetic_share:
            other = rng.integers(0, len(self.single_genes), n_draws)[draw]
            is_composed = (rng.random(n_draws) < self.synthetic_share)[draw]
            is_composed &= ((genes >= 0).sum(dim=1) == 1).numpy() & (self.single_genes[other] != genes[:, 0]).numpy()
            z[is_composed] += self.single_effects[other[is_composed]]
            genes[is_composed, 1] = self.single_genes[other[is_composed]]
        group = draw * (self.stratum.max() + 1) + self.stratum[target]
        group[is_control] = -1 - self.stratum[target[is_control]]
        return Batch(before, z, genes, torch.from_numpy(group))


class _Stream(IterableDataset):
    """One epoch of batches."""

    def __init__(self, cells: PairedCells, size: int, seed: int, epoch: int, n_batches: int) -> None:
        self.cells, self.size, self.seed, self.epoch, self.n_batches = cells, size, seed, epoch, n_batches

    def __iter__(self) -> Iterator[Batch]:
        for i in range(self.n_batches):
            yield self.cells.batch(self.size, (self.seed, self.epoch, i))


class Batches(pl.LightningDataModule):
    """Batches that depend on seed and epoch, so that a resumed training sees what it would have seen."""

    def __init__(self, training: PairedCells, validation: PairedCells | None, size: int, seed: int) -> None:
        super().__init__()
        self.training, self.validation, self.size, self.seed = training, validation, size, seed

    def train_dataloader(self) -> DataLoader:
        """Return the batches of the current epoch.

        Counted in steps: when a training is resumed, Lightning asks for batches before it has counted its epoch on.
        """
        epoch = self.trainer.global_step // STEPS_PER_EPOCH
        return DataLoader(_Stream(self.training, self.size, self.seed, epoch, STEPS_PER_EPOCH), batch_size=None)

    def val_dataloader(self) -> DataLoader | list:
        """Return four fixed batches of validation perturbations."""
        if self.validation is None:
            return []
        return DataLoader(_Stream(self.validation, self.size, self.seed, 2**31, 4), batch_size=None)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """Move a batch."""
        return batch.to(device)


# --- training -------------------------------------------------------------------------------------------------------


class Learner(pl.LightningModule):
    """A network, its exponential moving average, and the optimization of a loss.

    Parameters
    ----------
    network
        With a method `losses(batch) -> dict of tensors`; the entry "loss" is minimized, the others are reported.
    """

    def __init__(self, network: nn.Module, seed: int, n_steps: int, learning_rate: float, weight_decay: float, ema_decay: float) -> None:
        super().__init__()
        self.network = network
        self.average = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(ema_decay), use_buffers=False)
        self.seed, self.n_steps, self.learning_rate, self.weight_decay = seed, n_steps, learning_rate, weight_decay

    def configure_optimizers(self) -> dict:
        """AdamW with a linear warm-up and a cosine decay."""
        optimizer = torch.optim.AdamW(self.network.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay)
        warm_up = min(100, self.n_steps // 10)

        def factor(step: int) -> float:
            return min(1.0, (step + 1) / max(1, warm_up)) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.n_steps)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Tie noise and dropout to the step, so that a resumed training draws what it would have drawn."""
        torch.manual_seed(self.seed * 1_000_003 + self.global_step)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Minimize the network's loss."""
        losses = self.network.losses(batch)
        if not torch.isfinite(losses["loss"]):
            raise InputError(f"the loss is no number at step {self.global_step}; lower learning_rate in the model's params.")
        self.log_dict({name: value.detach() for name, value in losses.items()}, on_step=False, on_epoch=True, batch_size=len(batch.genes))
        return losses["loss"]

    def on_train_batch_end(self, outputs: object, batch: Batch, batch_idx: int) -> None:
        """Move the average, and let the network do what it does after a step."""
        self.average.update_parameters(self.network)
        if hasattr(self.network, "after_step"):
            self.network.after_step(self.global_step / self.n_steps)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Report the averaged network's loss on validation perturbations, with noise tied to the batch."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(batch_idx)
            losses = self.average.module.losses(batch)
        values = {f"validation_{name}": value for name, value in losses.items()}
        self.log_dict(values, on_epoch=True, batch_size=len(batch.genes))


class _History(Callback):
    """Keeps one row per epoch and writes a line every few seconds."""

    def __init__(self, name: str, n_steps: int) -> None:
        self.rows: list[dict[str, float]] = []
        self.name, self.n_steps = name, n_steps
        self.started = self.last_line = time.monotonic()
        self.first_step: int | None = None

    def state_dict(self) -> dict:
        return {"rows": self.rows}

    def load_state_dict(self, state_dict: dict) -> None:
        self.rows = state_dict["rows"]

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.first_step = trainer.global_step

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        if self.rows and self.rows[-1]["step"] >= step:
            return  # a resumed training ends the epoch of its checkpoint once more
        row = {"step": step, **{name: round(float(value), 6) for name, value in trainer.callback_metrics.items()}}
        self.rows.append(row)
        now = time.monotonic()
        if now - self.last_line >= SECONDS_BETWEEN_LINES or step >= self.n_steps:
            self.last_line = now
            rate = (step - self.first_step) / max(now - self.started, 1e-9)
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "step")
            left = (self.n_steps - step) / max(rate, 1e-9)
            logger.info("%s: step %d of %d, %s; about %.0f s left", self.name, step, self.n_steps, numbers, left)


def accelerator(device: str) -> str:
    """Return Lightning's word for a device; InputError where it is not there."""
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        return "cuda" if available["cuda"] else "cpu"
    if not available[device]:
        raise InputError(f"device: '{device}' is configured but not available here; set device: auto or cpu.")
    return device


def optimize(learner: Learner, batches: Batches, run: Run, name: str) -> None:
    """Train a learner to its last step, from the last checkpoint of the same training where there is one.

    Checkpoints of another identity (other params, data, code or seed) are left alone and not resumed.
    """
    torch.set_num_threads(max(1, run.threads))
    folder = run.checkpoints / run.identity
    history = _History(name, learner.n_steps)
    callbacks: list[Callback] = [
        history,
        ModelCheckpoint(dirpath=folder, filename="last", every_n_epochs=1, save_on_train_epoch_end=True, enable_version_counter=False),
    ]
    if sys.stderr.isatty():
        callbacks.append(TQDMProgressBar(refresh_rate=20))
    for noisy in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators.cuda"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    trainer = pl.Trainer(
        max_steps=learner.n_steps,
        accelerator=accelerator(run.device),
        devices=1,
        logger=False,
        callbacks=callbacks,
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=False,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        reload_dataloaders_every_n_epochs=1,
        check_val_every_n_epoch=1,
        default_root_dir=str(run.checkpoints),
    )
    last = folder / "last.ckpt"
    if last.exists():
        logger.info("%s: resuming from %s", name, last)
    with warnings.catch_warnings():
        # Lightning's own use of a function of torch; nothing that a reader of the log could do about.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        trainer.fit(learner, datamodule=batches, ckpt_path=str(last) if last.exists() else None, weights_only=True)
    run.history.extend(history.rows)
    run.facts["device"] = str(trainer.strategy.root_device)
    run.facts["n_parameters"] = sum(parameter.numel() for parameter in learner.network.parameters())
    run.facts["versions"] = {"torch": torch.__version__, "pytorch_lightning": pl.__version__}


# --- the model ------------------------------------------------------------------------------------------------------


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

    cells_per_draw: ClassVar[int] = 1

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
    def network(self, latent: LatentSpace, vectors: Tensor) -> nn.Module:
        """Return a new network for cells of this latent space and these gene vectors."""

    @abstractmethod
    def displace(self, start: Tensor, genes: Tensor, generator: torch.Generator) -> Tensor:
        """Return the latent displacement of start cells, (B, dimensions), zero where all gene indices are -1."""

    def fit(self, pairs: Pairs, embeddings: Embeddings, run: Run) -> Artefact:
        """Fit the latent space in closed form, then train the network."""
        effects = Effects.of_training(pairs)
        self.latent = LatentSpace.fit(pairs, effects, self.n_latent)
        self.own_gene = OwnGene.fit(pairs, effects)
        table = embeddings.standardized(effects.genes)
        self.conditions = Conditions(list(table.index), table.to_numpy())
        self.neighbours = Neighbours.fit(*Effects.with_disjoint_controls(pairs), dict(zip(table.index, table.to_numpy(float), strict=True)))
        self.genes = pairs.genes
        self.seen = effects.genes
        torch.manual_seed(run.seed)
        self.net = self.network(self.latent, self.conditions.vectors)
        shares = (self.control_share, self.synthetic_share, self.shifted_share, self.cells_per_draw)
        cells = {
            role: PairedCells(pairs.roles(role), self.latent, self.conditions, effects, *shares)
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

    def restore(self, artefact: Artefact) -> None:
        """Rebuild the network around its weights."""
        self.latent = LatentSpace(**{name: value.numpy() for name, value in artefact["latent"].items()})
        self.own_gene = OwnGene(artefact["own_gene"].numpy())
        self.genes, self.seen = artefact["genes"], artefact["seen"]
        vectors = next(value for name, value in artefact["state"].items() if name.endswith("gene_encoder.vectors"))
        self.conditions = Conditions(artefact["condition_genes"], vectors.numpy())
        arrays = {name: artefact["neighbours"][name].numpy() for name in ("vectors", "sizes")}
        self.neighbours = Neighbours(**{**artefact["neighbours"], **arrays})
        self.net = self.network(self.latent, vectors)
        self.net.load_state_dict(artefact["state"])
        self.net.eval()

    def refusal(self, perturbation: str) -> str | None:
        """A gene without a vector cannot be told from any other."""
        unknown = self.conditions.unknown(perturbation)
        if not unknown:
            return None
        return f"{', '.join(unknown)} has no embedding; give one through embeddings.sources: [{{file: ...}}]"

    @torch.no_grad()
    def predict(self, cells: np.ndarray, perturbations: Sequence[str], n: int, seed: int) -> np.ndarray:
        """Move start cells in latent space and decode the displacement."""
        start = start_cells(cells, n)
        z = torch.from_numpy(self.latent.encode(start))
        row = {gene: i for i, gene in enumerate(self.genes)}
        predicted = np.empty((len(perturbations), n, start.shape[1]), dtype=np.float32)
        for p, perturbation in enumerate(perturbations):
            if reason := self.refusal(perturbation):
                raise InputError(f"{perturbation} cannot be predicted: {reason}.")
            rng = np.random.default_rng((seed, p))
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            for first in range(0, n, CELLS_PER_BLOCK):
                block = slice(first, first + CELLS_PER_BLOCK)
                moved = self._displacement(z[block], perturbation, rng, generator)
                predicted[p, block] = start[block] + (moved.numpy() * self.latent.scale) @ self.latent.basis.T
            for gene in members_of(perturbation):
                if gene not in self.seen and gene in row:
                    predicted[p, :, row[gene]] += self.own_gene.shift(float(start[:, row[gene]].mean()))
        return predicted

    def _displacement(self, z: Tensor, perturbation: str, rng: np.random.Generator, generator: torch.Generator) -> Tensor:
        """Return the latent displacement of cells; the part of unseen members is borrowed and scaled by its strength."""
        members = members_of(perturbation)
        unseen = [gene for gene in members if gene not in self.seen]
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
