"""Whose genes a file holds: prefixes of genomes, mitochondrial genes, and signs of another organism."""

import re
from collections.abc import Iterable

import numpy as np
import pandas as pd

from perturbflow.genes.symbols import CONTROL_WORDS, ENSEMBL_ID, human_symbols

# Cell Ranger writes GRCh38_MT-CO1 and mm10___mt-Co1 where a reference holds several genomes; Seurat makes dashes of
# underscores, R dots.
_GENOME = (
    r"(?:(?P<human>GRCh3[78]|hg(?:18|19|38)|human|homo(?:[-_. ]?sapiens)?|hsapiens|hs|(?:T2T-)?CHM13(?:v\d(?:\.\d)?)?"
    r"|T2T)"
    r"|(?P<mouse>GRCm3[89]|mm(?:9|10|39)?|mouse|mus[-_. ]?musculus|mmusculus))"
    r"(?:\.p\d+)?(?:[-._]\d{4}[-._][A-Z])?"
)
MARKS = (
    re.compile(rf"^(?:refdata-(?:gex-)?)?{_GENOME}[-_.:|]+(?=\w)", re.IGNORECASE),
    re.compile(rf"(?<=\w)[-_.:|]+{_GENOME}$", re.IGNORECASE),
)
"""The name of a genome before that of a gene, and after it."""
NEARLY_ALL = 0.9
"""Share of genes with the name of a genome from which on it is removed: spike-ins and reporters have none."""

LEAST_NAMES = 20
"""Fewer names or ids are no evidence of an organism."""

MITOCHONDRIAL = re.compile(r"mt-.+|mt[._](?:nd|co|atp|cy|rnr|t[a-z]).*", re.IGNORECASE)
REFSEQ_MITOCHONDRIAL = {
    "ND1",
    "ND2",
    "ND3",
    "ND4",
    "ND4L",
    "ND5",
    "ND6",
    "COX1",
    "COX2",
    "COX3",
    "CYTB",
    "ATP6",
    "ATP8",
}
"""Names in the annotations of NCBI, which write no MT-.

COX1 and COX2 are also old names of PTGS1 and PTGS2, so most of these names have to be there.
"""
MOUSE_MITOCHONDRIAL = {f"ENSMUSG000000{number}" for number in (*range(64336, 64362), *range(64363, 64373), 65947)}
"""Ensembl ids of the 37 genes from mt-Tf to mt-Tp."""


def _marks(names: pd.Index | pd.Series) -> list[re.Match | None]:
    """Return the match of a genome in every name; None for all names where fewer than nearly all have one."""
    for pattern in MARKS:
        found = [pattern.search(name) for name in names]
        if len(found) > 0 and sum(match is not None for match in found) >= NEARLY_ALL * len(found):
            return found
    return [None] * len(names)


def without_genome(names: pd.Series) -> pd.Series:
    """Return names of genes without the name of their genome before or after them, where nearly all have one."""
    cut = [
        name[: match.start()] + name[match.end() :] if match else name
        for name, match in zip(names, _marks(names), strict=True)
    ]
    return pd.Series(cut, names.index)


def genomes(var: pd.DataFrame, columns: Iterable[str]) -> tuple[np.ndarray, list[str]]:
    """Return the organism of every gene by the genome in its name, and the genomes that the names hold.

    The organism is empty where a name has no genome.

    Parameters
    ----------
    var
        As it came.
    columns
        Columns that may hold names or ids of genes; the index comes first.
    """
    for names in (var.index, *(var[column] for column in columns)):
        found = _marks(names.astype(str))
        if any(found):
            organism = np.array([match.lastgroup if match else "" for match in found], dtype=object)
            return organism, sorted({match[0] for match in found if match})
    return np.full(len(var), "", dtype=object), []


def some_with_genome(names: pd.Index) -> str | None:
    """Return a sentence on names that begin or end with the version of a genome, where these are too few to be removed.

    None where no name does.
    """
    texts = names.astype(str)
    if any(_marks(texts)):
        return None
    matches = (pattern.search(name) for name in texts for pattern in MARKS)
    found = [match for match in matches if match and re.search(r"\d", match[0])]
    if not found:
        return None
    held = " and ".join(sorted({match[0] for match in found})[:4])
    return (
        f"{len(found):,} of {len(names):,} names of genes hold {held} ({found[0].string}) and keep it: nearly all "
        "would have to. Rename these genes in the file if they are others of it."
    )


def names_now(genes: pd.DataFrame, organism: str) -> dict[str, str]:
    """Return every name that the file has for a gene (symbol, Ensembl id, index) → its name now.

    Symbols are there in capitals and in small letters too, where that means one gene: a label SOX2 finds Sox2, and klf1
    finds KLF1.
    """
    columns = [genes[column] for column in ("source_name", "gene_id", "original_name") if column in genes]
    names = {name: now for column in columns for name, now in zip(column, genes["gene_name"], strict=True) if name}
    meant = pd.Series(genes["gene_name"].unique(), dtype=object)
    meant = meant[
        ~meant.str.casefold().duplicated(keep=False)
        & ~meant.str.upper().isin(CONTROL_WORDS if organism == "human" else [])
    ]
    forms = (meant.str.lower(), meant.str.upper(), meant.str.capitalize())
    return {**{form: gene for of in forms for form, gene in zip(of, meant, strict=True)}, **names}


def mitochondrial(genes: pd.DataFrame, organism: str) -> np.ndarray:
    """Return which genes are mitochondrial: by symbol, by Ensembl id, or by NCBI's names where most of these are there.

    Parameters
    ----------
    genes
        Columns gene_name, gene_id and original_name (`perturbflow.screens.annotation.gene_table`).
    """
    names = genes["original_name"]
    is_mt = genes["gene_name"].str.fullmatch(MITOCHONDRIAL) | names.str.fullmatch(MITOCHONDRIAL)
    ids = MOUSE_MITOCHONDRIAL
    if organism == "human":
        ids = {number for number, symbol in human_symbols().of_ensembl_id.items() if symbol.startswith("MT-")}
    is_mt |= genes["gene_id"].isin(ids)
    by_refseq = names.isin(REFSEQ_MITOCHONDRIAL)
    if not is_mt.any() and names[by_refseq].nunique() >= 10:
        is_mt = by_refseq
    return is_mt.to_numpy(bool)


def other_organism(genes: pd.DataFrame, declared: str) -> str | None:
    """Return why genes are evidently those of another organism than the declared one, and which; or None.

    Ensembl ids decide. Symbols do where human genes are declared, and most of the symbols that HGNC knows are written
    as mouse symbols (Sox2). Capitals are no evidence of human ones, as some write mouse symbols so.
    """
    ids = genes["gene_id"][genes["gene_id"] != ""]
    of_organism = {"human": int(ids.str.startswith("ENSG0").sum()), "mouse": int(ids.str.startswith("ENSMUSG").sum())}
    for organism, n in of_organism.items():
        if organism != declared and n >= LEAST_NAMES and n > NEARLY_ALL * len(ids):
            return (
                f"{n:,} of {len(ids):,} Ensembl ids are of {organism} genes. Set organism: {organism} in the dataset's "
                "block."
            )
    names = genes["original_name"][~genes["original_name"].str.fullmatch(ENSEMBL_ID)]
    approved = human_symbols().approved
    n_human = int(names.isin(approved).sum())
    n_mouse = int((names.str.fullmatch(r"[A-Z][a-z0-9-]*[a-z][a-z0-9-]*") & names.str.upper().isin(approved)).sum())
    if declared == "human" and n_mouse >= LEAST_NAMES and n_mouse > NEARLY_ALL * (n_mouse + n_human):
        example = ", ".join(names[names.str.upper().isin(approved) & ~names.isin(approved)].head(3))
        return (
            f"{n_mouse:,} gene names are written as mouse symbols are ({example}), {n_human:,} as human ones. "
            "Set organism: mouse in the dataset's block."
        )
    return None


def why_no_mitochondrial(genes: pd.DataFrame) -> str:
    """Return a likely reason why none of the genes is mitochondrial."""
    if genes["original_name"].str.fullmatch(ENSEMBL_ID).mean() > 0.5:
        return "the genes have Ensembl ids alone, and none is that of a mitochondrial gene of this organism"
    return (
        f"none of the {len(genes):,} genes has such a name (MT-CO1, mt-Co1) or id, as in a panel, or in a file whose "
        "genes were filtered"
    )
