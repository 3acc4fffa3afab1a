"""Read and write the chunks of HDF5 datasets directly.

HDF5 inflates and deflates one chunk at a time, under a lock of its own. Here threads do, with igzip (ISA-L), several
times faster. The files have the standard shuffle and gzip filter that every reader of HDF5 knows.
"""

import os
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from pathlib import Path

import h5py
import numpy as np
from isal import isal_zlib
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.io.kernels import shuffle_bytes

CHUNK = 2**18
"""Values per written chunk: 1 MiB, the cache that HDF5 has by default."""

CHUNKS_AHEAD = 32
"""Chunks of a dataset that are encoded before the oldest is written.

The number does not depend on the number of threads, and neither does the file.
"""

LEVEL = 2
"""Level of igzip (0-3): as fast as 1 and smaller; 3 takes twice the time and saves no space."""

GAP, SPAN = 2**15, 2**21
"""Rows of a sparse matrix are read together where no more than GAP values lie between two, and SPAN values in all."""

_DIRECT_FILTERS: tuple[list[int], ...] = (
    [],
    [h5py.h5z.FILTER_DEFLATE],
    [h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_DEFLATE],
    [h5py.h5z.FILTER_SHUFFLE],
)


class Rows:
    """A numeric dataset of one or two dimensions, to be read in ranges of rows by several threads.

    Parameters
    ----------
    dataset
        Of an open file.
    descriptor
        Of the same file, to read from beside HDF5.
    path
        Names the file in messages.
    """

    def __init__(self, dataset: h5py.Dataset, descriptor: int, path: Path):
        self.dataset, self.path = dataset, path
        self.shape, self.dtype, self.chunks = dataset.shape, dataset.dtype.newbyteorder("="), dataset.chunks
        self._descriptor = descriptor
        self._chunk_at: dict[tuple[int, ...], tuple[int, int, int]] | None = None
        self._last: tuple[tuple[int, ...], np.ndarray] | None = None
        self._offset: int | None = None
        self._lock = threading.Lock()
        creation = dataset.id.get_create_plist()
        self._filters = [creation.get_filter(i)[0] for i in range(creation.get_nfilters())]
        # Values in other files or of another encoding go through HDF5.
        self._is_direct = (
            dataset.dtype.isnative
            and dataset.file.userblock_size == 0
            and not dataset.is_virtual
            and not dataset.external
        )
        if self._is_direct and self.chunks is None:
            self._offset = dataset.id.get_offset()
        self._is_direct &= self._offset is not None or (self.chunks is not None and self._filters in _DIRECT_FILTERS)

    def _damaged(self, reason: object) -> InputError:
        return InputError(
            f"{self.path} is damaged: '{self.dataset.name}' cannot be read ({reason}). Retrieve the file again."
        )

    def _through_hdf5(self, where: slice | tuple[slice, slice]) -> np.ndarray:
        try:
            values = self.dataset[where]
        except (OSError, RuntimeError) as error:
            raise self._damaged(error) from error
        return values.astype(values.dtype.newbyteorder("="), copy=False)

    def _bytes(self, offset: int, size: int) -> bytes:
        content = os.pread(self._descriptor, size, offset)
        if len(content) != size:
            raise self._damaged("the file ends too early")
        return content

    def _chunk(self, origin: tuple[int, ...]) -> np.ndarray:
        """Return a whole chunk, decoded.

        It keeps the last one of one dimension, as the next range of rows may begin where this one ends.
        """
        last = self._last
        if last is not None and last[0] == origin:
            return last[1]
        values = self._decoded(origin)
        if len(origin) == 1:
            self._last = origin, values
        return values

    def _decoded(self, origin: tuple[int, ...]) -> np.ndarray:
        assert self._chunk_at is not None  # `tiles` looks first
        found = self._chunk_at.get(origin)
        if found is None:  # never written
            return np.full(self.chunks, self.dataset.fillvalue, self.dtype)
        offset, size, mask = found
        content = self._bytes(offset, size)
        n_bytes = int(np.prod(self.chunks)) * self.dtype.itemsize
        applied = [code for i, code in enumerate(self._filters) if not mask >> i & 1]
        if h5py.h5z.FILTER_DEFLATE in applied:
            try:
                content = isal_zlib.decompress(content, bufsize=n_bytes)
            except isal_zlib.error as error:  # type: ignore[misc]  # its stub declares an instance
                raise self._damaged(error) from error
        if len(content) != n_bytes:
            raise self._damaged(f"a chunk has {len(content):,} bytes instead of {n_bytes:,}")
        if h5py.h5z.FILTER_SHUFFLE in applied:
            planes = np.frombuffer(content, np.uint8).reshape(self.dtype.itemsize, -1)
            return np.ascontiguousarray(planes.T).view(self.dtype).reshape(self.chunks)
        return np.frombuffer(content, self.dtype).reshape(self.chunks)

    def _find_chunks(self) -> None:
        """Look up once where all chunks lie: HDF5 searches through all to find one."""
        with self._lock:
            if self._chunk_at is None:
                found: dict[tuple[int, ...], tuple[int, int, int]] = {}

                def note(chunk: h5py.h5d.StoreInfo) -> None:
                    found[chunk.chunk_offset] = (chunk.byte_offset, chunk.size, chunk.filter_mask)

                try:
                    self.dataset.id.chunk_iter(note)
                except (OSError, RuntimeError) as error:
                    raise self._damaged(error) from error
                self._chunk_at = found

    def tiles(self, start: int, stop: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield rows `start` to `stop` in pieces: first row (from `start`) and first column of each, and its values."""
        if not self._is_direct:
            yield 0, 0, self._through_hdf5(slice(start, stop))
        elif self._offset is not None:
            n_per_row = int(np.prod(self.shape[1:])) * self.dtype.itemsize
            content = self._bytes(self._offset + start * n_per_row, (stop - start) * n_per_row)
            yield 0, 0, np.frombuffer(content, self.dtype).reshape(stop - start, *self.shape[1:])
        else:
            self._find_chunks()
            height = self.chunks[0]
            columns = range(0, self.shape[1], self.chunks[1]) if len(self.shape) == 2 else [None]
            for top in range(start // height * height, stop, height):
                above, below = max(start - top, 0), min(stop - top, height)
                for left in columns:
                    if left is None:
                        yield top + above - start, 0, self._chunk((top,))[above:below]
                    else:
                        yield top + above - start, left, self._chunk((top, left))[above:below, : self.shape[1] - left]

    def chunk(self, top: int, left: int) -> np.ndarray:
        """Return the part of a matrix that one chunk holds."""
        rows, columns = (
            slice(top, min(top + self.chunks[0], self.shape[0])),
            slice(left, min(left + self.chunks[1], self.shape[1])),
        )
        if not self._is_direct:
            return self._through_hdf5((rows, columns))
        self._find_chunks()
        return self._chunk((top, left))[: rows.stop - top, : columns.stop - left]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop`."""
        values = np.empty((stop - start, *self.shape[1:]), self.dtype)
        for row, column, tile in self.tiles(start, stop):
            if tile.ndim == 1:
                values[row : row + len(tile)] = tile
            else:
                values[row : row + len(tile), column : column + tile.shape[1]] = tile
        return values


class CsrRows:
    """Rows of anndata's CSR matrix on disk: `X[rows]` reads them in the order of the file.

    It returns them in the order of `rows`.

    Parameters
    ----------
    group
        Of an open file.
    path
        The same file, to read from beside HDF5; messages name it.
    """

    def __init__(self, group: h5py.Group, path: Path):
        self.path = path
        self._content = path.open("rb")
        self._data, self._indices = (Rows(group[name], self._content.fileno(), path) for name in ("data", "indices"))
        self.dtype = self._data.dtype
        self._bounds = group["indptr"][:].astype(np.int64)
        self._rows = np.arange(len(self._bounds) - 1)
        self.shape = len(self._rows), int(group.attrs["shape"][1])

    def select(self, rows: np.ndarray) -> "CsrRows":
        """Return the same with these rows alone; nothing is read."""
        selected = copy(self)
        selected._rows = self._rows[rows]
        selected.shape = len(selected._rows), self.shape[1]
        return selected

    @property
    def n_stored(self) -> np.ndarray:
        """Values per row, (rows,)."""
        return self._bounds[self._rows + 1] - self._bounds[self._rows]

    def __getitem__(self, rows: slice | np.ndarray) -> sparse.csr_matrix:
        """Return rows by a slice, a mask or their numbers."""
        wanted = self._rows[rows]
        if (np.diff(wanted) > 0).all():
            return self._read(wanted)
        ordered, place = np.unique(wanted, return_inverse=True)
        return self._read(ordered)[place]

    def _read(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Return rows of the file, ascending.

        It reads near rows together, and decodes and drops the values between them.
        """
        begins, ends = self._bounds[rows], self._bounds[rows + 1]
        indptr = np.append(0, np.cumsum(ends - begins))
        data, indices = np.empty(indptr[-1], self._data.dtype), np.empty(indptr[-1], self._indices.dtype)
        is_far = np.append(begins[1:] - ends[:-1] > GAP, True)
        first = 0
        while first < len(rows):
            last = max(first + 1, int(np.searchsorted(ends, begins[first] + SPAN, side="right")))
            last = min(last, first + 1 + int(np.argmax(is_far[first:])))
            begin, end = int(begins[first]), int(ends[last - 1])
            here = slice(indptr[first], indptr[last])
            if here.stop - here.start == end - begin:
                taken: slice | np.ndarray = slice(None)
            else:
                skipped = begins[first:last] - begin - indptr[first:last]
                taken = np.arange(here.start, here.stop) + np.repeat(skipped, np.diff(indptr[first : last + 1]))
            data[here] = self._data.read(begin, end)[taken]
            indices[here] = self._indices.read(begin, end)[taken]
            first = last
        return sparse.csr_matrix((data, indices, indptr), shape=(len(rows), self.shape[1]))


def _encoded(values: np.ndarray) -> bytes:
    """Return 32-bit values as a chunk of HDF5's shuffle and gzip filters."""
    planes = np.empty((4, len(values)), np.uint8)
    shuffle_bytes(values.view(np.uint32), planes)
    return isal_zlib.compress(planes, LEVEL)


class Appended:
    """A one-dimensional dataset of 32-bit values, written from front to back; threads encode its chunks.

    Parameters
    ----------
    group, name, dtype
        Where it is made; float32 or int32.
    n_most
        No more than this many values will come.
    pool
        Where chunks are encoded.
    """

    def __init__(self, group: h5py.Group, name: str, dtype: type, n_most: int, pool: ThreadPoolExecutor):
        self._chunk = min(CHUNK, max(n_most, 1))
        self._dataset = group.create_dataset(
            name,
            (n_most,),
            dtype,
            maxshape=(None,),
            chunks=(self._chunk,),
            shuffle=True,
            compression="gzip",
            compression_opts=LEVEL,
        )
        self._pool = pool
        self._begun: np.ndarray = np.empty(0, dtype)
        self._n_written = 0
        self._encoding: deque[tuple[int, Future]] = deque()

    def _submit(self, values: np.ndarray) -> None:
        self._encoding.append((self._n_written, self._pool.submit(_encoded, values)))
        self._n_written += len(values)
        while len(self._encoding) > CHUNKS_AHEAD:
            self._write_oldest()

    def _write_oldest(self) -> None:
        offset, encoded = self._encoding.popleft()
        self._dataset.id.write_direct_chunk((offset,), encoded.result())

    def append(self, values: np.ndarray) -> None:
        """Add values at the end; do not change them afterwards."""
        missing = self._chunk - len(self._begun)
        if len(values) >= missing:
            self._submit(np.concatenate([self._begun, values[:missing]]))
            self._begun, values = self._begun[:0], values[missing:]
            n_whole = len(values) // self._chunk * self._chunk
            for start in range(0, n_whole, self._chunk):
                self._submit(values[start : start + self._chunk])
            values = values[n_whole:]
        self._begun = np.concatenate([self._begun, values])

    def finish(self) -> None:
        """Write the remaining values; the dataset takes its length."""
        n = self._n_written + len(self._begun)
        if len(self._begun):
            self._submit(np.append(self._begun, np.zeros(self._chunk - len(self._begun), self._begun.dtype)))
        while self._encoding:
            self._write_oldest()
        self._dataset.resize((n,))


class AppendedRows:
    """anndata's CSR matrix of float32, written from its first row to its last.

    Parameters
    ----------
    group
        To be filled.
    n_columns, n_most
        Columns, and rows that will come at most.
    pool
        Where chunks are encoded.
    """

    def __init__(self, group: h5py.Group, n_columns: int, n_most: int, pool: ThreadPoolExecutor):
        self._group, self._n_columns = group, n_columns
        self._data, self._indices = (
            Appended(group, name, dtype, n_most * n_columns, pool)
            for name, dtype in (("data", np.float32), ("indices", np.int32))
        )
        self._sizes: list[np.ndarray] = []

    def append(self, X: sparse.csr_matrix) -> None:
        """Add rows."""
        self._data.append(X.data.astype(np.float32, copy=False))
        self._indices.append(X.indices.astype(np.int32, copy=False))
        self._sizes.append(np.diff(X.indptr))

    def finish(self) -> None:
        """Write the remaining rows."""
        self._data.finish()
        self._indices.finish()
        indptr = np.append(0, np.cumsum(np.concatenate(self._sizes), dtype=np.int64))
        if indptr[-1] <= np.iinfo(np.int32).max:  # scipy wants one type for both, and refuses to sort others
            indptr = indptr.astype(np.int32)
        self._group.create_dataset("indptr", data=indptr, compression="gzip", shuffle=True)
        shape = len(indptr) - 1, self._n_columns
        self._group.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": shape})
