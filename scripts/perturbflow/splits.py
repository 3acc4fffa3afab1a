"""Divide perturbations, and with them cells, into training, validation and test."""

import difflib
import hashlib
import json
import logging
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from perturbflow.errors import InputError
from perturbflow.files import read_json, write_json
from perturbflow.symbols import CONTROL, SEPARATOR, canonical_label, members_of

logger = logging.getLogger(__name__)

ROLES = ("train", "validation", "test")
# Controls are split too: a model that starts from a control it was trained on would be scored on its own training data.
CONTROL_FRACTIONS = {"train": 0.5, "test": 0.3, "validation": 0.2}

Perturbations = dict[str, list[str]]


def _take(names: list[str], fraction: float, rng: np.random.Generator) -> set[str]:
    """Return a random share of the names, rounded to at least one where the fraction is positive."""
    n = min(len(names), max(1, round(fraction * len(names)))) if fraction > 0 else 0
    return set(rng.permutation(sorted(names))[:n])


def unseen_perturbation(labels: list[str], test_fraction: float, validation_fraction: float, seed: int) -> Perturbations:
    """Hold out genes: every perturbation with a held-out member goes where the gene goes, test before validation."""
    genes = sorted({gene for label in labels for gene in members_of(label)})
    if len(genes) < 3:
        raise InputError(f"split unseen_perturbation needs at least 3 perturbed genes; this screen has {len(genes)}: {', '.join(genes)}.")
    rng = np.random.default_rng(seed)
    test = _take(genes, test_fraction, rng)
    validation = _take(sorted(set(genes) - test), validation_fraction * len(genes) / max(1, len(genes) - len(test)), rng)
    roles: Perturbations = {role: [] for role in ROLES}
    for label in labels:
        members = set(members_of(label))
        roles["test" if members & test else "validation" if members & validation else "train"].append(label)
    return roles


def unseen_combination(labels: list[str], test_fraction: float, validation_fraction: float, seed: int) -> Perturbations:
    """Hold out combinations; every single perturbation is in training."""
    combinations = sorted(label for label in labels if len(members_of(label)) > 1)
    if len(combinations) < 2:
        raise InputError(
            f"split unseen_combination needs at least 2 combinations (A+B); this screen has {len(combinations)}. "
            "Set combinations: false in the dataset's block, or check perturbation.separator."
        )
    rng = np.random.default_rng(seed)
    test = _take(combinations, test_fraction, rng)
    rest = sorted(set(combinations) - test)
    validation = _take(rest, validation_fraction * len(combinations) / max(1, len(rest)), rng) if rest else set()
    return {
        "train": [label for label in labels if label not in test | validation],
        "validation": sorted(validation),
        "test": sorted(test),
    }


def from_file(
    path: Path, labels: list[str], dropped: dict[str, int], validation_fraction: float, seed: int, organism: str
) -> Perturbations:
    """Read roles from a JSON of three lists of labels; without validation, a share of train serves, by seed."""
    content = read_json(path)
    if unknown := set(content) - set(ROLES):
        raise InputError(f"{path}: unknown key {sorted(unknown)}; a split file has the lists train, validation and test.")
    roles: Perturbations = {}
    for role in ROLES:
        listed = content.get(role, [])
        if not isinstance(listed, list) or not all(isinstance(label, str) for label in listed):
            raise InputError(f"{path}: '{role}' must be a list of labels.")
        canonical = [canonical_label(label, {CONTROL}, SEPARATOR, organism) for label in listed]
        roles[role] = sorted({label for label in canonical if label != CONTROL})
    known = set(labels)
    for role, listed in roles.items():
        for label in listed:
            if label not in known:
                why = (
                    f"it was dropped by qc.min_cells_per_perturbation ({dropped[label]} cells)" if label in dropped
                    else f"the screen has no such perturbation; nearest: {', '.join(difflib.get_close_matches(label, labels)) or 'none'}"
                )  # fmt: skip
                raise InputError(f"{path}: '{label}' in '{role}' cannot be used: {why}. Remove it from the file.")
    for first, second in (("train", "validation"), ("train", "test"), ("validation", "test")):
        if both := sorted(set(roles[first]) & set(roles[second])):
            raise InputError(f"{path}: {', '.join(both[:5])} in both '{first}' and '{second}': a perturbation has one role.")
    for role in ("train", "test"):
        if not roles[role]:
            raise InputError(f"{path}: '{role}' is empty.")
    if not roles["validation"] and len(roles["train"]) > 2:
        chosen = _take(roles["train"], max(validation_fraction, 1e-9), np.random.default_rng(seed))
        roles["validation"] = sorted(chosen)
        roles["train"] = [label for label in roles["train"] if label not in chosen]
        logger.info("%s names no validation perturbations: %s serve, by seed %d", path, ", ".join(sorted(chosen)), seed)
    return roles


def members_seen(label: str, train: list[str]) -> int:
    """Return how many members of a perturbation are measured alone in training."""
    return sum(gene in train for gene in members_of(label))


def divide_controls(obs: pd.DataFrame, seed: int) -> pd.Series:
    """Return a role for every control cell, divided within batch and cell type by CONTROL_FRACTIONS.

    Each next control goes to the role that is furthest behind its share, so that three controls serve all three roles.
    Batches with fewer than three are divided together, per cell type.
    """
    roles = pd.Series(index=obs.index, dtype=object)
    rng = np.random.default_rng(seed)
    n_in_stratum = obs.groupby(["batch", "cell_type"], observed=True)["batch"].transform("size")
    batch = obs["batch"].astype(str).where(n_in_stratum >= len(ROLES), "")
    for _, cells in obs.groupby([batch, obs["cell_type"].astype(str)], sort=True):
        given = dict.fromkeys(CONTROL_FRACTIONS, 0)
        for n, cell in enumerate(rng.permutation(np.sort(cells.index.to_numpy())), start=1):
            role = max(given, key=lambda role: CONTROL_FRACTIONS[role] * n - given[role])
            given[role] += 1
            roles[cell] = role
    return roles


def names_digest(names: list[str]) -> str:
    """Return the SHA-256 of a set of names, whatever their order."""
    return hashlib.sha256(json.dumps(sorted(names)).encode()).hexdigest()


def split(harmonized: Path, harmonization: Path, split: Path, name: str, spec: dict) -> None:
    """Write the role of every perturbation and cell.

    Parameters
    ----------
    harmonized, harmonization
        The screen in its common schema, and the account of what was dropped.
    split
        JSON to be written: perturbations per role, members seen per held-out perturbation, cells per role, SHA-256 of each.
    name, spec
        The split's name and block.

    Raises
    ------
    InputError
        If the split is not possible on this screen.
    """
    obs = ad.read_h5ad(harmonized, backed="r").obs
    account = read_json(harmonization)
    labels = sorted(set(obs["perturbation"].astype(str)) - {CONTROL})
    arguments = {key: spec[key] for key in ("validation_fraction", "seed")}
    if spec["kind"] == "file":
        organism = account["organism"]
        roles = from_file(Path(spec["path"]), labels, account["perturbations"]["dropped"], **arguments, organism=organism)
    else:
        kinds = {"unseen_perturbation": unseen_perturbation, "unseen_combination": unseen_combination}
        roles = kinds[spec["kind"]](labels, spec["test_fraction"], **arguments)
    for role in ("train", "test"):
        if not roles[role]:
            raise InputError(f"splits.{name} leaves no {role} perturbation on this screen; change its fractions or seed.")

    role_of_label = {label: role for role in ROLES for label in roles[role]}
    role_of_cell = obs["perturbation"].astype(str).map(role_of_label).astype(object)
    controls = obs[obs["is_control"].to_numpy()]
    role_of_cell[controls.index] = divide_controls(controls, spec["seed"])
    cells = {role: sorted(role_of_cell.index[role_of_cell == role]) for role in ROLES}
    n_controls = {role: int((role_of_cell[controls.index] == role).sum()) for role in ROLES}
    left_out = sorted(set(labels) - set(role_of_label))
    if left_out:
        logger.info("%d perturbations of the screen have no role in this split and are left out: %s", len(left_out), ", ".join(left_out))
    for role in ROLES:
        logger.info("%s: %d perturbations, %d cells, %d of them controls", role, len(roles[role]), len(cells[role]), n_controls[role])
    held_out = [*roles["validation"], *roles["test"]]
    write_json(
        split,
        {
            "name": name,
            "spec": spec,
            "perturbations": {role: sorted(roles[role]) for role in ROLES},
            "left_out": left_out,
            "members_seen": {label: members_seen(label, roles["train"]) for label in held_out},
            "controls": n_controls,
            "cells": cells,
            "sha256": {role: {"perturbations": names_digest(roles[role]), "cells": names_digest(cells[role])} for role in ROLES},
        },
    )
