"""Arrays of zarr stores, read as those of HDF5 files are."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from perturbflow.errors import InputError


class ZarrRows:
    """A numeric array of a zarr store, to be read in ranges of rows by several threads; see `perturbflow.io.hdf5.Rows`.

    Parameters
    ----------
    array
        Of one or two dimensions.
    path
        The store, for messages.
    is_whole
        Whether no chunk may be missing. Zarr reads a missing chunk as zeros, which only a dense matrix can hold in
        number.

    Raises
    ------
    InputError
        If a chunk is missing that has to be there.
    """

    def __init__(self, array: Any, path: Path, is_whole: bool):
        self.dataset, self.path = array, path
        self.shape, self.dtype, self.chunks = array.shape, array.dtype, array.chunks
        if is_whole and array.nchunks_initialized < array.nchunks:
            missing = array.nchunks - array.nchunks_initialized
            raise self._damaged(f"{missing:,} of {array.nchunks:,} chunks are missing")

    def _damaged(self, reason: object) -> InputError:
        return InputError(
            f"{self.path} is damaged: '{self.dataset.name}' cannot be read ({reason}). Copy the whole store again."
        )

    def _values(self, where: Any) -> np.ndarray:
        try:
            return np.asarray(self.dataset[where])
        except Exception as error:  # each codec raises its own
            raise self._damaged(f"{type(error).__name__}: {error}") from error

    def read(self, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop`."""
        return self._values(slice(int(start), int(stop)))

    def tiles(self, start: int, stop: int) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yield rows `start` to `stop` at once, as `Rows.tiles` does in pieces."""
        yield 0, 0, self.read(start, stop)

    def chunk(self, top: int, left: int) -> np.ndarray:
        """Return the part of a matrix that one chunk holds."""
        return self._values((slice(top, top + self.chunks[0]), slice(left, left + self.chunks[1])))


def open_zarr(path: Path) -> Any:
    """Return the root group of a zarr store.

    Raises
    ------
    InputError
        If zarr is not installed, or this is no group that it can read.
    """
    try:
        import zarr
    except ImportError as error:
        raise InputError(
            f"{path} is a zarr store, and reading one takes the package zarr: pip install zarr."
        ) from error
    try:
        return zarr.open_group(str(path), mode="r")
    except Exception as error:
        raise InputError(
            f"{path}: zarr cannot read this store ({type(error).__name__}: {error}). Is it complete?"
        ) from error
