"""Doses as files write them: numbers with or without a unit, in a column or within the label.

A combination has one dose per member.
"""

import ast
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from perturbflow.errors import InputError
from perturbflow.genes.symbols import CONTROL, DOSE_SIGN, at_dose, members_of, without_dose
from perturbflow.screens.control_labels import DeclaredControls

logger = logging.getLogger(__name__)

NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
_UNIT = r"[^\W\d_][^\W\d_%/·. ]*(?:[/·. ]?[^\W\d_]+)*|%"
DOSE = re.compile(rf"\s*({NUMBER})(?:[\s_-]*(?:({_UNIT})|\(\s*({_UNIT})\s*\)))?\s*")
UNKNOWN_DOSE = {"", "nan", "na", "n/a", "none", "null", "<na>", "-"}
# Between the doses of one text: the separator of members first, then the first of these that leaves doses alone.
BETWEEN = ("+", ",", ";", "|", "_", "/", ":", "&", " and ")
DECIMAL_COMMA = re.compile(r"\d+,\d+")
# [('DRUG', 0.05, 'uM')], as Tahoe-100M writes a label; lists of lists, dicts, and names alone likewise.
PYTHON = re.compile(r"\s*(?:[\[({]\s*){1,2}['\"].*", re.DOTALL)
NAME_KEYS = ("drug", "compound", "treatment", "gene", "target", "perturbation", "name")
DOSE_KEYS = (("dose", "concentration", "conc", "dose_value"), ("unit", "units", "dose_unit"))

MOLAR = {"fM": 1e-9, "pM": 1e-6, "nM": 1e-3, "uM": 1.0, "mM": 1e3, "M": 1e6}  # in µM
WORDS = {"molar": "m", "femto": "f", "pico": "p", "nano": "n", "micro": "u", "milli": "m", "mol/l": "m", "moles/l": "m"}
SHOWN = 5  # values in a message

Member = tuple[str, str]  # a name, and its dose as it is written; empty where it has none


def parsed(text: str) -> tuple[float, str] | None:
    """Return the number and the unit of a dose, the latter empty where it has none; None for a text that is no dose.

    A unit has one spelling.
    """
    if not (match := DOSE.fullmatch(text)) or not np.isfinite(amount := float(match[1])):
        return None
    return amount, _unit(match[2] or match[3] or "")


def _unit(text: str) -> str:
    unit = text.strip().replace("µ", "u").replace("μ", "u")
    short = unit.lower().replace(" ", "")
    for word, letter in WORDS.items():
        short = short.replace(word, letter)
    return next((name for name in MOLAR if name.lower() == short), unit.lower())


def is_unit(text: str) -> bool:
    """Return whether a text is a unit of doses: molar, or mass or activity per volume."""
    unit = _unit(text)
    return unit in MOLAR or re.fullmatch(r"[fpnum]?(?:g|u|iu)/[unmd]?l|%", unit) is not None


def doses_in(text: str, separator: str | None) -> list[str]:
    """Return the doses in a text, as they are written; the text itself where it lists none."""
    text = text.strip()
    listed = text[1:-1] if (text[:1], text[-1:]) in (("(", ")"), ("[", "]")) else text
    if parsed(listed) is None:
        for between in (*([separator] if separator else []), *BETWEEN):
            if len(parts := listed.split(between)) > 1 and all(map(parsed, parts)):
                return parts
        if len(parts := re.split(r"\s+(?=[\d.])", listed.strip())) > 1 and all(map(parsed, parts)):
            return parts
    return [listed if parsed(listed) else text]


def _entry(value: object) -> Member | None:
    """Return the name and the dose of a dict, or of a tuple or list of two or three values; None for anything else."""
    if isinstance(value, dict):
        words = {str(key).lower(): of for key, of in value.items()}
        name = next((words[key] for key in NAME_KEYS if key in words), None)
        parts = [next((words[key] for key in keys if key in words), None) for keys in DOSE_KEYS]
    elif isinstance(value, (tuple, list)) and 2 <= len(value) <= 3:
        name, *parts = value
    else:
        return None
    if not isinstance(name, str) or any(isinstance(part, (tuple, list, dict, set)) for part in parts):
        return None
    dose = "" if parts[0] is None else " ".join(str(part) for part in parts if part is not None)
    return (name, dose) if not dose or parsed(dose) or isinstance(parts[0], (int, float)) else None


def _tuples(label: str) -> list[Member] | None:
    """Return names and doses of a label in Python's syntax; None for any other label.

    Such labels are [(name, dose, unit)], [name, name], and {"drug": name}.
    """
    if not PYTHON.fullmatch(label):
        return None
    text = re.sub(r"\b(?:np|numpy)\.\w+\(([^()]*)\)", r"\1", label.strip())
    text = re.sub(r"\bnan\b(?=\s*[,)\]}])", "None", text)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None
    if entry := _entry(value):
        return [entry]
    if not isinstance(value, (list, tuple, set)) or not value:
        return None
    if all(isinstance(name, str) for name in value):
        return [(name, "") for name in value]
    entries = [entry for one in value if (entry := _entry(one))]
    return entries if len(entries) == len(value) else None


def _matches(label: str, pattern: str) -> list[Member]:
    """Return all matches of a pattern: its groups member, dose and unit, or its first group with a value."""
    found = []
    for match in re.finditer(pattern, label):
        named = match.groupdict()
        if "member" in named:
            found.append((named["member"] or "", f"{named.get('dose') or ''} {named.get('unit') or ''}".strip()))
        else:
            found.append((next((group for group in match.groups() if group is not None), ""), ""))
    return found or [(label, "")]


def _by_pattern(label: str, declared: Mapping) -> list[Member]:
    """Return the members that the pattern of a block finds in a label.

    A pattern may be written for one guide. A pattern that is bound to the begin or end of a label takes
    `KLF1_1|GATA1_2` for one member. Where it matches in every part between separators, controls aside, each part is
    read by itself.
    """
    pattern, separator = declared["pattern"], declared["separator"]
    parts = [part.strip() for part in label.split(separator)] if separator else [label]
    controls, unassigned = DeclaredControls.of(declared), declared.get("drop", ())
    others = {part for part in parts if part in controls or part in unassigned}
    if not all(part in others or re.search(pattern, part) for part in parts):
        parts = [label]
    return [member for part in parts for member in ([(part, "")] if part in others else _matches(part, pattern))]


def members_in(label: str, declared: Mapping) -> list[Member]:
    """Return the members of a label, in its order, and their doses: by pattern or tuples, then separator and rename.

    A label that `rename` has as a whole has its new name from the start.

    Parameters
    ----------
    declared
        `perturbation` of a dataset's block.
    """
    renamed, members = declared.get("rename", {}), []
    label = renamed.get(label, label)
    tuples = None if "pattern" in declared else _tuples(label)
    found = _by_pattern(label, declared) if "pattern" in declared else tuples or [(label, "")]
    if declared["separator"] and tuples is None:
        found = [(name, dose) for part, dose in found for name in part.split(declared["separator"])]
    for name, dose in ((name.strip(), dose) for name, dose in found):
        drug, sign, amount = name.rpartition(DOSE_SIGN)
        if not dose and sign and drug and parsed(amount):
            name, dose = drug, amount
        members.append((renamed.get(name, name), dose))
    return members


def names_in(label: str, declared: Mapping) -> list[str]:
    """Return the members of a label without their doses (`members_in`)."""
    return [name for name, _ in members_in(label, declared)]


def with_doses(
    members: list[Member], text: str, control: set[str], label: str, separator: str | None, where: str
) -> list[Member]:
    """Return members with the doses of a column: one for all of them, or one for each in the order of the label.

    Parameters
    ----------
    text
        The value of the column.
    control
        Names of controls, which have no dose.
    where
        File and column, for the message.

    Raises
    ------
    InputError
        If the number of doses is none of these: one, the members, the members without controls. Or if the label holds
        doses itself.
    """
    members = [(name, "" if name in control else dose) for name, dose in members]
    if text.strip().lower() in UNKNOWN_DOSE:
        return members
    if any(dose for _, dose in members):
        raise InputError(
            f"{where} gives the dose '{text}' to the label '{label}', which holds a dose itself. Remove "
            "perturbation.dose from the dataset's block, or take the dose out of the label with perturbation.pattern."
        )
    named = [i for i, (name, _) in enumerate(members) if name]
    perturbed = [i for i in named if members[i][0] not in control]
    doses = doses_in(text, separator)
    if DECIMAL_COMMA.fullmatch(text.strip()) and len(named) > 1 and perturbed:
        raise InputError(
            f"{where} gives the dose '{text}' to the label '{label}': two doses, or one with a decimal comma? Write "
            f"{text.strip().replace(',', '+')} or {text.strip().replace(',', '.')} in the file."
        )
    of_member = {len(named): named, len(perturbed): perturbed}.get(len(doses)) if len(doses) > 1 else None
    if len(doses) > 1 and of_member is None:
        names = ", ".join(members[i][0] for i in named)
        raise InputError(
            f"{where} gives {len(doses)} doses, '{text}', to the label '{label}', whose members are {names}. "
            "Write one dose for all of them, or one for each in their order, such as 1+10; a decimal has a point."
        )
    given = dict(zip(of_member, doses, strict=True)) if of_member else dict.fromkeys(perturbed, doses[0])
    if twice := [
        name
        for name in {members[i][0] for i in perturbed}
        if len({given[i] for i in perturbed if members[i][0] == name}) > 1
    ]:
        raise InputError(
            f"{where} gives several doses, '{text}', to '{twice[0]}' in the label '{label}'. Write one dose, or leave "
            "these cells out: add "
            f'"{label}" to perturbation.drop.'
        )
    return [(name, given.get(i, "") if name not in control else "") for i, (name, _) in enumerate(members)]


@dataclass(frozen=True)
class DoseScale:
    """The unit that all doses of a screen are converted to.

    Attributes
    ----------
    unit
        Its name; empty where the file names none.
    factors
        Factor of a dose, per unit of the file.
    """

    unit: str
    factors: dict[str, float]

    @classmethod
    def of(cls, texts: Iterable[str], where: str) -> "DoseScale":
        """Find the unit: the only one, or µM for several molar ones.

        Raises
        ------
        InputError
            For a text that is no dose, and for units that cannot be converted to one.
        """
        found = {text: parsed(text) for text in dict.fromkeys(texts) if text.strip().lower() not in UNKNOWN_DOSE}
        if wrong := [text for text, dose in found.items() if dose is None]:
            shown = ", ".join(f"'{text}'" for text in wrong[:SHOWN])
            is_negative = any(re.fullmatch(rf"\s*-{NUMBER}.*", text) for text in wrong)
            raise InputError(
                f"{where} holds {shown}{' ...' if len(wrong) > SHOWN else ''}, which "
                f"{'are no doses' if len(wrong) > 1 else 'is no dose'}. A dose is a number, with a unit or without: "
                "10, 0.1 uM. "
                + (
                    "Is it a logarithm? Write the dose itself."
                    if is_negative
                    else "Write numbers, or remove perturbation.dose."
                )
            )
        doses = {text: dose for text, dose in found.items() if dose is not None}
        units = list(dict.fromkeys(unit for amount, unit in doses.values() if unit or amount > 0))
        if len(units) < 2:
            return cls(units[0] if units else "", {"": 1.0, **dict.fromkeys(units, 1.0)})
        if all(unit in MOLAR for unit in units):
            return cls("uM", {"": 0.0, **{unit: MOLAR[unit] for unit in units}})  # only a zero has no unit
        examples = ", ".join(
            f"'{next(text for text, (_, of) in doses.items() if of == unit)}'" for unit in units[:SHOWN]
        )
        raise InputError(
            f"{where} holds doses in several units, such as {examples}: "
            f"{', '.join(unit or '(none)' for unit in units[:SHOWN])}. Molar units (pM, nM, uM, mM, M) are brought to "
            "one; bring the others to one unit in the file."
        )

    def member(self, member: Member) -> str:
        """Return `NAME@dose`; the name where there is no dose."""
        name, text = member
        dose = parsed(text)
        return name if dose is None else at_dose(name, dose[0] * self.factors[dose[1]])


def warn_of_doses(labels: Sequence[str | None], n_cells: np.ndarray, path: Path, *, is_declared: bool) -> None:
    """Warn of perturbed cells without a dose in a screen that has doses, and of those at dose zero.

    Parameters
    ----------
    labels
        Canonical labels; None where cells have none.
    n_cells
        Cells of each, (labels,).
    is_declared
        Whether the block declares a column of doses.
    """
    doses = [
        [without_dose(member)[1] for member in members_of(label)] if label and label != CONTROL else []
        for label in labels
    ]
    if not is_declared and all(dose is None for of in doses for dose in of):
        return
    for is_odd, words in (
        (lambda dose: dose is None, "have no dose; a compound without one is a perturbation of its own"),
        (
            lambda dose: dose == 0,
            "are at dose 0 and count as perturbed: if these are vehicle controls, list them in perturbation.control",
        ),
    ):
        if odd := [i for i, of in enumerate(doses) if any(map(is_odd, of))]:
            shown = ", ".join(dict.fromkeys(str(labels[i]) for i in odd[: 2 * SHOWN]))
            logger.warning("%s: %s cells %s: %s", path, f"{int(n_cells[odd].sum()):,}", words, shown)
