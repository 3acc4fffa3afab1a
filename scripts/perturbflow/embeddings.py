"""Vectors of perturbed genes: what a model can know of a gene that it never saw perturbed."""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from perturbflow.errors import InputError
from perturbflow.files import atomic
from perturbflow.pairs import Pairs
from perturbflow.symbols import approved_symbol, members_of

logger = logging.getLogger(__name__)

N_COEXPRESSION = 32


@dataclass(frozen=True)
class Embeddings:
    """Gene vectors, one row per gene; a gene without a source row has NaN there.

    Attributes
    ----------
    table
        Genes × dimensions.
    """

    table: pd.DataFrame

    @classmethod
    def read(cls, path: Path) -> "Embeddings":
        """Read embeddings.parquet."""
        return cls(pd.read_parquet(path))

    @property
    def sources(self) -> list[str]:
        """Names of the sources that the columns come from, in order."""
        return list(dict.fromkeys(column.split(":")[0] for column in self.table))

    def of_source(self, source: str) -> "Embeddings":
        """Return the columns of one source, without the genes that it has no row for."""
        columns = [column for column in self.table if column.split(":")[0] == source]
        return Embeddings(self.table[columns].dropna(how="all"))

    def standardized(self, training_genes: list[str]) -> pd.DataFrame:
        """Return the table centred and scaled by the training genes; what is missing becomes 0, their mean."""
        reference = self.table.loc[self.table.index.intersection(training_genes)]
        scale = reference.std(ddof=0)
        return ((self.table - reference.mean()) / scale.where(scale > 0, 1.0)).fillna(0.0)


def coexpression(pairs: Pairs, genes: list[str]) -> pd.DataFrame:
    """Return each gene's loadings on the principal components of training cells, scaled by the components' deviations.

    Genes that vary together over unperturbed and perturbed training cells lie close together. Genes × 32 at most;
    NaN for a gene that was not measured.
    """
    X = pairs.roles("train").X.astype(np.float64)
    mean = np.asarray(X.mean(axis=0)).ravel()
    covariance = np.asarray((X.T @ X).todense()) / X.shape[0] - np.outer(mean, mean)
    spread = np.sqrt(np.maximum(covariance.diagonal(), 0.0))
    scale = np.where(spread > 1e-8, spread, 1.0)
    eigenvalues, vectors = np.linalg.eigh(covariance / np.outer(scale, scale))
    leading = np.argsort(eigenvalues)[::-1][: min(N_COEXPRESSION, len(pairs.genes))]
    # The sign of an eigenvector is arbitrary: fixed here, so that equal data give equal numbers.
    signs = np.sign(vectors[np.abs(vectors[:, leading]).argmax(axis=0), leading])
    loadings = vectors[:, leading] * signs * np.sqrt(np.maximum(eigenvalues[leading], 0.0))
    table = pd.DataFrame(loadings, index=pairs.genes, columns=[f"coexpression:{i}" for i in range(len(leading))])
    return table.reindex(genes)


def from_table(path: Path, genes: list[str]) -> pd.DataFrame:
    """Return the rows of a user's table: gene symbol in the first column, numbers after it."""
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, sep="\t")
    except (ValueError, OSError, pd.errors.ParserError) as error:
        raise InputError(
            f"{path} cannot be read as {'parquet' if path.suffix == '.parquet' else 'a tab-separated table'}: {error}."
        ) from error
    if isinstance(table.index, pd.RangeIndex):
        table = table.set_index(table.columns[0])
    words = [column for column in table if not pd.api.types.is_numeric_dtype(table[column])]
    if words or table.shape[1] == 0:
        raise InputError(
            f"{path}: the first column holds gene symbols, all others numbers; these hold none: {', '.join(map(str, words[:5])) or '(no columns)'}."
        )
    table.index = [approved_symbol(str(gene)) for gene in table.index]
    table = table[~table.index.duplicated()]
    table.columns = [f"{path.stem}:{column}" for column in table.columns]
    found = table.reindex(genes)
    n_found = int(found.notna().any(axis=1).sum())
    if n_found == 0:
        raise InputError(
            f"{path} has no row for any of the {len(genes)} perturbed genes (for example {', '.join(genes[:5])}); is its first column the gene symbol?"
        )
    return found


def embeddings(pairs: Path, embeddings: Path, sources: list) -> None:
    """Write one row per perturbed gene.

    Parameters
    ----------
    pairs
        Cells of one split; co-expression is computed on its training cells.
    embeddings
        Parquet to be written: gene symbol as index, one float column per dimension, NaN where a source has no row.
    sources
        "coexpression" or {"file": path}, concatenated in this order.
    """
    cells = Pairs.read(pairs)
    genes = sorted({gene for label in cells.perturbations for gene in members_of(label)})
    tables = [coexpression(cells, genes) if source == "coexpression" else from_table(Path(source["file"]), genes) for source in sources]
    table = pd.concat(tables, axis=1).astype(np.float32)
    table.index.name = "gene"
    missing = table.index[table.isna().all(axis=1)].tolist()
    if missing:
        logger.warning(
            "%d of %d perturbed genes have no row: %s; models give them the mean vector", len(missing), len(genes), ", ".join(missing)
        )
    logger.info("%d perturbed genes × %d dimensions", *table.shape)
    with atomic(embeddings) as partial:
        table.to_parquet(partial)
