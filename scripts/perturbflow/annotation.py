"""What is known of cells and genes before a count is read: which cells are wanted, their labels and covariates, gene symbols."""

import logging
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd

from perturbflow.controls import Controls, counted, declaration, look_alikes, warning
from perturbflow.doses import Member, Scale, members_in, names_in, tell, with_doses
from perturbflow.errors import InputError
from perturbflow.naming import gene_names
from perturbflow.organism import names_now
from perturbflow.separators import Unsplit, unsplit
from perturbflow.symbols import CONTROL, ENSEMBL_ID, SEPARATOR, approved_symbol, candidates, human_symbols, label_of, members_of
from perturbflow.unassigned import message, no_genes, unassigned_labels

logger = logging.getLogger(__name__)

UNKNOWN = "unknown"
SCHEMA_OBS = (
    "perturbation", "is_control", "n_perturbations", "perturbation_type", "cell_type", "batch", "dataset",
    "total_counts", "n_genes_by_counts", "pct_counts_mt",
)  # fmt: skip


def column_of(obs: pd.DataFrame, column: str, key: str, path: Path) -> pd.Series:
    """Return a column of obs that a block declares under `key`."""
    if column not in obs:
        raise InputError(f"{path}: obs has no column '{column}' ({key}). Its columns: {', '.join(map(str, obs.columns)) or '(none)'}.")
    return obs[column]


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
    """Return which cells hold, in one of the columns, a value that its regular expression finds something in."""
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
    control = Controls.of(declared)
    text = as_text(column_of(obs, declared["column"], "perturbation.column", path))
    dropped = set(declared["drop"])
    named = {label: [label] if label in control else [name for name in names_in(label, declared) if name] for label in text.categories}
    labels = [label for label, names in named.items() if names and all(name in control for name in names)]
    if labels and all(label in dropped or dropped & {*named[label]} for label in labels):
        raise InputError(
            f"{path}: perturbation.drop drops all {int(text.isin(labels).sum()):,} control cells ({', '.join(labels[:8])}). "
            "Take their labels out of drop."
        )
    return text.isin(labels)


def check_controls(before: np.ndarray, after: np.ndarray, key: str, path: Path) -> None:
    """Raise InputError if a key of the block takes all control cells away."""
    if before.any() and not after.any():
        raise InputError(
            f"{path}: {key} takes away all {int(before.sum()):,} control cells. Let {key} keep the controls that belong to its cells."
        )


def canonical_labels(obs: pd.DataFrame, dataset: dict, genes: pd.DataFrame, path: Path) -> pd.Series:
    """Return canonical labels as a categorical; missing where the cell has no assigned perturbation. attrs["dose_unit"] is their doses' unit.

    Parameters
    ----------
    genes
        The screen's genes (`gene_table`), which labels follow.

    Raises
    ------
    InputError
        If no cell is a control, a label holds the sign of a combination that is not split, or a dose cannot be read.
    """
    declared = dataset["perturbation"]
    source = column_of(obs, declared["column"], "perturbation.column", path)
    text = as_text(source)
    control, unassigned = Controls.of(declared), set(declared["drop"])
    # Drugs are no genes: theirs are not the names that HGNC approves.
    organism, measured = dataset["organism"], names_now(genes, dataset["organism"])
    if dataset["perturbation_type"] == "drug":
        organism, measured = "", {}

    dose = as_text(column_of(obs, declared["dose"], "perturbation.dose", path)) if "dose" in declared else None
    where = f"{path}: obs['{declared['column' if dose is None else 'dose']}']"

    def members_of_label(label: str, amount: str) -> list[Member] | None:
        if label in unassigned:
            return None
        if label in control:
            return [(CONTROL, "")]
        members = [(CONTROL, "") if name in control else (name, amount) for name, amount in members_in(label, declared)]
        # A combination with an unassigned member ("A+nan") is no single perturbation either.
        if unassigned & {name for name, _ in members if name}:
            return None
        if any(SEPARATOR in name for name, _ in members):
            raise InputError(
                f"{path}: the label '{label}' holds '{SEPARATOR}', which joins the members of a combination here, but "
                f"perturbation.separator is {declared['separator']!r}. Set it to '{SEPARATOR}', or give the label another name with "
                "perturbation.rename."
            )
        return with_doses(members, amount, {CONTROL}, label, declared["separator"], where)

    codes, texts = _label_and_dose(text, dose)
    named = [members_of_label(*both) for both in texts]
    scale = Scale.of((amount for members in named for _, amount in members or []), where)
    canonical = [label_of(map(scale.member, members or []), (), organism, measured) or None for members in named]
    tell(canonical, np.bincount(codes[codes >= 0], minlength=len(canonical)), path, is_declared=dose is not None)
    categories = pd.Categorical(canonical)
    labels = pd.Series(pd.Categorical.from_codes(np.append(categories.codes, -1)[codes], categories.categories), index=obs.index)
    labels.attrs["dose_unit"] = scale.unit
    if not (labels == CONTROL).any():
        n_cells = cells_of_labels(obs, dataset, path)
        alike = look_alikes(n_cells, control, lambda label: names_in(label, declared), is_drug=not organism)
        hint = (
            f"These look like controls (cells): {counted(alike)}. If they are, set {declaration(alike)}." if alike
            else f"Its most common labels: {counted(n_cells)}. Name the control label in perturbation.control."
        )  # fmt: skip
        sought = " and ".join(f"perturbation.{key} = {declared[key]}" for key in ("control", "control_pattern") if key in declared)
        raise InputError(f"{path}: no control cells: none of {sought} is in obs['{declared['column']}']. {hint}")
    return labels


def cells_of_labels(obs: pd.DataFrame, dataset: dict, path: Path) -> dict[str, int]:
    """Return label as in the file → cells, most cells first, without the labels of cells that have no assigned perturbation."""
    declared = dataset["perturbation"]
    n_cells = pd.Series(as_text(column_of(obs, declared["column"], "perturbation.column", path))).value_counts()
    return {label: int(n) for label, n in n_cells.items() if n and label not in declared["drop"]}


def doubtful_labels(obs: pd.DataFrame, dataset: dict, genes: pd.DataFrame, path: Path) -> dict[str, dict[str, int]]:
    """Return what a block may have missed: labels that look like controls, frequent ones that are no gene, and combinations that are not split.

    Each with its cells; all are told and stay as they are.

    Raises
    ------
    InputError
        If labels say that cells have no single known perturbation (unassigned, doublet): they would pass for perturbations. And if the separator is
        wrong: as A|B that is not split, a held-out gene would train within a combination. Where it is null, or a pattern finds the members, that was
        chosen, and it is told only.
    """
    declared = dataset["perturbation"]
    is_drug, n_cells = dataset["perturbation_type"] == "drug", cells_of_labels(obs, dataset, path)
    names: set[str] = set() if is_drug else {*genes["original_name"], *genes["gene_name"], *genes["gene_id"]} - {""}

    def members(label: str) -> list[str]:
        return names_in(label, declared)

    controls = Controls.of(declared)
    meant = {*declared["drop"], *declared.get("rename", {})}
    assigned = {label: n for label, n in n_cells.items() if label not in meant and not set(declared["drop"]) & set(members(label))}
    if words := unassigned_labels(assigned, controls, members, names):
        raise InputError(f"{path}: {message(words, declared['drop'])}")
    combined = unsplit(n_cells, declared, members, names, is_human=dataset["organism"] == "human" and not is_drug)
    if combined:
        _tell_combinations(combined, declared, path)
    left = {label: n for label, n in n_cells.items() if not combined or label not in combined.labels}
    alike = look_alikes(left, controls, members, is_drug=is_drug)
    if alike:
        logger.warning("%s: %s", path, warning(alike, declared.get("control", [])))
    others = {} if is_drug else {name: n for name, n in no_genes(left, controls, members, names).items() if name not in alike}
    return {"looks_like_control": alike, "no_gene": others, "not_split": combined.labels if combined else {}}


def _tell_combinations(combined: Unsplit, declared: dict, path: Path) -> None:
    said = f"{path}: {combined.sentence(declared['separator'])}."
    fix = combined.fix(declared["column"])
    if combined.is_sure and declared["separator"] is not None and "pattern" not in declared:
        raise InputError(f"{said} {fix}. If these labels are no combinations, set perturbation.separator: null; nothing is split then.")
    logger.warning("%s Each stays one perturbation. %s, if they are combinations.", said, fix)


def _label_and_dose(text: pd.Categorical, dose: pd.Categorical | None) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Return which label and dose each cell has, -1 without a label, and these labels and doses, empty where the dose is missing."""
    if dose is None:
        return text.codes, [(label, "") for label in text.categories]
    amounts, has_label = ["", *dose.categories], text.codes >= 0
    codes = np.full(len(text), -1)
    codes[has_label], unique = pd.factorize((text.codes.astype(np.int64) * len(amounts) + dose.codes + 1)[has_label])
    return codes, [(text.categories[i // len(amounts)], amounts[i % len(amounts)]) for i in unique]


def _covariate(obs: pd.DataFrame, declared: str | list[str] | dict | None, undeclared: str, key: str, path: Path) -> pd.Categorical:
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
        texts = ["|".join(filter(None, (texts[i // len(values.categories)], values.categories[i % len(values.categories)]))) for i in seen]
    merged = pd.Categorical(texts)
    return pd.Categorical.from_codes(merged.codes[codes], merged.categories)


def schema_obs(source: pd.DataFrame, labels: pd.Series, name: str, dataset: dict, path: Path) -> pd.DataFrame:
    """Return the columns of the schema (totals excepted) and the source's own, prefixed `source_` where the names collide.

    Parameters
    ----------
    source
        obs of the cells that are kept, as it came.
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
        obs[covariate] = _covariate(source, dataset["covariates"].get(covariate), undeclared, f"covariates.{covariate}", path)
    if "dataset" in dataset["covariates"]:
        # Lane 1 of one screen and lane 1 of another are two batches.
        obs["batch"] = pd.Categorical(obs["dataset"].astype(str) + ":" + obs["batch"].astype(str))
    for column in source:
        values = source[column]
        kept_as = str(column)  # `_index` is a name that anndata keeps for itself
        while kept_as in (*SCHEMA_OBS, "_index") or (kept_as != column and kept_as in source):
            kept_as = f"source_{kept_as}"
        obs[kept_as] = as_text(values) if values.dtype == object or isinstance(values.dtype, pd.StringDtype) else values.array
    return obs


def gene_table(var: pd.DataFrame, dataset: dict) -> pd.DataFrame:
    """Return gene_name (approved symbol), gene_id (Ensembl id or empty), original_name and source_name (the index) per source gene.

    Where a file has them is found by `perturbflow.naming.gene_names`; attrs["told"] is what it tells.
    Names of genomes (GRCh38_) are left out of all but source_name.
    A name that is approved stays. Otherwise the Ensembl id decides where HGNC knows it, else a previous symbol of one gene is renamed.
    Two genes of the file are never given one name: where another has it, or two would come to share it, they stay as they are.
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
        approved = approved.where(~is_renamed | ~(approved.isin(set(names)) | approved.isin(claims.index[claims > 1])), names)
    named = {"gene_name": approved, "gene_id": ids, "original_name": names, "source_name": pd.Series(var.index.astype(str))}
    table = pd.DataFrame({column: values.to_numpy() for column, values in named.items()})
    table.attrs["told"] = found.told
    return table


def is_wanted(genes: pd.DataFrame, pattern: str, path: Path) -> np.ndarray:
    """Return in which genes' Ensembl ids, names where they have none, a regular expression finds something."""
    names = genes["gene_id"].where(genes["gene_id"] != "", genes["original_name"])
    wanted = np.array([re.search(pattern, name) is not None for name in names])
    if not wanted.any():
        raise InputError(f"{path}: gene_pattern '{pattern}' keeps no gene. Its genes: {', '.join(genes['original_name'].head(8))}, ...")
    return wanted


def contradicting(genes: pd.DataFrame) -> dict[str, str]:
    """Return approved symbol → the approved symbol that HGNC has for the gene's Ensembl id, where they differ."""
    table = human_symbols()
    by_id = genes["gene_id"].map(table.of_ensembl_id)
    differ = by_id.notna() & (by_id != genes["gene_name"]) & genes["gene_name"].isin(table.approved)
    return dict(zip(genes.loc[differ, "gene_name"], by_id[differ], strict=True))


def ambiguous(names: Iterable[str]) -> dict[str, list[str]]:
    """Return the names that may mean several genes today, and which: they were left alone."""
    meant = {name: candidates(name) for name in names}
    return {name: genes for name, genes in meant.items() if len(genes) > 1}
