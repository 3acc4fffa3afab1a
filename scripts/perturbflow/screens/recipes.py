"""Readers for sources that a block cannot declare: one function each, named by the block's `recipe`."""

import tarfile
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.screens.readers import InMemory, Source
from perturbflow.screens.readers.triplets import open_triplets


def renge2023(files: dict[str, Path], dataset: dict) -> Source:
    """Read Ishikawa et al. 2023 from the source distribution of `renge`.

    `E_*.csv` holds log1p of UMI counts (cells × genes); `X_*.csv` an indicator of the knocked-out gene per cell
    and the day after perturbation in its last column; cells without an indicator are the study's controls.
    """
    archive, member = files["file"], dataset["source"]["member"]
    tables = {}
    with tarfile.open(archive) as tar:
        for entry in tar:
            for prefix in ("E_", "X_"):
                if f"/{member}/{prefix}" in entry.name and entry.name.endswith(".csv"):
                    tables[prefix] = pd.read_csv(tar.extractfile(entry), index_col=0)
    if set(tables) != {"E_", "X_"}:
        raise InputError(
            f"{archive}: no E_*.csv and X_*.csv under {member}/: this is not the archive the recipe was written for."
        )
    expression, design = tables["E_"], tables["X_"]
    knocked_out = design.drop(columns="t")
    counts = np.expm1(expression.to_numpy())
    if np.abs(counts - np.rint(counts)).max() > 1e-3:
        raise InputError(
            f"{archive}: expm1 of the expression table gives no integers: its values are not log1p of counts."
        )
    obs = pd.DataFrame(
        {
            "perturbation": knocked_out.idxmax(axis=1).where(knocked_out.sum(axis=1) > 0, "control"),
            "day": "day_" + design["t"].astype(int).astype(str),
            "cell_line": "iPSC",
        },
        index=expression.index,
    )
    X = sparse.csr_matrix(np.rint(counts).astype(np.float32))
    return InMemory(ad.AnnData(X=X, obs=obs, var=pd.DataFrame(index=expression.columns)), [archive])


def tenx(files: dict[str, Path], dataset: dict) -> Source:
    """Read 10x triplets with a table of cell identities: one by its roles, or all of a tar."""
    return open_triplets(files)


def open_by_recipe(recipe: str, files: dict[str, Path], dataset: dict) -> Source:
    """Open a source by the recipe of this name.

    It refers to no other recipe, so that a new one makes no screen stale.
    """
    return globals()[recipe](files, dataset)
