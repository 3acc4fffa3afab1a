"""10x triplets: a MatrixMarket file, its barcodes and features, and a table of cell identities.

They are plain or gzipped, in a tar or not.
"""

import gzip
import io
import logging
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.screens.readers.matrices import Columns, regrouped
from perturbflow.screens.readers.source import Block, Source, as_counts, rounded
from perturbflow.screens.readers.tenx import lane_of

logger = logging.getLogger(__name__)

# Names of the files of a triplet by Cell Ranger and by GEO, the latter after the name of the experiment.
MEMBER = re.compile(
    r"(?:.*/)?(?P<experiment>.*?)_?(?P<role>matrix|barcodes|features|genes|cell_identities)\.(?:mtx|tsv|csv|txt)[a-z.]*"
)
ENTRIES = 2**22
"""Entries of a matrix that are read at a time: some 100 MB."""
IDS = re.compile(r"ENS[A-Z]*G\d{11}")
BARCODES = 2**19
"""Barcodes that are read at a time."""
COLUMNS = {
    "id": {"geneid", "geneids", "ensemblid", "ensemblgeneid", "featureid", "featureids", "id"},
    "name": {"genename", "genenames", "genesymbol", "symbol", "featurename", "geneshortname", "gene", "name"},
    "type": {"featuretype", "featuretypes"},
}
"""Names of the columns of a list of genes in a header, in lower case and letters alone."""
HEADER = set().union(
    *COLUMNS.values(), {"barcode", "barcodes", "genes", "features", "cell", "cells", "cellid", "cellbarcode", "bcwells"}
)
"""Words that are neither a gene nor a barcode: a first line with one of them is a header."""

Entries = tuple[np.ndarray, np.ndarray]
"""Entries of a matrix: gene and barcode, (entries, 2), and values."""


class Head(NamedTuple):
    """The head of a MatrixMarket file: its entries, whether they are integers, and whether its rows are cells."""

    n_entries: int
    is_integer: bool
    is_transposed: bool


@dataclass(frozen=True)
class Place:
    """A file, or the member of a tar."""

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        """Return the name in messages."""
        return f"{self.path}: {self.member}" if self.member else str(self.path)

    @contextmanager
    def open(self) -> Iterator[io.BufferedIOBase]:
        """Yield the content, decompressed where it is gzipped."""
        with ExitStack() as stack:
            if self.member is None:
                raw = stack.enter_context(self.path.open("rb"))
            else:
                member = stack.enter_context(tarfile.open(self.path)).extractfile(self.member)
                assert isinstance(member, io.BufferedReader)  # a triplet has files alone
                raw = member
            is_gzipped = raw.peek(2)[:2] == b"\x1f\x8b"
            content: io.BufferedIOBase = stack.enter_context(gzip.open(raw)) if is_gzipped else raw
            try:
                yield content
            except (EOFError, zlib.error, tarfile.ReadError, gzip.BadGzipFile) as error:
                raise InputError(
                    f"{self} cannot be decompressed to its end ({error}). Delete it and download it again."
                ) from error


class Triplet(Source):
    """One experiment.

    Its cells are the barcodes that have a row in cell_identities. Barcodes are compared as a whole, with the lane
    suffix. Without such a table, all barcodes are cells. obs gets a column `lane`, the suffix of the barcode
    (AAACATACACCGAT-3 is of lane 3). var gets one of feature types, where the file has one.

    Parameters
    ----------
    places
        Role → file: matrix, barcodes, features or genes, and where there are any, names of the genes and
        cell_identities.
    is_by_cell
        Whether the matrix is known to be cells × genes. Otherwise its size decides.
    """

    def __init__(self, places: dict[str, Place], is_by_cell: bool = False):
        if "features" in places:
            places = {**places, "genes": places["features"]}
        if missing := [role for role in ("matrix", "barcodes", "genes") if role not in places]:
            raise InputError(f"{next(iter(places.values()))}: {' and '.join(missing)} of the triplet is missing.")
        self._matrix = places["matrix"]
        self.files = list(dict.fromkeys([self._matrix.path, *[place.path for place in places.values()]]))
        self.place = "the matrix"
        self._is_by_cell = is_by_cell
        self.var = _features(places["genes"], places.get("names"))
        if "cell_identities" not in places:
            self.obs = pd.DataFrame(index=pd.Index(_first_column(places["barcodes"])))
            self._column, self._n_barcodes = np.arange(len(self.obs)), len(self.obs)
        else:
            self._read_identities(places)
        if "lane" not in self.obs:
            self.obs = self.obs.assign(lane=lane_of(self.obs.index))

    def _read_identities(self, places: dict[str, Place]) -> None:
        with places["cell_identities"].open() as content:
            identities = pd.read_csv(content, index_col=0)
        identities.index = identities.index.astype(str)
        if identities.index.has_duplicates:
            twice = identities.index[identities.index.duplicated()][0]
            raise InputError(f"{places['cell_identities']}: barcode {twice} has several rows. Leave one.")
        self._column, self._n_barcodes = _found(places["barcodes"], identities.index)
        in_order = np.argsort(self._column, kind="stable")
        in_order = in_order[(self._column < 0).sum() :]
        if len(in_order) < len(identities):
            logger.warning(
                "%s: %d of %d barcodes are not in the matrix",
                self._matrix,
                len(identities) - len(in_order),
                len(identities),
            )
        self._column = self._column[in_order]
        self.obs = identities.iloc[in_order]

    def blocks(self, rows: np.ndarray | None = None) -> Iterator[Block]:
        """Yield blocks as `Source.blocks` does.

        Cell Ranger sorts the entries of a matrix by cell, so that one pass is enough. Other matrices are sorted on
        disk.
        """
        rows = np.arange(len(self.obs)) if rows is None else np.asarray(rows)
        with self._matrix.open() as content:
            head = self._head(content)
            pieces = self._entries(content, head)
            first = list(islice(pieces, 1))
            pieces = chain(first, pieces)
            if all((np.diff(places[:, 1]) >= 0).all() for places, _ in first):
                yield from self._in_order(pieces, rows)
                return
            n_rows = max(1, int(self._n_barcodes * ENTRIES / max(1, head.n_entries)))
            columns = map(self._by_gene, pieces)
            number = np.full(self._n_barcodes, -1, np.int64)
            number[self._column[rows]] = rows
            for barcodes, counts in regrouped(
                columns, self._column[rows], n_rows, (self._n_barcodes, len(self.var)), self.scratch
            ):
                yield number[barcodes], counts

    def _in_order(self, pieces: Iterator[Entries], rows: np.ndarray) -> Iterator[Block]:
        columns = self._column[rows]
        wanted = np.full(self._n_barcodes, -1, np.int32)  # barcode → place among rows
        wanted[columns] = np.arange(len(rows))
        n_done, last = 0, 0
        held: list[Entries] = []
        for places, values in pieces:
            barcodes = places[:, 1]
            if barcodes[0] < last or (np.diff(barcodes) < 0).any():
                raise InputError(
                    f"{self._matrix}: its entries are not sorted by barcode (second column) throughout. Sort them "
                    "first."
                )
            last = barcodes[-1]
            is_wanted = wanted[barcodes] >= 0
            held.append((places[is_wanted], values[is_wanted]))
            # All but the last barcode of a piece are complete.
            n_complete = int(np.searchsorted(columns, last))
            if n_complete > n_done and sum(len(values) for _, values in held) >= ENTRIES:
                places, values = _joined(held)
                is_complete = wanted[places[:, 1]] < n_complete
                yield (
                    rows[n_done:n_complete],
                    self._block((places[is_complete], values[is_complete]), wanted, n_done, n_complete),
                )
                held, n_done = [(places[~is_complete], values[~is_complete])], n_complete
        if n_done < len(rows):
            yield rows[n_done:], self._block(_joined(held), wanted, n_done, len(rows))

    def _block(self, entries: Entries, wanted: np.ndarray, start: int, stop: int) -> sparse.csr_matrix:
        places, values = entries
        cells = wanted[places[:, 1]] - start
        shape = (stop - start, len(self.var))
        return as_counts(sparse.csr_matrix((values, (cells, places[:, 0])), shape=shape))

    def _by_gene(self, entries: Entries) -> Columns:
        places, values = entries
        piece = sparse.csc_matrix(
            (rounded(values), (places[:, 1], places[:, 0])), shape=(self._n_barcodes, len(self.var))
        )
        return 0, piece.indptr.astype(np.int64), piece.indices, piece.data

    def _head(self, content: io.BufferedIOBase) -> Head:
        """Read the head of the matrix."""
        line = content.readline().decode(errors="replace")
        kind = line.lower().split()
        if kind[:3] != ["%%matrixmarket", "matrix", "coordinate"] or kind[3:] not in (
            ["integer", "general"],
            ["real", "general"],
        ):
            raise InputError(
                f"{self._matrix} is no sparse MatrixMarket file of counts: it starts with {line[:48].rstrip()!r}."
            )
        is_integer = kind[3] == "integer"
        while line.startswith("%") or not line.strip():
            line = content.readline().decode(errors="replace")
            if not line:
                raise InputError(f"{self._matrix} ends within its head. Make it again.")
        try:
            n_genes, n_barcodes, n_entries = map(int, line.split())
        except ValueError as error:
            raise InputError(
                f"{self._matrix}: its size should be three numbers, and is {line[:40].rstrip()!r}."
            ) from error
        expected = len(self.var), self._n_barcodes
        # Tools other than 10x's write cells × genes.
        is_transposed = (n_genes, n_barcodes) == expected[::-1] and (self._is_by_cell or n_genes != n_barcodes)
        if (n_genes, n_barcodes) != expected and not is_transposed:
            raise InputError(
                f"{self._matrix} has {n_genes:,} genes × {n_barcodes:,} barcodes, but the files beside it list "
                f"{len(self.var):,} genes and {self._n_barcodes:,} barcodes. They are not of one "
                f"set{self._with_a_header(expected, (n_genes, n_barcodes))}."
            )
        return Head(n_entries, is_integer, is_transposed)

    def _with_a_header(self, listed: tuple[int, int], sizes: tuple[int, int]) -> str:
        """Return the end of a message: which lists have one line more than the matrix has genes or barcodes."""
        fits = [[n - m for n, m in zip(listed, order, strict=True)] for order in (sizes, sizes[::-1])]
        surplus = next((one for one in fits if set(one) <= {0, 1}), None)
        lists = " and ".join(name for name, n in zip(("genes", "barcodes"), surplus or (), strict=False) if n)
        return f", or the list of {lists} starts with a header: delete its first line" if lists else ""

    def _entries(self, content: io.BufferedIOBase, head: Head) -> Iterator[Entries]:
        """Yield entries in the order of the file: gene and barcode (both from 0), and count."""
        n_read = 0
        dtype = {0: np.int32, 1: np.int32, 2: np.int32 if head.is_integer else np.float64}
        highest = np.array([len(self.var), self._n_barcodes])
        try:
            for piece in (
                pd.read_csv(content, sep=r"\s+", header=None, chunksize=ENTRIES, dtype=dtype) if head.n_entries else ()
            ):
                places = piece[[1, 0] if head.is_transposed else [0, 1]].to_numpy() - np.int32(1)
                if (places < 0).any() or (places >= highest).any():
                    raise InputError(
                        f"{self._matrix} names a gene or barcode that the files beside it do not list. They are not of "
                        "one set."
                    )
                n_read += len(places)
                yield places, piece[2].to_numpy().astype(np.float64 if not head.is_integer else np.float32)
        except (ValueError, KeyError, pd.errors.ParserError) as error:
            raise InputError(
                f"{self._matrix}: after {n_read:,} entries comes a value that is no count: {error}."
            ) from error
        if n_read != head.n_entries:
            raise InputError(
                f"{self._matrix} ends after {n_read:,} of {head.n_entries:,} entries. Delete it and download it again."
            )


def _joined(held: list[Entries]) -> Entries:
    if not held:
        return np.empty((0, 2), np.int32), np.empty(0, np.float32)
    return np.concatenate([places for places, _ in held]), np.concatenate([values for _, values in held])


def _form(place: Place) -> tuple[str, list[str]]:
    """Return the separator of the columns of a list of genes or barcodes, and the names in its header.

    The names are empty where its first line is no header.
    """
    with place.open() as content:
        first = content.readline().decode("utf-8-sig", errors="replace").rstrip("\r\n")
    separator = "," if "," in first and "\t" not in first else "\t"
    fields = [field.strip('" ') for field in first.split(separator)]
    is_header = any(_word(field) in HEADER for field in fields[:2]) and not any(map(IDS.search, fields))
    return separator, fields if is_header else []


def _word(text: str) -> str:
    return re.sub(r"[\W_]+", "", text.lower())


def _features(place: Place, names: Place | None = None) -> pd.DataFrame:
    """Return var: ids, names and, since Cell Ranger 3, types.

    A file of one column holds names. A header names the columns.

    Parameters
    ----------
    names
        A list of names beside that of ids.
    """
    separator, header = _form(place)
    # Rows differ in length: those of peaks have a place on the genome.
    (table,) = _read(
        place, sep=separator, names=range(max(8, len(header))), skiprows=int(bool(header)), index_col=False
    )
    table = table.fillna("")
    table = table.loc[:, (table != "").any()]
    words = dict(enumerate(map(_word, header)))
    of_role = {
        role: next((column for column in table if words.get(column) in known), None) for role, known in COLUMNS.items()
    }
    if not header:
        of_role = {role: place if place in table else None for place, role in enumerate(COLUMNS)}
        if of_role["name"] is not None and not _are_ids(table[0]) and _are_ids(table[1]):
            of_role |= {"id": 1, "name": 0}
    elif of_role["id"] is None and 0 in table and _are_ids(table[0]):
        of_role["id"] = 0  # names of rows, as R and pandas write them
    found = {role: table[column].to_numpy(object) for role, column in of_role.items() if column is not None}
    if names is not None:
        found["name"] = _first_column(names)
    ids = found.get("id", found.get("name"))
    named = found.get("name", ids)
    if named is None or len(named) != len(table):
        raise InputError(
            f"{names or place} names {0 if named is None else len(named):,} genes, and {len(table):,} are listed. Make "
            "it again."
        )
    var = pd.DataFrame({"gene_id": ids}, index=pd.Index(np.where(named == "", ids, named)))
    return var.assign(feature_types=found["type"]) if "type" in found else var


def _are_ids(values: pd.Series) -> bool:
    return bool(values.str.contains(IDS).mean() > 0.5)


def _first_column(place: Place) -> np.ndarray:
    """Return a list that is a file's first column."""
    return np.concatenate(list(_pieces(place)) or [np.empty(0, object)])


def _pieces(place: Place) -> Iterator[np.ndarray]:
    """Yield the first column of a file, some barcodes at a time."""
    separator, header = _form(place)
    for piece in _read(place, sep=separator, usecols=[0], skiprows=int(bool(header)), chunksize=BARCODES):
        yield piece[0].fillna("").to_numpy(object)


def _read(place: Place, chunksize: int | None = None, **form: Any) -> Iterator[pd.DataFrame]:
    """Yield a list of genes or barcodes as texts, whole or in pieces."""
    with place.open() as content:
        try:
            found = pd.read_csv(
                content,
                header=None,
                dtype=str,
                keep_default_na=False,
                encoding="utf-8-sig",
                chunksize=chunksize,
                **form,
            )
            yield from found if chunksize else (found,)
        except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
            raise InputError(
                f"{place} cannot be read as a list: {error}. Columns are separated by tabs, in a .csv by commas."
            ) from error


def _found(place: Place, cells: pd.Index) -> tuple[np.ndarray, int]:
    """Return the number of each cell among the barcodes (-1 for a missing one), and how many barcodes there are."""
    numbers, n_barcodes = np.full(len(cells), -1), 0
    for barcodes in _pieces(place):
        among = cells.get_indexer(barcodes)
        numbers[among[among >= 0]] = n_barcodes + np.flatnonzero(among >= 0)
        n_barcodes += len(barcodes)
    return numbers, n_barcodes


class Joined(Source):
    """Several experiments one below the other, on the genes that all have; obs gets a column `experiment`."""

    def __init__(self, experiments: dict[str, Source]):
        self._parts = list(experiments.values())
        self.files, self.place = self._parts[0].files, self._parts[0].place
        self.obs = pd.concat([part.obs.assign(experiment=name) for name, part in experiments.items()])
        positions = [
            pd.Series(range(len(part.var)), index=part.var["gene_id"]).groupby(level=0, sort=False).first()
            for part in self._parts
        ]
        common = [gene for gene in positions[0].index if all(gene in others.index for others in positions[1:])]
        self._genes = [position[common].to_numpy() for position in positions]
        self.var = self._parts[0].var.iloc[self._genes[0]]
        logger.info("%s: %d genes are in all of %s", self.files[0], len(common), ", ".join(experiments))

    def blocks(self, rows: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
        """See `Source.blocks`."""
        rows = np.arange(len(self.obs)) if rows is None else np.asarray(rows)
        first = 0
        for part, genes in zip(self._parts, self._genes, strict=True):
            here = rows[(rows >= first) & (rows < first + len(part.obs))]
            for numbers, counts in part.blocks(here - first) if len(here) else ():
                yield numbers + first, counts[:, genes]
            first += len(part.obs)


def triplets_in(path: Path) -> dict[str, dict[str, Place]]:
    """Return the files of the triplets in a folder or tar: experiment → role → place.

    Where a role has several files, it is the gzipped one.
    """
    if path.is_dir():
        names = {file.name: Place(file) for file in sorted(path.iterdir()) if file.is_file()}
    else:
        with tarfile.open(path) as archive:
            names = {name: Place(path, name) for name in sorted(entry.name for entry in archive if entry.isfile())}
    experiments: dict[str, dict[str, Place]] = {}
    for name, place in names.items():
        if named := MEMBER.fullmatch(name):
            experiments.setdefault(named["experiment"], {})[named["role"]] = place
    return experiments


def open_triplets(files: dict[str, Path]) -> Source:
    """Open a triplet by its roles, or all triplets of a tar, each with its cell_identities.

    Raises
    ------
    InputError
        If a file of a triplet is missing, is not of its set, or is damaged.
    """
    if set(files) != {"file"}:
        experiments = {"": {role: Place(path) for role, path in files.items()}}
    elif not tarfile.is_tarfile(files["file"]):
        raise InputError(f"{files['file']} is no tar of 10x triplets.")
    elif not (experiments := triplets_in(files["file"])):
        raise InputError(f"{files['file']}: no member is the matrix, barcodes, genes or cell_identities of a triplet.")
    for places in experiments.values():
        if missing := [role for role in ("matrix", "barcodes", "cell_identities") if role not in places]:
            raise InputError(f"{next(iter(places.values()))}: {' and '.join(missing)} of the triplet is missing.")
    parts: dict[str, Source] = {name: Triplet(places) for name, places in experiments.items()}
    return parts[""] if set(files) != {"file"} else Joined(parts)
