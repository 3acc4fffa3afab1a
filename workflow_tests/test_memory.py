"""Memory does not grow with the cells: each step at two sizes, by the bytes that a further cell takes at the peak."""

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SPECS, Prepared, make_screen, prepare

from perturbflow import embeddings, pairs
from perturbflow.counterfactuals import answers, warranty
from perturbflow.evaluation import measured
from perturbflow.evaluation.table import evaluate
from perturbflow.io import hdf5, streaming
from perturbflow.predict import predict
from perturbflow.registry.families import FAMILIES
from perturbflow.splits import split as splits
from perturbflow.train import train

N_GENES = 1000
SIZES = (20, 80)  # cells per perturbation and batch, and as many controls
BYTES_PER_CELL = 4 * N_GENES
"""Name, labels and controls of a cell are some hundred bytes; its counts are 8,000, as nearly all genes have one."""

SPEC = SPECS["unseen_perturbation"]


@pytest.fixture(scope="module")
def screens(tmp_path_factory: pytest.TempPathFactory) -> list[Prepared]:
    """Return the same screen with few and with four times as many cells, with predictions of `additive`."""
    folder = tmp_path_factory.mktemp("sizes")
    made = [make_screen(n_genes=N_GENES, n_controls=n, n_cells=n) for n in SIZES]
    prepared = [prepare(folder / str(n), screen, SPEC, N_GENES - 1) for n, screen in zip(SIZES, made, strict=True)]
    for here in prepared:
        trained("additive")(here)
        predicted(here)
        warranted(here)
    return prepared


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let blocks be small beside the screens."""
    monkeypatch.setattr(streaming, "ROWS_AT_ONCE", 64)
    monkeypatch.setattr(pairs, "VALUES_IN_MEMORY", 0)
    monkeypatch.setattr(measured, "CELLS_OF_PCA", 50)
    monkeypatch.setattr(measured, "ROWS_AT_ONCE", 64)
    monkeypatch.setattr(warranty, "MOST_CONTROLS", 20)
    monkeypatch.setattr(answers, "MAX_CELLS", 20)
    monkeypatch.setattr(hdf5, "CHUNK", 2**12)
    monkeypatch.setattr(hdf5, "CHUNKS_AHEAD", 2)


def peak(step: Callable[[Prepared], None], here: Prepared) -> int:
    """Return the most bytes that Python and numpy held at once in a step, of what it took itself."""
    tracemalloc.start()
    try:
        step(here)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def n_cells(here: Prepared) -> int:
    """Return the cells of a prepared split."""
    return pairs.Pairs.open(here.pairs).X.shape[0]


def run_of(here: Prepared, family: str) -> tuple[Path, Path]:
    """Return where a trained model and its account lie."""
    folder = here.folder / family
    folder.mkdir(exist_ok=True)
    return folder / FAMILIES[family].artefact, folder / "run.json"


def trained(family: str) -> Callable[[Prepared], None]:
    """Return the training of a family with its own params."""

    def step(here: Prepared) -> None:
        files = here.pairs, here.embeddings, here.audit, *run_of(here, family)
        train(*files, FAMILIES[family].implementation, {}, 0)

    return step


def predicted(here: Prepared) -> None:
    """Predict with `additive`, of every perturbation as many cells at either size."""
    model, _ = run_of(here, "additive")
    family = FAMILIES["additive"]
    predict(here.pairs, model, model.parent / "predictions.h5ad", family.implementation, {}, 0, 20)


def scored(here: Prepared) -> None:
    """Score these predictions."""
    folder = run_of(here, "additive")[0].parent
    evaluate(folder / "predictions.h5ad", here.pairs, here.split, folder / "metrics.tsv")


def warranted(here: Prepared) -> None:
    """Check `additive` before it answers."""
    model, _ = run_of(here, "additive")
    files = model.parent / "warranty.json", model.parent / "calibration.npz"
    warranty.warranty(here.pairs, here.embeddings, model, *files, FAMILIES["additive"].implementation, {}, 0)


def asked(here: Prepared) -> None:
    """Ask `additive` about a perturbation that it learned from."""
    model, _ = run_of(here, "additive")
    known = pairs.Pairs.open(here.pairs).roles("train").perturbations[0]
    query = {"perturbations": [known], "cells": "control", "samples_per_cell": 5}
    query |= {"keep_samples": False, "groups": "cell_type", "search": None}
    names = "warranty.json", "calibration.npz", "a.h5ad", "a.tsv", "a.ranking.tsv", "a.effects.h5ad"
    files = here.pairs, here.embeddings, model, *(model.parent / name for name in names)
    answers.counterfactual(*files, FAMILIES["additive"].implementation, {}, query, 0)


STEPS: dict[str, Callable[[Prepared], None]] = {
    "split": lambda here: splits.split(here.harmonized, here.harmonization, here.folder / "again.json", "mine", SPEC),
    "pair": lambda here: pairs.pair(here.harmonized, here.split, here.folder / "again.h5ad", N_GENES - 1),
    "embeddings": lambda here: embeddings.embeddings(here.pairs, here.folder / "again.parquet", ["coexpression"]),
    "audit": Prepared.run_audit,
    "train no_change": trained("no_change"),
    "train additive": trained("additive"),
    "train gaussian_process": trained("gaussian_process"),
    "train technical_duplicate": trained("technical_duplicate"),
    "train interpolated_duplicate": trained("interpolated_duplicate"),
    "train batch_only": trained("batch_only"),
    "predict": predicted,
    "evaluate": scored,
    "warranty": warranted,
    "counterfactual": asked,
}


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_further_cell_takes_no_more_than_its_labels(step: str, screens: list[Prepared]) -> None:
    for here in screens:  # the first call imports and compiles
        STEPS[step](here)
    few, many = (peak(STEPS[step], here) for here in screens)
    growth = (many - few) / (n_cells(screens[1]) - n_cells(screens[0]))
    assert growth < BYTES_PER_CELL, f"{step}: a further cell takes {growth:,.0f} bytes at the peak of {many:,}"
