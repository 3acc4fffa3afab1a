"""MuData on disk: its gene expression, with the other modalities of the same cells beside it."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.screens.readers.anndatas import open_anndata
from perturbflow.screens.readers.matrices import Values
from perturbflow.screens.readers.source import Block, NotCounts, Source
from perturbflow.screens.readers.types import EXPRESSION, EXPRESSION_WORDS, types_of, word

logger = logging.getLogger(__name__)

TYPES = "feature_types"
MOST_VALUES = 2**27
"""Counts of another modality are held in memory, up to about this many: 1 GB."""


class Beside(Source):
    """A source with the features of other modalities to the right of its genes, cell by cell.

    Parameters
    ----------
    source
        Gene expression.
    others
        Modality → its genes or other features (var), and its counts in the order of the cells of `source`.
    """

    def __init__(self, source: Source, others: dict[str, tuple[pd.DataFrame, sparse.csr_matrix]]):
        self._source, self._others = source, others
        self.obs, self.files, self.place = source.obs, source.files, source.place
        # Features of another modality are no gene expression, whatever the file calls them.
        names = {name: f"{name} modality" if word(name) in EXPRESSION_WORDS else name for name in others}
        self.var = pd.concat(
            [_typed(source.var, EXPRESSION), *[_typed(var, names[name])[[TYPES]] for name, (var, _) in others.items()]]
        )
        self.alternative = Beside(source.alternative, others) if source.alternative else None

    def places_with_counts(self) -> dict[str, float]:
        """See `Source.places_with_counts`."""
        return self._source.places_with_counts()

    def blocks(self, rows: np.ndarray | None = None) -> Iterator[Block]:
        """See `Source.blocks`."""
        self._source.threads, self._source.scratch = self.threads, self.scratch
        for numbers, counts in self._source.blocks(rows):
            beside = [counts, *[other[numbers] for _, other in self._others.values()]]
            yield numbers, sparse.hstack(beside, format="csr", dtype=np.float32)


def _typed(var: pd.DataFrame, undeclared: str) -> pd.DataFrame:
    """Return var with one column of feature types.

    It merges all columns of the file that hold types of features that are no gene expression.
    """
    known = types_of(var)
    types = (
        pd.Series(undeclared, index=var.index, dtype=object)
        if known is None
        else known.where(known.notna(), undeclared)
    )
    return var.drop(columns=[column for column in var if word(column) == word(TYPES)]).assign(
        **{TYPES: types.to_numpy()}
    )


def _counts_in_order(source: Source, cells: pd.Index) -> sparse.csr_matrix:
    """Return the counts of a modality in the order of other cells; a cell that it lacks has none."""
    counts = sparse.vstack([block for _, block in source.blocks()], format="csr", dtype=np.float32)
    place = source.obs.index.get_indexer(cells)
    found = counts[np.where(place < 0, 0, place)]
    return found if (place >= 0).all() else sparse.csr_matrix(sparse.diags((place >= 0).astype(np.float32)) @ found)


def _columns_of_all(file: Any, modality: str, obs: pd.DataFrame) -> pd.DataFrame:
    """Return obs of a modality with the columns that MuData keeps for all its cells.

    Columns of other modalities are named `modality:column`.
    """
    tables = {
        name: ad.io.read_elem(file[f"mod/{name}/obs"]).add_prefix(f"{name}:")
        for name in file["mod"]
        if name != modality
    }
    if "obs" in file:
        tables = {"": ad.io.read_elem(file["obs"]), **tables}
    for table in tables.values():
        if table.index.has_duplicates:
            continue
        new = [column for column in table if column not in obs and not str(column).startswith(f"{modality}:")]
        obs = pd.concat([obs, table[new].reindex(obs.index)], axis=1)
    return obs


def open_mudata(
    file: Any, path: Path, rows_of: Callable[[Any], Values], modality: str | None, counts: str | None
) -> Source:
    """Open a modality of MuData, with the features of all others beside its own.

    Parameters
    ----------
    modality
        The one of gene expression; None is `rna`, or the only one.

    Raises
    ------
    InputError
        If there is no such modality, or its cells have no names of their own.
    """
    names = [str(name) for name in file["mod"]]
    chosen = modality or ("rna" if "rna" in names or len(names) != 1 else names[0])
    if chosen not in names:
        raise InputError(
            f"{path} has no modality '{chosen}'. It holds {', '.join(names) or 'none'}. Name the one of gene "
            "expression in source.modality."
        )
    source = open_anndata(file[f"mod/{chosen}"], path, rows_of, counts)
    if source.obs.index.has_duplicates:
        raise InputError(
            f"{path}: cells of modality '{chosen}' share names, so that modalities cannot be joined. Make obs_names "
            "unique."
        )
    source.obs = _columns_of_all(file, chosen, source.obs)
    others = {}
    for name in names:
        if name != chosen and (found := _opened_beside(file, name, path, rows_of, source.obs.index)) is not None:
            others[name] = found
    return Beside(source, others) if others else source


def _opened_beside(
    file: Any, name: str, path: Path, rows_of: Callable[[Any], Values], cells: pd.Index
) -> tuple[pd.DataFrame, sparse.csr_matrix] | None:
    """Return var of another modality and its counts in the order of these cells.

    None, with a warning, for a modality that cannot be kept.
    """
    group = file[f"mod/{name}"]
    try:
        source = open_anndata(group, path, rows_of, None)
        X = group["X"] if "X" in group else group["layers/counts"]
        n_values = int(np.prod((X["data"] if hasattr(X, "keys") else X).shape))
        if n_values > MOST_VALUES:
            logger.warning("%s: modality %s is left out, for it holds %s values", path, name, f"{n_values:,}")
            return None
        if source.obs.index.has_duplicates:
            logger.warning("%s: modality %s is left out, for its cells share names", path, name)
            return None
        try:
            return source.var, _counts_in_order(source, cells)
        except NotCounts:
            if source.alternative is None:
                raise
            return source.var, _counts_in_order(source.alternative, cells)
    except (NotCounts, InputError) as problem:
        logger.warning("%s: modality %s is left out: %s", path, name, problem)
        return None
