"""Which rows of a source are gene expression.

Guides, antibodies and hashtags are counted in the same cells, and are no genes.
"""

import logging
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import h5py
import numpy as np
import pandas as pd

from perturbflow.errors import InputError
from perturbflow.genes.symbols import GUIDE, human_symbols
from perturbflow.io.hdf5 import AppendedRows
from perturbflow.screens.naming import ensembl_column, texts
from perturbflow.screens.readers.source import SomeGenes, Source
from perturbflow.screens.readers.types import doubtful_types, types_of, word

logger = logging.getLogger(__name__)

ENSEMBL_GENE = r"ENS[A-Z]*G\d{6}"  # with a version or the name of a genome, too
TOTALSEQ = re.compile(r".+[ _.-]TotalSeq[ _.-]?[A-D]\d*", re.IGNORECASE)
# Names of guides, of controls among them, antibodies and hashtags, as far as no gene is called so. Small sg is a guide,
# SGK1 is a gene.
LIKE_GUIDES = re.compile(
    r"(?:p-?)?sg[A-Z0-9].*|(?i:(?:sgrna|grna|guide|crispr)[-_.:].+|.+[-_.](?:sgrna|grna|crispr)[-_.]?\d*"
    r"|non[-_. ]?target.*|safe[-_. ]?target.*"
    r"|(?:sg)?ntc?[-_.]\d+|neg[-_. ]?(?:ctrl|control).*)|.+[-_.](?:sg|g|guide)[-_.]?\d+"
)
LIKE_OTHERS = re.compile(
    r"(?:adt|hto|cmo|lmo|prot|anti|hashtag)[-_.:].+|(?:hto|cmo|hashtag)\d+.*|.+[-_.](?:adt|hto|prot)", re.IGNORECASE
)
NEARLY_ALL = 0.95
"""Share of genes with an Ensembl id beyond which a gene without one is reported."""
SHOWN = 5
"""Features of a type that a message names."""


def _types_by_name(var: pd.DataFrame, labels: Iterable[str]) -> pd.Series:
    """Return the type of features whose name shows for certain that they are no genes, missing for all others.

    Those are antibodies of TotalSeq, and guides of a gene of the file (KLF1_2 beside KLF1). Such a guide has no Ensembl
    id and no approved symbol. Beyond that, a label of cells has the same name, or the genes have Ensembl ids and the
    guide has another id in their place.
    """
    names = pd.Series(var.index.astype(str), index=var.index)
    types = pd.Series(np.nan, index=var.index, dtype=object)
    types[names.str.fullmatch(TOTALSEQ)] = "Antibody Capture"
    column = ensembl_column(var)
    ids = None if column is None else texts(var[column]).set_axis(var.index)
    has_id = (names if ids is None else ids).str.contains(ENSEMBL_GENE)
    is_certain = names.isin(set(labels))
    if ids is not None and has_id.mean() > 0.5:
        is_certain |= ids != ""
    genes, approved = set(names), human_symbols().approved
    for place in np.flatnonzero(is_certain & ~has_id):
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
    types = types_of(var)
    if types is None:
        types = _types_by_name(var, labels)
    apart = {str(kind): np.flatnonzero((types == kind).to_numpy()) for kind in types.dropna().unique()}
    is_all_of_one = len(apart) == 1 and sum(map(len, apart.values())) == len(var)
    if is_all_of_one and not word(next(iter(apart))).endswith("capture"):
        return {}  # a word of the file's own for its genes
    if apart and sum(map(len, apart.values())) == len(var):
        raise InputError(
            f"{path} holds no gene expression: its features are {', '.join(apart)}. Name the file that holds it."
        )
    for kind, numbers in apart.items():
        shown = ", ".join(map(str, var.index[numbers[:SHOWN]]))
        logger.info(
            "%s: %s features are %s, no gene expression, and kept apart: %s ...", path, f"{len(numbers):,}", kind, shown
        )
    return apart


def doubtful_features(var: pd.DataFrame, genes: pd.DataFrame) -> list[str]:
    """Return sentences on genes that may be none: by an unknown type, by their names, or without an Ensembl id.

    Names are suspect that look like those of guides, antibodies or hashtags.

    Parameters
    ----------
    var
        All features that count as genes, as they came.
    genes
        Their table (`perturbflow.screens.annotation.gene_table`).
    """
    names, has_id = genes["original_name"], genes["gene_id"] != ""
    is_suspect = names.str.fullmatch(LIKE_GUIDES) | names.str.fullmatch(LIKE_OTHERS) | (has_id.mean() > NEARLY_ALL)
    table = human_symbols()
    found = names[
        is_suspect & ~has_id & ~names.str.upper().isin({*table.approved, *table.previous, *table.alias})
    ].tolist()
    sentences = doubtful_types(var)
    if found:
        shown = ", ".join(found[:SHOWN]) + (", ..." if len(found) > SHOWN else "")
        sentences.append(
            f"{len(found):,} of the genes may be guides, antibodies or hashtags by their names, or for want of an "
            f"Ensembl id: {shown}. They stay genes. If they are none, write CRISPR Guide Capture or Antibody Capture "
            "into var['feature_types'], or leave them out by gene_pattern."
        )
    return sentences


def keys_of(apart: Iterable[str]) -> dict[str, str]:
    """Return type → its key in obsm: `CRISPR Guide Capture` → `crispr_guide_capture`."""
    keys: dict[str, str] = {}
    for kind in apart:
        key = re.sub(r"\W+", "_", kind.lower()).strip("_") or "features"
        keys[kind] = key if key not in keys.values() else f"{key}_{len(keys)}"
    return keys


def write_features(
    group: h5py.Group, source: Source, apart: dict[str, np.ndarray], is_kept: np.ndarray, threads: int
) -> None:
    """Write the counts of the features laid aside, one CSR matrix per type, cells × features.

    Parameters
    ----------
    group
        obsm, to be filled.
    source
        The source whose blocks were read.
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
