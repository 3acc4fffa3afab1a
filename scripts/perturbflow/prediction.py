"""Predict cells for held-out perturbations, each from a control of its own role, batch and cell type."""

import logging
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.artefacts import load_artefact
from perturbflow.files import atomic
from perturbflow.models.base import build
from perturbflow.pairs import Pairs

logger = logging.getLogger(__name__)


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
    pairs: Path, model: Path, predictions: Path, implementation: str, params: dict, seed: int, max_cells: int, role: str = "test"
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
        pairs.h5ad of the control that the cell started from); uns["perturbflow"] starts_from_controls and role.
    role
        test, or validation for choosing hyper-parameters.
    """
    cells = Pairs.read(pairs).roles(role)
    family = build(implementation, params)
    family.restore(load_artefact(model))
    rng = np.random.default_rng(seed)
    blocks, rows = [], []
    for label in cells.perturbations:
        measured = cells.cells_of(label)
        if len(measured) > max_cells:
            measured = np.sort(rng.choice(measured, max_cells, replace=False))
        if family.is_ceiling:  # its cells are measured ones: it says which
            measured = np.searchsorted(cells.rows, family.rows(label, len(measured), seed))
        start = cells.control_index[measured, 0]
        strata = {"strata": cells.strata[start]} if family.reads_strata else {}
        predicted = family.predict(cells.X[start].toarray(), [label], len(start), seed, **strata)[0]
        blocks.append(sparse.csr_matrix(nonnegative(predicted).astype(np.float32)))
        obs = cells.obs.iloc[measured if family.is_ceiling else start][["cell_type", "batch"]].astype(str)
        rows.append(obs.assign(perturbation=label, control_index=cells.rows[start].astype(np.int32)))
        logger.info("%s: %d cells", label, len(predicted))
    obs = pd.concat(rows, ignore_index=True)[["perturbation", "cell_type", "batch", "control_index"]]
    obs.index = [f"predicted_{i}" for i in range(len(obs))]
    for column in ("perturbation", "cell_type", "batch"):
        obs[column] = pd.Categorical(obs[column])
    out = ad.AnnData(X=sparse.vstack(blocks, format="csr"), obs=obs, var=pd.DataFrame(index=cells.genes))
    out.uns["perturbflow"] = {"starts_from_controls": not family.is_ceiling, "role": role}
    with atomic(predictions) as partial:
        out.write_h5ad(partial, compression="gzip")
