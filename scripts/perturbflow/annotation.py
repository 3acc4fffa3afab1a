"""What is known of cells and genes before a count is read: which cells are wanted, their labels and covariates, gene symbols."""

import re
from pathlib import Path

import numpy as np
import pandas as pd

from perturbflow.errors import InputError
from perturbflow.symbols import CONTROL, SEPARATOR, approved_symbol, canonical_label, members_of

UNKNOWN = "unknown"
ENSEMBL_COLUMNS = ("gene_id", "ensembl_id", "ensemble_id", "ensembl_gene_id", "gene_ids")
SYMBOL_COLUMNS = ("gene_name", "gene_symbol", "symbol", "feature_name", "gene_short_name")
ENSEMBL_ID = re.compile(r"^ENS[A-Z]*G\d{11}(\.\d+)?$")
SCHEMA_OBS = (
    "perturbation", "is_control", "n_perturbations", "perturbation_type", "cell_type", "batch", "dataset",
    "total_counts", "n_genes_by_counts", "pct_counts_mt",
)  # fmt: skip


def column_of(obs: pd.DataFrame, column: str, key: str, path: Path) -> pd.Series:
    """Return a column of obs that a block declares under `key`."""
    if column not in obs:
        raise InputError(f"{path}: obs has no column '{column}' ({key}). Its columns: {', '.join(map(str, obs.columns)) or '(none)'}.")
    return obs[column]


def as_text(values: pd.Series) -> pd.Categorical:
    """Return values as strings, missing ones left missing; strings are made per value, not per cell."""
    codes, unique = pd.factorize(values)
    merged, texts = pd.factorize(np.array([str(value) for value in unique], dtype=object))
    return pd.Categorical.from_codes(np.where(codes < 0, -1, np.append(merged, -1)[codes]), texts)


def in_subset(obs: pd.DataFrame, subset: dict[str, list], path: Path) -> np.ndarray:
    """Return which cells hold one of the listed values in every listed column.

    Raises
    ------
    InputError
        If a column does not exist or none of its values is found.
    """
    wanted = np.ones(len(obs), bool)
    for column, values in subset.items():
        text = as_text(column_of(obs, column, "subset", path))
        wanted &= text.isin(list(map(str, values)))
        if not wanted.any():
            found = ", ".join(text.categories[:8])
            raise InputError(f"{path}: subset {column} = {values} keeps no cell. obs['{column}'] holds: {found}.")
    return wanted


def canonical_labels(obs: pd.DataFrame, dataset: dict, path: Path) -> pd.Series:
    """Return canonical labels as a categorical; missing where the cell has no assigned perturbation.

    Raises
    ------
    InputError
        If no cell is a control, or a label holds the sign of a combination that is not split.
    """
    declared = dataset["perturbation"]
    source = column_of(obs, declared["column"], "perturbation.column", path)
    text = as_text(source)
    unassigned = set(declared["drop"])

    def is_assigned(label: str) -> bool:
        # A combination with an unassigned member ("A+nan") is no single perturbation either.
        members = label.split(declared["separator"]) if declared["separator"] else [label]
        return label not in unassigned and not unassigned & {member for member in members if member}

    renamed = {
        label: canonical_label(label, declared["control"], declared["separator"], dataset["organism"])
        for label in text.categories
        if is_assigned(label)
    }
    for label, canonical in renamed.items():
        if SEPARATOR in label and declared["separator"] != SEPARATOR and canonical != CONTROL:
            raise InputError(
                f"{path}: the label '{label}' holds '{SEPARATOR}', which joins the members of a combination here, but "
                f"perturbation.separator is {declared['separator']!r}. Set it to '{SEPARATOR}', or rename the label in the file."
            )
    canonical = pd.Categorical([renamed.get(label) or None for label in text.categories])
    labels = pd.Series(pd.Categorical.from_codes(np.append(canonical.codes, -1)[text.codes], canonical.categories), index=obs.index)
    if not (labels == CONTROL).any():
        common = ", ".join(f"'{label}' ({n:,})" for label, n in pd.Series(text).value_counts().head(8).items())
        raise InputError(
            f"{path}: no control cells: none of perturbation.control = {declared['control']} is in obs['{declared['column']}']. "
            f"Its most common labels: {common}. Name the control label in perturbation.control."
        )
    return labels


def schema_obs(source: pd.DataFrame, labels: pd.Series, name: str, dataset: dict, path: Path) -> pd.DataFrame:
    """Return the columns of the schema (totals excepted) and the source's own, prefixed `source_` where the names collide.

    Parameters
    ----------
    source
        obs of the cells that are kept, as it came.
    labels
        Their canonical labels.
    """
    obs = pd.DataFrame(index=source.index.astype(str))
    obs["perturbation"] = labels.cat.remove_unused_categories().array
    obs["is_control"] = (labels == CONTROL).to_numpy()
    n_members = np.array([len(members_of(label)) for label in labels.cat.categories], np.int64)
    obs["n_perturbations"] = n_members[labels.cat.codes]

    def constant(value: str) -> pd.Categorical:
        return pd.Categorical.from_codes(np.zeros(len(obs), np.int8), [value])

    obs["perturbation_type"] = constant(dataset["perturbation_type"])
    for covariate, undeclared in (("cell_type", UNKNOWN), ("batch", UNKNOWN), ("dataset", name)):
        column = dataset["covariates"].get(covariate)
        if column is None:
            obs[covariate] = constant(undeclared)
        else:
            values = as_text(column_of(source, column, f"covariates.{covariate}", path))
            values = values.add_categories({UNKNOWN} - set(values.categories)).fillna(UNKNOWN)
            obs[covariate] = values.reorder_categories(sorted(values.categories)).remove_unused_categories()
    if "dataset" in dataset["covariates"]:
        # Lane 1 of one screen and lane 1 of another are two batches.
        obs["batch"] = pd.Categorical(obs["dataset"].astype(str) + ":" + obs["batch"].astype(str))
    for column in source:
        values = source[column]
        kept_as = str(column)
        while kept_as in SCHEMA_OBS or (kept_as != column and kept_as in source):
            kept_as = f"source_{kept_as}"
        obs[kept_as] = as_text(values) if values.dtype == object or isinstance(values.dtype, pd.StringDtype) else values.array
    return obs


def gene_table(var: pd.DataFrame, organism: str) -> pd.DataFrame:
    """Return gene_name (approved symbol), gene_id (Ensembl id or empty) and original_name per source gene."""
    names = pd.Series(var.index.astype(str), index=var.index)
    ids = next((var[column].astype(object).where(var[column].notna(), "").astype(str) for column in ENSEMBL_COLUMNS if column in var), None)
    if names.str.match(ENSEMBL_ID).mean() > 0.5:
        ids = names
        symbols = next((var[column] for column in SYMBOL_COLUMNS if column in var), None)
        if symbols is not None:
            usable = symbols.notna() & (symbols.astype(str).str.len() > 0)
            names = symbols.astype(object).where(usable, names).astype(str)
    if ids is None:
        ids = pd.Series("", index=var.index)
    ids = ids.where(ids.str.match(ENSEMBL_ID), "").str.replace(r"\.\d+$", "", regex=True)
    approved = names.map(lambda name: approved_symbol(name, organism))
    # A previous symbol whose successor is measured too would merge two genes: it is left as it is.
    taken = set(names)
    approved = approved.where(~((approved != names) & approved.isin(taken)), names)
    return pd.DataFrame({"gene_name": approved.to_numpy(), "gene_id": ids.to_numpy(), "original_name": names.to_numpy()})
