"""A network in training: its loss, its optimizer and an average of its weights. Lightning runs it in `loop`."""

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from perturbflow.errors import InputError
from perturbflow.io.artefacts import DAMAGED, load_checkpoint
from perturbflow.models.base import Run
from perturbflow.models.training.batches import STEPS_PER_EPOCH, Batch, Batches, Sampler, sampled_ahead

logger = logging.getLogger(__name__)

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


class Learner(nn.Module):
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
        self.network = network
        self.average = AveragedModel(
            network, multi_avg_fn=get_ema_multi_avg_fn(optimization.ema_decay), use_buffers=False
        )
        self.seed, self.n_steps = seed, n_steps

    def optimizers(self) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        """Return AdamW, and a linear warm-up with a cosine decay, by step."""
        optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self.optimization.learning_rate, weight_decay=self.optimization.weight_decay
        )
        warm_up = min(100, self.n_steps // 10)

        def factor(step: int) -> float:
            warmth = min(1.0, (step + 1) / max(1, warm_up))
            return warmth * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.n_steps)))

        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)

    def before_step(self, n_done: int) -> None:
        """Tie noise and dropout to the step, so that a resumed training has the same noise.

        Without an accelerator this seeds the CPU's generator directly. `torch.manual_seed` would also keep a traceback
        for later devices, which takes a tenth of a small step.
        """
        seed_all = torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed
        seed_all(self.seed * 1_000_003 + n_done)

    def losses(self, batch: Batch, n_done: int) -> dict[str, Tensor]:
        """Return the network's losses on a batch; one that is not finite is an error."""
        losses: dict[str, Tensor] = self.network.losses(batch)
        if not torch.isfinite(losses["loss"]):
            raise InputError(f"the loss is not finite at step {n_done}; lower learning_rate in the model's params.")
        return losses

    def after_step(self, n_done: int) -> None:
        """Update the average, and let the network finish the last of so many steps."""
        self.average.update_parameters(self.network)
        if hasattr(self.network, "after_step"):
            self.network.after_step(n_done / self.n_steps)

    @torch.no_grad()
    def watched(self, cells: list[Batch], n_done: int) -> dict[str, float]:
        """Return the averaged network's report on fixed cells of training and, with a prefix, of validation.

        Raises
        ------
        InputError
            If the network complains in the second half of the training.
        """
        network = self.average.module
        if not hasattr(network, "watch"):
            return {}
        network.eval()
        watched = {
            f"{prefix}{name}": float(value)
            for prefix, batch in zip(("", "validation_"), cells, strict=False)
            for name, value in network.watch(batch).items()
        }
        complaint = network.complaint(watched)
        if complaint and self.stops and n_done >= self.n_steps / 2:
            raise InputError(f"training was stopped at step {n_done} of {self.n_steps}: {complaint}")
        return watched

    def optimize(self, batches: Batches, run: Run, name: str) -> None:
        """Train to the last step, from the last checkpoint of the same training where there is one.

        Checkpoints of another identity (other params, data, code or seed) stay as they are and are not resumed.
        """
        from perturbflow.models.training.loop import optimize  # Lightning: seconds, which a prediction spares

        optimize(self, batches, run, name)

    def optimize_briefly(self, cells: Sampler, batch_size: int) -> nn.Module:
        """Return the averaged network after the steps of `optimize`, on the CPU, without checkpoints and history."""
        optimizer, schedule = self.optimizers()
        self.network.train()
        seeds = ((self.seed, *divmod(step, STEPS_PER_EPOCH)) for step in range(self.n_steps))
        for step, batch in enumerate(sampled_ahead(cells, batch_size, seeds)):
            self.before_step(step)
            optimizer.zero_grad()
            self.losses(batch, step)["loss"].backward()
            nn.utils.clip_grad_norm_(self.network.parameters(), MAX_GRADIENT)
            optimizer.step()
            schedule.step()
            self.after_step(step + 1)
        return self.average.module.eval()


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
