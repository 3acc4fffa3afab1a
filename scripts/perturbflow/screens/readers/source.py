"""A screen as it came: cells and genes at once, raw counts in blocks of cells.

So a file of any size fits in memory.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.io.kernels import TOLERANCE, round_counts
from perturbflow.io.streaming import Piece, Spool

Block = tuple[np.ndarray, sparse.csr_matrix]
"""Row numbers and their counts, cells × genes."""

BLOCK_VALUES = 2**23
"""Values (cells × genes) of a dense block; more where the file's chunks hold more cells."""

HIGHEST_COUNT = 2**24 - 1
"""float32 holds integers up to here, and so do three bytes."""


class NotCounts(Exception):
    """A matrix holds values that are no raw counts; the message names them."""


class Source(ABC):
    """A screen as it came.

    Attributes
    ----------
    obs, var
        All cells and all genes, in the order of the source; an index need not be unique.
    files
        The files that it was read from; messages name the first one.
    place
        The place of its counts in the file.
    alternative
        The same screen with the counts of another place, in the event that these turn out to be no counts.
    threads
        Threads that decode.
    scratch
        Folder for data that fit in memory only in parts; None is the system's temporary folder.
    """

    obs: pd.DataFrame
    var: pd.DataFrame
    files: list[Path]
    place: str = "X"
    alternative: "Source | None" = None
    threads: int = 1
    scratch: Path | None = None

    @abstractmethod
    def blocks(self, rows: np.ndarray | None = None) -> Iterator[Block]:
        """Yield row numbers and their raw counts (cells × genes, float32) in the order of the source.

        Blocks are of bounded size.

        Parameters
        ----------
        rows
            Ascending numbers of the wanted rows; None for all.

        Raises
        ------
        NotCounts
            At the first block with a value that is no raw count.
        """

    def places_with_counts(self) -> dict[str, float]:
        """Return the other places of the file that hold raw counts → the highest count in a sample of them.

        Places are in the words of the key `counts`.
        """
        return {}


def _reason(values: np.ndarray) -> str:
    """Return why these values are no counts."""
    if not np.isfinite(values).all():
        return "it holds NaN or infinite values"
    if values.min() < 0:
        return f"it holds negative values (the lowest is {values.min():g})"
    if values.max() > HIGHEST_COUNT:
        return f"it holds values that are too high for counts (the highest is {values.max():g})"
    fractional = np.abs(values - np.rint(values)) > TOLERANCE
    return f"it holds values that are no integers (for example {values[fractional][0]:g})"


def rounded(values: np.ndarray) -> np.ndarray:
    """Return values as float32 integers; NotCounts unless they are raw counts."""
    rounded = np.empty(len(values), np.float32)
    if not round_counts(values, rounded, HIGHEST_COUNT):
        raise NotCounts(_reason(values))
    return rounded


def as_counts(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return a block as float32, genes ascending and without stored zeros.

    It raises NotCounts unless the block holds non-negative integers.
    """
    counts = sparse.csr_matrix((rounded(matrix.data), matrix.indices, matrix.indptr), shape=matrix.shape)
    counts.sum_duplicates()
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

    def blocks(self, rows: np.ndarray | None = None) -> Iterator[Block]:
        """See `Source.blocks`."""
        matrix = self.adata.X if self.layer is None else self.adata.layers[self.layer]
        if sparse.issparse(matrix):
            matrix = matrix.tocsr()
        rows = np.arange(self.adata.n_obs) if rows is None else rows
        step = max(1, BLOCK_VALUES // max(1, self.adata.n_vars))
        for start in range(0, len(rows), step):
            wanted = rows[start : start + step]
            yield wanted, as_counts(sparse.csr_matrix(matrix[wanted]))


class SomeGenes(Source):
    """Some genes of another source; features of its other types are laid aside while they are read.

    Parameters
    ----------
    source
        Of all features.
    genes
        Numbers of the features that are kept as genes.
    apart
        Name → numbers of the features that are laid aside under it.
    """

    def __init__(self, source: Source, genes: np.ndarray, apart: Mapping[str, np.ndarray] | None = None):
        self._source, self._genes, self._apart = source, genes, dict(apart or {})
        self.obs, self.var, self.files, self.place = source.obs, source.var.iloc[genes], source.files, source.place
        self.alternative = SomeGenes(source.alternative, genes, apart) if source.alternative else None

    def places_with_counts(self) -> dict[str, float]:
        """See `Source.places_with_counts`."""
        return self._source.places_with_counts()

    def blocks(self, rows: np.ndarray | None = None) -> Iterator[Block]:
        """See `Source.blocks`."""
        self._source.threads, self._source.scratch = self.threads, self.scratch
        self._spool = Spool(self.scratch) if self._apart else None
        self._pieces: dict[str, list[tuple[Piece, ...]]] = {name: [] for name in self._apart}
        for numbers, counts in self._source.blocks(rows):
            for name, columns in self._apart.items():
                features = counts[:, columns]
                assert self._spool is not None  # there are features to be laid aside
                parts = (features.data, features.indices, features.indptr)
                self._pieces[name].append(tuple(self._spool.append(part) for part in parts))
            yield numbers, counts[:, self._genes]

    def laid_aside(self, name: str) -> Iterator[sparse.csr_matrix]:
        """Yield the counts of the features of this name, cells × features.

        Its blocks are those of `blocks`.
        """
        for pieces in self._pieces[name]:
            assert self._spool is not None
            data, indices, indptr = (self._spool.read(piece) for piece in pieces)
            shape = (len(indptr) - 1, len(self._apart[name]))
            yield sparse.csr_matrix(
                (data.astype(np.float32), indices.astype(np.int32), indptr.astype(np.int64)), shape=shape
            )
