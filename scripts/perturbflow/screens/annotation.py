"""What is known of cells and genes before a count is read: which cells are wanted, their labels and covariates, gene symbols."""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable
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
from perturbflow.screens import variants
from perturbflow.screens.control_labels import Controls, counted, declaration, look_alikes, warning
from perturbflow.screens.doses import (
    UNKNOWN_DOSE,
    Member,
    Scale,
    is_unit,
    members_in,
    names_in,
    parsed,
    tell,
    with_doses,
)
from perturbflow.screens.naming import gene_names
from perturbflow.screens.organism import names_now
from perturbflow.screens.separators import Unsplit, another_name, torn, unsplit
from perturbflow.screens.unassigned import message, no_genes, unassigned_labels

logger = logging.getLogger(__name__)

UNKNOWN = "unknown"
CONTEXT_COLUMN = re.compile(r"cell|line|donor|patient|tissue|context|sample", re.IGNORECASE)
MOST_CONTEXTS = 100  # a column of more values is of barcodes
SCHEMA_OBS = (
    "perturbation", "is_control", "n_perturbations", "perturbation_type", "cell_type", "batch", "dataset",
    "total_counts", "n_genes_by_counts", "pct_counts_mt",
)  # fmt: skip


def column_of(obs: pd.DataFrame, column: str, key: str, path: Path) -> pd.Series:
    """Return a column of obs that a block declares under `key`."""
    if column not in obs:
        raise InputError(
            f"{path}: obs has no column '{column}' ({key}). Its columns: {', '.join(map(str, obs.columns)) or '(none)'}."
        )
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
    named = {
        label: [label] if label in control else [name for name in names_in(label, declared) if name]
        for label in text.categories
    }
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

    dose = _dose(obs, declared, path)
    where = f"{path}: obs['{declared['column'] if dose is None else _columns(declared['dose'])[0]}']"

    def members_of_label(label: str, amount: str) -> list[Member] | None:
        if label in unassigned:
            return None
        if label in control:
            return [(CONTROL, "")]
        members = [(CONTROL, "") if name in control else (name, amount) for name, amount in members_in(label, declared)]
        # A combination with an unassigned member ("A+nan") is no single perturbation either.
        if unassigned & {name for name, _ in members if name}:
            return None
        if plus := next((name for name, _ in members if SEPARATOR in name), None):
            raise InputError(_holds_plus(label, plus, declared, path))
        return with_doses(members, amount, {CONTROL}, label, declared["separator"], where)

    codes, texts = _label_and_dose(text, dose)
    named = [members_of_label(*both) for both in texts]
    if organism == "human":
        others = {name for members in named for name, _ in members or []} - set(measured) - human_symbols().approved
        measured |= {
            name: measured.get(gene, gene)
            for name in others
            if (gene := in_other_letters(name)) and not control.resembles(name)
        }
    scale = Scale.of((amount for members in named for _, amount in members or []), where)
    canonical = [label_of(map(scale.member, members or []), (), organism, measured) or None for members in named]
    tell(canonical, np.bincount(codes[codes >= 0], minlength=len(canonical)), path, is_declared=dose is not None)
    categories = pd.Categorical(canonical)
    labels = pd.Series(
        pd.Categorical.from_codes(np.append(categories.codes, -1)[codes], categories.categories), index=obs.index
    )
    labels.attrs["dose_unit"] = scale.unit
    if not (labels == CONTROL).any():
        n_cells = cells_of_labels(obs, dataset, path)
        alike = look_alikes(n_cells, control, lambda label: names_in(label, declared), is_drug=not organism)
        hint = (
            f"These look like controls (cells): {counted(alike)}. If they are, set {declaration(alike)}." if alike
            else f"Its most common labels: {counted(n_cells)}. Name the control label in perturbation.control."
        )  # fmt: skip
        sought = " and ".join(
            f"perturbation.{key} = {declared[key]}" for key in ("control", "control_pattern") if key in declared
        )
        raise InputError(f"{path}: no control cells: none of {sought} is in obs['{declared['column']}']. {hint}")
    return labels


def _columns(declared: str | list[str]) -> list[str]:
    return [declared] if isinstance(declared, str) else declared


def _dose(obs: pd.DataFrame, declared: dict, path: Path) -> pd.Categorical | None:
    """Return the doses of cells as they are written: of one column, or of a number and its unit; None where none is declared."""
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


def _tell_units(obs: pd.DataFrame, declared: dict, path: Path, warnings: list[str]) -> None:
    """Warn where a column beside the dose holds several units, and raise InputError where a label has one number in several of them."""
    if not isinstance(column := declared.get("dose"), str):
        return
    dose, labels = as_text(column_of(obs, column, "perturbation.dose", path)), as_text(obs[declared["column"]])
    numbers = [text for text in dose.categories if (found := parsed(text)) and found[0] > 0 and not found[1]]
    for name in obs:
        if name == column or "unit" not in str(name).lower():
            continue
        unit = as_text(obs[name])
        units = [text for text in unit.categories if text.lower() not in UNKNOWN_DOSE]
        if len(units) < 2 or not all(map(is_unit, units)):
            continue
        cells = pd.DataFrame({"label": labels, "dose": dose, "unit": unit}).astype(object).drop_duplicates().dropna()
        cells = cells[cells["dose"].isin(numbers) & cells["unit"].isin(units)]
        fix = f"write perturbation.dose: [{column}, {name}]"
        for (label, amount), of in cells.groupby(["label", "dose"])["unit"]:
            if len(of) > 1:
                raise InputError(
                    f"{path}: obs['{column}'] gives '{label}' the dose {amount}, and obs['{name}'] says {', '.join(of)}: two doses would be "
                    f"one. To read both, {fix}."
                )
        if len(set(cells["unit"])) > 1:
            warnings.append(
                f"obs['{name}'] holds {', '.join(units)}, and the doses of obs['{column}'] are taken as they are. To read both, {fix}."
            )


def _holds_plus(label: str, name: str, declared: dict, path: Path) -> str:
    """Return the message on a name that holds the sign of combinations, with the fix."""
    fix = f"give it another name: {another_name([name], SEPARATOR)}"
    if declared["separator"] != SEPARATOR and not torn(name, SEPARATOR):
        fix += f". If it is a combination, set perturbation.separator: '{SEPARATOR}'"
    return f"{path}: the label '{label}' holds '{SEPARATOR}', which joins the members of a combination here. If it is one name, {fix}."


def cells_of_labels(obs: pd.DataFrame, dataset: dict, path: Path) -> dict[str, int]:
    """Return label as in the file → cells, most cells first, without the labels of cells that have no assigned perturbation."""
    declared = dataset["perturbation"]
    n_cells = pd.Series(as_text(column_of(obs, declared["column"], "perturbation.column", path))).value_counts()
    return {label: int(n) for label, n in n_cells.items() if n and label not in declared["drop"]}


def doubtful_labels(
    obs: pd.DataFrame, dataset: dict, genes: pd.DataFrame, path: Path, warnings: list[str] | None = None
) -> dict[str, dict[str, int]]:
    """Return what a block may have missed: labels that look like controls, frequent ones that are no gene, and combinations that are not split.

    Each with its cells; all are told and stay as they are. What else is likely wrong goes to `warnings`.

    Raises
    ------
    InputError
        If labels say that cells have no single known perturbation (unassigned, doublet): they would pass for perturbations. If the separator is
        wrong: as A|B that is not split, a held-out gene would train within a combination. Or if several labels are of one gene or compound.
        Where the separator is null, or a pattern finds the members, that was chosen, and it is told only.
    """
    declared, told = dataset["perturbation"], [] if warnings is None else warnings
    is_drug, n_cells = dataset["perturbation_type"] == "drug", cells_of_labels(obs, dataset, path)
    names = set() if is_drug else {*names_now(genes, dataset["organism"]), *genes["gene_name"]} - {""}
    is_human = dataset["organism"] == "human" and not is_drug
    controls = Controls.of(declared)

    def members(label: str) -> list[str]:
        return names_in(label, declared)

    named = names | set(genes["original_name"]) | set(genes["gene_id"])
    meant = {*declared["drop"], *declared.get("rename", {})}
    whole = [label for label in n_cells if label not in meant and not torn(label, declared["separator"])]
    assigned = {label: n_cells[label] for label in whole if not set(declared["drop"]) & set(members(label))}
    if words := unassigned_labels(assigned, controls, members, named):
        raise InputError(f"{path}: {message(words, declared['drop'])}")

    def is_gene(name: str) -> bool:
        is_symbol = name in human_symbols().approved or approved_symbol(name) != name or in_other_letters(name)
        return name in names or (is_human and bool(is_symbol) and not controls.resembles(name))

    combined = unsplit(n_cells, declared, members, names, is_human=is_human)
    if combined:
        _tell_combinations(combined, declared, path)
    left = {label: n for label, n in n_cells.items() if not combined or label not in combined.labels}
    variants.tell(left, dataset, is_gene, path, told)
    _tell_contexts(obs, dataset, is_gene, path)
    _tell_units(obs, declared, path, told)
    alike = look_alikes(left, controls, members, is_drug=is_drug)
    cells = Counter(
        {
            name: n
            for label, n in left.items()
            if label not in controls
            for name in members(label)
            if name and name not in controls
        }
    )

    def is_name(part: str) -> bool:
        return is_gene(part) or part in cells

    joined = {
        name: n for name, n in cells.items() if not is_gene(name) and controls.joined(name, is_name, is_drug=is_drug)
    }
    alike = {name: n for name, n in alike.items() if name not in joined}
    if joined:
        told.append(
            f"{len(joined):,} labels join a control and another name (cells): {counted(joined)}. They stay perturbations. If they are "
            "combinations with a control, set perturbation.separator to the sign between the two; if they are controls, list them in "
            "perturbation.control."
        )
    if alike:
        logger.warning("%s: %s", path, warning(alike, declared.get("control", [])))
    vehicle = next((name for name in controls.names if re.match(r"dmso|veh|pbs|solvent", name, re.IGNORECASE)), None)
    if dataset["perturbation_type"] == "unknown" and ("dose" in declared or vehicle):
        sign = "perturbation.dose is declared" if "dose" in declared else f"the control is {vehicle}"
        told.append(
            f"{sign}, and labels are read as genes. If they are compounds, set perturbation_type: drug; THC is no gene WAS then."
        )
    others = (
        {}
        if is_drug
        else {name: n for name, n in no_genes(left, controls, members, named).items() if name not in alike}
    )
    return {"looks_like_control": alike, "no_gene": others, "not_split": combined.labels if combined else {}}


def _tell_contexts(obs: pd.DataFrame, dataset: dict, is_gene: Callable[[str], bool], path: Path) -> None:
    """Raise InputError where the cell line, or another context that a column holds, stands in the labels: A549_JQ1 beside K562_JQ1."""
    declared, controls = dataset["perturbation"], Controls.of(dataset["perturbation"])
    if variants.KEEP.endswith(f"'{declared.get('pattern')}'"):
        return
    for column in obs:
        if (
            column == declared["column"]
            or not CONTEXT_COLUMN.search(str(column))
            or not 2 <= obs[column].nunique() <= MOST_CONTEXTS
        ):
            continue
        cells = (
            pd.DataFrame({"label": as_text(obs[declared["column"]]), "context": as_text(obs[column])})
            .drop_duplicates()
            .dropna()
        )
        contexts = set(cells["context"])
        if any(len(context) < 2 or is_gene(context) for context in contexts):
            continue
        pairs = {
            (name, context) for label, context in cells.itertuples(index=False) if label not in controls and label not in declared["drop"]
            for name in names_in(label, declared) if name and name not in controls and not controls.resembles(name)
        }  # fmt: skip
        several, line = variants.of_contexts(pairs, declared.get("pattern"))
        if several:
            shown = "; ".join(", ".join(map(repr, names[:3])) for names in list(several.values())[:3])
            raise InputError(
                f"{path}: labels hold obs['{column}'] too: {shown}. Each would be a perturbation of its own, one held out while another of the "
                f"same trains. Write {line} and covariates.cell_type: {column}. If they are perturbations of their own, write {variants.KEEP}."
            )


def _tell_combinations(combined: Unsplit, declared: dict, path: Path) -> None:
    said = f"{path}: {combined.sentence(declared['separator'])}."
    fix = combined.fix(declared["column"])
    if combined.is_sure and declared["separator"] is not None and "pattern" not in declared:
        raise InputError(
            f"{said} {fix}. If these labels are no combinations, set perturbation.separator: null; nothing is split then."
        )
    logger.warning("%s Each stays one perturbation. %s, if they are combinations.", said, fix)


def _label_and_dose(text: pd.Categorical, dose: pd.Categorical | None) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Return which label and dose each cell has, -1 without a label, and these labels and doses, empty where the dose is missing."""
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
    """Return gene_name (approved symbol), gene_id (Ensembl id or empty), original_name and source_name (the index) per source gene.

    Where a file has them is found by `perturbflow.screens.naming.gene_names`; attrs["told"] is what it tells.
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
    table.attrs["told"] = found.told
    return table


def is_wanted(genes: pd.DataFrame, pattern: str, path: Path) -> np.ndarray:
    """Return in which genes' Ensembl ids, names where they have none, a regular expression finds something."""
    names = genes["gene_id"].where(genes["gene_id"] != "", genes["original_name"])
    wanted = np.array([re.search(pattern, name) is not None for name in names])
    if not wanted.any():
        raise InputError(
            f"{path}: gene_pattern '{pattern}' keeps no gene. Its genes: {', '.join(genes['original_name'].head(8))}, ..."
        )
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
