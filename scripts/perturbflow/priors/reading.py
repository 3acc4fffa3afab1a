"""Functions that the readers and embeddings of all priors share."""

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.sparse.linalg import svds

from perturbflow.errors import InputError
from perturbflow.genes.symbols import approved_symbol

# Of every prior's vectors; chosen by inner folds over training genes (docs/results/priors.md, "Choices").
N_DIMENSIONS = 64
BLOCK_ROWS = 1_000_000
ALIKE = 1e-6  # relative to the largest entry: entries that are closer differ by rounding


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedIOBase]:
    """Open a file of text, gzipped or not, whatever its name; an error in reading it names the file."""
    try:
        with path.open("rb") as file:
            is_gzipped = file.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if is_gzipped else path.open("rb") as file:
            yield file
    except (
        OSError,
        EOFError,
        zlib.error,
        UnicodeDecodeError,
        pd.errors.ParserError,
        pd.errors.EmptyDataError,
    ) as error:
        raise InputError(
            f"{path} cannot be read: {error}. Is it the file that the configuration says it is?"
        ) from error


def first_line(path: Path) -> str:
    """Return the first line of a text file."""
    with opened(path) as file:
        return file.readline(10_000).decode("utf-8").rstrip("\r\n")


def read_table(path: Path, **options: object) -> pd.DataFrame:
    """Read a table of text as strings; a blank stays a blank, and the gene NA is a gene."""
    with opened(path) as file:
        return pd.read_csv(file, **{"dtype": str, "keep_default_na": False, "quoting": 3, "sep": "\t", **options})


def blocks_of(path: Path, **options: object) -> Iterator[pd.DataFrame]:
    """Yield a table of text in blocks of at most a million rows, so that a file of any size fits in memory.

    There is at least one block, however few rows.
    """
    with (
        opened(path) as file,
        pd.read_csv(file, **{"keep_default_na": False, "quoting": 3, "chunksize": BLOCK_ROWS, **options}) as reader,
    ):
        yield from reader


def approved(symbols: pd.Series, organism: str) -> pd.Series:
    """Return the approved symbols; each is looked up once."""
    return symbols.map({symbol: approved_symbol(symbol, organism) for symbol in symbols.unique()})


def leading_factors(matrix: sparse.csr_matrix, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return left singular vectors and values of the n largest, or of as many as there are.

    Equal input gives equal numbers.

    Returns
    -------
    vectors
        (rows, n); the sign of each is that of `signed`.
    values
        (n,), descending.
    """
    n = min(n, min(matrix.shape) - 1)
    vectors, values, _ = svds(matrix.astype(float), k=n, v0=np.ones(min(matrix.shape)))
    order = np.argsort(values)[::-1]
    return signed(vectors[:, order]), values[order]


def signed(vectors: np.ndarray) -> np.ndarray:
    """Return vectors (rows, n), each with the sign that makes the first of its largest entries positive.

    A decomposition leaves the sign open.
    """
    size = np.abs(vectors)
    first = (size >= (1.0 - ALIKE) * size.max(axis=0)).argmax(axis=0)
    return vectors * np.where(vectors[first, np.arange(vectors.shape[1])] < 0, -1.0, 1.0)
