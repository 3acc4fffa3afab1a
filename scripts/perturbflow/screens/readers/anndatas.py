"""AnnData on disk: h5ad of any version, a zarr store, or a modality of MuData, and the place of its counts."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from perturbflow.errors import InputError
from perturbflow.screens.readers.matrices import Csc, Csr, Dense, Values
from perturbflow.screens.readers.source import Block, NotCounts, Source, rounded

Matrix = Dense | Csr


class Stored(Source):
    """AnnData on disk: dense, CSR or CSC, chunked or not, of today's anndata or of its first versions."""

    def __init__(self, store: "Store", key: str, obs: pd.DataFrame, var: pd.DataFrame):
        self._store, self._key, self.obs, self.var, self.files, self.place = (
            store,
            key,
            obs,
            var,
            [store.path],
            store.name_of(key),
        )
        matrix = store.matrix(key)
        assert matrix is not None  # `open_anndata` looks first
        self._matrix = matrix
        if matrix.shape != (len(self.obs), len(self.var)):
            raise InputError(
                f"{store.path}: {self.place} has the shape {matrix.shape}, obs and var have {len(self.obs):,} and "
                f"{len(self.var):,} rows."
            )

    def places_with_counts(self) -> dict[str, float]:
        """See `Source.places_with_counts`."""
        highest = {key: self._store.highest_count(key) for key in self._store.places if key != self._key}
        return {key: count for key, count in highest.items() if count > 1}

    def blocks(self, rows: np.ndarray | None = None) -> Iterator[Block]:
        """See `Source.blocks`."""
        yield from self._matrix.blocks(
            np.arange(self._matrix.shape[0]) if rows is None else rows, self.threads, self.scratch
        )


class Store:
    """A group that holds AnnData.

    Parameters
    ----------
    group
        Of HDF5 or zarr.
    path
        The file or folder, for messages.
    rows_of
        Makes an array of the group readable.

    Attributes
    ----------
    places
        Where counts may be, in the words of the key `counts` → name in the group.
    """

    def __init__(self, group: Any, path: Path, rows_of: Callable[[Any], Values]):
        self._group, self.path, self._rows_of = group, path, rows_of
        self._matrices: dict[str, Matrix | None] = {}
        layers = [str(name) for name in group["layers"]] if hasattr(group.get("layers"), "keys") else []
        # Before anndata 0.7 the parts of raw had a point in their names.
        raw = next((name for name in ("raw/X", "raw.X") if name in group), None)
        self.places = {"X": "X"} if "X" in group else {}
        self.places |= {"raw": raw} if raw else {}
        self.places |= {name if name not in ("X", "raw") else f"layers/{name}": f"layers/{name}" for name in layers}

    def table(self, name: str) -> pd.DataFrame:
        """Return obs, var, or the genes of raw, of which X may hold fewer."""
        return _table(self._group, self.places["raw"].replace("X", "var") if name == "raw" else name, self.path)

    def key_of(self, counts: str) -> str:
        """Return the place that a block means: a layer by its name, with or without `layers/`.

        A layer may be called raw where there is no raw.
        """
        meant = (counts, f"layers/{counts}", counts.removeprefix("layers/"))
        return next((key for key in meant if key in self.places), counts)

    def name_of(self, key: str) -> str:
        """Return the name of a place in messages."""
        name = self.places[key]
        return (
            "raw.X"
            if key == "raw"
            else f"layers['{name.removeprefix('layers/')}']"
            if name.startswith("layers/")
            else name
        )

    def matrix(self, key: str) -> Matrix | None:
        """Return the matrix of a place in the form that it is stored in; None for an empty one or none."""
        if key not in self._matrices:
            self._matrices[key] = self._opened(key) if key in self.places else None
        return self._matrices[key]

    def _opened(self, key: str) -> Matrix | None:
        stored = self._group[self.places[key]]

        def rows_of(array: Any) -> Values:
            if array.dtype.kind not in "biuf":
                raise InputError(
                    f"{self.path}: '{array.name}' holds no numbers but {array.dtype}. Put the integer counts into X."
                )
            return self._rows_of(array)

        if not hasattr(stored, "keys"):
            return Dense(rows_of(stored)) if stored.ndim == 2 and stored.size else None
        # The second names are those of h5sparse, which anndata had before 0.7.
        kind = str(stored.attrs.get("encoding-type", stored.attrs.get("h5sparse_format")))
        n_rows, n_columns = (int(n) for n in stored.attrs.get("shape", stored.attrs.get("h5sparse_shape")))
        return (Csc if kind.startswith("csc") else Csr)(stored, (n_rows, n_columns), rows_of)

    def highest_count(self, key: str) -> float:
        """Return the highest of a sample of the values of a place, 0 where they are no raw counts.

        A matrix of 0 and 1 alone passes for none.
        """
        try:
            matrix = self.matrix(key)
            sample = np.zeros(1) if matrix is None else matrix.sample()
            return float(rounded(sample).max(initial=0))
        except (NotCounts, InputError, KeyError, TypeError):
            return 0.0


def _table(group: Any, name: str, path: Path) -> pd.DataFrame:
    """Return obs or var."""
    if hasattr(group[name], "keys"):
        table = ad.io.read_elem(group[name])
        if not isinstance(table, pd.DataFrame):
            raise InputError(
                f"{path}: {name} is no table but a {type(table).__name__}. Save the screen with anndata's write_h5ad."
            )
        return table
    # Before anndata 0.7: an array of records with the index first; the categories of codes are in uns, -1 is missing.
    records = pd.DataFrame.from_records(group[name][()])
    for column in records:
        if records[column].dtype == object:
            records[column] = [value.decode() if isinstance(value, bytes) else value for value in records[column]]
        elif f"uns/{column}_categories" in group:
            categories = np.atleast_1d(group[f"uns/{column}_categories"].asstr()[()])
            records[column] = pd.Categorical.from_codes(records[column], categories)
    return records.set_index(records.columns[0])


def open_anndata(group: Any, path: Path, rows_of: Callable[[Any], Values], counts: str | None) -> Source:
    """Open AnnData on disk.

    Parameters
    ----------
    group
        The root of an h5ad or zarr store, or the group of a modality.
    path
        The file or folder, for messages.
    rows_of
        Makes an array readable.
    counts
        Place of the counts: X, raw or the name of a layer. None is X, and layers['counts'] where X turns out to hold
        none.

    Raises
    ------
    InputError
        If anndata cannot read it, or the place does not exist.
    """
    try:
        store = Store(group, path, rows_of)
        keys = [store.key_of(counts)] if counts else [key for key in ("X", "counts") if store.matrix(key) is not None]
        if not keys or store.matrix(keys[0]) is None:
            raise InputError(_no_such_place(store, counts))
        obs, var = store.table("obs"), store.table("raw" if keys[0] == "raw" else "var")
        # Columns of obs take half a gigabyte for two million cells: once is enough.
        sources = [Stored(store, key, obs if i == 0 else obs[[]], var) for i, key in enumerate(keys)]
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"{path} is nothing that anndata can read ({type(error).__name__}: {error}). Is it complete?"
        ) from error
    sources[0].alternative = next(iter(sources[1:]), None)
    return sources[0]


def _no_such_place(store: Store, counts: str | None) -> str:
    found = [key for key in store.places if store.highest_count(key) > 1]
    fix = f"Say so in its block: counts: {found[0]}." if found else "Put the integer counts into X."
    if counts:
        return (
            f"{store.path} has no counts in {counts!r} (counts). It holds {', '.join(store.places) or 'no matrix'}. "
            f"{fix}"
        )
    return f"{store.path} holds neither X nor layers['counts']. {fix}"
