"""Mistakes that a block may have in its labels: controls, combinations, variants, contexts, units, unassigned cells."""

import logging
import re
from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import pandas as pd

from perturbflow.errors import InputError
from perturbflow.genes.symbols import approved_symbol, human_symbols, in_other_letters
from perturbflow.screens.annotation import as_text, cells_of_labels, column_of
from perturbflow.screens.control_labels import DeclaredControls, counted, look_alikes, warning
from perturbflow.screens.dose_labels import UNKNOWN_DOSE, is_unit, names_in, parsed
from perturbflow.screens.organism import names_now
from perturbflow.screens.separators import Unsplit, torn, unsplit
from perturbflow.screens.unassigned import message, no_genes, unassigned_labels
from perturbflow.screens.variants import KEEP, check_variants, of_contexts

logger = logging.getLogger(__name__)

CONTEXT_COLUMN = re.compile(r"cell|line|donor|patient|tissue|context|sample", re.IGNORECASE)
MOST_CONTEXTS = 100  # a column of more values holds barcodes
VEHICLE = re.compile(r"dmso|veh|pbs|solvent", re.IGNORECASE)


@dataclass(frozen=True)
class _Checked:
    """The labels of a screen, its block and its genes, as the checks below read them.

    Attributes
    ----------
    n_cells
        Label as in the file → cells.
    names, known
        Names that genes have now or in a label; and all names and ids that the file has for them.
    warnings
        Collects sentences.
    """

    block: dict
    path: Path
    n_cells: dict[str, int]
    names: set[str]
    known: set[str]
    warnings: list[str] = field(default_factory=list)

    @property
    def declared(self) -> dict:
        """`perturbation` of the block."""
        return self.block["perturbation"]

    @property
    def is_drug(self) -> bool:
        """Whether perturbations are drugs; their names are no genes."""
        return self.block["perturbation_type"] == "drug"

    @property
    def is_human(self) -> bool:
        """Whether perturbations are human genes."""
        return self.block["organism"] == "human" and not self.is_drug

    @cached_property
    def controls(self) -> DeclaredControls:
        """The declared controls."""
        return DeclaredControls.of(self.declared)

    def members(self, label: str) -> list[str]:
        """Return the names in a label."""
        return names_in(label, self.declared)

    def is_gene(self, name: str) -> bool:
        """Return whether a name is a gene of the file, or an official human symbol that is no word for controls."""
        is_symbol = name in human_symbols().approved or approved_symbol(name) != name or in_other_letters(name)
        return name in self.names or (self.is_human and bool(is_symbol) and not self.controls.resembles(name))


def doubtful_labels(
    obs: pd.DataFrame, dataset: dict, genes: pd.DataFrame, path: Path, warnings: list[str] | None = None
) -> dict[str, dict[str, int]]:
    """Return labels with their cells that a block may have missed; all stay as they are.

    These look like controls, are no gene but frequent, or are combinations that are not split.
    Sentences on whatever else is likely wrong go to `warnings`.

    Raises
    ------
    InputError
        If labels say that cells have no single known perturbation (unassigned, doublet): they would pass for
        perturbations. If the separator is wrong: within A|B that is not split, a held-out gene would train.
        Or if several labels are of one gene or compound. A null separator and a pattern are a choice, and get warnings.
    """
    declared = dataset["perturbation"]
    is_drug = dataset["perturbation_type"] == "drug"
    names = set() if is_drug else {*names_now(genes, dataset["organism"]), *genes["gene_name"]} - {""}
    known = names | set(genes["original_name"]) | set(genes["gene_id"])
    found = [] if warnings is None else warnings
    checked = _Checked(dataset, path, cells_of_labels(obs, dataset, path), names, known, found)
    _check_unassigned(checked)
    combined = unsplit(checked.n_cells, declared, checked.members, names, is_human=checked.is_human)
    if combined:
        _check_combinations(combined, checked)
    not_split = combined.labels if combined else {}
    left = {label: n for label, n in checked.n_cells.items() if label not in not_split}
    check_variants(left, dataset, checked.is_gene, path, found)
    _check_contexts(obs, checked)
    _check_units(obs, checked)
    joined = _joined_to_controls(left, checked)
    alike = look_alikes(left, checked.controls, checked.members, is_drug=is_drug)
    alike = {name: n for name, n in alike.items() if name not in joined}
    if alike:
        logger.warning("%s: %s", path, warning(alike, declared.get("control", [])))
    _warn_of_compounds(checked)
    others = {} if is_drug else no_genes(left, checked.controls, checked.members, known)
    others = {name: n for name, n in others.items() if name not in alike}
    return {"looks_like_control": alike, "no_gene": others, "not_split": not_split}


def _check_unassigned(checked: _Checked) -> None:
    """Raise InputError where labels say that cells have no single known perturbation."""
    declared = checked.declared
    known = {*declared["drop"], *declared.get("rename", {})}
    whole = [label for label in checked.n_cells if label not in known and not torn(label, declared["separator"])]
    assigned = {
        label: checked.n_cells[label] for label in whole if not set(declared["drop"]) & set(checked.members(label))
    }
    if words := unassigned_labels(assigned, checked.controls, checked.members, checked.known):
        raise InputError(f"{checked.path}: {message(words, declared['drop'])}")


def _check_combinations(combined: Unsplit, checked: _Checked) -> None:
    """Raise InputError where the separator is wrong for sure; warn where the block chose how labels are read."""
    declared = checked.declared
    problem = f"{checked.path}: {combined.sentence(declared['separator'])}."
    fix = combined.fix(declared["column"])
    if combined.is_sure and declared["separator"] is not None and "pattern" not in declared:
        raise InputError(
            f"{problem} {fix}. If these labels are no combinations, set perturbation.separator: null; "
            "then nothing is split."
        )
    logger.warning("%s Each stays one perturbation. %s, if they are combinations.", problem, fix)


def _contexts_of(obs: pd.DataFrame, column: str, checked: _Checked) -> pd.DataFrame | None:
    """Return the distinct labels and contexts of a column; None where it holds no contexts."""
    if column == checked.declared["column"] or not CONTEXT_COLUMN.search(str(column)):
        return None
    if not 2 <= obs[column].nunique() <= MOST_CONTEXTS:
        return None
    cells = pd.DataFrame({"label": as_text(obs[checked.declared["column"]]), "context": as_text(obs[column])})
    cells = cells.drop_duplicates().dropna()
    is_none = any(len(context) < 2 or checked.is_gene(context) for context in set(cells["context"]))
    return None if is_none else cells


def _check_contexts(obs: pd.DataFrame, checked: _Checked) -> None:
    """Raise InputError where labels hold the context of a column too: A549_JQ1 beside K562_JQ1."""
    declared, controls = checked.declared, checked.controls
    if KEEP.endswith(f"'{declared.get('pattern')}'"):
        return
    for column in obs:
        cells = _contexts_of(obs, column, checked)
        if cells is None:
            continue
        perturbed = cells[[label not in controls and label not in declared["drop"] for label in cells["label"]]]
        pairs = {
            (name, context)
            for label, context in perturbed.itertuples(index=False)
            for name in checked.members(label)
            if name and name not in controls and not controls.resembles(name)
        }
        several, line = of_contexts(pairs, declared.get("pattern"))
        if several:
            shown = "; ".join(", ".join(map(repr, names[:3])) for names in list(several.values())[:3])
            raise InputError(
                f"{checked.path}: labels hold obs['{column}'] too: {shown}. Each would be a perturbation of its own, "
                f"one held out while another of the same trains. Write {line} and covariates.cell_type: {column}. If "
                f"they are perturbations of their own, write {KEEP}."
            )


def _check_units(obs: pd.DataFrame, checked: _Checked) -> None:
    """Warn where a column beside the dose holds several units.

    Raises
    ------
    InputError
        If a label has one number in several units: two doses would be one.
    """
    declared = checked.declared
    if not isinstance(column := declared.get("dose"), str):
        return
    dose, labels = as_text(column_of(obs, column, "perturbation.dose", checked.path)), as_text(obs[declared["column"]])
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
                    f"{checked.path}: obs['{column}'] gives '{label}' the dose {amount}, and obs['{name}'] has the "
                    f"units {', '.join(of)}: two doses would be one. To read both, {fix}."
                )
        if len(set(cells["unit"])) > 1:
            checked.warnings.append(
                f"obs['{name}'] holds {', '.join(units)}, and the doses of obs['{column}'] are taken as they are. "
                f"To read both, {fix}."
            )


def _joined_to_controls(n_cells: dict[str, int], checked: _Checked) -> dict[str, int]:
    """Return names that join a control and another name (ctrl_KLF1) → their cells, and warn of them."""
    controls = checked.controls
    cells: Counter[str] = Counter()
    for label, n in n_cells.items():
        if label not in controls:
            cells.update({name: n for name in checked.members(label) if name and name not in controls})

    def is_name(part: str) -> bool:
        return checked.is_gene(part) or part in cells

    joined = {
        name: n
        for name, n in cells.items()
        if not checked.is_gene(name) and controls.joined(name, is_name, is_drug=checked.is_drug)
    }
    if joined:
        checked.warnings.append(
            f"{len(joined):,} labels join a control and another name (cells): {counted(joined)}. They stay "
            "perturbations. If they are combinations with a control, set perturbation.separator to the sign between "
            "the two; if they are controls, list them in perturbation.control."
        )
    return joined


def _warn_of_compounds(checked: _Checked) -> None:
    """Warn where doses or a vehicle suggest that perturbations of unknown type are compounds."""
    has_dose = "dose" in checked.declared
    vehicle = next((name for name in checked.controls.names if VEHICLE.match(name)), None)
    if checked.block["perturbation_type"] == "unknown" and (has_dose or vehicle):
        sign = "perturbation.dose is declared" if has_dose else f"the control is {vehicle}"
        checked.warnings.append(
            f"{sign}, and labels are read as genes. If they are compounds, set perturbation_type: drug; "
            "then THC is no gene WAS."
        )
