"""Genes by their known functions: GO annotations → vectors.

It reads the annotation packages of Bioconductor (org.Hs.eg.db), GAF 2.x with or without the ontology, and a plain
table.
"""

import sqlite3
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.priors.reading import N_DIMENSIONS, approved, first_line, leading_factors, opened, read_table

LEAST_GENES = 3  # a term of fewer genes hardly shows which genes are alike
# ND means that nothing is known. IEP and HEP are inferred from expression, and models are scored on expression.
LEFT_OUT_EVIDENCE = ("ND", "IEP", "HEP")
SQLITE = b"SQLite format 3\0"


def annotation_vectors(
    files: dict[str, Path], organism: str = "human", n_dimensions: int = N_DIMENSIONS
) -> pd.DataFrame:
    """Return one vector per annotated gene: the leading factors of gene × term, terms weighted by their information.

    A term weighs ln(N/n) where n of N genes have it or a more special one (Resnik 1995). Genes are scaled to unit
    length, so that the inner product of two is the cosine of their terms.

    Parameters
    ----------
    files
        "file" or "annotations", and where annotations are of GAF or a table, "ontology" (OBO). Without the ontology a
        gene has its direct terms, and no more general ones.

    Returns
    -------
    Genes × n_dimensions.
    """
    annotations = read_annotations(files, organism)
    gene, term = annotations["gene"].astype("category"), annotations["term"].astype("category")
    shape = len(gene.cat.categories), len(term.cat.categories)
    has = sparse.csr_matrix((np.ones(len(annotations)), (gene.cat.codes, term.cat.codes)), shape=shape)
    n_genes = np.asarray(has.sum(axis=0)).ravel()
    information = np.where(n_genes >= LEAST_GENES, np.log(len(gene.cat.categories) / n_genes), 0.0)
    weighted = has.multiply(information).tocsr()
    length = np.sqrt(np.asarray(weighted.multiply(weighted).sum(axis=1)).ravel())
    informative = length > 0
    if informative.sum() <= n_dimensions:
        raise InputError(
            f"{', '.join(map(str, files.values()))}: only {informative.sum()} genes share a GO term with others; is "
            "this the whole of the annotations?"
        )
    unit = sparse.diags(1.0 / length[informative]) @ weighted[informative][:, information > 0]
    vectors, values = leading_factors(unit, n_dimensions)
    return pd.DataFrame(vectors * values, index=gene.cat.categories[informative].astype(str))


def read_annotations(files: dict[str, Path], organism: str = "human") -> pd.DataFrame:
    """Return the distinct rows gene (approved symbol) and term, with more general terms where the ontology is known."""
    path = files.get("annotations") or files.get("file")
    if path is None:
        raise InputError(f"GO annotations: a file of role 'annotations' is needed, found {', '.join(files)}.")
    with path.open("rb") as file:
        is_database = file.read(len(SQLITE)) == SQLITE
    if is_database or tarfile.is_tarfile(path):
        table = _from_database(path)
    else:
        table = _from_gaf(path) if first_line(path).startswith("!") else _from_table(path)
        if "ontology" in files:
            table = with_ancestors(table, files["ontology"])
    return table.assign(gene=approved(table["gene"], organism)).drop_duplicates(ignore_index=True)


@contextmanager
def _database(path: Path) -> Iterator[Path]:
    """Yield an SQLite file: the path itself, or the one inside a source package of Bioconductor."""
    if not tarfile.is_tarfile(path):
        yield path
        return
    with tarfile.open(path) as archive, tempfile.TemporaryDirectory() as folder:
        member = next((member for member in archive if member.isfile() and member.name.endswith(".sqlite")), None)
        if member is None:
            raise InputError(f"{path} holds no .sqlite file; a source package org.*.eg.db of Bioconductor is expected.")
        member.name = "annotations.sqlite"
        archive.extract(member, folder, filter="data")
        yield Path(folder) / member.name


def _from_database(path: Path) -> pd.DataFrame:
    """Read an annotation package of Bioconductor.

    Its tables *_all hold the more general terms, each with the evidence of the term that implies it.
    """
    codes = ", ".join("?" * len(LEFT_OUT_EVIDENCE))
    query = " UNION ALL ".join(
        f"SELECT DISTINCT symbol AS gene, go_id AS term FROM go_{aspect}_all JOIN gene_info USING (_id) WHERE evidence "
        f"NOT IN ({codes})"
        for aspect in ("bp", "mf", "cc")
    )
    with _database(path) as database:
        connection = sqlite3.connect(f"file:{database.absolute()}?mode=ro", uri=True)
        try:
            return pd.read_sql_query(query, connection, params=LEFT_OUT_EVIDENCE * 3)
        except (sqlite3.DatabaseError, pd.errors.DatabaseError) as error:
            raise InputError(f"{path} is no annotation package of Bioconductor (org.*.eg.db): {error}.") from error
        finally:
            connection.close()


def _kept(table: pd.DataFrame) -> pd.DataFrame:
    """Drop negated annotations, and those by evidence that is left out."""
    negated = table["qualifier"].str.split("|").map(lambda words: "NOT" in words)
    return table.loc[~negated & ~table["evidence"].isin(LEFT_OUT_EVIDENCE) & (table["gene"] != ""), ["gene", "term"]]


def _from_gaf(path: Path) -> pd.DataFrame:
    """Read GAF 2.x: columns 3 symbol, 4 qualifier, 5 term, 7 evidence.

    geneontology.org/docs/go-annotation-file-gaf-format-2.2 describes it.
    """
    table = read_table(
        path, header=None, comment="!", usecols=[2, 3, 4, 6], names=["gene", "qualifier", "term", "evidence"]
    )
    if not table["term"].str.match(r"GO:\d{7}$").all():
        raise InputError(f"{path} is no GAF file: its fifth column must hold GO terms such as GO:0006915.")
    return _kept(table)


def _from_table(path: Path) -> pd.DataFrame:
    """Read a table with the columns symbol and go_id, and evidence and qualifier if it has them."""
    table = read_table(path)
    if not {"symbol", "go_id"} <= set(table):
        raise InputError(
            f"{path}: GO annotations are a GAF file, a package org.*.eg.db of Bioconductor, or a tab-separated table "
            f"with the columns symbol and go_id; this has {', '.join(map(str, table.columns[:10]))}."
        )
    table = table.assign(**{column: "" for column in ("evidence", "qualifier") if column not in table})
    return _kept(table.rename(columns={"symbol": "gene", "go_id": "term"}))


def with_ancestors(table: pd.DataFrame, ontology: Path) -> pd.DataFrame:
    """Return the annotations and all that they imply (the true path rule).

    A gene with a term has every term that this is a kind or a part of. Obsolete terms, and terms that the ontology does
    not know, are left out. Secondary ids become the primary ones.
    """
    parents, primary = _read_obo(ontology)

    def with_all_above(term: str) -> list[str]:
        above, waiting = set(), [term]
        while waiting:
            here = waiting.pop()
            if here not in above:
                above.add(here)
                waiting += parents.get(here, [])
        return sorted(above)

    terms = pd.Series(
        {term: with_all_above(primary[term]) for term in table["term"].unique() if term in primary}, dtype=object
    )
    known = table[table["term"].isin(terms.index)]
    if known.empty:
        raise InputError(f"{ontology} has none of the annotated terms; is it the gene ontology (go-basic.obo)?")
    return (
        known.assign(term=known["term"].map(terms))
        .explode("term", ignore_index=True)
        .drop_duplicates(ignore_index=True)
    )


def _read_obo(path: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Return the parents (is_a, part_of) of every term that is not obsolete, and the primary id of every id."""
    with opened(path) as file:
        text = file.read().decode("utf-8")
    parents: dict[str, list[str]] = {}
    primary: dict[str, str] = {}
    for stanza in text.split("\n[")[1:]:
        tags = [
            (key, value.split())
            for key, _, value in (line.partition(": ") for line in stanza.splitlines()[1:])
            if value.strip()
        ]
        if not stanza.startswith("Term]") or ("is_obsolete", ["true"]) in tags:
            continue
        ids = [words[0] for key, words in tags if key in ("id", "alt_id")]
        above = [words[0] for key, words in tags if key == "is_a"]
        above += [words[1] for key, words in tags if key == "relationship" and words[0] == "part_of"]
        parents[ids[0]] = above
        primary |= dict.fromkeys(ids, ids[0])
    return parents, primary
