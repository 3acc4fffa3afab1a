"""10x triplets: a MatrixMarket file, its barcodes and genes, and what is known of the cells; plain or gzipped, in a tar or not."""

import gzip
import io
import logging
import re
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.sources import Source, as_counts

logger = logging.getLogger(__name__)

# What GEO calls the files of a triplet, with the name of the experiment before it.
MEMBER = re.compile(r"(?:.*/)?(?P<experiment>.*?)_?(?P<role>matrix|barcodes|genes|cell_identities)\.[a-z.]+")
ENTRIES = 2**22
"""Entries of a matrix that are read at a time: some 100 MB."""
BARCODES = 2**19
"""Barcodes that are read at a time."""


@dataclass(frozen=True)
class Place:
    """A file, or the member of a tar."""

    path: Path
    member: str | None = None

    def __str__(self) -> str:
        """Return what messages call it."""
        return f"{self.path}: {self.member}" if self.member else str(self.path)

    @contextmanager
    def open(self) -> Iterator[io.BufferedIOBase]:
        """Yield the content, decompressed where it is gzipped."""
        with ExitStack() as stack:
            if self.member is None:
                raw = stack.enter_context(self.path.open("rb"))
            else:
                member = stack.enter_context(tarfile.open(self.path)).extractfile(self.member)
                assert isinstance(member, io.BufferedReader)  # what is no file has no place in a triplet
                raw = member
            is_gzipped = raw.peek(2)[:2] == b"\x1f\x8b"
            content: io.BufferedIOBase = stack.enter_context(gzip.open(raw)) if is_gzipped else raw
            try:
                yield content
            except (EOFError, zlib.error, tarfile.ReadError, gzip.BadGzipFile) as error:
                raise InputError(f"{self} cannot be decompressed to its end ({error}). Delete it and download it again.") from error


class Triplet(Source):
    """One experiment. Its cells are the barcodes that have a row in cell_identities; barcodes are joined whole, lane suffix included.

    obs gets a column `lane`, the suffix of the barcode (AAACATACACCGAT-3 is of lane 3).
    """

    def __init__(self, places: dict[str, Place]):
        if missing := [role for role in ("matrix", "barcodes", "genes", "cell_identities") if role not in places]:
            raise InputError(f"{next(iter(places.values()))}: {' and '.join(missing)} of the triplet is missing.")
        self._matrix = places["matrix"]
        self.files = list(dict.fromkeys([self._matrix.path, *[place.path for place in places.values()]]))
        self.place = "the matrix"
        with places["genes"].open() as content:
            genes = pd.read_csv(content, sep="\t", header=None, usecols=[0, 1], dtype=str, keep_default_na=False)
        self.var = pd.DataFrame({"gene_id": genes[0].to_numpy()}, index=pd.Index(genes[1].to_numpy()))
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
            logger.warning("%s: %d of %d barcodes are not in the matrix", self._matrix, len(identities) - len(in_order), len(identities))
        self._column = self._column[in_order]
        self.obs = identities.iloc[in_order]
        if "lane" not in self.obs:
            self.obs = self.obs.assign(lane=self.obs.index.str.extract(r"-(\w+)$")[0].to_numpy())

    def blocks(self, rows: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, sparse.csr_matrix]]:
        """See `Source.blocks`. The entries of a matrix by Cell Ranger are sorted by cell, so that one pass serves."""
        rows = np.arange(len(self.obs)) if rows is None else np.asarray(rows)
        columns = self._column[rows]
        wanted = np.full(self._n_barcodes, -1, np.int32)  # barcode → place among rows
        wanted[columns] = np.arange(len(rows))
        n_done = 0
        held: list[np.ndarray] = []
        for entries in self._entries():
            held.append(entries[wanted[entries[:, 1]] >= 0])
            # All but the last barcode of a piece are complete.
            n_complete = int(np.searchsorted(columns, entries[-1, 1]))
            if n_complete > n_done and sum(map(len, held)) >= ENTRIES:
                entries = np.concatenate(held)
                is_complete = wanted[entries[:, 1]] < n_complete
                yield rows[n_done:n_complete], self._block(entries[is_complete], wanted, n_done, n_complete)
                held, n_done = [entries[~is_complete]], n_complete
        entries = np.concatenate([*held, np.empty((0, 3), np.int32)])
        if n_done < len(rows):
            yield rows[n_done:], self._block(entries, wanted, n_done, len(rows))

    def _block(self, entries: np.ndarray, wanted: np.ndarray, start: int, stop: int) -> sparse.csr_matrix:
        cells = wanted[entries[:, 1]] - start
        shape = (stop - start, len(self.var))
        return as_counts(sparse.csr_matrix((entries[:, 2].astype(np.float32), (cells, entries[:, 0])), shape=shape))

    def _entries(self) -> Iterator[np.ndarray]:
        """Yield entries, columns gene, barcode (both from 0) and count, by barcode."""
        with self._matrix.open() as content:
            line = content.readline().decode(errors="replace")
            if not line.startswith("%%MatrixMarket matrix coordinate"):
                raise InputError(f"{self._matrix} is no sparse MatrixMarket file: it starts with {line[:40]!r}.")
            while line.startswith("%"):
                line = content.readline().decode()
            n_genes, n_barcodes, n_entries = map(int, line.split())
            if (n_genes, n_barcodes) != (len(self.var), self._n_barcodes):
                raise InputError(
                    f"{self._matrix} has {n_genes:,} genes × {n_barcodes:,} barcodes, but the files beside it list {len(self.var):,} genes "
                    f"and {self._n_barcodes:,} barcodes. They are not of one set."
                )
            n_read, last = 0, 0
            try:
                for piece in pd.read_csv(content, sep=r"\s+", header=None, chunksize=ENTRIES, dtype=np.int32):
                    entries = piece.to_numpy() - np.array([1, 1, 0], np.int32)
                    barcodes = entries[:, 1]
                    if barcodes[0] < last or (np.diff(barcodes) < 0).any():
                        raise InputError(f"{self._matrix}: its entries are not sorted by barcode (second column). Sort them first.")
                    n_read, last = n_read + len(entries), barcodes[-1]
                    yield entries
            except (ValueError, pd.errors.ParserError) as error:
                raise InputError(f"{self._matrix}: after {n_read:,} entries comes what is no count: {error}.") from error
            if n_read != n_entries:
                raise InputError(f"{self._matrix} ends after {n_read:,} of {n_entries:,} entries. Delete it and download it again.")


def _found(place: Place, cells: pd.Index) -> tuple[np.ndarray, int]:
    """Return the number of each cell among the barcodes, -1 where it is none of them, and how many barcodes there are."""
    numbers, n_barcodes = np.full(len(cells), -1), 0
    with place.open() as content:
        for barcodes in pd.read_csv(content, sep="\t", header=None, usecols=[0], dtype=str, chunksize=BARCODES):
            among = cells.get_indexer(barcodes[0])
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
            pd.Series(range(len(part.var)), index=part.var["gene_id"]).groupby(level=0, sort=False).first() for part in self._parts
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


def open_triplets(files: dict[str, Path]) -> Source:
    """Open a triplet by its roles, or all triplets of a tar.

    Raises
    ------
    InputError
        If a file of a triplet is missing, is not of its set, is damaged or not sorted by barcode.
    """
    if set(files) != {"file"}:
        return Triplet({role: Place(path) for role, path in files.items()})
    path = files["file"]
    if not tarfile.is_tarfile(path):
        raise InputError(f"{path} is no tar of 10x triplets.")
    experiments: dict[str, dict[str, Place]] = {}
    with tarfile.open(path) as archive:
        for name in sorted(entry.name for entry in archive if entry.isfile()):
            if named := MEMBER.fullmatch(name):
                experiments.setdefault(named["experiment"], {})[named["role"]] = Place(path, name)
    if not experiments:
        raise InputError(f"{path}: no member is the matrix, barcodes, genes or cell_identities of a triplet.")
    return Joined({name: Triplet(places) for name, places in experiments.items()})
