"""The training loop: PyTorch Lightning's Trainer, an average of weights, and a history. A killed training resumes."""

import logging
import signal
import sys
import time
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.utils.data import DataLoader

from perturbflow.errors import InputError
from perturbflow.io.artefacts import load_checkpoint, save_checkpoint
from perturbflow.models.base import Run
from perturbflow.models.training.batches import Batch, Batches
from perturbflow.models.training.devices import accelerator
from perturbflow.models.training.learner import MAX_GRADIENT, Learner, resumable

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0


class _Fit(pl.LightningModule):
    """A learner as Lightning calls it, and the sums of its losses."""

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self.learner = learner
        self.totals: dict[str, Tensor] = {}
        self.n_in_totals = 0

    def configure_optimizers(self) -> dict:
        optimizer, schedule = self.learner.optimizers()
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.learner.before_step(self.global_step)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = self.learner.losses(batch, self.global_step)
        for name, value in losses.items():
            self.totals[name] = self.totals.get(name, 0.0) + value.detach()
        self.n_in_totals += 1
        return losses["loss"]

    def on_train_batch_end(self, outputs: object, batch: Batch, batch_idx: int) -> None:
        self.learner.after_step(self.global_step)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Report the averaged network's loss on validation perturbations, with noise tied to the batch."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(batch_idx)
            losses = self.learner.average.module.losses(batch)
        values = {f"validation_{name}": value for name, value in losses.items()}
        self.log_dict(values, on_epoch=True, batch_size=len(batch))

    def mean_losses(self) -> dict[str, float]:
        """Return the mean losses since the last call. Lightning's own log slows the steps of small networks."""
        means = {name: float(total) / self.n_in_totals for name, total in self.totals.items()}
        self.totals, self.n_in_totals = {}, 0
        return means

    def watched(self) -> dict[str, float]:
        """Return the network's report on the cells that are watched."""
        cells = [batch.to(self.device) for batch in self.trainer.datamodule.batches.watched()]
        return self.learner.watched(cells, self.global_step)


class _Data(pl.LightningDataModule):
    """Batches as Lightning asks for them."""

    def __init__(self, batches: Batches) -> None:
        super().__init__()
        self.batches = batches

    def train_dataloader(self) -> DataLoader:
        """Return the batches of the current epoch.

        The epoch is counted in steps: Lightning asks a resumed training for batches before it updates its own epoch.
        """
        return DataLoader(self.batches.of_epoch(self.trainer.global_step), batch_size=None)

    def val_dataloader(self) -> DataLoader | list:
        validated = self.batches.validated()
        return [] if validated is None else DataLoader(validated, batch_size=None)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)


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
        _send(trainer, self.rows)  # of the part before a resumption: a logger starts anew

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        step = trainer.global_step
        if self.rows and self.rows[-1]["step"] >= step:
            return  # a resumed training ends the epoch of its checkpoint again
        found = {**pl_module.mean_losses(), **trainer.callback_metrics, **pl_module.watched()}
        row = {"step": step, **{name: round(float(value), 6) for name, value in found.items()}}
        self.rows.append(row)
        _send(trainer, [row])
        now = time.monotonic()
        if now - self.last_line >= SECONDS_BETWEEN_LINES or step >= self.n_steps:
            self.last_line = now
            rate = (step - self.first_step) / max(now - self.started, 1e-9)
            numbers = ", ".join(f"{name} {value:.4g}" for name, value in row.items() if name != "step")
            left = (self.n_steps - step) / max(rate, 1e-9)
            logger.info("%s: step %d of %d, %s; about %.0f s left", self.name, step, self.n_steps, numbers, left)


def _send(trainer: pl.Trainer, rows: list[dict[str, float]]) -> None:
    """Hand rows of a history to the loggers of the training, if it has any."""
    for to in trainer.loggers:
        for row in rows:
            to.log_metrics({name: value for name, value in row.items() if name != "step"}, int(row["step"]))
        to.save()


class _WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all. Lightning copies its own to the final name byte by byte."""

    def save_checkpoint(self, checkpoint: dict, path: str, storage_options: object | None = None) -> None:
        save_checkpoint(Path(path), checkpoint)

    def load_checkpoint(self, path: str, map_location: object = None, weights_only: bool | None = None) -> dict:
        return load_checkpoint(Path(path))


def optimize(learner: Learner, batches: Batches, run: Run, name: str) -> None:
    """Train a learner to its last step, from the last checkpoint of the same training where there is one.

    Checkpoints of another identity (other params, data, code or seed) stay as they are and are not resumed.
    """
    torch.set_num_threads(max(1, run.threads))
    last = run.checkpoints / run.identity / "last.ckpt"
    history = _History(name, learner.n_steps)
    for noisy in ("pytorch_lightning.utilities.rank_zero", "pytorch_lightning.accelerators.cuda"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        # Lightning's own use of a function of torch; a reader of the log cannot change it.
        warnings.filterwarnings("ignore", message=".*LeafSpec.*")
        # A job is one process; Lightning must not take it for a step of SLURM with several tasks.
        warnings.filterwarnings("ignore", message="The `srun` command is available")
        trainer = _trainer(learner.n_steps, batches, run, _callbacks(history, last), name)
        resumed = last if resumable(last, name) else None
        try:
            trainer.fit(_Fit(learner), datamodule=_Data(batches), ckpt_path=resumed, weights_only=True)
        except SIGTERMException:
            text = "%s: asked to end (cancelled, or out of run time); the next attempt resumes from the last checkpoint"
            logger.warning(text, name)
            sys.exit(128 + signal.SIGTERM)
    run.history.extend(history.rows)
    run.facts["device"] = str(trainer.strategy.root_device)
    if hasattr(learner.network, "complaint") and (complaint := learner.network.complaint(history.rows[-1])):
        run.facts["complaint"] = complaint
        logger.warning("%s: %s", name, complaint)
    run.facts["n_parameters"] = sum(parameter.numel() for parameter in learner.network.parameters())
    run.facts["versions"] = {"torch": torch.__version__, "pytorch_lightning": pl.__version__}


LOGGERS = {"csv": CSVLogger, "tensorboard": TensorBoardLogger, "wandb": WandbLogger}


def _logger(run: Run, name: str) -> Logger | bool:
    """Return the logger of Lightning that a run asks for, or False for none.

    Raises
    ------
    InputError
        If its package is not installed.
    """
    if run.logger is None:
        return False
    folder, label = run.checkpoints.parent / "logger", f"{run.place} {name} seed {run.seed}"
    places = {"wandb": {"project": "perturbflow", "name": label}}.get(run.logger, {"name": name, "version": ""})
    try:
        return LOGGERS[run.logger](save_dir=str(folder), **places)
    except ModuleNotFoundError as error:
        raise InputError(
            f"logger: {run.logger} needs a package that is not installed: pip install {run.logger}, or logger: csv."
        ) from error


def _trainer(n_steps: int, batches: Batches, run: Run, callbacks: list[Callback], name: str) -> pl.Trainer:
    """Return Lightning's Trainer: one process on one device, whole checkpoints."""
    return pl.Trainer(
        max_steps=n_steps,
        accelerator=accelerator(run.device),
        devices=1,
        plugins=[LightningEnvironment(), _WholeCheckpoints()],
        logger=_logger(run, name),
        callbacks=callbacks,
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=False,
        gradient_clip_val=MAX_GRADIENT,
        num_sanity_val_steps=0,
        limit_val_batches=0 if batches.validation is None else 1.0,
        reload_dataloaders_every_n_epochs=1,
        check_val_every_n_epoch=1,
        default_root_dir=str(run.checkpoints),
    )


def _callbacks(history: _History, last: Path) -> list[Callback]:
    """Return the callbacks of a training: its history, a checkpoint per epoch, and a progress bar on a terminal."""
    checkpoint = ModelCheckpoint(
        dirpath=last.parent,
        filename=last.stem,
        every_n_epochs=1,
        save_on_train_epoch_end=True,
        enable_version_counter=False,
    )
    return [history, checkpoint, *([TQDMProgressBar(refresh_rate=20)] if sys.stderr.isatty() else [])]
