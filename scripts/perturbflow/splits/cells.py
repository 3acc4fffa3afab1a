"""Divide cells among training, validation and test: controls always, perturbed cells by perturbation or at random."""

import numpy as np
import pandas as pd

from perturbflow.errors import InputError
from perturbflow.splits.divisions import ROLES, Perturbations

# Controls are split too: a model must not be scored on cells that start from a control of its training.
CONTROL_FRACTIONS = {"train": 0.5, "test": 0.3, "validation": 0.2}


def divide(cells: pd.DataFrame, strata: list[pd.Series], fractions: dict[str, float], seed: int) -> pd.Series:
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
    return divide(obs, [batch, obs["cell_type"]], fractions, seed)


def by_perturbation(obs: pd.DataFrame, roles: Perturbations, seed: int) -> pd.Series:
    """Return the role of every cell where perturbations have roles.

    Controls are divided, and cells of other labels have none.
    """
    role_of_label = {label: role for role in ROLES for label in roles[role]}
    role_of_cell = obs["perturbation"].astype(str).map(role_of_label).astype(object)
    controls = obs[obs["is_control"].to_numpy(bool)]
    role_of_cell[controls.index] = divide_controls(controls, seed)
    return role_of_cell


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
    of_perturbed = divide(perturbed, [perturbed["perturbation"]], fractions, seed)
    return pd.concat([divide_controls(controls, seed, fractions), of_perturbed])[obs.index]
