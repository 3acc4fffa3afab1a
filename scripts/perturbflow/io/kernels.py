"""Compiled loops over counts, at the speed of memory.

They release the interpreter's lock, so that threads run side by side.
"""

import numpy as np

from perturbflow.io.compiled import compiled

TOLERANCE = 1e-4
"""How far from an integer a count may be: expm1 of float32 logarithms is that far off."""

# Positions are unsigned and rows are slices: numba then does not look for negative indices at every value.


@compiled(nogil=True)
def place_counts(tile: np.ndarray, band: np.ndarray, column: int, highest: int) -> bool:
    """Write a tile (rows × some columns) into an integer band (rows × genes) from `column` on.

    It returns False unless all values are integers from 0 to `highest`.
    """
    n_bad = np.int32(0)
    width = tile.shape[1]
    for i in range(tile.shape[0]):
        values, counts = tile[i], band[i, column : column + width]
        for j in range(width):
            count = np.int32(values[j])
            # NaN and values that are too large become negative numbers, or other numbers.
            n_bad |= np.int32(np.float32(count) != values[j]) | np.int32(np.uint32(count) > np.uint32(highest))
            counts[j] = count
    return n_bad == 0


@compiled(nogil=True)
def round_counts(values: np.ndarray, rounded: np.ndarray, highest: int) -> bool:
    """Write the nearest integers as float32; False where a value is no count."""
    is_good = True
    for i in range(len(values)):
        nearest = np.rint(values[i])
        is_good &= (nearest >= 0) & (nearest <= highest) & (abs(values[i] - nearest) <= TOLERANCE)
        rounded[i] = nearest
    return is_good


@compiled(nogil=True)
def compress_rows(
    band: np.ndarray, rows: np.ndarray, indices: np.ndarray, data: np.ndarray, indptr: np.ndarray
) -> None:
    """Write the nonzero values of the named rows as CSR; `indices` and `data` have room for all values."""
    at = np.uint64(0)
    for k in range(len(rows)):
        values = band[rows[k]]
        for j in range(len(values)):
            # Zeros are written, too, and overwritten by the next value: that is faster than a branch.
            indices[at] = j
            data[at] = values[j]
            at += np.uint64(values[j] != 0)
        indptr[k + 1] = at


@compiled(nogil=True)
def group_entries(
    rows: np.ndarray,
    indptr: np.ndarray,
    first_column: int,
    values: np.ndarray,
    position: np.ndarray,
    n_per_group: int,
    n_groups: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Group the entries of some columns (CSC) by group of rows, columns ascending within a group.

    `position` gives the place of a source row among the wanted rows, -1 for any other row. It returns the first entry
    per group, and the row within the group, column and value of each entry.
    """
    starts = np.zeros(n_groups + 1, np.int64)
    for i in range(len(rows)):
        if position[rows[i]] >= 0:
            starts[position[rows[i]] // n_per_group + 1] += 1
    for group in range(n_groups):
        starts[group + 1] += starts[group]
    free = starts[:-1].copy()
    n = starts[-1]
    row_of, column_of, value_of = np.empty(n, np.int32), np.empty(n, np.int32), np.empty(n, np.float32)
    for column in range(len(indptr) - 1):
        for i in range(indptr[column], indptr[column + 1]):
            place = position[rows[i]]
            if place >= 0:
                at = free[place // n_per_group]
                free[place // n_per_group] = at + 1
                row_of[at] = place % n_per_group
                column_of[at] = first_column + column
                value_of[at] = values[i]
    return starts, row_of, column_of, value_of


@compiled(nogil=True, fastmath={"reassoc"})  # sums of counts are exact in any order
def cell_totals(
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, is_mt: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the counts per cell, all and mitochondrial."""
    total, mitochondrial = np.zeros(len(indptr) - 1, np.float64), np.zeros(len(indptr) - 1, np.float64)
    for cell in range(len(indptr) - 1):
        counts, genes = data[indptr[cell] : indptr[cell + 1]], indices[indptr[cell] : indptr[cell + 1]]
        in_cell = in_mitochondria = 0.0
        for i in range(len(counts)):
            in_cell += counts[i]
            in_mitochondria += counts[i] * is_mt[np.uint32(genes[i])]
        total[cell] = in_cell
        mitochondrial[cell] = in_mitochondria
    return total, mitochondrial


@compiled(nogil=True)
def add_moments(
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, group: np.ndarray, sums: np.ndarray, squares: np.ndarray
) -> None:  # fmt: skip
    """Add the rows of a CSR matrix, and their squares, to those of their groups, (groups, columns) each."""
    for cell in range(len(group)):
        total, total_of_squares = sums[group[cell]], squares[group[cell]]
        for i in range(indptr[cell], indptr[cell + 1]):
            value = np.float64(data[i])
            total[np.uint32(indices[i])] += value
            total_of_squares[np.uint32(indices[i])] += value * value


@compiled(nogil=True)
def add_rows(data: np.ndarray, indices: np.ndarray, indptr: np.ndarray, group: np.ndarray, sums: np.ndarray) -> None:
    """Add the rows of a CSR matrix to those of their groups, (groups, columns)."""
    for cell in range(len(group)):
        total = sums[group[cell]]
        for i in range(indptr[cell], indptr[cell + 1]):
            total[np.uint32(indices[i])] += data[i]


@compiled(nogil=True)
def pack_counts(
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray,
    is_wanted: np.ndarray, packed: np.ndarray, ends: np.ndarray, n_cells: np.ndarray,
) -> None:  # fmt: skip
    """Write the wanted cells in about a byte per entry, and where each of them ends.

    It adds to the number of cells per gene. The high half of a byte is the number of genes without a count before this
    one, the low half the count. If one of them is 15 or more (3 % of the entries of a screen), a zero byte comes first.
    Then both follow in three bytes each. `packed` has room for 7 bytes per entry.
    """
    at = np.uint64(0)
    cell = 0
    for row in range(len(indptr) - 1):
        if is_wanted[row]:
            counts, genes = data[indptr[row] : indptr[row + 1]], indices[indptr[row] : indptr[row + 1]]
            expected = np.uint32(0)
            for i in range(len(counts)):
                gene, count = np.uint32(genes[i]), np.uint32(counts[i])
                skipped = np.uint32(gene - expected)
                expected = gene + 1
                n_cells[gene] += 1
                if skipped < 15 and count <= 15:
                    packed[at] = skipped << 4 | count
                    at += np.uint64(1)
                else:
                    packed[at] = 0
                    for byte in range(3):
                        packed[at + np.uint64(1 + byte)] = skipped >> (8 * byte) & 0xFF
                        packed[at + np.uint64(4 + byte)] = count >> (8 * byte) & 0xFF
                    at += np.uint64(7)
            ends[cell] = at
            cell += 1


@compiled(nogil=True)
def unpack_counts(
    packed: np.ndarray, starts: np.ndarray, is_kept: np.ndarray, gene: np.ndarray,
    data: np.ndarray, indices: np.ndarray, indptr: np.ndarray,
) -> None:  # fmt: skip
    """Write the kept cells and genes as CSR.

    `starts` gives where each cell starts, and the last one ends; `gene` the new number of a gene, -1 for a dropped one.
    `data` and `indices` have room for one value more.
    """
    at = np.uint64(0)
    cell = 0
    for row in range(len(starts) - 1):
        if is_kept[row]:
            source = np.uint64(starts[row])
            end = np.uint64(starts[row + 1])
            place = np.uint32(0)
            while source < end:
                byte = packed[source]
                if byte:
                    place += np.uint32(byte >> 4)
                    count = np.uint32(byte & 0xF)
                    source += np.uint64(1)
                else:
                    count = np.uint32(0)
                    for k in range(3):
                        place += np.uint32(packed[source + np.uint64(1 + k)]) << np.uint32(8 * k)
                        count |= np.uint32(packed[source + np.uint64(4 + k)]) << np.uint32(8 * k)
                    source += np.uint64(7)
                # As in `compress_rows`.
                kept = gene[place]
                place += np.uint32(1)
                data[at] = count
                indices[at] = kept
                at += np.uint64(kept >= 0)
            cell += 1
            indptr[cell] = at


@compiled(nogil=True)
def shuffle_bytes(values: np.ndarray, planes: np.ndarray) -> None:
    """Write the bytes of 32-bit values as four planes, lowest bytes first: HDF5's shuffle filter."""
    for i in range(len(values)):
        value = values[i]
        planes[0, i] = value & 0xFF
        planes[1, i] = (value >> 8) & 0xFF
        planes[2, i] = (value >> 16) & 0xFF
        planes[3, i] = value >> 24
