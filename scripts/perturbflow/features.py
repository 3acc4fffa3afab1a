"""Which rows of a source are gene expression: guides, antibodies and hashtags are counted in the same cells, and are no genes."""

import logging
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pandas as pd

from perturbflow.annotation import ENSEMBL_COLUMNS
from perturbflow.errors import InputError
from perturbflow.hdf5 import AppendedRows
from perturbflow.sources.base import EXPRESSION, TYPE_COLUMNS, SomeGenes, Source
from perturbflow.symbols import GUIDE, human_symbols

logger = logging.getLogger(__name__)

# In lower case and letters alone. A column in which 10x's own word stands holds nothing but types of features; of other columns only
# these words are taken for types.
EXPRESSION_WORDS = {"gex", "rna", "mrna", "gene", "genes", "expression", "scrna", "transcriptome"}
OTHER_WORDS = {
    "crispr", "guide", "guides", "grna", "sgrna", "crisprguide", "guidecapture", "adt", "antibody", "protein", "prot", "surfaceprotein",
    "hto", "hashtag", "hashing", "cellhashing", "multiplexing", "cmo", "custom", "atac", "peak", "peaks", "antigen",
}  # fmt: skip
ENSEMBL_GENE = r"ENS[A-Z]*G\d{6}"  # with a version or the name of a genome, too
TOTALSEQ = re.compile(r".+[ _.-]TotalSeq[ _.-]?[A-D]\d*", re.IGNORECASE)
SHOWN = 5
"""Features of a type that are named."""


def _word(value: str) -> str:
    return re.sub(r"[^a-z]", "", value.lower())


def _types_by_column(values: pd.Series) -> pd.Series | None:
    """Return the type of every feature that a column says is no gene expression, missing for the others; None if it speaks of something else."""
    texts = values.astype(object).where(values.notna(), "").astype(str).str.strip()
    words = {text: _word(text) for text in texts.unique()}
    known = set(words.values())
    if _word(EXPRESSION) in known:
        others = {text for text, word in words.items() if text and word != _word(EXPRESSION)}
    elif known & EXPRESSION_WORDS:
        others = {text for text, word in words.items() if word in OTHER_WORDS or word.endswith("capture")}
    else:  # genes without a type beside features that have 10x's
        others = {text for text, word in words.items() if word.endswith("capture")}
    return texts.where(texts.isin(others)) if others else None


def _types_by_name(var: pd.DataFrame, labels: Iterable[str]) -> pd.Series:
    """Return the type of features whose name says for sure that they are no genes, missing for all others.

    Those are antibodies of TotalSeq, and guides of a gene of the file (KLF1_2 beside KLF1) that have no Ensembl id and no approved
    symbol, where a label of cells has the same name, or the genes have Ensembl ids and this has another id in their place.
    """
    names = pd.Series(var.index.astype(str), index=var.index)
    types = pd.Series(np.nan, index=var.index, dtype=object)
    types[names.str.fullmatch(TOTALSEQ)] = "Antibody Capture"
    ids = next((var[column].astype(object).fillna("").astype(str) for column in ENSEMBL_COLUMNS if column in var), None)
    has_id = (names if ids is None else ids).str.contains(ENSEMBL_GENE)
    is_told = names.isin(set(labels))
    if ids is not None and has_id.mean() > 0.5:
        is_told |= ids != ""
    genes, approved = set(names), human_symbols().approved
    for place in np.flatnonzero(is_told & ~has_id):
        guide = GUIDE.fullmatch(names.iloc[place])
        if guide and guide["gene"] in genes and names.iloc[place] not in approved:
            types.iloc[place] = "CRISPR Guide Capture"
    return types


def features_apart(var: pd.DataFrame, labels: Iterable[str], path: object) -> dict[str, np.ndarray]:
    """Return the features that are no gene expression: type, in the words of the file → their numbers.

    Parameters
    ----------
    var
        All features of a source.
    labels
        Labels of its cells, as they came.
    path
        The source, for messages.

    Raises
    ------
    InputError
        If no feature is gene expression.
    """
    by_column = (_types_by_column(var[column]) for column in TYPE_COLUMNS if column in var)
    types = next((found for found in by_column if found is not None), None)
    if types is None:
        types = _types_by_name(var, labels)
    apart = {str(kind): np.flatnonzero((types == kind).to_numpy()) for kind in types.dropna().unique()}
    is_all_of_one = len(apart) == 1 and sum(map(len, apart.values())) == len(var)
    if is_all_of_one and not _word(next(iter(apart))).endswith("capture"):
        return {}  # a word of the file's own for its genes
    if apart and sum(map(len, apart.values())) == len(var):
        raise InputError(f"{path} holds no gene expression: its features are {', '.join(apart)}. Name the file that holds it.")
    for kind, numbers in apart.items():
        shown = ", ".join(map(str, var.index[numbers[:SHOWN]]))
        logger.info("%s: %s features are %s, no gene expression, and kept apart: %s ...", path, f"{len(numbers):,}", kind, shown)
    return apart


def keys_of(apart: Iterable[str]) -> dict[str, str]:
    """Return type → its key in obsm: `CRISPR Guide Capture` → `crispr_guide_capture`."""
    keys: dict[str, str] = {}
    for kind in apart:
        key = re.sub(r"\W+", "_", kind.lower()).strip("_") or "features"
        keys[kind] = key if key not in keys.values() else f"{key}_{len(keys)}"
    return keys


def write_features(group: h5py.Group, source: Source, apart: dict[str, np.ndarray], is_kept: np.ndarray, threads: int) -> None:
    """Write the counts of the features that were laid aside, one CSR matrix per type, cells × features.

    Parameters
    ----------
    group
        obsm, to be filled.
    source
        Whose blocks were read.
    apart
        Type → numbers of its features.
    is_kept
        Per cell that was read, whether it is written.
    """
    assert isinstance(source, SomeGenes)  # which laid them aside
    for kind, key in keys_of(apart).items():
        with ThreadPoolExecutor(threads) as pool:
            rows, first = AppendedRows(group.create_group(key), len(apart[kind]), max(1, int(is_kept.sum())), pool), 0
            for counts in source.laid_aside(kind):
                rows.append(counts[is_kept[first : first + counts.shape[0]]])
                first += counts.shape[0]
            rows.finish()
