"""Open a screen's file: obs and var at once, counts in blocks of cells, so that a file of any size fits in memory."""

import lzma
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.files import full_disk, is_of_full_disk
from perturbflow.hdf5 import Rows
from perturbflow.kernels import TOLERANCE, compress_rows, group_entries, place_counts, round_counts
from perturbflow.streaming import Spool, in_order

Block = tuple[np.ndarray, sparse.csr_matrix]
"""Row numbers and their counts, cells × genes."""

Columns = tuple[int, np.ndarray, np.ndarray, np.ndarray]
"""Some columns of a matrix: number of the first, and indptr, row numbers and counts of their entries."""

BLOCK_VALUES = 2**23
"""Values (cells × genes) of a dense block; more where the file's chunks hold more cells."""

BLOCK_ENTRIES = 2**22
"""Nonzero values of a sparse block."""

TALL_BLOCKS = 8
"""A dense block of whole chunks may be this many times BLOCK_VALUES; beyond, the matrix is read by columns."""

BYTES_UNDER_WAY = 2**29
"""Dense blocks that threads decode at the same time hold no more than this."""

HIGHEST_COUNT = 2**24 - 1
"""float32 holds integers up to here, and so do three bytes."""


DAMAGED_ARCHIVE = (zipfile.BadZipFile, tarfile.TarError, zlib.error, lzma.LZMAError, EOFError, OSError, RuntimeError)
"""What the readers of archives raise at those that are truncated, altered or encrypted."""


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
    def blocks(self, rows: np.ndarray | None = None) -> Iterator[Block]:
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


def _reason(values: np.ndarray) -> str:
    """Say why these values are no counts."""
    if not np.isfinite(values).all():
        return "it holds NaN or infinite values"
    if values.min() < 0:
        return f"it holds negative values (the lowest is {values.min():g})"
    if values.max() > HIGHEST_COUNT:
        return f"it holds values that are too high for counts (the highest is {values.max():g})"
    fractional = np.abs(values - np.rint(values)) > TOLERANCE
    return f"it holds values that are no integers (for example {values[fractional][0]:g})"


def _rounded(values: np.ndarray) -> np.ndarray:
    """Return values as float32 integers; NotCounts unless they are raw counts."""
    rounded = np.empty(len(values), np.float32)
    if not round_counts(values, rounded, HIGHEST_COUNT):
        raise NotCounts(_reason(values))
    return rounded


def as_counts(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    """Return a block as float32, genes ascending and without stored zeros; NotCounts unless it holds non-negative integers."""
    counts = sparse.csr_matrix((_rounded(matrix.data), matrix.indices, matrix.indptr), shape=matrix.shape)
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
    """Some genes of another source."""

    def __init__(self, source: Source, genes: np.ndarray):
        self._source, self._genes = source, genes
        self.obs, self.var, self.files, self.place = source.obs, source.var.iloc[genes], source.files, source.place
        self.alternative = SomeGenes(source.alternative, genes) if source.alternative else None

    def blocks(self, rows: np.ndarray | None = None) -> Iterator[Block]:
        """See `Source.blocks`."""
        self._source.threads, self._source.scratch = self.threads, self.scratch
        for numbers, counts in self._source.blocks(rows):
            yield numbers, counts[:, self._genes]


# --- h5ad -----------------------------------------------------------------------------------------------------------


def _spans(rows: np.ndarray, borders: np.ndarray) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yield first row, last row + 1 and the wanted rows of every block that has some."""
    places = np.searchsorted(rows, borders)
    for k in np.flatnonzero(np.diff(places)):
        yield int(borders[k]), int(borders[k + 1]), rows[places[k] : places[k + 1]]


def _cuts(indptr: np.ndarray, n_entries: int) -> np.ndarray:
    """Return borders of ranges of rows (columns) with about `n_entries` entries each, one row at least."""
    cuts = np.searchsorted(indptr, np.arange(0, indptr[-1], n_entries), side="right") - 1
    return np.unique(np.append(cuts, [0, len(indptr) - 1]))


class _Dense:
    """A dense matrix, cells × genes."""

    def __init__(self, values: Rows):
        self.values, self.shape = values, values.shape
        height = values.chunks[0] if values.chunks else 1
        # Whole chunks, so that none is decoded twice.
        self.step = -(-max(1, BLOCK_VALUES // self.shape[1]) // height) * height
        self.is_tall = min(self.step, self.shape[0]) * self.shape[1] > TALL_BLOCKS * BLOCK_VALUES

    def blocks(self, rows: np.ndarray, threads: int, scratch: Path | None) -> Iterator[Block]:
        if self.is_tall:
            n_rows = max(1, BLOCK_VALUES // self.shape[1])
            return _regrouped(self._columns(), rows, n_rows, self.shape, scratch)
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
                rounded = _rounded(tile.ravel()).reshape(tile.shape)
                band = band.astype(np.int32, copy=False)
                place_counts(rounded, band[here], column, HIGHEST_COUNT)
        local = wanted - start
        # Memory that is never written to takes none.
        n_values = len(local) * self.shape[1]
        indices, data, indptr = np.empty(n_values, np.int32), np.empty(n_values, np.float32), np.zeros(len(local) + 1, np.int64)
        compress_rows(band, local, indices, data, indptr)
        entries = slice(indptr[-1])
        block = sparse.csr_matrix((data[entries], indices[entries], indptr), shape=(len(local), self.shape[1]))
        block.has_canonical_format = True
        return wanted, block

    def _columns(self) -> Iterator[Columns]:
        """Yield the entries of one chunk after the other, those of the first columns first."""
        height, width = self.values.chunks
        for left in range(0, self.shape[1], width):
            for top in range(0, self.shape[0], height):
                tile = sparse.csc_matrix(self.values.chunk(top, left))
                yield left, tile.indptr, tile.indices + np.int32(top), _rounded(tile.data)


class _Csr:
    """A sparse matrix whose rows are cells."""

    def __init__(self, group: h5py.Group, shape: tuple[int, int], rows_of: Callable[[h5py.Dataset], Rows]):
        self.shape = shape
        self.indptr = group["indptr"][:].astype(np.int64)
        self.indices, self.data = rows_of(group["indices"]), rows_of(group["data"])
        n_entries = self.data.shape[0]
        is_whole = self.indptr[0] == 0 and self.indptr[-1] == n_entries == self.indices.shape[0] and self.indices.dtype.kind in "iu"
        if len(self.indptr) != shape[self._axis] + 1 or not is_whole or (np.diff(self.indptr) < 0).any():
            raise InputError(f"{self.data.path} is damaged: '{group.name}/indptr' does not fit the matrix. Retrieve the file again.")

    _axis = 0

    def _entries(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Return numbers (columns of a CSR matrix, rows of a CSC matrix) and values of a range of entries."""
        numbers, values = self.indices.read(start, stop), self.data.read(start, stop)
        if len(numbers) and (numbers.min() < 0 or numbers.max() >= self.shape[1 - self._axis]):
            raise InputError(
                f"{self.data.path} is damaged: '{self.indices.dataset.name}' names what is not there. Retrieve the file again."
            )
        return numbers.astype(np.int32, copy=False), values

    def blocks(self, rows: np.ndarray, threads: int, scratch: Path | None) -> Iterator[Block]:
        return in_order(self._block, _spans(rows, _cuts(self.indptr, BLOCK_ENTRIES)), threads)

    def _block(self, span: tuple[int, int, np.ndarray]) -> Block:
        start, stop, wanted = span
        indptr = self.indptr[start : stop + 1]
        indices, data = self._entries(indptr[0], indptr[-1])
        block = as_counts(sparse.csr_matrix((data, indices, indptr - indptr[0]), shape=(stop - start, self.shape[1])))
        return wanted, block if len(wanted) == stop - start else block[wanted - start]


class _Csc(_Csr):
    """A sparse matrix whose columns are genes: its entries are sorted into rows on disk."""

    _axis = 1

    def blocks(self, rows: np.ndarray, threads: int, scratch: Path | None) -> Iterator[Block]:
        n_rows = max(1, int(self.shape[0] * BLOCK_ENTRIES / max(1, self.indptr[-1])))
        cuts = _cuts(self.indptr, BLOCK_ENTRIES)
        columns = in_order(self._columns, pairwise(cuts), 1)
        return _regrouped(columns, rows, n_rows, self.shape, scratch)

    def _columns(self, span: tuple[int, int]) -> Columns:
        indptr = self.indptr[span[0] : span[1] + 1]
        numbers, values = self._entries(indptr[0], indptr[-1])
        return int(span[0]), indptr - indptr[0], numbers, _rounded(values)


def _regrouped(columns: Iterator[Columns], rows: np.ndarray, n_rows: int, shape: tuple[int, int], scratch: Path | None) -> Iterator[Block]:
    """Yield blocks of `n_rows` wanted rows of a matrix that comes by columns.

    The entries of some columns are grouped by block and laid aside on disk; a block is then gathered from all of them. In memory are
    a few million entries at a time, whatever the matrix; on disk 3-8 bytes per entry, read and written once.
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
        parts = [[spool.read(piece, starts[group], starts[group + 1]) for piece in pieces] for starts, pieces in laid_aside]
        row, column, value = (np.concatenate(part) for part in zip(*parts, strict=True))
        entries = (value.astype(np.float32), (row.astype(np.int32), column.astype(np.int32)))
        block = sparse.coo_matrix(entries, shape=(len(wanted), shape[1])).tocsr()
        block.eliminate_zeros()
        yield wanted, block


class H5ad(Source):
    """An h5ad of any layout: dense, CSR or CSC, chunked or not, of today's anndata or of its first versions."""

    def __init__(self, matrix: _Dense | _Csr, place: str, obs: pd.DataFrame, var: pd.DataFrame, path: Path, file: BinaryIO):
        self._matrix, self._file = matrix, file
        self.place, self.obs, self.var, self.files = place, obs, var, [path]

    def blocks(self, rows: np.ndarray | None = None) -> Iterator[Block]:
        """See `Source.blocks`."""
        yield from self._matrix.blocks(np.arange(len(self.obs)) if rows is None else rows, self.threads, self.scratch)


def _table(file: h5py.File, name: str, path: Path) -> pd.DataFrame:
    """Return obs or var."""
    if isinstance(file[name], h5py.Group):
        table = ad.io.read_elem(file[name])
        if not isinstance(table, pd.DataFrame):
            raise InputError(f"{path}: {name} is no table but a {type(table).__name__}. Save the screen with anndata's write_h5ad.")
        return table
    # Before anndata 0.7: an array of records with the index first; the categories of codes are in uns, -1 is missing.
    records = pd.DataFrame.from_records(file[name][()])
    for column in records:
        if records[column].dtype == object:
            records[column] = [value.decode() if isinstance(value, bytes) else value for value in records[column]]
        elif f"uns/{column}_categories" in file:
            categories = np.atleast_1d(file[f"uns/{column}_categories"].asstr()[()])
            records[column] = pd.Categorical.from_codes(records[column], categories)
    return records.set_index(records.columns[0])


def _content(path: Path, member: str | None) -> BinaryIO:
    """Open a file, or the member of an archive: unpacked beside it into a file without a name."""
    if h5py.is_hdf5(path):
        return path.open("rb")
    if not zipfile.is_zipfile(path) and not tarfile.is_tarfile(path):
        start = path.open("rb").read(64)
        shown = "an HTML page" if start.lstrip().lower().startswith((b"<!doctype", b"<html")) else f"it starts with {start[:8]!r}"
        raise InputError(f"{path} is not an h5ad file ({shown}). Save the screen with anndata's write_h5ad.")
    try:
        return _unpacked(path, member)
    except DAMAGED_ARCHIVE as error:
        if is_of_full_disk(error):
            raise full_disk(path.parent, f"{member} of {path.name}, which is unpacked beside it") from error
        raise InputError(f"{path}: {member} cannot be unpacked ({error}). Is the archive complete?") from error


def _unpacked(path: Path, member: str | None) -> BinaryIO:
    """Unpack the member of an archive beside it, into a file without a name: no name in the archive leads anywhere."""
    unpacked = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115  closed with its last user
    with zipfile.ZipFile(path) if zipfile.is_zipfile(path) else tarfile.open(path) as archive:
        names = archive.namelist() if isinstance(archive, zipfile.ZipFile) else [entry.name for entry in archive if entry.isfile()]
        if member is None or member not in names:
            raise InputError(f"{path}: source.member is {member!r}, and the archive holds {', '.join(names[:8])}. Name one of these.")
        content = archive.open(member) if isinstance(archive, zipfile.ZipFile) else archive.extractfile(member)
        assert content is not None  # names are those of files
        shutil.copyfileobj(content, unpacked, 2**20)
    unpacked.flush()
    return unpacked


def open_source(files: dict[str, Path], dataset: dict) -> Source:
    """Open the one h5ad of a source, or the h5ad that an archive holds.

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
    content = _content(path, dataset["source"].get("member"))
    try:
        # By its name where it has one: HDF5's own reading is faster than through Python.
        file = h5py.File(path if content.name == str(path) else content, "r")
        obs, var = _table(file, "obs", path), _table(file, "var", path)
        source: Source | None = None
        for place, name in (("layers['counts']", "layers/counts"), ("X", "X")):
            if name in file and (matrix := _matrix(file[name], content, path)) is not None:
                if matrix.shape != (len(obs), len(var)):
                    raise InputError(f"{path}: {place} has the shape {matrix.shape}, obs and var have {len(obs):,} and {len(var):,} rows.")
                alternative, source = source, H5ad(matrix, place, obs, var, path, content)
                source.alternative = alternative
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path} is an HDF5 file that anndata cannot read ({type(error).__name__}: {error}). Is it complete?") from error
    if source is None:
        raise InputError(f"{path} holds neither X nor layers['counts']. Put the integer counts into X.")
    return source


def _matrix(stored: h5py.Dataset | h5py.Group, content: BinaryIO, path: Path) -> _Dense | _Csr | None:
    """Return a matrix by the way it is stored; None for an empty one."""

    def rows_of(dataset: h5py.Dataset) -> Rows:
        if dataset.dtype.kind not in "biuf":
            raise InputError(f"{path}: '{dataset.name}' holds no numbers but {dataset.dtype}. Put the integer counts into X.")
        return Rows(dataset, content.fileno(), path)

    if isinstance(stored, h5py.Dataset):
        return _Dense(rows_of(stored)) if stored.ndim == 2 and stored.size else None
    # The second names are those of h5sparse, which anndata had before 0.7.
    kind = str(stored.attrs.get("encoding-type", stored.attrs.get("h5sparse_format")))
    n_rows, n_columns = (int(n) for n in stored.attrs.get("shape", stored.attrs.get("h5sparse_shape")))
    return (_Csc if kind.startswith("csc") else _Csr)(stored, (n_rows, n_columns), rows_of)
