"""Predict cells for held-out perturbations, each from a control of its own role, batch and cell type."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from zlib import crc32

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.io.anndata_file import begin_anndata, write_tables
from perturbflow.io.artefacts import load_artefact
from perturbflow.io.files import atomic, require_room
from perturbflow.io.hdf5 import AppendedRows
from perturbflow.io.streaming import RowsByLabel
from perturbflow.models.base import Ceiling, Given, Model, build
from perturbflow.pairs import Pairs
from perturbflow.progress import progressed

CELLS_PER_BLOCK = 2048
BYTES_PER_VALUE = 2.0  # of predictions.h5ad, at the least: value and place, compressed


def block_seed(seed: int, label: str, block: int) -> int:
    """Return the seed of a block of cells of one perturbation. The first block has the seed of the run."""
    return int(np.random.SeedSequence([seed, crc32(label.encode()), block]).generate_state(1)[0]) if block else seed


def nonnegative(cells: np.ndarray) -> np.ndarray:
    """Return cells without negative expression, with the same mean of every gene where that is positive.

    An effect can take a zero below zero, and clipping alone would raise the mean. So the positive values are scaled
    down.

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
        The pairs of one split. Cells start from the controls that are matched to the measured cells.
    model
        A trained model.
    predictions
        AnnData to be written. X is log1p-normalized like pairs.h5ad. obs has perturbation, cell_type, batch and
        control_index, the row of pairs.h5ad of the control that the cell started from. uns["perturbflow"] has
        starts_from_controls, role and noise_removed; and missing, the perturbations that given predictions lack, which
        are predicted as no change. The mean of a perturbation's cells is that of all controls of their batches and cell
        types plus the predicted effect. Given cells stay as they are, up to max_cells, without control_index.
    role
        test, or validation for choosing hyper-parameters.
    """
    cells = Pairs.open(pairs).roles(role)
    family = build(implementation, params)
    family.restore(load_artefact(model))
    facts = family.meet(cells) if isinstance(family, Given) else {}
    chosen = _chosen(cells, family, seed, max_cells)
    is_ceiling = isinstance(family, Ceiling)
    has_cells = isinstance(family, Given) and family.has_cells
    n_most = max_cells * len(chosen) if has_cells else sum(map(len, chosen.values()))
    # Controls hold about as many values as the cells that start from them.
    n_values = sum(map(len, chosen.values())) * cells.X.n_stored[cells.is_control].mean()
    require_room(predictions.parent, BYTES_PER_VALUE * n_values, predictions.name)
    tables = []
    with atomic(predictions) as partial, h5py.File(partial, "w") as file, ThreadPoolExecutor(1) as pool:
        written = AppendedRows(file.create_group("X"), len(cells.genes), n_most, pool)
        if isinstance(family, Given) and has_cells:
            for label in list(chosen):
                if (given := family.cells_of(label, max_cells, seed)) is not None:
                    written.append(sparse.csr_matrix(given[0].astype(np.float32)))
                    tables.append(given[1].assign(perturbation=label))
                    del chosen[label]
        for predicted in _predicted(cells, family, chosen, seed):
            written.append(sparse.csr_matrix(nonnegative(predicted).astype(np.float32)))
        written.finish()
        if chosen:
            tables.append(_table(cells, chosen, starts_from_controls=not is_ceiling))
        obs = _joined(tables, without=["control_index"] if has_cells else [])
        noise_removed = isinstance(family, Ceiling) and family.noise_removed
        starts_from_controls = not is_ceiling and not has_cells
        about = {"starts_from_controls": starts_from_controls, "role": role, "noise_removed": noise_removed}
        uns = {"perturbflow": {**about, **facts}}
        begin_anndata(file)
        write_tables(file, obs, pd.DataFrame(index=cells.genes), uns)


def predicted_cells(cells: Pairs, family: Model, seed: int, max_cells: int, role: str) -> ad.AnnData:
    """Return in memory what `predict` writes for a model that makes its own cells, of the cells of one role."""
    chosen = _chosen(cells, family, seed, max_cells)
    X = sparse.vstack(
        [sparse.csr_matrix(nonnegative(block).astype(np.float32)) for block in _predicted(cells, family, chosen, seed)],
        format="csr",
    )
    obs = _joined([_table(cells, chosen, starts_from_controls=True)], without=[])
    about = {"starts_from_controls": True, "role": role, "noise_removed": False}
    return ad.AnnData(X, obs, pd.DataFrame(index=cells.genes), uns={"perturbflow": about})


def _chosen(cells: Pairs, family: Model, seed: int, max_cells: int) -> dict[str, np.ndarray]:
    """Return, by label, rows of the measured cells that predictions stand for; a ceiling has rows of its own."""
    rng = np.random.default_rng(seed)
    chosen = {}
    for label in cells.perturbations:
        measured = cells.cells_of(label)
        if len(measured) > max_cells:
            measured = np.sort(rng.choice(measured, max_cells, replace=False))
        if isinstance(family, Ceiling):
            measured = np.searchsorted(cells.rows, family.rows(label, len(measured), seed))
        chosen[label] = measured
    return chosen


def _predicted(cells: Pairs, family: Model, chosen: dict[str, np.ndarray], seed: int) -> Iterator[np.ndarray]:
    """Yield predicted cells block by block, (cells, genes), in the order of the chosen ones."""
    # The same few controls start many cells: they stay in memory, and no other cell is read.
    is_control = np.flatnonzero(cells.is_control)
    controls = replace(cells.select(cells.is_control), X=cells.X[is_control])
    strata = controls.strata
    # A ceiling starts from cells of its own, all in one block: it has each once.
    is_ceiling = isinstance(family, Ceiling)
    measured = RowsByLabel.gathered(cells.X, chosen) if is_ceiling else None
    for label, rows in progressed(chosen.items(), "perturbations"):
        place = np.searchsorted(is_control, cells.control_index[rows, 0])
        # By chance the mean of these controls differs from that of all controls, which predicted cells shall have.
        asked = controls.context_of(place)
        size = len(rows) if is_ceiling else CELLS_PER_BLOCK
        for block, first in enumerate(range(0, len(rows), size)):
            starts = place[first : first + size]
            context = replace(asked, strata=strata[starts])
            start = (measured.of(label) if measured else controls.X[starts]).toarray()
            of_block = block_seed(seed, label, block)
            yield family.predict(start, [label], len(starts), of_block, context)[0]


def _table(cells: Pairs, chosen: dict[str, np.ndarray], *, starts_from_controls: bool) -> pd.DataFrame:
    """Return obs of the predicted cells; batch and cell type are those of the start cells, or of measured ones."""
    measured = np.concatenate(list(chosen.values()))
    start = cells.control_index[measured, 0]
    obs = cells.obs.iloc[start if starts_from_controls else measured][["cell_type", "batch"]].astype(str)
    labels = np.repeat(list(chosen), list(map(len, chosen.values())))
    return obs.assign(perturbation=labels, control_index=cells.rows[start].astype(np.int32))


def _joined(tables: list[pd.DataFrame], without: list[str]) -> pd.DataFrame:
    """Return obs of all predicted cells, without some columns."""
    obs = pd.concat(tables)
    columns = ["perturbation", "cell_type", "batch", "control_index"]
    obs = obs[[column for column in columns if column not in without]].copy()
    obs.index = [f"predicted_{i}" for i in range(len(obs))]
    for column in ("perturbation", "cell_type", "batch"):
        obs[column] = pd.Categorical(obs[column])
    return obs
