"""Raw counts in one pass over the source: totals per cell, cells per gene, and the counts to be written.

The latter are laid aside until quality control is complete.
"""

import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.io.hdf5 import Appended
from perturbflow.io.kernels import cell_totals, pack_counts, unpack_counts
from perturbflow.io.streaming import Piece, Spool
from perturbflow.screens.efficacy import OwnCounts, OwnGenes
from perturbflow.screens.readers import NotCounts, Source

logger = logging.getLogger(__name__)

LIMITS = (("min_counts", "total_counts", 1), ("min_genes", "n_genes_by_counts", 1), ("max_pct_mt", "pct_counts_mt", -1))
"""Limit of quality control, the total that it is for, and 1 for a lower limit, -1 for an upper one."""

LOW = 10
"""Rounded logarithms are no higher. Values up to here are compared with the file's other places."""
LEAST_CELLS, ALIKE = 50, 0.2
"""The variance of sums of counts is at least their mean.

From LEAST_CELLS cells on, sums with a variance below this share of their mean are no sums of counts.
"""

REMEDIES = {1: "lower it", -1: "raise it"}


@dataclass(frozen=True)
class Genes:
    """The genes of the harmonized screen, and how those of the source become them.

    Attributes
    ----------
    code
        Number of the gene that a gene of the source becomes.
    is_mt
        Per gene, whether it is mitochondrial.
    """

    code: np.ndarray
    is_mt: np.ndarray

    def merged(self, block: sparse.csr_matrix) -> sparse.csr_matrix:
        """Sum the counts of genes that become one; genes ascend in every cell."""
        n = len(self.code)
        if n != len(self.is_mt):
            indicator = sparse.csr_matrix(
                (np.ones(n, np.float32), self.code, np.arange(n + 1)), shape=(n, len(self.is_mt))
            )
            block = sparse.csr_matrix(block @ indicator)
        block.sum_duplicates()
        return block


def totals_table(total: np.ndarray, mitochondrial: np.ndarray, n_genes: np.ndarray) -> pd.DataFrame:
    """Return totals per cell under scanpy's names and in its types.

    Percent are 0-100, and 0 in a cell without counts.
    """
    total, mitochondrial = total.astype(np.float32), mitochondrial.astype(np.float32)
    share = np.divide(mitochondrial, total, out=np.zeros_like(total), where=total > 0)
    return pd.DataFrame(
        {"total_counts": total, "n_genes_by_counts": n_genes.astype(np.int32), "pct_counts_mt": share * np.float32(100)}
    )


def _passes(totals: pd.DataFrame, qc: dict) -> Iterator[tuple[str, np.ndarray]]:
    """Yield every limit that is set, and which cells are within it."""
    for name, column, sign in LIMITS:
        if qc[name] is not None:
            yield name, (sign * totals[column] >= sign * qc[name]).to_numpy()


@dataclass
class Screened:
    """The result of one pass over the counts.

    Attributes
    ----------
    totals
        Per cell that was read: counts, genes and percent mitochondrial, over all genes of the source.
    n_cells
        Per gene, the cells within the limits that have it.
    source
        The source of the counts, or an alternative of it.
    own
        The counts of the perturbed genes.
    """

    totals: pd.DataFrame
    n_cells: np.ndarray
    spool: Spool
    source: Source
    own: OwnCounts
    n_entries: int = 0
    highest: float = 0.0
    pieces: list[tuple[Piece, Piece]] = field(default_factory=list)

    def lay_aside(self, counts: sparse.csr_matrix, is_within: np.ndarray) -> None:
        """Keep the counts of the cells within the limits."""
        packed, ends = np.empty(7 * counts.nnz, np.uint8), np.zeros(int(is_within.sum()), np.int64)
        pack_counts(counts.data, counts.indices, counts.indptr, is_within, packed, ends, self.n_cells)
        self.n_entries += counts.nnz
        self.pieces.append((self.spool.append(packed[: ends[-1] if len(ends) else 0]), self.spool.append(ends)))

    def cells(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield the packed counts of cells within the limits, and where each cell starts, block by block."""
        for packed, ends in self.pieces:
            yield self.spool.read(packed), np.append(0, self.spool.read(ends).astype(np.int64))


def _one_pass(source: Source, rows: np.ndarray, genes: Genes, qc: dict, own: OwnGenes) -> Screened:
    found: list[pd.DataFrame] = []
    screened = Screened(
        pd.DataFrame(), np.zeros(len(genes.is_mt), np.int64), Spool(source.scratch), source, OwnCounts(own)
    )
    for _, block in source.blocks(rows):
        counts = genes.merged(block)
        screened.highest = max(screened.highest, float(counts.data.max(initial=0)))
        total, mitochondrial = cell_totals(counts.data, counts.indices, counts.indptr, genes.is_mt)
        totals = totals_table(total, mitochondrial, np.diff(counts.indptr))
        found.append(totals)
        is_within = np.logical_and.reduce([np.ones(len(totals), bool), *(passes for _, passes in _passes(totals, qc))])
        screened.lay_aside(counts, is_within)
        screened.own.add(counts, total, is_within)
    screened.totals = pd.concat(found, ignore_index=True)
    return screened


def screen_counts(source: Source, rows: np.ndarray, genes: Genes, qc: dict, own: OwnGenes) -> Screened:
    """Read the raw UMI counts of the wanted rows once, from the source or from its alternative.

    Parameters
    ----------
    own
        The perturbed genes of these cells, which are counted on the way.

    Raises
    ------
    InputError
        If neither holds non-negative integers; the message names the places of the file that do.
    """
    problems = []
    candidate: Source | None = source
    while candidate is not None:
        candidate.threads, candidate.scratch = source.threads, source.scratch
        try:
            screened = _one_pass(candidate, rows, genes, qc, own)
        except NotCounts as problem:
            problems.append(f"{candidate.place}: {problem}")
            candidate = candidate.alternative
        else:
            if (
                screened.highest <= 1
                and candidate.alternative is not None
                and candidate.places_with_counts().get("counts")
            ):
                problems.append(f"{candidate.place}: it holds 0 and 1 alone")
                candidate = candidate.alternative
                continue
            if problems:
                logger.info("%s: counts are taken from %s (%s)", source.files[0], candidate.place, problems[0])
            return screened
    elsewhere = source.places_with_counts()
    fix = (
        f"Counts are in {', '.join(elsewhere)}: write counts: {next(iter(elsewhere))} into its block"
        if elsewhere
        else "Put the integer counts into X or layers['counts']"
    )
    raise InputError(
        f"{source.files[0]}: raw UMI counts are needed, {'; '.join(problems)}. {fix}; normalization is done later, on "
        "training cells."
    )


def doubtful_counts(screened: Screened) -> list[str]:
    """Return sentences on values that pass for counts and hardly are counts.

    These are binary ones, low ones beside higher ones in the file, and cells with one sum.
    """
    found, highest = screened.source.place, screened.highest
    elsewhere = screened.source.places_with_counts() if highest <= LOW else {}
    higher = [place for place, count in elsewhere.items() if count > max(highest, 1)]
    sentences = []
    if higher:
        sentences.append(
            f"no value of {found} is above {highest:g}, while {' and '.join(higher)} holds higher counts: if these are "
            f"the raw ones, set counts: {higher[0]}."
        )
    elif highest <= 1:
        sentences.append(
            f"{found} holds 0 and 1 alone: if it was made binary, name the place of the raw counts with the key "
            "counts, or give another file."
        )
    totals = screened.totals["total_counts"].astype(float)
    if not sentences and len(totals) >= LEAST_CELLS and totals.var() < ALIKE * totals.mean():
        sentences.append(
            f"all cells have nearly the same sum in {found} ({totals.min():,.0f} to {totals.max():,.0f}), as "
            "normalized values have that were rounded, or counts that were sampled down. If the file holds the raw "
            "counts, name their place with the key counts."
        )
    return sentences


def within_limits(screened: Screened, qc: dict, path: object) -> tuple[np.ndarray, dict[str, int]]:
    """Return which of the read cells are within all limits, and how many cells each limit drops.

    A cell counts for the first limit that drops it.

    Raises
    ------
    InputError
        If the limits leave no cell; all that drop some are named.
    """
    is_kept = np.ones(len(screened.totals), bool)
    dropped = {}
    for name, passes in _passes(screened.totals, qc):
        dropped[f"qc.{name}"] = int((is_kept & ~passes).sum())
        is_kept &= passes
    if not is_kept.any():
        every = np.ones(len(is_kept), bool)
        raise InputError(
            f"{path}: the limits under qc leave no cell. Of all cells, {limits_on(every, screened, qc)}. Change them "
            "in the dataset's block; null switches a limit off."
        )
    return is_kept, dropped


def limits_on(cells: np.ndarray, screened: Screened, qc: dict) -> str:
    """Return, in words, how many of these cells (a mask of the read ones) each limit drops, the strictest first."""
    of_limit = {name: (column, REMEDIES[sign]) for name, column, sign in LIMITS}
    lost = sorted(((int((cells & ~passes).sum()), name) for name, passes in _passes(screened.totals, qc)), reverse=True)
    sentences = [
        f"qc.{name} = {qc[name]} drops {n:,} of {cells.sum():,} (their median: "
        f"{screened.totals.loc[cells, of_limit[name][0]].median():g}); {of_limit[name][1]}"
        for n, name in lost
        if n
    ]
    return ". ".join(sentences)


def write_counts(
    group: h5py.Group, screened: Screened, is_kept: np.ndarray, is_seen: np.ndarray, is_mt: np.ndarray, threads: int
) -> pd.DataFrame:
    """Write X as anndata's CSR and return the totals per cell over the kept genes.

    Parameters
    ----------
    group
        To be filled: `data` float32, `indices` int32 and `indptr`, in chunks that threads encode.
    is_kept
        Per cell within the limits, whether it is written.
    is_seen, is_mt
        Per gene, whether it is written, and whether it is mitochondrial.
    """
    gene = np.where(is_seen, np.cumsum(is_seen) - 1, -1).astype(np.int32)
    totals, first = [], 0
    with ThreadPoolExecutor(threads) as pool:
        written = {
            name: Appended(group, name, dtype, screened.n_entries, pool)
            for name, dtype in (("data", np.float32), ("indices", np.int32))
        }
        for packed, starts in screened.cells():
            kept = is_kept[first : first + len(starts) - 1]
            first += len(kept)
            # An entry takes a byte or more.
            data, indices = np.empty(len(packed) + 1, np.float32), np.empty(len(packed) + 1, np.int32)
            indptr = np.zeros(int(kept.sum()) + 1, np.int64)
            unpack_counts(packed, starts, kept, gene, data, indices, indptr)
            written["data"].append(data[: indptr[-1]])
            written["indices"].append(indices[: indptr[-1]])
            total, mitochondrial = cell_totals(data, indices, indptr, is_mt[is_seen])
            totals.append(totals_table(total, mitochondrial, np.diff(indptr)))
        for dataset in written.values():
            dataset.finish()
    table = pd.concat(totals, ignore_index=True)
    indptr = np.append(0, np.cumsum(table["n_genes_by_counts"].to_numpy(np.int64)))
    group.create_dataset("indptr", data=indptr, compression="gzip", shuffle=True)
    group.attrs.update(
        {"encoding-type": "csr_matrix", "encoding-version": "0.1.0", "shape": (len(table), int(is_seen.sum()))}
    )
    return table
