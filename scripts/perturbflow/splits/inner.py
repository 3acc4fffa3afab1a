"""Hold out again, within training: every inner fold is a split of the same kind, of the cells that a model may know."""

from collections.abc import Mapping
from typing import Any

import pandas as pd

from perturbflow.errors import InputError
from perturbflow.genes.symbols import members_of
from perturbflow.splits.split import roles_of_cells

# Kinds that divide by a share: each fold is a division of its own seed. The others deal names to folds.
SHARED_OUT = ("random_cells", "unseen_perturbation_in_context")


def inner_kind(split: Mapping[str, Any]) -> str:
    """Return the kind of the inner folds of a split, given the content of split.json.

    A list of the user's own is held out as combinations are, if all members of all of its test are known alone.
    """
    kind = split["spec"]["kind"]
    if kind != "file":
        return kind
    seen = split["members_seen"]
    of_test = [(len(members_of(label)), seen[label]) for label in split["perturbations"]["test"]]
    return "unseen_combination" if all(n > 1 and n == n_seen for n, n_seen in of_test) else "unseen_perturbation"


def inner_roles(obs: pd.DataFrame, split: Mapping[str, Any], n_folds: int, seed: int) -> list[pd.Series]:
    """Return one role per cell and fold: train, validation or test, missing where it has none.

    Parameters
    ----------
    obs
        The cells that models of the split may know, and no others.
    split
        Content of split.json.

    Raises
    ------
    InputError
        If these cells cannot be divided into so many folds.
    """
    kind, spec = inner_kind(split), split["spec"]
    kept = {key: spec[key] for key in ("covariate", "support_fraction") if key in spec}
    shared = {"kind": kind, **kept, "validation_fraction": 0.0}
    account = {"organism": "", "perturbations": {"dropped": {}}}
    folds = []
    for i in range(n_folds):
        if kind in SHARED_OUT:
            own = {"test_fraction": 1 / n_folds, "seed": n_folds * seed + i}
        else:
            own = {"folds": n_folds, "fold": i, "seed": seed}
        try:
            folds.append(roles_of_cells(obs, account, {**shared, **own}, {}))
        except InputError as error:
            raise InputError(
                f"sweep.by: inner_folds within training: {error} Or set sweep.by to validation."
            ) from error
    return folds
