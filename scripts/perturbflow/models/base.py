"""The interface that every model keeps: baselines, ceilings and learned families alike."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from perturbflow.controls import Context
from perturbflow.embeddings import Embeddings
from perturbflow.models.calibration import Calibration
from perturbflow.pairs import Pairs
from perturbflow.registry.families import FAMILIES
from perturbflow.registry.params import Params, made

# What training leaves behind: arrays of a closed form, tensors and plain values of a network.
Artefact = dict[str, Any]


@dataclass
class Run:
    """The circumstances of one training.

    Attributes
    ----------
    seed
        Governs initialization, batches and noise.
    device
        auto, cpu, cuda or mps.
    threads
        CPU threads that the job was given.
    checkpoints
        Folder for resumable state; no result.
    identity
        Digest of all that went in: state of another identity is not resumed.
    history
        Filled by training: one row of numbers per logged step.
    facts
        Filled by training: what else run.json should say.
    """

    seed: int
    device: str = "cpu"
    threads: int = 1
    checkpoints: Path = Path("checkpoints")
    identity: str = ""
    history: list[dict[str, float]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


class Model(ABC):
    """A model of perturbed expression.

    A model is built from its params, then either fitted or restored from an artefact.
    Expression is log1p-normalized, on the scale of pairs.h5ad, in that file's gene order.
    """

    reads_blocks: bool = False  # fit goes through the cells block by block: their expression may stay on disk
    files: tuple[Path, ...] = ()  # that the params name: what is in them is part of a training's identity

    def __init__(self, params: Params | None = None) -> None:
        self.params = params or Params()

    @abstractmethod
    def fit(self, pairs: Pairs, embeddings: Embeddings, run: Run) -> Artefact:
        """Learn from training cells (validation cells are reported on, no more) and return all that prediction needs."""

    @abstractmethod
    def restore(self, artefact: Artefact) -> None:
        """Become the model that an earlier `fit` returned."""

    @abstractmethod
    def predict(
        self, cells: np.ndarray, perturbations: Sequence[str], n: int, seed: int, context: Context | None = None
    ) -> np.ndarray:
        """Predict perturbed cells.

        Parameters
        ----------
        cells
            Control cells, (m, genes); the i-th prediction starts from cells[i % m].
        perturbations
            Canonical labels.
        n
            Cells per perturbation.
        seed
            Same seed, same cells.
        context
            Where the cells are. The predicted cells have its level plus the effect for their mean, so that they do not carry the chance by which a
            few controls were drawn. None: the mean of the cells themselves.

        Returns
        -------
        (perturbations, n, genes); a ceiling has no more cells than were measured.
        """

    def counterfactual(
        self, cells: np.ndarray, perturbations: Sequence[str], samples: int, seed: int, context: Context | None = None
    ) -> np.ndarray:
        """Return what each of these cells might become, (perturbations, cells, samples, genes)."""
        repeated = np.repeat(cells, samples, axis=0)
        predicted = self.predict(repeated, perturbations, len(repeated), seed, context)
        return predicted.reshape(len(perturbations), len(cells), samples, cells.shape[1])

    def individual_effects(
        self, cells: np.ndarray, perturbation: str, seed: int, context: Context | None = None
    ) -> np.ndarray:
        """Return what the perturbation is expected to change in each of these cells, (cells, genes): the mean over what is not known of it."""
        return self.predict(cells, [perturbation], len(cells), seed, context)[0] - cells

    def uncertainty(self, perturbation: str, context: Context | None = None) -> np.ndarray | None:
        """Return the variance that the model gives its own idea of the mean effect, (genes,); None where it has none."""
        return None

    def held_out(self, pairs: Pairs, embeddings: Embeddings, seed: int) -> Calibration:
        """Return how far this model is off on training perturbations that it was not trained on, as far as that can be known."""
        return Calibration.none()

    def refusal(self, perturbation: str) -> str | None:
        """Return why this perturbation cannot be predicted, or None."""
        return None


class Ceiling(Model):
    """What may see measured test cells, and predicts with some of them; a model never does."""

    noise_removed: ClassVar[bool] = False  # its scores are to be told without the noise of its cells

    @abstractmethod
    def rows(self, perturbation: str, n: int, seed: int) -> np.ndarray:
        """Return the row of pairs.h5ad of every cell that `predict` returns."""


def build(implementation: str, params: dict) -> Model:
    """Return the model of an implementation, "module:Class" below perturbflow.models, with these params."""
    module, name = implementation.split(":")
    model = getattr(importlib.import_module(f"perturbflow.models.{module}"), name)
    declared = next((of.params for of in FAMILIES.values() if of.implementation == implementation), Params)
    return model(made(declared, params)) if fields(declared) else model()


def off_level(cells: np.ndarray, context: Context | None) -> np.ndarray:
    """Return what the mean of cells lacks of the level of their context, (genes,); zeros without one."""
    return np.zeros(cells.shape[1]) if context is None else context.level - cells.mean(axis=0, dtype=np.float64)


def start_cells(cells: np.ndarray, n: int) -> np.ndarray:
    """Return the control cell that each of n predictions starts from, (n, genes)."""
    return cells[np.arange(n) % len(cells)]
