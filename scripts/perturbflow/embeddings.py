"""Vectors of genes: the knowledge of a model about a gene that it never saw perturbed."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.linalg import eigh

from perturbflow.errors import InputError
from perturbflow.genes.symbols import approved_symbol, candidates, entity_of, members_of, without_dose
from perturbflow.io.files import atomic, read_json
from perturbflow.pairs import Pairs, Screen

logger = logging.getLogger(__name__)


N_COEXPRESSION = 32


@dataclass(frozen=True)
class Embeddings:
    """Gene vectors, one row per gene; a gene without a source row has NaN there.

    Attributes
    ----------
    table
        Genes × dimensions. Its attribute `knows` is source → the part of the screen's outcome that it may know.
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

    @property
    def knows(self) -> dict[str, str]:
        """Source → the part of the screen's outcome that it may know, in words; sources without any are not in it."""
        return self.table.attrs.get("knows", {})

    def of_source(self, source: str) -> "Embeddings":
        """Return the columns of one source, without the genes that it has no row for."""
        columns = [column for column in self.table if column.split(":")[0] == source]
        return Embeddings(self.table[columns].dropna(how="all"))

    def without_row(self) -> dict[str, list[str]]:
        """Return the genes that each source has no row for."""
        return {
            source: self.table.index.difference(self.of_source(source).table.index).tolist() for source in self.sources
        }

    @property
    def without_vector(self) -> list[str]:
        """Genes that no source has a row for."""
        return self.table.index[self.table.isna().all(axis=1)].tolist()

    def with_genes_of(self, others: "Embeddings", genes: Iterable[str]) -> "Embeddings":
        """Return these vectors, and those of further genes that others hold."""
        further = [gene for gene in dict.fromkeys(genes) if gene in others.table.index and gene not in self.table.index]
        table = pd.concat([self.table, others.table.loc[further, self.table.columns]])
        table.attrs = self.table.attrs
        return Embeddings(table)

    def standardized(self, training_genes: list[str]) -> pd.DataFrame:
        """Return the table centred and scaled by the training genes; missing values become 0, their mean."""
        reference = self.table.loc[self.table.index.intersection(training_genes)]
        scale = reference.std(ddof=0)
        return ((self.table - reference.mean()) / scale.where(scale > 0, 1.0)).fillna(0.0)


@dataclass(frozen=True)
class Components:
    """The leading principal components of training cells, genes scaled to unit variance.

    Attributes
    ----------
    genes
        Highly variable and perturbed genes.
    mean, scale
        Of each gene, (genes,).
    eigenvalues, vectors
        (components,), descending, and (genes, components).
    """

    genes: list[str]
    mean: np.ndarray
    scale: np.ndarray
    eigenvalues: np.ndarray
    vectors: np.ndarray

    @classmethod
    def of(cls, training: Pairs) -> "Components":
        """Sum products of genes block by block: memory does not grow with the cells."""
        n_genes, n_cells = len(training.genes), len(training.rows)
        sums, products = np.zeros(n_genes), np.zeros((n_genes, n_genes))
        for _, block in training.blocks():
            X = block.toarray().astype(np.float64)
            sums += X.sum(axis=0)
            products += X.T @ X
        mean = sums / n_cells
        covariance = products / n_cells - np.outer(mean, mean)
        spread = np.sqrt(np.maximum(covariance.diagonal(), 0.0))
        scale = np.where(spread > 1e-8, spread, 1.0)
        n_leading = min(N_COEXPRESSION, n_genes)
        leading = [n_genes - n_leading, n_genes - 1]
        eigenvalues, vectors = eigh(covariance / np.outer(scale, scale), subset_by_index=leading)
        eigenvalues, vectors = np.maximum(eigenvalues[::-1], 0.0), vectors[:, ::-1]
        # The sign of an eigenvector is arbitrary: fixed here, so that equal data give equal numbers.
        signs = np.sign(vectors[np.abs(vectors).argmax(axis=0), np.arange(n_leading)])
        return cls(training.genes, mean, scale, eigenvalues, vectors * signs)

    def table(self, loadings: np.ndarray, genes: list[str]) -> pd.DataFrame:
        """Return loadings, (genes, components), as vectors of the source coexpression."""
        return pd.DataFrame(loadings, index=genes, columns=[f"coexpression:{i}" for i in range(loadings.shape[1])])

    @property
    def loadings(self) -> pd.DataFrame:
        """Correlations of the genes with the components, genes × components: vectors × √eigenvalues."""
        return self.table(self.vectors * np.sqrt(self.eigenvalues), self.genes)

    def loadings_of(self, genes: list[str], screen: Screen, cells: Pairs) -> pd.DataFrame:
        """Return the correlations of other measured genes with the components, from one pass over the counts.

        NaN for a gene that does not vary.

        Parameters
        ----------
        genes
            Measured genes of the screen.
        screen, cells
            The same cells in the same order: counts of all genes, and pairs.h5ad.
        """
        columns = screen.var.index.get_indexer(genes)
        sums, squares, products = (
            np.zeros(len(genes)),
            np.zeros(len(genes)),
            np.zeros((len(genes), self.vectors.shape[1])),
        )
        for rows, counts in screen.blocks():
            places = np.flatnonzero(screen.is_train[rows]) + rows.start
            X = sparse.csr_matrix((screen.normalized(rows, counts), counts.indices, counts.indptr), counts.shape)
            X = X[places - rows.start][:, columns].astype(np.float64)
            scores = ((cells.X[places].toarray() - self.mean) / self.scale) @ self.vectors  # (cells, components)
            products += X.T @ scores
            sums += np.asarray(X.sum(axis=0)).ravel()
            squares += np.asarray(X.power(2).sum(axis=0)).ravel()
        n = max(1, int(screen.is_train.sum()))
        spread = np.sqrt(np.maximum(squares / n - (sums / n) ** 2, 0.0))
        unit = np.outer(np.where(spread > 1e-8, spread, np.nan), np.sqrt(np.maximum(self.eigenvalues, 1e-12)))
        return self.table(products / n / unit, genes)


def coexpression(pairs: Pairs, genes: list[str]) -> pd.DataFrame:
    """Return each gene's loadings on the principal components of training cells, scaled by the components' deviations.

    Genes that vary together over unperturbed and perturbed training cells lie close together. Genes × 32 at most; NaN
    for a gene that is not in pairs.h5ad.
    """
    return Components.of(pairs.roles("train")).loadings.reindex(genes)


def rows_of(table: pd.DataFrame, genes: list[str]) -> pd.DataFrame:
    """Return the rows of these genes, NaN where there is none.

    A gene that goes by an alias finds the row of the one gene it can be. A drug at a dose (`DRUG@dose`) finds that of
    the drug.
    """
    known = set(table.index)

    def row(gene: str) -> str:
        name = gene if gene in known else without_dose(gene)[0]
        return name if name in known or len(meant := candidates(name)) != 1 else meant[0]

    return table.reindex(list(map(row, genes))).set_axis(genes)


def from_table(path: Path, genes: list[str]) -> pd.DataFrame:
    """Return the rows of a user's table: gene symbol in the first column, numbers after it.

    Genes without a row are NaN. A row goes by the approved symbol, a previous one, an Ensembl id, an alias, or any of
    these in other letters. The name has to be one gene's alone.
    """
    table = _read(path)
    table.index = [_today(gene) for gene in table.index]
    table = table[~table.index.duplicated()]
    found = rows_of(table, genes)
    missing = found.index[found.isna().all(axis=1)].tolist()
    by_name: dict[str, set[str]] = {}
    for name in table.index if missing else ():
        for meant in {name.casefold(), *(gene.casefold() for gene in candidates(name) or candidates(name.upper()))}:
            by_name.setdefault(meant, set()).add(name)
    for gene in missing:
        names = by_name.get(without_dose(gene)[0].casefold(), set())
        if len(names) == 1:
            found.loc[gene] = table.loc[names.pop()]
    if found.isna().all(axis=None):
        raise InputError(
            f"{path} has no row for any of the {len(genes)} genes that are asked for (for example "
            f"{', '.join(genes[:5])}); is its first column the gene symbol?"
        )
    return found


def _today(gene: object) -> str:
    """Return the approved symbol of a row's name."""
    return approved_symbol(str(gene).strip())


def _read(path: Path) -> pd.DataFrame:
    """Return a user's table as it is, genes in its index."""
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
            f"{path}: the first column holds gene symbols, all others numbers; these hold none: "
            f"{', '.join(map(str, words[:5])) or '(no columns)'}."
        )
    return table


def _joined_sources(
    genes: list[str], sources: list, priors: Iterable[Path], of_coexpression: Callable[[], pd.DataFrame]
) -> pd.DataFrame:
    """Return the vectors of genes from all sources, side by side; parameters as in `embeddings`."""
    of_priors = iter(priors)
    tables: list[pd.DataFrame] = []
    knows: dict[str, str] = {}
    for source in sources:
        if source == "coexpression":
            table = of_coexpression().reindex(genes)
        elif isinstance(source, str):
            vectors = pd.read_parquet(next(of_priors))
            knows |= {source: vectors.attrs["knows"]} if "knows" in vectors.attrs else {}
            table = rows_of(vectors, genes).add_prefix(f"{source}:")
        else:
            path = Path(source["file"])
            table = from_table(path, genes).add_prefix(f"{path.stem}:")
        tables.append(table)
    joined = pd.concat(tables, axis=1).astype(np.float32)
    joined.index.name = "gene"
    joined.attrs = {"knows": knows} if knows else {}
    for source, outcome in knows.items():
        logger.warning("%s: these vectors know %s", source, outcome)
    return joined


def _log_coverage(found: Embeddings) -> None:
    """Log how many perturbed genes have a row in each source, and warn of those without any."""
    n = len(found.table)
    for source, missing in found.without_row().items():
        logger.info("%s: %d of %d perturbed genes have a row%s", source, n - len(missing), n, _list_of(missing))
    if unknown := found.without_vector:
        logger.warning(
            "%d of %d perturbed genes have no row in any source: models that never saw them perturbed predict the "
            "same as for any other such gene%s",
            len(unknown),
            n,
            _list_of(unknown),
        )


def embeddings(pairs: Path, embeddings: Path, sources: list, priors: list[Path] | None = None) -> None:
    """Write one row per perturbed gene.

    Parameters
    ----------
    pairs
        Cells of one split; co-expression is computed on its training cells.
    embeddings
        Parquet to be written: gene symbol as index, one float column per dimension, named after its source; NaN where
        the source has no row. Its attribute `knows` is source → the part of the screen's outcome that it may know.
    sources
        "coexpression", the name of a prior, or {"file": path}, concatenated in this order.
    priors
        Vectors of all genes, one table per prior among the sources, in their order.
    """
    cells = Pairs.open(pairs)
    genes = sorted({gene for label in cells.perturbations for gene in members_of(label)})
    table = _joined_sources(genes, sources, priors or [], lambda: coexpression(cells, genes))
    _log_coverage(Embeddings(table))
    with atomic(embeddings) as partial:
        table.to_parquet(partial)


def gene_vectors(
    pairs: Path,
    harmonized: Path,
    split: Path,
    embeddings: Path,
    gene_vectors: Path,
    sources: list,
    priors: list[Path] | None = None,
) -> None:
    """Write one row per gene that any source knows: what-if questions may name them all.

    The rows of perturbed genes are those of embeddings.parquet. By co-expression every measured gene has one, highly
    variable or not: its correlations with the same components of the same training cells.

    Parameters
    ----------
    pairs, harmonized, split, embeddings
        Files of one split.
    gene_vectors
        Parquet to be written, as embeddings.parquet.
    sources, priors
        As in `embeddings`.
    """
    cells, screen, own = Pairs.open(pairs), Screen.open(harmonized, read_json(split)), Embeddings.read(embeddings)
    measured = screen.var.index.astype(str).tolist()
    known = [{*pd.read_parquet(path, columns=[]).index.astype(str)} for path in priors or []]
    known += [{*map(_today, _read(Path(source["file"])).index)} for source in sources if isinstance(source, dict)]
    known += [set(measured)] if "coexpression" in sources else []
    others = sorted(set[str]().union(*known) - {*own.table.index, *map(entity_of, own.table.index)})

    def of_coexpression() -> pd.DataFrame:
        components = Components.of(cells.roles("train"))
        further = [gene for gene in others if gene in set(measured) - set(cells.genes)]
        return pd.concat([components.loadings, components.loadings_of(further, screen, cells)])

    table = _joined_sources(others, sources, priors or [], of_coexpression).dropna(how="all")
    found = pd.concat([own.table, table])
    found.index.name, found.attrs = "gene", own.table.attrs
    logger.info("%d genes have a vector, %d of them perturbed in this screen", len(found), len(own.table))
    with atomic(gene_vectors) as partial:
        found.to_parquet(partial)


def _list_of(genes: list[str]) -> str:
    return f" (without: {', '.join(genes)})" if genes else ""
