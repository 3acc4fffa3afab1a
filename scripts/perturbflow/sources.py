"""Open a screen's file: obs and var at once, counts in blocks of cells, so that a file of any size fits in memory."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.errors import InputError

BLOCK_VALUES = 2**23
"""Values (cells × genes) of a block: 32 MiB as dense float32."""


class NotCounts(Exception):
    """A matrix holds values that are no raw counts; the message says which."""


class Source(ABC):
    """A screen as it came.

    Attributes
    ----------
    obs, var
        All cells and all genes, in the order of the source; an index need not be unique.
    files
        What it was read from; the first one names it in messages.
    place
        Where in the file its counts are.
    alternative
        The same screen with the counts of another place, for when these turn out to be no counts.
    threads
        Threads that decode.
    scratch
        Folder for what fits in memory only in parts; None is the system's temporary folder.
    """

    obs: pd.DataFrame
    var: pd.DataFrame
    files: list[Path]
    place: str = "X"
    alternative: "Source | None" = None
    threads: int = 1
    scratch: Path | None = None

    @abstractmethod
    def blocks(self, rows: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
        """Yield row numbers and their raw counts (cells × genes, float32) in the order of the source, in blocks of bounded size.

        Parameters
        ----------
        rows
            Ascending numbers of the rows that are wanted; None for all.

        Raises
        ------
        NotCounts
            At the first block with a value that is no raw count.
        """


def as_counts(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return a block as float32 without stored zeros; NotCounts unless it holds non-negative integers."""
    values = matrix.data
    if not np.isfinite(values).all():
        raise NotCounts("it holds NaN or infinite values")
    if values.size and values.min() < 0:
        raise NotCounts(f"it holds negative values (the lowest is {values.min():g})")
    rounded = np.rint(values)
    fractional = np.abs(values - rounded) > 1e-4
    if fractional.any():
        raise NotCounts(f"it holds values that are no integers (for example {values[fractional][0]:g})")
    counts = sparse.csr_matrix((rounded.astype(np.float32), matrix.indices, matrix.indptr), shape=matrix.shape)
    counts.eliminate_zeros()
    return counts


class InMemory(Source):
    """A screen that is small enough to be held in memory."""

    def __init__(self, adata: ad.AnnData, files: list[Path], layer: str | None = None):
        self.adata, self.files, self.layer = adata, files, layer
        self.obs, self.var = adata.obs, adata.var
        if layer is not None:
            self.place = f"layers['{layer}']"
        elif "counts" in adata.layers:
            self.alternative = InMemory(adata, files, "counts")

    def blocks(self, rows: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
        """See `Source.blocks`."""
        matrix = self.adata.X if self.layer is None else self.adata.layers[self.layer]
        if matrix is None:
            raise NotCounts("it is empty")
        if sparse.issparse(matrix):
            matrix = matrix.tocsr()
        rows = np.arange(self.adata.n_obs) if rows is None else rows
        step = max(1, BLOCK_VALUES // max(1, self.adata.n_vars))
        for start in range(0, len(rows), step):
            wanted = rows[start : start + step]
            yield wanted, as_counts(sparse.csr_matrix(matrix[wanted]))


class SomeGenes(Source):
    """Some genes of another source."""

    def __init__(self, source: Source, genes: np.ndarray):
        self._source, self._genes = source, genes
        self.obs, self.var, self.files, self.place = source.obs, source.var.iloc[genes], source.files, source.place
        self.alternative = SomeGenes(source.alternative, genes) if source.alternative else None

    def blocks(self, rows: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
        """See `Source.blocks`."""
        for numbers, counts in self._source.blocks(rows):
            yield numbers, counts[:, self._genes]


def open_source(files: dict[str, Path], dataset: dict) -> Source:
    """Open the one h5ad of a source.

    Parameters
    ----------
    files
        Role → path; an h5ad has the role `file`.
    dataset
        The dataset's block.

    Raises
    ------
    InputError
        If it is no h5ad that anndata can read.
    """
    if list(files) != ["file"]:
        raise InputError(f"a source of several files ({', '.join(files)}) needs a recipe that reads them: name it in the dataset's block.")
    path = files["file"]
    if not h5py.is_hdf5(path):
        start = path.open("rb").read(64)
        shown = "an HTML page" if start.lstrip().lower().startswith((b"<!doctype", b"<html")) else f"it starts with {start[:8]!r}"
        raise InputError(f"{path} is not an h5ad file ({shown}). Save the screen with anndata's write_h5ad.")
    try:
        return InMemory(ad.read_h5ad(path), [path])
    except Exception as error:
        raise InputError(f"{path} is an HDF5 file that anndata cannot read ({type(error).__name__}: {error}). Is it complete?") from error
