"""Predictions from a file: what fits the screen scores as it should, whatever its form; what does not is refused in words."""

import json
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import Prepared, merged
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.evaluation import METRICS, evaluate
from perturbflow.models.base import build
from perturbflow.predict import predict
from perturbflow.registry.families import FAMILIES
from perturbflow.registry.plan import Plan
from perturbflow.train import train

IMPLEMENTATION = FAMILIES["predictions"].implementation
DEFAULTS = {"values": "expression", "scale": "log1p", "target_sum": None, "label": "perturbation", "separator": "+"}
KIND = "unseen_combination"
BY_MEANS = [
    name for name, metric in METRICS.items() if metric.needs == "pseudobulk" and metric.family in ("error", "correlation")
]


def shuffled(X: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return cells with the values of every gene in another order: the same means, and no measured cell."""
    return np.stack([rng.permutation(column) for column in X.T], axis=1)


@pytest.fixture(scope="module")
def measured(prepared: dict[str, Prepared]) -> ad.AnnData:
    """Return the test cells of half a, perturbed, with all genes of the screen's pairs and their counts."""
    pairs = ad.read_h5ad(prepared[KIND].pairs)
    cells = pairs[(pairs.obs["role"] == "test") & (pairs.obs["half"] == "a")].copy()
    cells.uns = {"perturbflow": {"target_sum": pairs.uns["perturbflow"]["target_sum"]}}
    return cells


@pytest.fixture(scope="module")
def perfect(measured: ad.AnnData) -> ad.AnnData:
    """Return a prediction that is as good as half a, cells that were never measured."""
    rng = np.random.default_rng(0)
    counts, X = np.zeros(measured.shape), np.zeros(measured.shape)
    for places in measured.obs.groupby(["perturbation", "batch"], observed=True).indices.values():
        # Cells of one size, so that log1p and counts agree after the shuffle.
        X[places] = shuffled(measured.X[places].toarray(), rng)
    counts = np.expm1(X) * 2000.0 / measured.uns["perturbflow"]["target_sum"]
    obs = measured.obs[["perturbation", "batch", "cell_type"]].astype(str)
    return ad.AnnData(X.astype(np.float32), obs, measured.var[[]], layers={"counts": counts.astype(np.float32)})


class Run:
    """Trains, predicts and scores the family on one file."""

    def __init__(self, here: Prepared, folder: Path) -> None:
        self.here, self.folder, self.path = here, folder, folder / "theirs.h5ad"

    def write(self, cells: ad.AnnData) -> None:
        """Write the predictions."""
        self.path = self.folder / "theirs.h5ad"
        cells.write_h5ad(self.path)

    def __call__(self, cells: ad.AnnData | None = None, **params: object) -> pd.DataFrame:
        """Return the scores of a file, perturbations × metrics."""
        if cells is not None:
            self.write(cells)
        here, folder, told = self.here, self.folder, {"file": str(self.path), **DEFAULTS, **params}
        train(here.pairs, here.embeddings, here.audit, folder / "model.npz", folder / "run.json", IMPLEMENTATION, told, 0)
        predict(here.pairs, folder / "model.npz", folder / "predictions.h5ad", IMPLEMENTATION, told, 0, 1000)
        evaluate(folder / "predictions.h5ad", here.pairs, here.split, folder / "metrics.tsv")
        self.table = pd.read_csv(folder / "metrics.tsv", sep="\t")
        return self.table.pivot_table(index="perturbation", columns="metric", values="value", dropna=False)

    @property
    def account(self) -> dict:
        """run.json."""
        return json.loads((self.folder / "run.json").read_text())


@pytest.fixture
def run(prepared: dict[str, Prepared], tmp_path: Path) -> Run:
    """Return a run of the family in a folder of its own."""
    return Run(prepared[KIND], tmp_path)


@pytest.fixture(scope="module")
def duplicate(prepared: dict[str, Prepared], tmp_path_factory: pytest.TempPathFactory) -> dict[str, pd.DataFrame]:
    """Return the scores of the ceiling (half a) and of no change."""
    here, found = prepared[KIND], {}
    for name in ("technical_duplicate", "no_change"):
        folder, told = tmp_path_factory.mktemp(name), (FAMILIES[name].implementation, {}, 0)
        train(here.pairs, here.embeddings, here.audit, folder / "model.npz", folder / "run.json", *told)
        predict(here.pairs, folder / "model.npz", folder / "predictions.h5ad", *told, 1000)
        evaluate(folder / "predictions.h5ad", here.pairs, here.split, folder / "metrics.tsv")
        table = pd.read_csv(folder / "metrics.tsv", sep="\t")
        found[name] = table.pivot_table(index="perturbation", columns="metric", values="value", dropna=False)
    return found


def target(cells: ad.AnnData, here: Prepared) -> float:
    return float(ad.read_h5ad(here.pairs, backed="r").uns["perturbflow"]["target_sum"])


# --- what fits ------------------------------------------------------------------------------------------------------


def test_cells_of_half_a_score_as_the_ceiling_does(run: Run, perfect: ad.AnnData, duplicate: dict) -> None:
    scores = run(perfect)
    np.testing.assert_allclose(scores["mae"], duplicate["technical_duplicate"]["mae"], rtol=1e-4)
    np.testing.assert_allclose(
        scores["pearson_delta"], duplicate["technical_duplicate"]["pearson_delta"], rtol=1e-3
    )
    predictions = ad.read_h5ad(run.folder / "predictions.h5ad")
    assert "control_index" not in predictions.obs
    assert not predictions.uns["perturbflow"]["starts_from_controls"]
    assert run.account["facts"]["file"]["holds"] == "cells"
