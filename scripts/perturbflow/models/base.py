"""The interface that every model keeps: baselines, ceilings and learned families alike."""

import importlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, get_type_hints

import numpy as np
import pandas as pd

from perturbflow.controls import Context
from perturbflow.embeddings import Embeddings
from perturbflow.models.calibration import Calibration
from perturbflow.pairs import Pairs
from perturbflow.registry.params import Params, made

# A trained model: arrays of a closed form, tensors and plain values of a network.
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
        Digest of all inputs: state of another identity is not resumed.
    history
        Filled by training: one row of numbers per logged step.
    facts
        Filled by training: other entries of run.json.
    scored
        Role that predictions will be scored on.
    sources
        Name → file that the data were read from: pairs, embeddings and, where it was given, split.
    place
        Dataset × split, in words.
    logger
        csv, tensorboard, wandb: one of Lightning's loggers gets the history too.
    """

    seed: int
    device: str = "cpu"
    threads: int = 1
    checkpoints: Path = Path("checkpoints")
    identity: str = ""
    history: list[dict[str, float]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    scored: str = "test"
    sources: dict[str, Path] = field(default_factory=dict)
    place: str = ""
    logger: str | None = None


class Model(ABC):
    """A model of perturbed expression.

    A model is built from its params, then either fitted or restored from an artefact.
    Expression is log1p-normalized, on the scale of pairs.h5ad, in that file's gene order.
    """

    params: Params
    reads_blocks: bool = False  # fit reads the cells block by block: their expression may stay on disk
    files: tuple[Path, ...] = ()  # files that the params name: their content is part of a training's identity
    keeps_trainings: bool = False  # finished trainings are kept, and the same one is not repeated

    def __init__(self, params: Params | None = None) -> None:
        self.params = params or Params()

    @abstractmethod
    def fit(self, pairs: Pairs, embeddings: Embeddings, run: Run) -> Artefact:
        """Learn from training cells and return all that prediction needs. Validation cells serve reports alone."""

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
            Control cells, (m, genes). Prediction i starts from cells[i % m].
        perturbations
            Canonical labels.
        n
            Cells per perturbation.
        seed
            Same seed, same cells.
        context
            Context of the cells. The mean of the predicted cells is its level plus the effect: the sampling error of a
            few controls does not enter. None: the mean of the cells themselves replaces its level.

        Returns
        -------
        (perturbations, n, genes). A ceiling has no more cells than were measured.
        """

    def counterfactual(
        self, cells: np.ndarray, perturbations: Sequence[str], samples: int, seed: int, context: Context | None = None
    ) -> np.ndarray:
        """Return samples of each cell after each perturbation, (perturbations, cells, samples, genes)."""
        repeated = np.repeat(cells, samples, axis=0)
        predicted = self.predict(repeated, perturbations, len(repeated), seed, context)
        return predicted.reshape(len(perturbations), len(cells), samples, cells.shape[1])

    def individual_effects(
        self, cells: np.ndarray, perturbation: str, seed: int, context: Context | None = None
    ) -> np.ndarray:
        """Return the expected effect on each of these cells, (cells, genes): the mean over its samples."""
        return self.predict(cells, [perturbation], len(cells), seed, context)[0] - cells

    def mean_effects(
        self, cells: np.ndarray, perturbations: Sequence[str], seed: int, context: Context | None = None
    ) -> np.ndarray:
        """Return the mean of `individual_effects` over the cells, (perturbations, genes)."""
        return np.stack([self.individual_effects(cells, label, seed, context).mean(axis=0) for label in perturbations])

    def uncertainties(self, perturbations: Sequence[str], context: Context | None = None) -> np.ndarray | None:
        """Return the model's own variances of mean effects, (perturbations, genes); None where it has none."""
        found = [self.uncertainty(label, context) for label in perturbations]
        known = [variance for variance in found if variance is not None]
        return np.stack(known) if len(known) == len(found) else None

    def add_genes(self, pairs: Pairs, embeddings: Embeddings, seed: int) -> None:  # noqa: B027
        """Take in the vectors of genes that the screen does not perturb. A model that reads no vectors needs none.

        Parameters
        ----------
        pairs, embeddings
            Those that the model was fitted on; the embeddings hold the further genes, too.
        """

    def uncertainty(self, perturbation: str, context: Context | None = None) -> np.ndarray | None:
        """Return the model's own variance of the mean effect, (genes,); None where it has none."""
        return None

    def held_out(self, pairs: Pairs, embeddings: Embeddings, seed: int) -> Calibration:
        """Return this model's errors on training perturbations that inner folds held out, where it has such folds."""
        return Calibration.none()

    def refusal(self, perturbation: str) -> str | None:
        """Return why this perturbation cannot be predicted, or None."""
        return None


class Ceiling(Model):
    """A predictor that sees measured test cells and predicts with some of them. A model never sees them.

    `predict` gets the cells of `rows`, in place of control cells.
    """

    noise_removed: ClassVar[bool] = False  # whether the noise of its cells is removed from its scores

    @abstractmethod
    def rows(self, perturbation: str, n: int, seed: int) -> np.ndarray:
        """Return the rows of pairs.h5ad whose cells predict a perturbation: n, or as many as were measured."""


class Given(Model):
    """A model whose predictions were made elsewhere: it may hold predicted cells."""

    has_cells: bool = False  # else it predicts from control cells, as others do

    @abstractmethod
    def meet(self, scored: Pairs) -> dict[str, Any]:
        """Look at the cells of the scored role before predicting; return facts for uns of predictions.h5ad.

        `missing` lists the perturbations that were not predicted.
        """

    @abstractmethod
    def cells_of(self, label: str, most: int, seed: int) -> tuple[np.ndarray, pd.DataFrame] | None:
        """Return predicted cells of a perturbation, (cells, genes), and their batch and cell type; None without any.

        Parameters
        ----------
        most
            Of more cells, as many are drawn.
        """


def build(implementation: str, params: dict) -> Model:
    """Return the model of an implementation, "module:Class" below perturbflow.models, with these params."""
    module, name = implementation.split(":")
    model = getattr(importlib.import_module(f"perturbflow.models.{module}"), name)
    # By the class's annotation: the code of a training must not depend on the declarations of other families.
    declared = get_type_hints(model)["params"]
    return model(made(declared, params)) if fields(declared) else model()


def off_level(cells: np.ndarray, context: Context | None) -> np.ndarray:
    """Return the level of the cells' context minus the mean of the cells, (genes,); zeros without a context."""
    return np.zeros(cells.shape[1]) if context is None else context.level - cells.mean(axis=0, dtype=np.float64)


def start_cells(cells: np.ndarray, n: int) -> np.ndarray:
    """Return the control cell that each of n predictions starts from, (n, genes)."""
    return cells[np.arange(n) % len(cells)]
