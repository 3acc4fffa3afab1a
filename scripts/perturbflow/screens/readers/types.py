"""The types of the features of a file: gene expression, or guides, antibodies and hashtags.

Types have the words of 10x Genomics and of others.
"""

import re

import numpy as np
import pandas as pd

EXPRESSION = "Gene Expression"
"""The word of 10x Genomics for genes."""

# Names of columns and words are compared in lower case and letters alone.
# In these columns short words are types, too. In all others 10x's own words alone are: no column holds them by chance.
TYPE_COLUMNS = (
    "featuretypes", "featuretype", "modality", "type", "modalities", "types", "librarytype", "librarytypes",
    "featureclass", "assay",
)  # fmt: skip
EXPRESSION_WORDS = {
    "geneexpression", "gex", "rna", "mrna", "gene", "genes", "expression", "scrna", "scrnaseq", "rnaseq",
    "transcriptome", "transcript", "transcripts", "cdna", "endogenous", "proteincoding",
}  # fmt: skip
OTHER_WORDS = {
    "crispr", "guide", "guides", "grna", "grnas", "sgrna", "sgrnas", "crisprguide", "crisprguides", "crisprgrna",
    "crisprsgrna", "gdo", "guidecapture", "protospacer", "protospacers", "perturbation", "adt", "ab", "abs",
    "antibody", "antibodies", "abseq", "cite", "citeseq", "antibodyderivedtag", "antibodyderivedtags", "protein",
    "proteins", "prot", "surface", "surfaceprotein", "surfaceproteins", "proteinexpression", "hto", "hash",
    "hashtag", "hashtags", "hashing", "hashtagoligo", "hashtagoligos", "cellhashing", "multiplexing", "multi",
    "multiseq", "sampletag", "sampletags", "cmo", "lmo", "custom", "atac", "peak", "peaks", "antigen",
}  # fmt: skip
BIOTYPE = re.compile(r".*(?:rna|gene|coding|transcript|sense|intron|decay|ribozyme|segment|artifact|tec$).*")
"""Kinds of genes in the words of Ensembl and NCBI."""
SHOWN = 5
"""Words and features that a message names."""


def word(text: object) -> str:
    """Return a text in lower case and letters alone."""
    return re.sub(r"[^a-z]", "", str(text).lower())


def _words(values: pd.Series) -> tuple[pd.Series, dict[str, str]]:
    """Return a column as texts, empty where missing, and the word of each."""
    texts = pd.Series(np.asarray(values.astype(object).where(values.notna(), ""), dtype=object)).astype(str).str.strip()
    return texts, {text: word(text) for text in texts.unique()}


def _types_in(values: pd.Series, is_listed: bool) -> pd.Series | None:
    """Return the type of every feature that is no gene expression by a column, missing for the others.

    None if the column holds something else.
    """
    texts, words = _words(values)
    known = set(words.values())
    if is_listed and word(EXPRESSION) in known:
        others = {text for text, one in words.items() if text and one not in EXPRESSION_WORDS}
    elif word(EXPRESSION) in known or (is_listed and known & EXPRESSION_WORDS):
        # In a column with protein_coding, guide_RNA is a kind of gene.
        known_others = OTHER_WORDS if "proteincoding" in known else OTHER_WORDS | {"guiderna", "guidernas"}
        others = {text for text, one in words.items() if one in known_others or one.endswith("capture")}
    else:  # genes without a type, or with another word, beside features that have 10x's
        others = {text for text, one in words.items() if one.endswith("capture")}
    return texts.where(texts.isin(others)) if others else None


def _columns(var: pd.DataFrame) -> list[tuple[object, bool]]:
    """Return the columns that may hold types, and whether their names say so.

    Columns with such names come first, the likeliest at the front.
    """
    place = {name: i for i, name in enumerate(TYPE_COLUMNS)}
    of_texts = [column for column in var if not pd.api.types.is_numeric_dtype(var[column])]
    return sorted(
        ((column, word(column) in place) for column in of_texts), key=lambda one: place.get(word(one[0]), len(place))
    )


def types_of(var: pd.DataFrame) -> pd.Series | None:
    """Return the type of every feature that is no gene expression by some column, missing for the others.

    None where no column holds types.
    """
    found = [types for column, is_listed in _columns(var) if (types := _types_in(var[column], is_listed)) is not None]
    merged = None
    for types in found:
        merged = types if merged is None else merged.where(merged.notna(), types)
    return merged if merged is None else merged.set_axis(var.index)


def doubtful_types(var: pd.DataFrame) -> list[str]:
    """Return sentences on features that count as genes, though a column of types has no known word for them."""
    sentences = []
    for column, is_listed in _columns(var):
        texts, words = _words(var[column])
        known = set(words.values())
        has_types = word(EXPRESSION) in known or (is_listed and known & (EXPRESSION_WORDS | OTHER_WORDS))
        if len(words) == 1 or not (has_types or word(column) in TYPE_COLUMNS[:2]):
            continue
        doubtful = [text for text, one in words.items() if one not in EXPRESSION_WORDS and not BIOTYPE.fullmatch(one)]
        if word(EXPRESSION) not in known and "" in doubtful:
            doubtful.remove("")
        shown = []
        for text in doubtful[:SHOWN]:
            features = var.index[(texts == text).to_numpy()]
            names = ", ".join(map(str, features[:SHOWN])) + (", ..." if len(features) > SHOWN else "")
            shown.append(f"{repr(text) if text else 'nothing'} of {len(features):,} ({names})")
        if shown:
            sentences.append(
                f"var['{column}'] says of some features nothing that is known as gene expression: {'; '.join(shown)}. "
                "They stay genes. If they are none, write 10x's word there, such as CRISPR Guide Capture, or leave "
                "them out by gene_pattern."
            )
    return sentences
