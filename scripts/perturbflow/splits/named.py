"""Perturbations that a user names, in a split's own file or under `held_out` of its block.

They are translated into the labels of the screen, or refused in one message.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from perturbflow.errors import InputError
from perturbflow.genes.symbols import (
    CONTROL,
    SEPARATOR,
    canonical_label,
    entities_of,
    entity_of,
    label_of,
    members_of,
    without_dose,
)
from perturbflow.io.files import read_json
from perturbflow.nearest import did_you_mean, nearest
from perturbflow.screens.control_labels import DeclaredControls
from perturbflow.screens.dose_labels import DoseScale, members_in
from perturbflow.splits.divisions import ROLES

# Names of the roles elsewhere: GEARS, cell-load, scikit-learn.
ROLE_NAMES = {"val": "validation", "valid": "validation", "training": "train", "testing": "test"}
# GEARS writes a single perturbation A+ctrl, whatever the file calls its controls.
FIELD_CONTROLS = ("ctrl", CONTROL)
SHOWN = 10


@dataclass(frozen=True)
class Labels:
    """The labels of a screen, and how a user's words for them are read.

    Attributes
    ----------
    known
        Canonical labels of the screen.
    dropped
        Label → cells, of those that quality control dropped.
    organism
        Whose genes these are; empty for drugs.
    declared
        The keys of `perturbation` in the dataset's block that read a label: control, control_pattern, pattern,
        separator and rename. Empty without a block.
    """

    known: Sequence[str]
    dropped: Mapping[str, int]
    organism: str
    declared: Mapping[str, Any] = field(default_factory=dict)

    def _readings(self, text: str) -> list[str]:
        """Return the labels that a text may be: a canonical one, one of GEARS, one as in the dataset's file."""
        genes = {gene: gene for label in [*self.known, *self.dropped] for gene in members_of(label)}
        field_controls = [name for name in FIELD_CONTROLS if name not in genes]
        found = [canonical_label(text, field_controls, SEPARATOR, self.organism, genes)]
        if self.declared:
            controls = DeclaredControls.of(self.declared)
            named = members_in(text, self.declared)
            scale = DoseScale.of((dose for _, dose in named), f"'{text}'")
            members = [CONTROL if name in controls else scale.member((name, dose)) for name, dose in named]
            found.append(CONTROL if text in controls else label_of(members, field_controls, self.organism, genes))
        return found

    def label(self, text: str) -> str:
        """Return the label that a text means; the text in canonical form where it means none of the screen."""
        readings = self._readings(text)
        return next(
            (label for label in readings if label in self.known or label in self.dropped or label == CONTROL),
            readings[0],
        )

    def entity(self, text: str) -> str:
        """Return the perturbed gene, or the compound at all its doses, that a text means.

        It is the text in canonical form where it means none.
        """
        readings = [entity_of(label) for label in self._readings(text)]
        return next((name for name in readings if name in self.entities), readings[0])

    @property
    def entities(self) -> set[str]:
        """All genes or compounds of the screen's labels."""
        return {name for label in self.known for name in entities_of(label)}


def _listed(texts: Sequence[str], shown: Callable[[str], str] = str) -> str:
    more = f", {len(texts) - SHOWN:,} more" if len(texts) > SHOWN else ""
    return ", ".join(map(shown, texts[:SHOWN])) + more


def _unusable(
    places: Mapping[str, str],
    known: set[str],
    dropped: Mapping[str, int],
    called: str,
    written: Mapping[str, str],
    labels: Iterable[str],
) -> list[str]:
    """Return sentences on names that cannot be used: unknown ones with the nearest, dropped ones with their cells.

    Parameters
    ----------
    places
        Name → where it stands.
    called
        Kind of the names, in words.
    written
        Name → as the user wrote it.
    labels
        Those of the screen, with their doses.
    """
    at_doses: dict[str, list[str]] = {}
    for label in sorted(labels, key=lambda label: [without_dose(member)[1] or 0.0 for member in members_of(label)]):
        at_doses.setdefault(SEPARATOR.join(entities_of(label)), []).append(label)

    def shown(name: str) -> str:
        text = written.get(name, name)
        is_same = sorted(text.split(SEPARATOR)) == sorted(name.split(SEPARATOR))
        place = places[name] if is_same else f" (read as '{name}'){places[name]}"
        if name in at_doses:
            return f"'{text}'{place} (name it with its doses: {_listed(at_doses[name])})"
        return (
            did_you_mean(text, known, place)
            if nearest(text, known)
            else did_you_mean(name, known, place).replace(f"'{name}'", f"'{text}'", 1)
        )

    unknown = [name for name in places if name not in known and name not in dropped]
    gone = [name for name in places if name not in known and name in dropped]
    sentences = []
    if unknown:
        sentences.append(f"the screen has no such {called}: {_listed(unknown, shown)}")
    if gone:
        listed = _listed(gone, lambda name: f"'{written.get(name, name)}'{places[name]} ({dropped[name]} cells)")
        sentences.append(f"dropped by qc.min_cells_per_perturbation: {listed}")
    return sentences


def read_roles(path: Path) -> dict[str, list[str]]:
    """Return the lists of a split file by role, in the user's words.

    Raises
    ------
    InputError
        If the file is a pickle, no JSON of lists, or has an unknown key.
    """
    with path.open("rb") as file:
        # No JSON of lists starts like a pickle, not even of the first protocols.
        is_pickle = path.suffix in (".pkl", ".pickle") or file.read(1) in (b"\x80", b"(", b"]", b"}", b"c")
    if is_pickle:
        target = f"{path.stem}.converted.json"
        raise InputError(
            f"{path} is a pickle: reading one runs whatever its author put into it, so it is not read. "
            "If you trust its author, convert it:\n"
            f"  import json, pickle\n"
            "  json.dump({role: list(map(str, labels)) for role, labels in "
            f"pickle.load(open({path.name!r}, 'rb')).items()}}, open({target!r}, 'w'))\n"
            f"and name {target} as path."
        )
    listed: dict[str, list[str]] = {}
    content = read_json(path)
    named = {key: ROLE_NAMES.get(key.lower(), key.lower()) for key in content}
    if unknown := sorted(key for key, role in named.items() if role not in ROLES):
        raise InputError(
            f"{path}: unknown key {unknown}; a split file has the lists train, validation (or val) and test."
        )
    for key, role in named.items():
        texts = content[key]
        if not isinstance(texts, list) or not all(isinstance(label, str) for label in texts):
            raise InputError(f"{path}: '{key}' must be a list of labels.")
        listed[role] = [*listed.get(role, []), *texts]
    return listed


def from_file(path: Path, labels: Labels) -> dict[str, list[str]]:
    """Read roles from a JSON of lists of labels, as they are in the screen, in its file, or in GEARS.

    Without a list for training, all that the others do not name trains.

    Raises
    ------
    InputError
        If the file cannot be read, or a label cannot be used: all of them in one message.
    """
    written: dict[str, str] = {}
    roles: dict[str, list[str]] = {}
    for role, texts in read_roles(path).items():
        read = {text: labels.label(text) for text in texts}
        for text, label in read.items():
            written.setdefault(label, text)
        roles[role] = sorted({*read.values()} - {CONTROL})
    places: dict[str, list[str]] = {}
    for role, names in roles.items():
        for label in names:
            places.setdefault(label, []).append(role)
    stands = {label: f" in {' and '.join(of)}" for label, of in places.items()}
    found = _unusable(stands, set(labels.known), labels.dropped, "perturbation", written, labels.known)
    twice = [f"'{written[label]}' in {' and '.join(of)}" for label, of in places.items() if len(of) > 1]
    if twice:
        found.append(f"in two lists, while a perturbation has one role: {_listed(twice)}")
    if found:
        raise InputError("\n  ".join([f"{path}: labels that cannot be used. Remove or correct them:", *found]))
    if "train" not in roles:
        roles["train"] = sorted({*labels.known}.difference(*roles.values()))
    for role in ("train", "test"):
        if not roles.get(role):
            raise InputError(f"{path}: '{role}' is empty.")
    return roles


def held_out_names(texts: Iterable[Any], kind: str, labels: Labels) -> set[str]:
    """Return the names that a split's block holds out.

    They are genes or compounds, combinations at all their doses, or doses.

    Raises
    ------
    InputError
        If some are none of the screen's, in one message; or if nothing would be left to learn from.
    """

    def combination(text: str) -> str:
        return SEPARATOR.join(entities_of(labels.label(text)))

    if kind == "unseen_combination":
        called, read = "combination", combination
        known = {SEPARATOR.join(entities_of(label)) for label in labels.known if len(members_of(label)) > 1}
    elif kind == "unseen_dose":
        called, read = "dose measured alone", labels.label
        known = {label for label in labels.known if len(members_of(label)) == 1 and without_dose(label)[1]}
    else:
        called, read, known = "perturbed gene or compound", labels.entity, labels.entities
    written: dict[str, str] = {}
    for text in map(str, texts):
        written.setdefault(read(text), text)
    names = set(written)
    found = _unusable(dict.fromkeys(sorted(names), ""), known, labels.dropped, called, written, known)
    if found:
        raise InputError(f"held_out: {'; '.join(found)}.")
    if known <= names:
        raise InputError(f"held_out names every {called} of this screen; leave at least one to learn from.")
    return names
