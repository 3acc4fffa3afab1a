"""The training loop: PyTorch Lightning's Trainer, an average of weights, and a history. A killed training resumes."""

import logging
import math
import signal
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.plugins.io import TorchCheckpointIO
from pytorch_lightning.utilities.exceptions import SIGTERMException
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from perturbflow.errors import InputError
from perturbflow.io.artefacts import DAMAGED, load_checkpoint, save_checkpoint
from perturbflow.models.base import Run
from perturbflow.models.training.batches import STEPS_PER_EPOCH, Batch, Batches, Sampler, sampled_ahead
from perturbflow.models.training.devices import accelerator

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 10.0
MAX_GRADIENT = 1.0  # norm


@dataclass(frozen=True)
class Optimization:
    """How weights are optimized.

    Attributes
    ----------
    learning_rate, weight_decay
        Of AdamW.
    ema_decay
        Of the moving average of weights, which predicts.
    """

    learning_rate: float
    weight_decay: float
    ema_decay: float


class Learner(pl.LightningModule):
    """A network, its exponential moving average, and the optimization of a loss.

    Parameters
    ----------
    network
        With a method `losses(batch) -> dict of tensors`: the entry "loss" is minimized, the others are reported. It may
        have `after_step(progress)`. It may have `watch(batch) -> dict of tensors` and `complaint(watched) -> text or
        None`, which check whether its training makes sense.
    stops
        Whether a complaint in the second half of the training is an error. Otherwise the last one is a fact of the run.
    """

    def __init__(
        self,
        network: nn.Module,
        seed: int,
        n_steps: int,
        optimization: Optimization,
        *,
        stops: bool = True,
    ) -> None:
        super().__init__()
        self.optimization, self.stops = optimization, stops
        self.totals: dict[str, Tensor] = {}
        self.n_in_totals = 0
        self.network = network
        self.average = AveragedModel(
            network, multi_avg_fn=get_ema_multi_avg_fn(optimization.ema_decay), use_buffers=False
        )
        self.seed, self.n_steps = seed, n_steps

    def configure_optimizers(self) -> dict:
        """AdamW with a linear warm-up and a cosine decay."""
        optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self.optimization.learning_rate, weight_decay=self.optimization.weight_decay
        )
        warm_up = min(100, self.n_steps // 10)

        def factor(step: int) -> float:
            warmth = min(1.0, (step + 1) / max(1, warm_up))
            return warmth * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.n_steps)))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Tie noise and dropout to the step, so that a resumed training has the same noise."""
        _tie_noise(self.seed, self.global_step)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Minimize the network's loss."""
        losses = _finite(self.network.losses(batch), self.global_step)
        for name, value in losses.items():
            self.totals[name] = self.totals.get(name, 0.0) + value.detach()
        self.n_in_totals += 1
        return losses["loss"]

    def mean_losses(self) -> dict[str, float]:
        """Return the mean losses since the last call. Lightning's own log slows the steps of small networks."""
        means = {name: float(total) / self.n_in_totals for name, total in self.totals.items()}
        self.totals, self.n_in_totals = {}, 0
        return means

    def on_train_batch_end(self, outputs: object, batch: Batch, batch_idx: int) -> None:
        """Update the average, and let the network finish its step."""
        self.after_step(self.global_step)

    def after_step(self, n_done: int) -> None:
        """Update the average, and let the network finish the last of so many steps."""
        self.average.update_parameters(self.network)
        if hasattr(self.network, "after_step"):
            self.network.after_step(n_done / self.n_steps)

    @torch.no_grad()
    def watched(self) -> dict[str, float]:
        """Return the averaged network's report on fixed cells of training and, with a prefix, of validation.

        Raises
        ------
        InputError
            If the network complains in the second half of the training.
        """
        network, cells = self.average.module, self.trainer.datamodule
        if not hasattr(network, "watch"):
            return {}
        network.eval()
        watched = {
            f"{prefix}{name}": float(value)
            for prefix, batch in zip(("", "validation_"), cells.watched(), strict=False)
            for name, value in network.watch(batch.to(self.device)).items()
        }
        complaint = network.complaint(watched)
        if complaint and self.stops and self.global_step >= self.n_steps / 2:
            raise InputError(f"training was stopped at step {self.global_step} of {self.n_steps}: {complaint}")
        return watched

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Report the averaged network's loss on validation perturbations, with noise tied to the batch."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(batch_idx)
            losses = self.average.module.losses(batch)
        values = {f"validation_{name}": value for name, value in losses.items()}
        self.log_dict(values, on_epoch=True, batch_size=len(batch))


def _tie_noise(seed: int, step: int) -> None:
    """Seed all that is random in a step.

    Without an accelerator this seeds the CPU's generator directly. `torch.manual_seed` would also keep a traceback for
    later devices, which takes a tenth of a small step.
    """
    seed_all = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed
    seed_all(seed * 1_000_003 + step)


def _finite(losses: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    if not torch.isfinite(losses["loss"]):
        raise InputError(f"the loss is not finite at step {step}; lower learning_rate in the model's params.")
    return losses


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


def resumable(last: Path, name: str) -> dict | None:
    """Return the content of the last checkpoint; None if there is none, or a damaged one, which is soon replaced."""
    if not last.exists():
        return None
    try:
        found = load_checkpoint(last)
    except DAMAGED as error:
        logger.warning("%s: %s is damaged (%s); training starts from its first step", name, last, error)
        return None
    logger.info("%s: resuming from %s", name, last)
    return found


def optimize_briefly(learner: Learner, cells: Sampler, batch_size: int) -> nn.Module:
    """Return the averaged network after the steps of `optimize`, on the CPU, without checkpoints and history."""
    configured = learner.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    learner.network.train()
    seeds = ((learner.seed, *divmod(step, STEPS_PER_EPOCH)) for step in range(learner.n_steps))
    for step, batch in enumerate(sampled_ahead(cells, batch_size, seeds)):
        _tie_noise(learner.seed, step)
        optimizer.zero_grad()
        _finite(learner.network.losses(batch), step)["loss"].backward()
        nn.utils.clip_grad_norm_(learner.network.parameters(), MAX_GRADIENT)
        optimizer.step()
        schedule.step()
        learner.after_step(step + 1)
    return learner.average.module.eval()


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
            trainer.fit(learner, datamodule=batches, ckpt_path=resumed, weights_only=True)
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
