"""Cells and genes before a count is read: which cells are wanted, their labels and covariates, gene symbols."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from perturbflow.errors import InputError
from perturbflow.genes.symbols import (
    CONTROL,
    ENSEMBL_ID,
    SEPARATOR,
    approved_symbol,
    candidates,
    human_symbols,
    in_other_letters,
    label_of,
    members_of,
)
from perturbflow.nearest import nearest
from perturbflow.screens.control_labels import DeclaredControls, counted, declaration, look_alikes
from perturbflow.screens.dose_labels import (
    UNKNOWN_DOSE,
    DoseScale,
    Member,
    members_in,
    names_in,
    warn_of_doses,
    with_doses,
)
from perturbflow.screens.naming import gene_names
from perturbflow.screens.organism import names_now
from perturbflow.screens.separators import another_name, torn

UNKNOWN = "unknown"
SCHEMA_OBS = (
    "perturbation", "is_control", "n_perturbations", "perturbation_type", "cell_type", "batch", "dataset",
    "total_counts", "n_genes_by_counts", "pct_counts_mt",
)  # fmt: skip


def column_of(obs: pd.DataFrame, column: str, key: str, path: Path) -> pd.Series:
    """Return a column of obs that a block declares under `key`."""
    if column not in obs:
        close = nearest(column, map(str, obs.columns))
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        raise InputError(
            f"{path}: obs has no column '{column}' ({key}).{hint} Its columns: "
            f"{', '.join(map(str, obs.columns)) or '(none)'}."
        )
    return obs[column]


def label_column(obs: pd.DataFrame, declared: dict, path: Path) -> pd.Categorical:
    """Return the labels as the file has them; a message on a missing column names those that hold controls."""
    control, column = DeclaredControls.of(declared), declared["column"]
    try:
        return as_text(column_of(obs, column, "perturbation.column", path))
    except InputError as error:
        texts = {str(name): as_text(obs[name]).categories for name in obs.columns}
        holding = {name: next((text for text in values if text in control), "") for name, values in texts.items()}
        found = ", ".join(f"{name} (it holds '{label}')" for name, label in holding.items() if label)
        raise InputError(f"{error} Controls stand in {found}." if found else str(error)) from None


def check_shape(found: tuple[int, int], dataset: dict, path: Path) -> None:
    """Raise InputError unless the source has cells and genes, and as many as its block declares."""
    if 0 in found:
        raise InputError(f"{path} holds {found[0]:,} cells × {found[1]:,} genes. Save the screen with its counts.")
    declared = tuple(dataset.get("shape", found))
    if found != declared:
        raise InputError(
            f"{path}: {found[0]:,} cells × {found[1]:,} genes, but the block declares shape: {list(declared)}. "
            "The file at the source has changed, or is another one. If it is the right one, correct shape."
        )


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
        # A column of whole numbers in which some are missing holds 1.0 where 1 is meant.
        wholes = [str(float(value)) for value in values if isinstance(value, int) and not isinstance(value, bool)]
        wanted &= text.isin([*map(str, values), *wholes])
        if not wanted.any():
            found = ", ".join(text.categories[:8])
            raise InputError(f"{path}: subset {column} = {values} keeps no cell. obs['{column}'] holds: {found}.")
    return wanted


def is_excluded(obs: pd.DataFrame, exclude: dict[str, str], path: Path) -> np.ndarray:
    """Return which cells have an excluded value: one in which the regular expression of its column finds something."""
    excluded = np.zeros(len(obs), bool)
    for column, pattern in exclude.items():
        text = as_text(column_of(obs, column, "exclude", path))
        excluded |= text.isin([value for value in text.categories if re.search(pattern, value)])
    return excluded


def is_control_label(obs: pd.DataFrame, dataset: dict, path: Path) -> np.ndarray:
    """Return which cells hold a label whose members are all controls.

    Raises
    ------
    InputError
        If perturbation.drop has all such labels.
    """
    declared = dataset["perturbation"]
    control = DeclaredControls.of(declared)
    text = label_column(obs, declared, path)
    dropped = set(declared["drop"])
    named = {
        label: [label] if label in control else [name for name in names_in(label, declared) if name]
        for label in text.categories
    }
    labels = [label for label, names in named.items() if names and all(name in control for name in names)]
    if labels and all(label in dropped or dropped & {*named[label]} for label in labels):
        raise InputError(
            f"{path}: perturbation.drop drops all {int(text.isin(labels).sum()):,} control cells "
            f"({', '.join(labels[:8])}). Take their labels out of drop."
        )
    return text.isin(labels)


def check_controls(before: np.ndarray, after: np.ndarray, key: str, path: Path) -> None:
    """Raise InputError if a key of the block takes all control cells away."""
    if before.any() and not after.any():
        raise InputError(
            f"{path}: {key} takes away all {int(before.sum()):,} control cells. Let {key} keep the controls that "
            "belong to its cells."
        )


@dataclass(frozen=True)
class _Reader:
    """Reads the members and doses of labels in the words of a block.

    Attributes
    ----------
    declared
        `perturbation` of the block.
    path
        The screen, for messages.
    dose_place
        File and column of the doses, for messages.
    """

    declared: dict
    path: Path
    dose_place: str

    @cached_property
    def control(self) -> DeclaredControls:
        """The declared controls."""
        return DeclaredControls.of(self.declared)

    def members(self, label: str, amount: str) -> list[Member] | None:
        """Return the members of a label, each with its dose; None where the cell has no single known perturbation."""
        unassigned = set(self.declared["drop"])
        if label in unassigned:
            return None
        if label in self.control:
            return [(CONTROL, "")]
        named = members_in(label, self.declared)
        members = [(CONTROL, "") if name in self.control else (name, dose) for name, dose in named]
        # A combination with an unassigned member ("A+nan") is no single perturbation either.
        if unassigned & {name for name, _ in members if name}:
            return None
        if plus := next((name for name, _ in members if SEPARATOR in name), None):
            raise InputError(self._holds_plus(label, plus))
        return with_doses(members, amount, {CONTROL}, label, self.declared["separator"], self.dose_place)

    def _holds_plus(self, label: str, name: str) -> str:
        """Return the message on a name that holds the sign of combinations, with the fix."""
        fix = f"give it another name: {another_name([name], SEPARATOR)}"
        if self.declared["separator"] != SEPARATOR and not torn(name, SEPARATOR):
            fix += f". If it is a combination, set perturbation.separator: '{SEPARATOR}'"
        return (
            f"{self.path}: the label '{label}' holds '{SEPARATOR}', which joins the members of a combination here. "
            f"If it is one name, {fix}."
        )


def _genes_in_other_letters(
    named: list[list[Member] | None], measured: dict[str, str], control: DeclaredControls
) -> dict[str, str]:
    """Return name → gene now, of members that are a human gene's symbol but for small and capital letters."""
    others = {name for members in named for name, _ in members or []} - set(measured) - human_symbols().approved
    return {
        name: measured.get(gene, gene)
        for name in others
        if (gene := in_other_letters(name)) and not control.resembles(name)
    }


def canonical_labels(obs: pd.DataFrame, dataset: dict, genes: pd.DataFrame, path: Path) -> pd.Series:
    """Return canonical labels as a categorical, with the unit of their doses as attrs["dose_unit"].

    A label is missing where the cell has no assigned perturbation.

    Parameters
    ----------
    genes
        The screen's genes (`gene_table`), whose names labels follow.

    Raises
    ------
    InputError
        If no cell is a control, a label holds the sign of a combination that is not split, or a dose cannot be read.
    """
    declared = dataset["perturbation"]
    text = label_column(obs, declared, path)
    is_drug = dataset["perturbation_type"] == "drug"
    # HGNC approves names of genes, and drugs are no genes.
    organism = "" if is_drug else dataset["organism"]
    measured = {} if is_drug else names_now(genes, organism)
    dose = _dose(obs, declared, path)
    dose_place = f"{path}: obs['{declared['column'] if dose is None else _columns(declared['dose'])[0]}']"
    reader = _Reader(declared, path, dose_place)

    codes, texts = _label_and_dose(text, dose)
    named = [reader.members(*both) for both in texts]
    if organism == "human":
        measured |= _genes_in_other_letters(named, measured, reader.control)
    scale = DoseScale.of((amount for members in named for _, amount in members or []), dose_place)
    canonical = [label_of(map(scale.member, members or []), (), organism, measured) or None for members in named]
    n_cells = np.bincount(codes[codes >= 0], minlength=len(canonical))
    warn_of_doses(canonical, n_cells, path, is_declared=dose is not None)
    categories = pd.Categorical(canonical)
    labels = pd.Series(
        pd.Categorical.from_codes(np.append(categories.codes, -1)[codes], categories.categories), index=obs.index
    )
    labels.attrs["dose_unit"] = scale.unit
    if not (labels == CONTROL).any():
        raise InputError(_no_controls(obs, dataset, path))
    return labels


def _no_controls(obs: pd.DataFrame, dataset: dict, path: Path) -> str:
    """Return the message on a screen without control cells, with the labels that look like controls or are frequent."""
    declared = dataset["perturbation"]
    n_cells = cells_of_labels(obs, dataset, path)
    is_drug = dataset["perturbation_type"] == "drug"
    alike = look_alikes(
        n_cells, DeclaredControls.of(declared), lambda label: names_in(label, declared), is_drug=is_drug
    )
    hint = (
        f"These look like controls (cells): {counted(alike)}. If they are, set {declaration(alike)}."
        if alike
        else f"Its most common labels: {counted(n_cells)}. Name the control label in perturbation.control."
    )
    sought = " and ".join(
        f"perturbation.{key} = {declared[key]}" for key in ("control", "control_pattern") if key in declared
    )
    return f"{path}: no control cells: none of {sought} is in obs['{declared['column']}']. {hint}"


def _columns(declared: str | list[str]) -> list[str]:
    return [declared] if isinstance(declared, str) else declared


def _dose(obs: pd.DataFrame, declared: dict, path: Path) -> pd.Categorical | None:
    """Return the doses of cells as they are written: of one column, or of a number and its unit.

    None where the block declares none.
    """
    if "dose" not in declared:
        return None
    columns = _columns(declared["dose"])
    texts = [as_text(column_of(obs, column, "perturbation.dose", path)) for column in columns]
    if len(texts) == 1:
        return texts[0]
    known = [texts[1].isin([unit for unit in texts[1].categories if unit.lower() not in UNKNOWN_DOSE])]
    joined = [
        f"{number} {unit if has_unit else ''}".strip() for number, unit, has_unit in zip(*texts, *known, strict=True)
    ]
    return pd.Categorical(pd.Series(joined, dtype=object).where(texts[0].codes >= 0))


def cells_of_labels(obs: pd.DataFrame, dataset: dict, path: Path) -> dict[str, int]:
    """Return label as in the file → cells, most cells first, without the labels of unassigned cells."""
    declared = dataset["perturbation"]
    n_cells = pd.Series(label_column(obs, declared, path)).value_counts()
    return {label: int(n) for label, n in n_cells.items() if n and label not in declared["drop"]}


def _label_and_dose(text: pd.Categorical, dose: pd.Categorical | None) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Return the label and dose of each cell by number, and these labels and doses.

    The number is -1 without a label, and the dose empty where it is missing.
    """
    if dose is None:
        return text.codes, [(label, "") for label in text.categories]
    amounts, has_label = ["", *dose.categories], text.codes >= 0
    codes = np.full(len(text), -1)
    codes[has_label], unique = pd.factorize((text.codes.astype(np.int64) * len(amounts) + dose.codes + 1)[has_label])
    return codes, [(text.categories[i // len(amounts)], amounts[i % len(amounts)]) for i in unique]


def _covariate(
    obs: pd.DataFrame, declared: str | list[str] | dict | None, undeclared: str, key: str, path: Path
) -> pd.Categorical:
    """Return a covariate of cells: a column, several joined by `|`, or one value for all."""
    if declared is None or isinstance(declared, dict):
        value = undeclared if declared is None else declared["value"]
        return pd.Categorical.from_codes(np.zeros(len(obs), np.int8), [value])
    columns = [declared] if isinstance(declared, str) else declared
    codes = np.zeros(len(obs), np.int64)
    texts = [""]
    for column in columns:
        values = as_text(column_of(obs, column, key, path))
        values = values.add_categories({UNKNOWN} - set(values.categories)).fillna(UNKNOWN)
        codes, seen = pd.factorize(codes * len(values.categories) + values.codes)
        texts = [
            "|".join(filter(None, (texts[i // len(values.categories)], values.categories[i % len(values.categories)])))
            for i in seen
        ]
    merged = pd.Categorical(texts)
    return pd.Categorical.from_codes(merged.codes[codes], merged.categories)


def schema_obs(source: pd.DataFrame, labels: pd.Series, name: str, dataset: dict, path: Path) -> pd.DataFrame:
    """Return the columns of the schema (totals excepted) and the source's own.

    Where names collide, the source's column gets the prefix `source_`.

    Parameters
    ----------
    source
        obs of the kept cells, as it came.
    labels
        Their canonical labels.
    """
    obs = pd.DataFrame(index=source.index.astype(str).rename(None))  # it may be called as a column is
    obs["perturbation"] = labels.cat.remove_unused_categories().array
    obs["is_control"] = (labels == CONTROL).to_numpy()
    n_members = np.array([len(members_of(label)) for label in labels.cat.categories], np.int64)
    obs["n_perturbations"] = n_members[labels.cat.codes]

    obs["perturbation_type"] = pd.Categorical.from_codes(np.zeros(len(obs), np.int8), [dataset["perturbation_type"]])
    for covariate, undeclared in (("cell_type", UNKNOWN), ("batch", UNKNOWN), ("dataset", name)):
        obs[covariate] = _covariate(
            source, dataset["covariates"].get(covariate), undeclared, f"covariates.{covariate}", path
        )
    if "dataset" in dataset["covariates"]:
        # Lane 1 of one screen and lane 1 of another are two batches.
        obs["batch"] = pd.Categorical(obs["dataset"].astype(str) + ":" + obs["batch"].astype(str))
    for column in source:
        values = source[column]
        kept_as = str(column)  # `_index` is a name that anndata keeps for itself
        while kept_as in (*SCHEMA_OBS, "_index") or (kept_as != column and kept_as in source):
            kept_as = f"source_{kept_as}"
        obs[kept_as] = (
            as_text(values) if values.dtype == object or isinstance(values.dtype, pd.StringDtype) else values.array
        )
    if obs.index.name in obs:
        obs.index.name = None  # a name of a column is none of the index too
    return obs


def gene_table(var: pd.DataFrame, dataset: dict) -> pd.DataFrame:
    """Return names and ids of every gene of a source, one row per gene.

    Columns are gene_name (approved symbol), gene_id (Ensembl id or empty), original_name and source_name (the index).
    `perturbflow.screens.naming.gene_names` finds their places in the file; attrs["notes"] holds its notes. Names of
    genomes (GRCh38_) are removed from all but source_name.

    A name that is approved stays. Otherwise the Ensembl id decides where HGNC knows it, else a previous symbol of one
    gene is renamed. Two genes of the file never get one name. Where another gene has it, or two would share it, they
    keep theirs.
    """
    found = gene_names(var)
    names, ids = found.names, found.ids
    ids = ids.where(ids.str.fullmatch(ENSEMBL_ID), "").str.replace(r"\.\d+$", "", regex=True)
    approved = names
    if dataset["organism"] == "human":
        table = human_symbols()
        by_id = ids.map(table.of_ensembl_id)
        approved = names.where(names.isin(table.approved) | by_id.isna(), by_id)
        approved = approved.where(approved != names, names.map(approved_symbol))
        is_renamed = approved != names
        claims = names[is_renamed].groupby(approved[is_renamed]).nunique()
        approved = approved.where(
            ~is_renamed | ~(approved.isin(set(names)) | approved.isin(claims.index[claims > 1])), names
        )
    named = {
        "gene_name": approved,
        "gene_id": ids,
        "original_name": names,
        "source_name": pd.Series(var.index.astype(str)),
    }
    table = pd.DataFrame({column: values.to_numpy() for column, values in named.items()})
    table.attrs["notes"] = found.notes
    return table


def is_wanted(genes: pd.DataFrame, pattern: str, path: Path) -> np.ndarray:
    """Return in which genes' Ensembl ids (or names, where these are missing) a regular expression finds something."""
    names = genes["gene_id"].where(genes["gene_id"] != "", genes["original_name"])
    wanted = np.array([re.search(pattern, name) is not None for name in names])
    if not wanted.any():
        raise InputError(
            f"{path}: gene_pattern '{pattern}' keeps no gene. Its genes: {', '.join(genes['original_name'].head(8))}, "
            "..."
        )
    return wanted


def contradicting(genes: pd.DataFrame) -> dict[str, str]:
    """Return approved symbol → the approved symbol that HGNC has for the gene's Ensembl id, where they differ."""
    table = human_symbols()
    by_id = genes["gene_id"].map(table.of_ensembl_id)
    differ = by_id.notna() & (by_id != genes["gene_name"]) & genes["gene_name"].isin(table.approved)
    return dict(zip(genes.loc[differ, "gene_name"], by_id[differ], strict=True))


def ambiguous(names: Iterable[str]) -> dict[str, list[str]]:
    """Return name → genes, of the names that may mean several genes today; these names were not changed."""
    meant = {name: candidates(name) for name in names}
    return {name: genes for name, genes in meant.items() if len(genes) > 1}
