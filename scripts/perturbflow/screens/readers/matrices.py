"""Matrices on disk, dense, CSR or CSC: raw counts in blocks of cells, whatever the layout."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.io.kernels import compress_rows, group_entries, place_counts
from perturbflow.io.streaming import Spool, in_order
from perturbflow.screens.readers.source import BLOCK_VALUES, HIGHEST_COUNT, Block, as_counts, rounded

Columns = tuple[int, np.ndarray, np.ndarray, np.ndarray]
"""Some columns of a matrix: number of the first, and indptr, row numbers and counts of their entries."""

BLOCK_ENTRIES = 2**22
"""Nonzero values of a sparse block."""

TALL_BLOCKS = 8
"""A dense block of whole chunks may be this many times BLOCK_VALUES; beyond, the matrix is read by columns."""

BYTES_UNDER_WAY = 2**29
"""Limit on the dense blocks that threads decode at the same time."""

SAMPLE = 2**14
"""Values that are read at each of three places of a matrix, to see whether it holds counts."""


class Values(Protocol):
    """A stored array of one or two dimensions; several threads read it in ranges of rows.

    See `perturbflow.io.hdf5.Rows`.
    """

    path: Path
    dataset: Any
    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: tuple[int, ...] | None

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop`."""

    def tiles(self, start: int, stop: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield rows `start` to `stop` in pieces: first row (from `start`) and first column of each, and its values."""

    def chunk(self, top: int, left: int) -> np.ndarray:
        """Return the part of a matrix that one chunk holds."""


def _spans(rows: np.ndarray, borders: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield first row, last row + 1 and the wanted rows of every block that has some."""
    places = np.searchsorted(rows, borders)
    for k in np.flatnonzero(np.diff(places)):
        yield int(borders[k]), int(borders[k + 1]), rows[places[k] : places[k + 1]]


def _cuts(indptr: np.ndarray, n_entries: int) -> np.ndarray:
    """Return borders of ranges of rows (columns) with about `n_entries` entries each, one row at least."""
    cuts = np.searchsorted(indptr, np.arange(0, indptr[-1], n_entries), side="right") - 1
    return np.unique(np.append(cuts, [0, len(indptr) - 1]))


def _parts(n: int, length: int) -> list[tuple[int, int]]:
    """Return the first, middle and last ranges of this length among n."""
    return [(start, min(start + length, n)) for start in sorted({0, max(0, (n - length) // 2), max(0, n - length)})]


class Dense:
    """A dense matrix, cells × genes."""

    def __init__(self, values: Values):
        self.values, self.shape = values, (values.shape[0], values.shape[1])
        height = values.chunks[0] if values.chunks else 1
        # Whole chunks, so that none is decoded twice.
        self.step = -(-max(1, BLOCK_VALUES // self.shape[1]) // height) * height
        self.is_tall = min(self.step, self.shape[0]) * self.shape[1] > TALL_BLOCKS * BLOCK_VALUES

    def sample(self) -> np.ndarray:
        """Return some of the values, from its first, middle and last rows."""
        n = max(1, SAMPLE // self.shape[1])
        return np.concatenate([self.values.read(*part).ravel() for part in _parts(self.shape[0], n)])

    def blocks(self, rows: np.ndarray, threads: int, scratch: Path | None) -> Iterator[Block]:
        """Yield numbers and counts of the wanted rows."""
        if self.is_tall:
            n_rows = max(1, BLOCK_VALUES // self.shape[1])
            return regrouped(self._columns(), rows, n_rows, self.shape, scratch)
        borders = np.append(np.arange(0, self.shape[0], self.step), self.shape[0])
        n_bytes = self.step * self.shape[1] * 8
        return in_order(self._block, _spans(rows, borders), max(1, min(threads, BYTES_UNDER_WAY // n_bytes)))

    def _block(self, span: tuple[int, int, np.ndarray]) -> Block:
        start, stop, wanted = span
        band = np.empty((stop - start, self.shape[1]), np.uint16)
        for row, column, tile in self.values.tiles(start, stop):
            here = slice(row, row + len(tile))
            if not place_counts(tile, band[here], column, np.iinfo(band.dtype).max):
                # No counts, or not quite integers, or higher than 16 bits hold.
                counted = rounded(tile.ravel()).reshape(tile.shape)
                band = band.astype(np.int32, copy=False)
                place_counts(counted, band[here], column, HIGHEST_COUNT)
        local = wanted - start
        # Memory that is never written to takes no room.
        n_values = len(local) * self.shape[1]
        indices, data, indptr = (
            np.empty(n_values, np.int32),
            np.empty(n_values, np.float32),
            np.zeros(len(local) + 1, np.int64),
        )
        compress_rows(band, local, indices, data, indptr)
        entries = slice(indptr[-1])
        block = sparse.csr_matrix((data[entries], indices[entries], indptr), shape=(len(local), self.shape[1]))
        block.has_canonical_format = True
        return wanted, block

    def _columns(self) -> Iterator[Columns]:
        """Yield the entries of one chunk after the other, those of the first columns first."""
        assert self.values.chunks is not None  # a block of rows is tall by its chunks alone
        height, width = self.values.chunks
        for left in range(0, self.shape[1], width):
            for top in range(0, self.shape[0], height):
                tile = sparse.csc_matrix(self.values.chunk(top, left))
                yield left, tile.indptr, tile.indices + np.int32(top), rounded(tile.data)


class Csr:
    """A sparse matrix whose rows are cells."""

    def __init__(self, group: Any, shape: tuple[int, int], rows_of: Callable[[Any], Values]):
        self.shape = shape
        self.indptr = group["indptr"][:].astype(np.int64)
        self.indices, self.data = rows_of(group["indices"]), rows_of(group["data"])
        n_entries = self.data.shape[0]
        is_whole = (
            self.indptr[0] == 0
            and self.indptr[-1] == n_entries == self.indices.shape[0]
            and self.indices.dtype.kind in "iu"
        )
        if len(self.indptr) != shape[self._axis] + 1 or not is_whole or (np.diff(self.indptr) < 0).any():
            raise InputError(
                f"{self.data.path} is damaged: '{group.name}/indptr' does not fit the matrix. Retrieve the file again."
            )

    _axis = 0

    def _entries(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return numbers (columns of a CSR matrix, rows of a CSC matrix) and values of a range of entries."""
        numbers, values = self.indices.read(start, stop), self.data.read(start, stop)
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= self.shape[1 - self._axis]):
            raise InputError(
                f"{self.data.path} is damaged: '{self.indices.dataset.name}' names rows or columns that do not exist. "
                "Retrieve the file again."
            )
        return numbers.astype(np.int32, copy=False), values

    def sample(self) -> np.ndarray:
        """Return some of the stored values, from its first, middle and last."""
        return np.concatenate([self.data.read(*part) for part in _parts(self.data.shape[0], SAMPLE)])

    def blocks(self, rows: np.ndarray, threads: int, scratch: Path | None) -> Iterator[Block]:
        """Yield numbers and counts of the wanted rows."""
        return in_order(self._block, _spans(rows, _cuts(self.indptr, BLOCK_ENTRIES)), threads)

    def _block(self, span: tuple[int, int, np.ndarray]) -> Block:
        start, stop, wanted = span
        indptr = self.indptr[start : stop + 1]
        indices, data = self._entries(indptr[0], indptr[-1])
        block = as_counts(sparse.csr_matrix((data, indices, indptr - indptr[0]), shape=(stop - start, self.shape[1])))
        return wanted, block if len(wanted) == stop - start else block[wanted - start]


class Csc(Csr):
    """A sparse matrix whose columns are genes; its entries are sorted into rows on disk."""

    _axis = 1

    def blocks(self, rows: np.ndarray, threads: int, scratch: Path | None) -> Iterator[Block]:
        """See `Csr.blocks`."""
        n_rows = max(1, int(self.shape[0] * BLOCK_ENTRIES / max(1, self.indptr[-1])))
        cuts = _cuts(self.indptr, BLOCK_ENTRIES)
        columns = in_order(self._columns, pairwise(cuts), 1)
        return regrouped(columns, rows, n_rows, self.shape, scratch)

    def _columns(self, span: tuple[int, int]) -> Columns:
        indptr = self.indptr[span[0] : span[1] + 1]
        numbers, values = self._entries(indptr[0], indptr[-1])
        return int(span[0]), indptr - indptr[0], numbers, rounded(values)


def regrouped(
    columns: Iterator[Columns], rows: np.ndarray, n_rows: int, shape: tuple[int, int], scratch: Path | None
) -> Iterator[Block]:
    """Yield blocks of `n_rows` wanted rows of a matrix that comes by columns.

    It groups the entries of some columns by block and lays them aside on disk. Then it gathers each block from all of
    them. In memory are a few million entries at a time, whatever the matrix; on disk 3-8 bytes per entry, read and
    written once.
    """
    position = np.full(shape[0], -1, np.int64)
    position[rows] = np.arange(len(rows))
    n_groups = -(-len(rows) // n_rows)
    spool = Spool(scratch)
    laid_aside = []
    for first, indptr, numbers, values in columns:
        starts, *entries = group_entries(numbers, indptr, first, values, position, n_rows, n_groups)
        laid_aside.append((starts, [spool.append(part) for part in entries]))
    for group in range(n_groups):
        wanted = rows[group * n_rows : (group + 1) * n_rows]
        parts = [
            [spool.read(piece, starts[group], starts[group + 1]) for piece in pieces] for starts, pieces in laid_aside
        ]
        row, column, value = (np.concatenate(part) for part in zip(*parts, strict=True))
        entries = (value.astype(np.float32), (row.astype(np.int32), column.astype(np.int32)))
        block = sparse.coo_matrix(entries, shape=(len(wanted), shape[1])).tocsr()
        block.eliminate_zeros()
        yield wanted, block
