"""Predict cells for held-out perturbations, each from a control of its own role, batch and cell type."""

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.controls import Context
from perturbflow.io.anndata_file import begin_anndata, write_tables
from perturbflow.io.artefacts import load_artefact
from perturbflow.io.files import atomic
from perturbflow.io.hdf5 import AppendedRows
from perturbflow.models.base import Ceiling, build
from perturbflow.pairs import Pairs

logger = logging.getLogger(__name__)

CELLS_PER_BLOCK = 2048


def block_seed(seed: int, label: str, block: int) -> int:
    """Return the seed of a block of cells of one perturbation; that of the first is the model's, as if there were no other."""
    return int(np.random.SeedSequence([seed, crc32(label.encode()), block]).generate_state(1)[0]) if block else seed


def nonnegative(cells: np.ndarray) -> np.ndarray:
    """Return cells without negative expression and, gene by gene, with the same mean over cells where that is positive.

    A shifted zero falls below zero; clipping it alone would raise the mean. Here the positive values give way in proportion.

    Parameters
    ----------
    cells
        Predicted cells of one perturbation, (cells, genes).
    """
    clipped = np.maximum(cells, 0.0)
    mean, clipped_mean = cells.mean(axis=0), clipped.mean(axis=0)
    return clipped * np.divide(np.maximum(mean, 0.0), clipped_mean, out=np.zeros_like(mean), where=clipped_mean > 0)


def predict(
    pairs: Path,
    model: Path,
    predictions: Path,
    implementation: str,
    params: dict,
    seed: int,
    max_cells: int,
    role: str = "test",
) -> None:
    """Predict as many cells per held-out perturbation as were measured, up to max_cells.

    Parameters
    ----------
    pairs
        The pairs of one split; starting cells are the controls matched to the measured cells.
    model
        A trained model.
    predictions
        AnnData to be written: X log1p-normalized like pairs.h5ad; obs perturbation, cell_type, batch, control_index (row of
        pairs.h5ad of the control that the cell started from); uns["perturbflow"] starts_from_controls, role and noise_removed. The mean of a perturbation's
        cells is that of all controls of their batches and cell types plus the predicted effect.
    role
        test, or validation for choosing hyper-parameters.
    """
    cells = Pairs.open(pairs).roles(role)
    family = build(implementation, params)
    family.restore(load_artefact(model))
    rng = np.random.default_rng(seed)
    chosen = {}
    for label in cells.perturbations:
        measured = cells.cells_of(label)
        if len(measured) > max_cells:
            measured = np.sort(rng.choice(measured, max_cells, replace=False))
        if isinstance(family, Ceiling):  # its cells are measured ones: it says which
            measured = np.searchsorted(cells.rows, family.rows(label, len(measured), seed))
        chosen[label] = measured
    # Controls are few and start again and again: they are kept, and no other cell is read.
    is_control = np.flatnonzero(cells.is_control)
    controls = replace(cells.select(cells.is_control), X=cells.X[is_control])
    strata, measured = controls.strata, np.concatenate(list(chosen.values()))
    start = cells.control_index[measured, 0]

    with atomic(predictions) as partial, h5py.File(partial, "w") as file, ThreadPoolExecutor(1) as pool:
        written = AppendedRows(file.create_group("X"), len(cells.genes), len(start), pool)
        for label, rows in chosen.items():
            place = np.searchsorted(is_control, cells.control_index[rows, 0])
            # The mean of a few controls is off that of all by chance; predicted cells are to have the mean of the population.
            levels = controls.context_of(place).levels
            size = (
                len(rows) if isinstance(family, Ceiling) else CELLS_PER_BLOCK
            )  # a ceiling draws without replacement, from few
            for block, first in enumerate(range(0, len(rows), size)):
                starts = place[first : first + size]
                context = Context(strata[starts], levels)
                predicted = family.predict(
                    controls.X[starts].toarray(), [label], len(starts), block_seed(seed, label, block), context
                )[0]
                written.append(sparse.csr_matrix(nonnegative(predicted).astype(np.float32)))
            logger.info("%s: %d cells", label, len(rows))
        written.finish()
        obs = cells.obs.iloc[measured if isinstance(family, Ceiling) else start][["cell_type", "batch"]].astype(str)
        obs = obs.assign(
            perturbation=np.repeat(list(chosen), list(map(len, chosen.values()))),
            control_index=cells.rows[start].astype(np.int32),
        )
        obs = obs[["perturbation", "cell_type", "batch", "control_index"]]
        obs.index = [f"predicted_{i}" for i in range(len(obs))]
        for column in ("perturbation", "cell_type", "batch"):
            obs[column] = pd.Categorical(obs[column])
        noise_removed = isinstance(family, Ceiling) and family.noise_removed
        uns = {
            "perturbflow": {
                "starts_from_controls": not isinstance(family, Ceiling),
                "role": role,
                "noise_removed": noise_removed,
            }
        }
        begin_anndata(file)
        write_tables(file, obs, pd.DataFrame(index=cells.genes), uns)
