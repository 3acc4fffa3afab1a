"""Work in bounded memory: threads that run only a little ahead, and integers laid aside on disk."""

import errno
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from perturbflow.errors import InputError

Task = TypeVar("Task")
Result = TypeVar("Result")

ROWS_AT_ONCE = 4096


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
