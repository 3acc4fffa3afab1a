"""An AnnData file read and written part by part: the tables here, the matrices by whoever has them."""

from collections.abc import Sequence
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd

PLACES = ("obsm", "varm", "obsp", "varp", "layers")
"""Groups that every AnnData file has, be they empty."""


def begin_anndata(file: h5py.File) -> None:
    """Mark a file as AnnData and make its empty groups; X, layers and obsm may be written then."""
    file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    for place in PLACES:
        ad.io.write_elem(file, place, {})


def write_tables(file: h5py.File, obs: pd.DataFrame, var: pd.DataFrame, uns: dict[str, Any]) -> None:
    """Write the tables of cells and genes, and `uns`, compressed."""
    for place, content in (("obs", obs), ("var", var), ("uns", uns)):
        ad.io.write_elem(file, place, content, dataset_kwargs={"compression": "gzip"})


def read_columns(group: h5py.Group, columns: Sequence[str]) -> pd.DataFrame:
    """Read some columns of a table of cells or genes, and its index."""
    name = group.attrs["_index"]
    index = pd.Index(ad.io.read_elem(group[name]), name=None if name == "_index" else name)
    return pd.DataFrame({name: ad.io.read_elem(group[name]) for name in columns}, index=index)


def measured_by_all(varm: Any, n_genes: int) -> np.ndarray:
    """Return the numbers of the genes that every screen of a union measured; all genes of any other screen.

    Parameters
    ----------
    varm
        Of harmonized.h5ad: `measured`, (genes, screens), is there where some screen lacks a gene.
    """
    return np.flatnonzero(np.all(varm["measured"], axis=1)) if "measured" in varm else np.arange(n_genes)
