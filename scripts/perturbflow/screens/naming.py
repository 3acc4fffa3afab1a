"""Where a file has the names of its genes and their Ensembl ids.

They are in the index of var, in columns of it, or both in one name.
"""

import re
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from perturbflow.genes.symbols import ENSEMBL_ID, human_symbols
from perturbflow.screens.organism import without_genome
from perturbflow.screens.readers.types import word

# GeneNames of columns, in lower case and letters alone, the likeliest first.
ENSEMBL_WORDS = (
    "geneid",
    "ensemblid",
    "ensembleid",
    "ensemblgeneid",
    "geneids",
    "featureid",
    "featureids",
    "ensembl",
    "accession",
    "id",
)
SYMBOL_WORDS = (
    "genename",
    "genesymbol",
    "symbol",
    "featurename",
    "geneshortname",
    "genenames",
    "genesymbols",
    "symbols",
    "hgncsymbol",
    "mgisymbol",
)
# Columns of these names may hold something else, so nearly all their values have to differ.
VAGUE_WORDS = ("gene", "genes", "feature", "features", "name", "names", "varnames", "index")

_ID = r"(?P<id>ENS[A-Z]*G\d{11}(?:\.\d+)?)"
COMPOSITE = re.compile(rf"{_ID}[|_:;/, (-]+(?!PAR_Y$|\d+$)(?P<name>[^)]+)\)?")
COMPOSITE_AFTER = re.compile(rf"(?P<name>.+?)[|_:;/, (\[-]+{_ID}[)\]]?")
NO_NAMES = {"", "nan", "NaN", "None", "<NA>"}
"""Texts of missing values: none is a gene."""


@dataclass(frozen=True)
class GeneNames:
    """GeneNames and Ensembl ids of the genes of a file, without prefixes of genomes, in its order.

    Attributes
    ----------
    names
        Symbols where the file has them.
    ids
        The texts in the place of Ensembl ids, empty where there are none.
    notes
        Sentences that a reader should know of their places.
    """

    names: pd.Series
    ids: pd.Series
    notes: list[str] = field(default_factory=list)


def texts(values: pd.Series | pd.Index) -> pd.Series:
    """Return values as texts, empty where they are missing."""
    values = pd.Series(np.asarray(values, dtype=object))
    return values.where(values.notna(), "").astype(str)


def columns_of(var: pd.DataFrame, words: tuple[str, ...]) -> list[str]:
    """Return the columns of var that go by one of these words, in the order of the words."""
    by_word: dict[str, list[str]] = {}
    for column in var:
        by_word.setdefault(word(column), []).append(column)
    return [column for one in words for column in by_word.get(one, [])]


def _share(values: pd.Series, pattern: re.Pattern | str) -> float:
    named = values[values != ""]
    return float(named.str.fullmatch(pattern).mean()) if len(named) else 0.0


def ensembl_column(var: pd.DataFrame) -> str | None:
    """Return the column of Ensembl ids: the first that mostly holds them, of any name; else one that is named so."""
    named = columns_of(var, ENSEMBL_WORDS)
    of_texts = [column for column in var if column not in named and not pd.api.types.is_numeric_dtype(var[column])]
    holds = (column for column in [*named, *of_texts] if _share(without_genome(texts(var[column])), ENSEMBL_ID) > 0.5)
    return next(holds, next(iter(columns_of(var, ENSEMBL_WORDS[:5])), None))


def _symbol_column(var: pd.DataFrame) -> str | None:
    """Return the column of symbols: one that is named so, else one that mostly holds approved symbols."""
    for column in columns_of(var, (*SYMBOL_WORDS, *VAGUE_WORDS)):
        values = texts(var[column])
        named = values[values != ""]
        is_vague = word(column) in VAGUE_WORDS and named.nunique() < 0.9 * len(named)
        if (
            len(named)
            and not is_vague
            and _share(values, r"\d+") < 0.5
            and _share(without_genome(values), ENSEMBL_ID) < 0.5
        ):
            return column
    approved = human_symbols().approved  # those of mice are mostly the same in capitals
    of_texts = [column for column in var if not pd.api.types.is_numeric_dtype(var[column])]
    return next((column for column in of_texts if texts(var[column]).str.upper().isin(approved).mean() > 0.5), None)


def _divided(names: pd.Series) -> tuple[pd.Series, pd.Series] | None:
    """Return the names and the ids of names such as ENSG00000105610|KLF1, where most are so."""
    for pattern in (COMPOSITE, COMPOSITE_AFTER):
        found = names.map(pattern.fullmatch)
        if len(names) and found.notna().mean() > 0.5:
            return (
                pd.Series([match["name"].strip() if match else name for match, name in zip(found, names, strict=True)]),
                pd.Series([match["id"] if match else "" for match in found]),
            )
    return None


def gene_names(var: pd.DataFrame) -> GeneNames:
    """Return the names of the genes of a file: the index of var where it holds names, else the columns that do."""
    index = without_genome(texts(var.index))
    column = ensembl_column(var)
    ids = pd.Series("", index=index.index) if column is None else without_genome(texts(var[column]))
    if divided := _divided(index):
        note = (
            f"names of genes hold their Ensembl ids ({index.iloc[0]}): they are divided, the first is "
            f"{divided[0].iloc[0]}."
        )
        return GeneNames(*divided, [note])
    has_ids, is_number = (index.str.fullmatch(pattern) for pattern in (ENSEMBL_ID, r"\d*"))
    if has_ids.mean() > 0.5:
        symbols = _symbol_column(var)
        return GeneNames(index if symbols is None else _filled(without_genome(texts(var[symbols])), index), index)
    if not is_number.all() or not len(index):
        return GeneNames(_filled(index.where(~index.isin(NO_NAMES), ""), ids), ids)
    symbols = _symbol_column(var) or column
    shown = ", ".join(index.head(3))
    if symbols is None:
        note = (
            f"genes are called {shown}, ..., and no column of var has names of genes (its columns: "
            f"{', '.join(map(str, var)) or 'none'}). No perturbed gene is found among them. "
            "Put the names of genes into var_names."
        )
        return GeneNames(index, ids, [note])
    note = f"the index of var holds numbers ({shown}, ...): names of genes are those of var['{symbols}']."
    return GeneNames(_filled(_filled(without_genome(texts(var[symbols])), ids), index), ids, [note])


def _filled(names: pd.Series, others: pd.Series) -> pd.Series:
    return names.where(~names.isin(NO_NAMES), others)
