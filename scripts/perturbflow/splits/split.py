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
from perturbflow.splits.cells import stored_roles
from perturbflow.splits.divisions import DIVISIONS, ROLES, Perturbations, Shares, members_seen, take
from perturbflow.splits.named import Labels, from_file, held_out_names

logger = logging.getLogger(__name__)

# Controls are split too: a model must not be scored on cells that start from a control of its training.
CONTROL_FRACTIONS = {"train": 0.5, "test": 0.3, "validation": 0.2}

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
    "random_cells": (
        "Cells are held out at random, and training saw other cells of every perturbation: scores measure "
        "interpolation and are no evidence of generalization."
    ),
    "file": (
        "Perturbations are held out by a list of the user's own: scores say how well these are predicted; how "
        "many of their genes or compounds training saw perturbed alone, at whatever dose, stands beside each."
    ),
}


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


# --- cells ----------------------------------------------------------------------------------------------------------


def _divide(cells: pd.DataFrame, strata: list[pd.Series], fractions: dict[str, float], seed: int) -> pd.Series:
    """Return a role for every cell, divided within strata by fractions.

    In random order, each next cell of a stratum goes to the role that is furthest behind its share.
    """
    roles: dict[str, str] = {}
    rng = np.random.default_rng(seed)
    for _, stratum in cells.groupby([column.astype(str) for column in strata], sort=True):
        given = dict.fromkeys(fractions, 0)
        for n, cell in enumerate(rng.permutation(np.sort(stratum.index.to_numpy())), start=1):
            role = max(given, key=lambda role: fractions[role] * n - given[role])
            given[role] += 1
            roles[cell] = role
    return pd.Series(roles, dtype=object).reindex(cells.index)


def divide_controls(obs: pd.DataFrame, seed: int, fractions: dict[str, float] = CONTROL_FRACTIONS) -> pd.Series:
    """Return a role for every control cell, divided within batch and cell type by fractions.

    Three controls serve all three roles. Batches with fewer than three are divided together, per cell type.
    """
    n_in_stratum = obs.groupby(["batch", "cell_type"], observed=True)["batch"].transform("size")
    batch = obs["batch"].astype(str).where(n_in_stratum >= len(ROLES), "")
    return _divide(obs, [batch, obs["cell_type"]], fractions, seed)


def by_perturbation(obs: pd.DataFrame, roles: Perturbations, seed: int) -> pd.Series:
    """Return the role of every cell where perturbations have roles.

    Controls are divided, and cells of other labels have none.
    """
    role_of_label = {label: role for role in ROLES for label in roles[role]}
    role_of_cell = obs["perturbation"].astype(str).map(role_of_label).astype(object)
    controls = obs[obs["is_control"].to_numpy(bool)]
    role_of_cell[controls.index] = divide_controls(controls, seed)
    return role_of_cell


def unseen_context(
    obs: pd.DataFrame,
    covariate: str,
    held_out: list | None,
    test_fraction: float | None,
    validation_fraction: float,
    seed: int,
) -> pd.Series:
    """Hold out contexts: values of a covariate, with all their controls and with perturbations seen elsewhere.

    Parameters
    ----------
    obs
        Cells with perturbation, is_control, batch, cell_type and the covariate.
    held_out
        The contexts to be held out; without it a share of them, by seed: at least one, never all.
    validation_fraction
        Share of the other contexts' cells, per perturbation × context; their controls are divided between training and
        validation as elsewhere.

    Returns
    -------
    A role per cell; none for cells of held-out contexts whose perturbation is in no other.

    Raises
    ------
    InputError
        If the screen has one context or lacks a held-out one, or if a side is left without cells or controls.
    """
    context = obs[covariate].astype(str)
    test = _held_out_contexts(sorted(context.unique()), covariate, held_out, test_fraction, seed)
    is_test, is_control = context.isin(test), obs["is_control"].astype(bool)
    for where, side in (("the held-out", is_test), ("the other", ~is_test)):
        if not (side & is_control).any():
            raise InputError(
                f"{where} values of {covariate} ({', '.join(sorted(context[side].unique()))}) hold no control cell to "
                "compare with; hold out others through held_out in the split's block."
            )
    controls, perturbed = obs[~is_test & is_control], obs[~is_test & ~is_control]
    shares = {role: CONTROL_FRACTIONS[role] for role in ("train", "validation")}
    of_controls = {role: share / sum(shares.values()) for role, share in shares.items()}
    of_perturbed = {"train": 1 - validation_fraction, "validation": validation_fraction}
    roles = pd.Series(index=obs.index, dtype=object)
    roles[controls.index] = divide_controls(controls, seed, of_controls)
    roles[perturbed.index] = _divide(perturbed, [perturbed["perturbation"], perturbed[covariate]], of_perturbed, seed)
    seen = obs["perturbation"].isin(obs.loc[roles == "train", "perturbation"].unique())
    roles[is_test & (is_control | seen)] = "test"
    return roles


def _held_out_contexts(
    known: list[str], covariate: str, held_out: list | None, test_fraction: float | None, seed: int
) -> set[str]:
    """Return the contexts for test: the named ones, or a share of all.

    Raises
    ------
    InputError
        If the screen has one context, lacks a named one, or none is left to learn from.
    """
    if len(known) < 2:
        raise InputError(
            f"split unseen_context needs at least 2 values of {covariate}; this screen has one, '{known[0]}'. Name the "
            f"obs column of contexts under covariates.{covariate} in the dataset's block, or take the split out of "
            "select.splits."
        )
    if held_out is None:
        assert test_fraction is not None  # the configuration has one of the two
        return take(known, min(test_fraction, 1 - 1 / len(known)), np.random.default_rng(seed))
    test = set(map(str, held_out))
    if unknown := sorted(test - set(known)):
        raise InputError(
            f"held_out: {', '.join(unknown)} is no value of {covariate} in this screen; its values: {', '.join(known)}."
        )
    if test == set(known):
        raise InputError(
            f"held_out names all values of {covariate} ({', '.join(known)}); leave at least one to learn from."
        )
    return test


def random_cells(obs: pd.DataFrame, test_fraction: float, validation_fraction: float, seed: int) -> pd.Series:
    """Hold out cells of every perturbation, and controls within batch and cell type, at random: interpolation."""
    if test_fraction + validation_fraction >= 1:
        raise InputError(
            f"test_fraction {test_fraction} and validation_fraction {validation_fraction} leave no cell for training."
        )
    fractions = {
        "train": 1 - test_fraction - validation_fraction,
        "test": test_fraction,
        "validation": validation_fraction,
    }
    is_control = obs["is_control"].to_numpy(bool)
    controls, perturbed = obs[is_control], obs[~is_control]
    of_perturbed = _divide(perturbed, [perturbed["perturbation"]], fractions, seed)
    return pd.concat([divide_controls(controls, seed, fractions), of_perturbed])[obs.index]


# --- the step -------------------------------------------------------------------------------------------------------


def names_digest(names: list[str]) -> str:
    """Return the SHA-256 of a set of names, whatever their order."""
    return hashlib.sha256(json.dumps(sorted(names)).encode()).hexdigest()


def _roles_of_cells(obs: pd.DataFrame, account: dict, spec: dict, naming: dict) -> pd.Series:
    """Return the role of every cell under a split's block; missing where it has none."""
    shares = {key: spec[key] for key in ("validation_fraction", "seed")}
    if spec["kind"] == "random_cells":
        return random_cells(obs, spec["test_fraction"], **shares)
    if spec["kind"] == "unseen_context":
        return unseen_context(obs, spec["covariate"], spec.get("held_out"), spec.get("test_fraction"), **shares)
    names = sorted(set(obs["perturbation"].astype(str)) - {CONTROL})
    organism = "" if naming.get("perturbation_type") == "drug" else account["organism"]
    labels = Labels(names, account["perturbations"]["dropped"], organism, naming.get("perturbation", {}))
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
        role_of_cell = _roles_of_cells(obs, account, spec, naming or {})
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
        "generalization": GENERALIZATION[spec["kind"]],
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
    if spec["kind"] == "unseen_context":
        contexts = obs[spec["covariate"]].astype(str)
        content["contexts"] = {role: sorted(set(contexts[cells[role]])) for role in ROLES}
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
