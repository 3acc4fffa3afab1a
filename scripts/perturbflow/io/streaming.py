"""Work in bounded memory: threads that run only a little ahead, integers and rows of matrices laid aside on disk."""

import errno
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.io.files import full_disk, is_of_full_disk, require_room

if TYPE_CHECKING:
    from perturbflow.io.hdf5 import CsrRows

Task = TypeVar("Task")
Result = TypeVar("Result")

ROWS_AT_ONCE = 4096
LAID_ASIDE = "held-out cells, laid aside by perturbation,"


def row_blocks(n: int) -> Iterator[slice]:
    """Yield n rows in their order, some thousands at once."""
    for first in range(0, n, ROWS_AT_ONCE):
        yield slice(first, min(first + ROWS_AT_ONCE, n))


def in_order(function: Callable[[Task], Result], tasks: Iterable[Task], threads: int) -> Iterator[Result]:
    """Yield the results of `function` in the order of the tasks.

    At most one task per thread and one more are under way or waiting.
    """
    with ThreadPoolExecutor(threads) as pool:
        under_way: deque = deque()
        try:
            for task in tasks:
                under_way.append(pool.submit(function, task))
                if len(under_way) > threads:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            for future in under_way:
                future.cancel()


@dataclass(frozen=True)
class Piece:
    """Where an array lies in a spool."""

    offset: int
    n: int
    dtype: np.dtype


class Spool:
    """Non-negative integers in a file without a name, in the narrowest type that holds them.

    The file is gone however the process ends.

    Parameters
    ----------
    folder
        A folder on a disk with room for it; None is the system's temporary folder.
    """

    def __init__(self, folder: Path | None):
        self._folder = folder or tempfile.gettempdir()
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115  closed with its last user
        self._end = 0

    def append(self, values: np.ndarray) -> Piece:
        """Lay an array of integers (of any type) aside."""
        narrow = values.dtype if values.dtype == np.uint8 else np.min_scalar_type(int(values.max(initial=0)))
        content = np.ascontiguousarray(values, narrow).data.cast("B")
        piece = Piece(self._end, len(values), narrow)
        try:
            while content:
                written = self._file.write(content)
                content = content[written:]
                self._end += written
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise InputError(
                f"{self._folder}: the disk is full; {self._end:,} bytes of counts were laid aside there. Make room."
            ) from error
        return piece

    def read(self, piece: Piece, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return an array or a part of it, in the type that it was stored in."""
        n = (piece.n if stop is None else stop) - start
        size = piece.dtype.itemsize
        return np.frombuffer(
            os.pread(self._file.fileno(), int(n) * size, int(piece.offset + start * size)), piece.dtype
        )


class RowsByLabel:
    """Some rows of a sparse matrix, to be read label by label.

    Rows of a matrix in a file are laid aside, in the order in which they will be read, in a file without a name that is
    gone however the process ends: the cells of a label are all over a screen, and to look for each again takes long.

    Parameters
    ----------
    X
        In memory, or in a file (`hdf5.CsrRows`).
    rows
        The rows of every label, in the order in which `of` returns them; a row has one label.

    Raises
    ------
    InputError
        If the disk has no room.
    """

    def __init__(self, X: "sparse.csr_matrix | CsrRows", rows: dict[str, np.ndarray]) -> None:
        self._X, self._rows = X, rows
        self._is_aside = not sparse.issparse(X)
        if not self._is_aside:
            return
        ordered = np.concatenate(list(rows.values()))
        ends = np.cumsum([len(of_label) for of_label in rows.values()])
        self._first = dict(zip(rows, np.append(0, ends[:-1]).tolist(), strict=True))
        self._place = np.full(X.shape[0], -1)
        self._place[ordered] = np.arange(len(ordered))
        self._begins = np.append(0, np.cumsum(X.n_stored[ordered], dtype=np.int64))
        self._sizes = np.zeros(len(ordered), np.int64)
        # The disk that holds the matrix, unless its folder is another's.
        folder = X.path.parent
        self._folder = folder if os.access(folder, os.W_OK | os.X_OK) else Path(tempfile.gettempdir())
        n_bytes = 8 * int(self._begins[-1])
        require_room(self._folder, n_bytes, LAID_ASIDE)
        self._file = tempfile.TemporaryFile(dir=self._folder, buffering=0)  # noqa: SIM115  closed with its last user
        self._file.truncate(n_bytes)

    @classmethod
    def gathered(cls, X: "sparse.csr_matrix | CsrRows", rows: dict[str, np.ndarray]) -> "RowsByLabel":
        """Return the rows, ready to be read; those of a file are gathered in one pass."""
        gathered = cls(X, rows)
        if gathered._is_aside:
            wanted = np.flatnonzero(gathered._place >= 0)
            for part in row_blocks(len(wanted)):
                gathered._lay(gathered._place[wanted[part]], X[wanted[part]])
        return gathered

    def put(self, rows: slice, X: sparse.csr_matrix) -> None:
        """Take those of a block's rows that have a label; all blocks have to come before `of` is asked."""
        if self._is_aside:
            place = self._place[rows]
            self._lay(place[place >= 0], X[place >= 0])

    def _lay(self, places: np.ndarray, X: sparse.csr_matrix) -> None:
        values = np.stack([X.indices.astype(np.int32), X.data.astype(np.float32, copy=False).view(np.int32)], axis=1)
        for row, place in enumerate(places):
            of_row = values[X.indptr[row] : X.indptr[row + 1]]
            try:
                os.pwrite(self._file.fileno(), of_row.data, 8 * int(self._begins[place]))
            except OSError as error:
                raise full_disk(self._folder, LAID_ASIDE) if is_of_full_disk(error) else error from error
        self._sizes[places] = np.diff(X.indptr)

    def of(self, label: str) -> sparse.csr_matrix:
        """Return a copy of the rows of a label."""
        if not self._is_aside:
            return self._X[self._rows[label]]
        first, n = self._first[label], len(self._rows[label])
        begin, end = int(self._begins[first]), int(self._begins[first + n])
        content = os.pread(self._file.fileno(), 8 * (end - begin), 8 * begin)
        values, sizes = np.frombuffer(content, np.int32).reshape(-1, 2), self._sizes[first : first + n]
        indptr = np.append(0, np.cumsum(sizes))
        if indptr[-1] < len(values):  # some rows came without values that were stored as zeros
            unused = self._begins[first : first + n] - begin - indptr[:-1]
            values = values[np.arange(indptr[-1]) + np.repeat(unused, sizes)]
        data, indices = np.ascontiguousarray(values[:, 1]).view(np.float32), np.ascontiguousarray(values[:, 0])
        return sparse.csr_matrix((data, indices, indptr), shape=(n, self._X.shape[1]))
