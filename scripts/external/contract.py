"""The contract of scripts that train models of others: the exported folder in, predictions.h5ad out.

A script here runs in its own environment, without perturbflow: this module needs anndata, numpy and pandas alone. It is
called as `python SCRIPT EXPORTED PREDICTIONS SETTINGS`. The folder's README.md says what is in it.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

CONTROL = "control"


def nonnegative(cells: np.ndarray) -> np.ndarray:
    """Return cells of one perturbation without negative values, (cells, genes), with the same mean where it is above 0.

    Clipping alone would raise the mean. The workflow does the same with its own models.
    """
    clipped, mean = np.maximum(cells, 0.0), np.maximum(cells.mean(axis=0), 0.0)
    clipped_mean = clipped.mean(axis=0)
    return clipped * np.divide(mean, clipped_mean, out=np.zeros_like(mean), where=clipped_mean > 0)


@dataclass(frozen=True)
class Task:
    """What a script was handed.

    Attributes
    ----------
    exported, predictions
        The folder to read, and the file to write.
    seed, threads
        Of the run.
    device
        auto, cpu or cuda.
    options, files
        As the params of the model have them.
    """

    exported: Path
    predictions: Path
    seed: int
    threads: int
    device: str
    options: dict[str, Any]
    files: dict[str, str]

    @classmethod
    def handed(cls) -> "Task":
        """Read the arguments of this process."""
        exported, predictions, settings = map(Path, sys.argv[1:4])
        return cls(exported, predictions, **json.loads(settings.read_text(encoding="utf-8")))

    @cached_property
    def train(self) -> ad.AnnData:
        """Training and validation cells, controls among them."""
        return ad.read_h5ad(self.exported / "train.h5ad")

    @cached_property
    def controls(self) -> ad.AnnData:
        """Controls of the role to be predicted."""
        return ad.read_h5ad(self.exported / "controls.h5ad")

    @cached_property
    def targets(self) -> pd.DataFrame:
        """Perturbations to be predicted, by label: n_cells, members, members_seen."""
        return pd.read_csv(self.exported / "targets.tsv", sep="\t", dtype={"perturbation": str}).set_index(
            "perturbation"
        )

    def members(self, label: str) -> list[str]:
        """Return the genes of a perturbation."""
        return [] if label == CONTROL else label.split("+")

    @cached_property
    def known(self) -> set[str]:
        """Genes that some training cell was perturbed in."""
        labels = self.train.obs["perturbation"].astype(str).unique()
        return {member for label in labels for member in self.members(label)}

    def vectors(self) -> pd.DataFrame:
        """Return vectors of genes, genes × dimensions, scaled by the training genes; missing values are 0."""
        table = pd.read_csv(self.exported / "embeddings.tsv", sep="\t", index_col=0)
        reference = table.loc[table.index.intersection(sorted(self.known))]
        scale = reference.std(ddof=0)
        return ((table - reference.mean()) / scale.where(scale > 0, 1.0)).fillna(0.0)

    def torch_device(self) -> str:
        """Return the device for torch: a GPU where there is one, unless cpu is asked for."""
        import torch

        return "cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu"

    def starts(self, label: str, most: int) -> np.ndarray:
        """Return rows of `controls` to start a perturbation's cells from: as many as were measured, at most `most`."""
        rng = np.random.default_rng([self.seed, *label.encode()])
        n, there = min(int(self.targets.loc[label, "n_cells"]), most), self.controls.n_obs
        return np.sort(rng.choice(there, n, replace=n > there))

    def leave_means(self, means: Mapping[str, np.ndarray]) -> None:
        """Write mean log1p expression by label."""
        labels = list(means)
        self._leave(np.stack([means[label] for label in labels]), pd.DataFrame({"perturbation": labels}))

    def leave_cells(self, cells: Mapping[str, np.ndarray], starts: Mapping[str, np.ndarray]) -> None:
        """Write log1p expression of cells by label, with batch and cell type of the controls that they started from."""
        obs = [
            self.controls.obs.iloc[starts[label]][["batch", "cell_type"]].astype(str).assign(perturbation=label)
            for label in cells
        ]
        self._leave(np.concatenate([nonnegative(of_label) for of_label in cells.values()]), pd.concat(obs))

    def _leave(self, X: np.ndarray, obs: pd.DataFrame) -> None:
        obs.index = [f"predicted_{i}" for i in range(len(obs))]
        predicted = ad.AnnData(np.maximum(X, 0.0).astype(np.float32), obs, self.train.var[[]].copy())
        predicted.uns["perturbflow"] = {"split_sha256": self.train.uns["perturbflow"]["split_sha256"]}
        partial = self.predictions.with_suffix(".part.h5ad")
        predicted.write_h5ad(partial)
        partial.replace(self.predictions)
