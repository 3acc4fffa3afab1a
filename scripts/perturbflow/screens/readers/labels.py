"""Labels of cells in a table of their own, such as Cell Ranger's protospacer_calls_per_cell.csv, joined by barcode."""

import gzip
import logging
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from perturbflow.errors import InputError

logger = logging.getLogger(__name__)


def _table(path: Path) -> pd.DataFrame:
    """Return a table, comma- or tab-separated, plain or gzipped."""
    try:
        is_gzipped = path.open("rb").read(2) == b"\x1f\x8b"
        with gzip.open(path, "rt") if is_gzipped else path.open(encoding="utf-8") as file:
            first = file.readline()
            file.seek(0)
            return pd.read_csv(file, sep="\t" if "\t" in first else ";" if ";" in first and "," not in first else ",")
    except (OSError, EOFError, UnicodeDecodeError, pd.errors.ParserError, pd.errors.EmptyDataError) as error:
        raise InputError(
            f"{path} (source.labels) cannot be read as a table: {error}. A header and commas or tabs are expected."
        ) from error


def _suffix(barcodes: pd.Index) -> str | None:
    """Return the one suffix that all barcodes have, empty where none has any.

    None where there are several, as of lanes.
    """
    suffixes = barcodes.str.extract(r"(-\w+)?$")[0].fillna("").unique()
    return suffixes[0] if len(suffixes) == 1 else None


def with_labels(obs: pd.DataFrame, labels: Path, path: Path) -> pd.DataFrame:
    """Return obs with the columns of a table; cells that are not in the table have no values.

    The column of barcodes is the one that has most of the cells' names. Where none has any, suffixes may differ. If all
    barcodes of the screen or of the table have one suffix (`-1`) that the others lack, it is ignored.

    Parameters
    ----------
    obs
        All cells; the index holds their barcodes.
    labels
        The table, one row per cell.
    path
        The screen, for messages.

    Raises
    ------
    InputError
        If the table cannot be read, no column has barcodes of the screen, or a barcode has several rows.
    """
    table = _table(labels)
    found = _matched(table, pd.Index(obs.index.astype(str)))
    if found.column is None:
        shown = "; ".join(f"{column}: {table[column].iloc[0]}" for column in list(table)[:4] if len(table))
        raise InputError(
            f"{labels} (source.labels) has no column with barcodes of {path}, whose cells are called "
            f"{', '.join(obs.index[:2].astype(str))}, ... Its first row: {shown or 'none'}.{found.remark} "
            "Give it one, with a suffix like theirs."
        )
    cells, names = found.cells, found.names
    if names.has_duplicates:
        twice = names[names.duplicated()][0]
        raise InputError(
            f"{labels} (source.labels): barcode {twice} has several rows. Join its labels to one row per cell."
        )
    table = table.drop(columns=found.column).set_index(names)
    if not cells.isin(names).all():  # a missing value makes no number of 6 into 6.0
        table = table.astype(dict.fromkeys(table.select_dtypes("integer"), "Int64"))
    joined = table.reindex(cells).set_index(obs.index)
    if replaced := sorted(set(map(str, joined)) & set(map(str, obs))):
        logger.warning("%s: obs already has %s; the values of %s are taken", path, ", ".join(replaced), labels)
    n_labelled = f"{int(cells.isin(names).sum()):,}"
    logger.info("%s: %s of %s cells have labels in %s", path, n_labelled, f"{len(cells):,}", labels)
    return pd.concat([obs.drop(columns=replaced), joined], axis=1)


@dataclass(frozen=True)
class _Match:
    """The column of a table that has most of the cells' barcodes.

    Attributes
    ----------
    column
        None where no column has any.
    cells, names
        The barcodes of the screen and of the column, as they compare: without their suffixes where need be.
    remark
        The end of a message: barcodes that are the same but for their suffixes.
    """

    column: object
    cells: pd.Index
    names: pd.Index
    remark: str = ""


def _matched(table: pd.DataFrame, cells: pd.Index) -> _Match:
    """Return the column of barcodes: by whole barcodes, or else without the suffixes of the screen and the table."""
    texts = {
        column: pd.Index(table[column].astype(str))
        for column in table
        if not pd.api.types.is_float_dtype(table[column])
    }
    n_found = {column: int(names.isin(cells).sum()) for column, names in texts.items()}
    of_screen, remark = _suffix(cells), ""
    if not any(n_found.values()) and of_screen is not None:
        of_table = {column: suffix for column, names in texts.items() if (suffix := _suffix(names)) is not None}
        cells = cells.str.removesuffix(of_screen)
        texts |= {column: texts[column].str.removesuffix(suffix) for column, suffix in of_table.items()}
        # Of two suffixes either may be another lane, whose cells share barcodes.
        differ = [
            column for column, suffix in of_table.items() if suffix and of_screen and texts[column].isin(cells).any()
        ]
        if differ:
            remark = (
                f" Without their ends ({of_table[differ[0]]}, of the screen {of_screen}) those of column {differ[0]} "
                "are the same: of another lane?"
            )
        n_found = {column: int(names.isin(cells).sum()) for column, names in texts.items() if column not in differ}
    if not any(n_found.values()):
        return _Match(None, cells, pd.Index([]), remark)
    column = max(n_found, key=lambda column: n_found[column])
    return _Match(column, cells, texts[column], remark)
