"""Divide perturbations, contexts or cells into training, validation and test.

A role belongs to a cell. Where perturbations are held out (`LABEL_KINDS`), all cells of a perturbation have one role.
Where contexts or cells are, a perturbation has cells in several.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd

from perturbflow.errors import InputError
from perturbflow.genes.symbols import CONTROL
from perturbflow.io.files import read_json, write_json
from perturbflow.splits.cells import by_perturbation, random_cells
from perturbflow.splits.contexts import CONTEXT_KINDS, Support, n_sources
from perturbflow.splits.divisions import DIVISIONS, ROLES, Perturbations, Shares, members_seen, take
from perturbflow.splits.named import Labels, from_file, held_out_names
from perturbflow.splits.stored_roles import stored_roles

logger = logging.getLogger(__name__)

# Kinds that hold perturbations out: a label has one role.
LABEL_KINDS = ("unseen_perturbation", "unseen_combination", "unseen_dose", "file")
# The held-out things, and the evidence that a score is.
GENERALIZATION = {
    "unseen_perturbation": (
        "Genes or compounds are held out, with all their doses: scores say how well effects of those that "
        "training never saw perturbed are predicted, in contexts that training knows."
    ),
    "unseen_combination": (
        "Combinations are held out, with all their doses, while everything perturbed alone is in training: scores "
        "say how well known effects are combined, and nothing of new genes or compounds."
    ),
    "unseen_dose": (
        "Doses of compounds are held out whose other doses are in training: scores say how well responses are "
        "interpolated or extrapolated over dose, and nothing of new compounds."
    ),
    "unseen_context": (
        "Contexts are held out, with all their cells, controls included: scores say how well effects measured in "
        "other contexts carry over to the controls of a new one, and nothing of new perturbations."
    ),
    "unseen_perturbation_in_context": (
        "Perturbations are held out in one context each, whose controls and other perturbations train. As many other "
        "contexts as n_sources says have them in training: scores say how much measurements elsewhere are worth."
    ),
    "random_cells": (
        "Cells are held out at random, and training saw other cells of every perturbation: scores measure "
        "interpolation and are no evidence of generalization."
    ),
    "file": (
        "Perturbations are held out by a list of the user's own: scores say how well these are predicted; how "
        "many of their genes or compounds training saw perturbed alone, at whatever dose, stands beside each."
    ),
}

# What of a held-out context trains beside this changes the evidence.
SUPPORTED = {
    "zero-shot": (
        "Contexts are held out but for some of their controls, which train: scores say how well effects measured in "
        "other contexts carry over to a new one whose unperturbed cells are known, and nothing of new perturbations."
    ),
    "few-shot": (
        "Contexts are held out but for some of their controls and perturbations, which train: scores say how well "
        "these and other contexts tell the effects of the rest in it, and nothing of new perturbations."
    ),
}


def generalization(spec: dict) -> str:
    """Return in a sentence or two what scores on a split are evidence of."""
    if spec["kind"] == "unseen_context" and (support := Support.share_of(spec)) is not None:
        return SUPPORTED["few-shot" if support else "zero-shot"]
    return GENERALIZATION[spec["kind"]]


# --- perturbations held out by a list ------------------------------------------------------------------------------


def listed(path: Path, labels: Labels, validation_fraction: float, seed: int) -> Perturbations:
    """Return the roles that a file lists (`from_file`).

    Without a list for validation, even an empty one, it takes a share of train by seed.
    """
    roles = from_file(path, labels)
    if "validation" not in roles and validation_fraction > 0 and len(roles["train"]) > 2:
        chosen = take(roles["train"], validation_fraction, np.random.default_rng(seed))
        roles |= {"validation": sorted(chosen), "train": [label for label in roles["train"] if label not in chosen]}
        logger.info("%s has no list for validation: %s serve, by seed %d", path, ", ".join(sorted(chosen)), seed)
    return {role: roles.get(role, []) for role in ROLES}


# --- the step -------------------------------------------------------------------------------------------------------


def names_digest(names: list[str]) -> str:
    """Return the SHA-256 of a set of names, whatever their order."""
    return hashlib.sha256(json.dumps(sorted(names)).encode()).hexdigest()


def roles_of_cells(obs: pd.DataFrame, account: dict, spec: dict, naming: dict) -> pd.Series:
    """Return the role of every cell under a split's block; missing where it has none."""
    shares = {key: spec[key] for key in ("validation_fraction", "seed")}
    if spec["kind"] == "random_cells":
        return random_cells(obs, spec["test_fraction"], **shares)
    names = sorted(set(obs["perturbation"].astype(str)) - {CONTROL})
    organism = "" if naming.get("perturbation_type") == "drug" else account["organism"]
    labels = Labels(names, account["perturbations"]["dropped"], organism, naming.get("perturbation", {}))
    if spec["kind"] in CONTEXT_KINDS:
        contexts = {str(name) for name in spec["held_out"]} if "held_out" in spec else None
        divide, support = CONTEXT_KINDS[spec["kind"]], Support.of(spec, labels)
        return divide(obs, spec["covariate"], Shares.of(spec, contexts), support)
    if spec["kind"] == "file":
        roles = listed(Path(spec["path"]), labels, **shares)
    else:
        held_out = held_out_names(spec["held_out"], spec["kind"], labels) if "held_out" in spec else None
        roles = DIVISIONS[spec["kind"]](names, Shares.of(spec, held_out))
    return by_perturbation(obs, roles, spec["seed"])


def divided(obs: pd.DataFrame, account: dict, name: str, spec: dict, naming: dict | None = None) -> dict[str, Any]:
    """Return the content of split.json.

    Parameters
    ----------
    obs
        Cells of harmonized.h5ad.
    account
        organism and perturbations.dropped of harmonization.json, which help to read a user's own list.
    name, spec
        The split's name and block, as `Plan.split` gives it: held_out is the list of this screen.
    naming
        How the dataset's block reads labels (`Plan.naming`), for those that the split names.

    Raises
    ------
    InputError
        If the split is not possible on this screen.
    """
    try:
        role_of_cell = roles_of_cells(obs, account, spec, naming or {})
    except InputError as error:
        raise InputError(f"splits.{name}: {error}") from error
    labels = obs["perturbation"].astype(str)
    cells = {role: (role_of_cell == role).to_numpy() for role in ROLES}
    perturbations = {role: sorted(set(labels[cells[role]]) - {CONTROL}) for role in ROLES}
    for role in ("train", "test"):
        if not perturbations[role]:
            raise InputError(
                f"splits.{name} leaves no {role} perturbation on this screen; change its fractions or seed."
            )
    content: dict[str, Any] = {
        "name": name,
        "spec": spec,
        "generalization": generalization(spec),
        "perturbations": perturbations,
        "left_out": sorted(set(labels) - {CONTROL}.union(*perturbations.values())),
        "n_cells_left_out": int(role_of_cell.isna().sum()),
        "members_seen": members_seen(perturbations),
        "controls": {role: int(obs.loc[cells[role], "is_control"].sum()) for role in ROLES},
        "n_cells": {role: int(cells[role].sum()) for role in ROLES},
        **stored_roles(obs.index, pd.Categorical(role_of_cell, categories=list(ROLES)).codes),
        "sha256": {
            role: {
                "perturbations": names_digest(perturbations[role]),
                "cells": names_digest(obs.index[cells[role]].tolist()),
            }
            for role in ROLES
        },
    }
    if spec["kind"] in CONTEXT_KINDS:
        contexts = obs[spec["covariate"]].astype(str)
        content["contexts"] = {role: sorted(set(contexts[cells[role]])) for role in ROLES}
        content["n_sources"] = n_sources(labels, contexts, role_of_cell)
    _log(content)
    return content


def _log(content: dict[str, Any]) -> None:
    """Log how many cells and perturbations have each role, and none."""
    if n := content["n_cells_left_out"]:
        logger.info("%d cells have no role in this split and are left out", n)
    if left_out := content["left_out"]:
        names = ", ".join(left_out)
        logger.info("%d perturbations of the screen are left out with all their cells: %s", len(left_out), names)
    for role in ROLES:
        n_perturbations, n_cells = len(content["perturbations"][role]), content["n_cells"][role]
        n_controls = content["controls"][role]
        logger.info("%s: %d perturbations, %d cells, %d of them controls", role, n_perturbations, n_cells, n_controls)
    if "contexts" in content:
        logger.info("held out: %s %s", content["spec"]["covariate"], ", ".join(content["contexts"]["test"]))


def split(
    harmonized: Path, harmonization: Path, split: Path, name: str, spec: dict, naming: dict | None = None
) -> None:
    """Write the role of every perturbation and cell; InputError as in `divided`.

    Parameters
    ----------
    harmonized, harmonization
        The screen in its common schema, and its account.
    split
        JSON to be written: perturbations and cells per role with the SHA-256 of each, members seen per held-out
        perturbation, perturbations and cells left out, and a sentence on the meaning of scores.
    name, spec, naming
        As in `divided`.
    """
    write_json(split, divided(ad.read_h5ad(harmonized, backed="r").obs, read_json(harmonization), name, spec, naming))
