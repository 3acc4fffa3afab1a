"""Caveats that are no leak and belong to every verdict.

Controls are of other batches, all scored cells are of one batch, or vectors may know the screen.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

TOLD = 0.01  # share of the perturbed cells from which on it is a caveat of the verdicts
SHOWN = 5  # batches


def matched_across_batches(obs: pd.DataFrame, control_index: np.ndarray) -> dict[str, Any]:
    """Return which perturbed cells have matched controls of other batches, as their own holds none of their role.

    Parameters
    ----------
    obs
        Cells of pairs.h5ad: is_control, batch and role.
    control_index
        Rows of the matched controls, (cells, k); -1 for controls.

    Returns
    -------
    cells and share of the perturbed cells; cells per batch and per role, of those that have any.
    """
    perturbed = np.flatnonzero(~obs["is_control"].to_numpy(bool))
    batch = obs["batch"].astype("category").cat.codes.to_numpy()
    elsewhere = perturbed[(batch[control_index[perturbed]] != batch[perturbed][:, None]).any(axis=1)]
    found = obs.iloc[elsewhere]
    counts = {column: found[column].astype(str).value_counts() for column in ("batch", "role")}
    return {
        "cells": len(found),
        "share": len(found) / max(1, len(perturbed)),
        "batches": {str(name): int(n) for name, n in counts["batch"].items()},
        "roles": {str(name): int(n) for name, n in counts["role"].items()},
    }


def caveats_of(obs: pd.DataFrame, matched: dict[str, Any], knows: Mapping[str, str] | None = None) -> list[str]:
    """Return the caveats of every verdict, one sentence each.

    Parameters
    ----------
    obs
        Cells of pairs.h5ad: is_control, batch and role.
    matched
        The result of `matched_across_batches`.
    knows
        Source of vectors → the part of the screen's outcome that it may know, in words.
    """
    of_vectors = [
        f"The vectors of {source} know {outcome}: models that read them may have an outcome from elsewhere."
        for source, outcome in (knows or {}).items()
    ]
    return _of_one_batch(obs) + _of_matches(matched) + of_vectors


def _of_one_batch(obs: pd.DataFrame) -> list[str]:
    is_scored = ~obs["is_control"].to_numpy(bool) & (obs["role"] == "test").to_numpy()
    batches = obs.loc[is_scored, "batch"].astype(str).unique()
    if len(batches) != 1:
        return []
    which = "as no batch is declared" if batches[0] == "unknown" else batches[0]
    return [f"All scored cells are of one batch ({which}): whether the same holds in another is not known."]


def _of_matches(matched: dict[str, Any]) -> list[str]:
    if matched["share"] < TOLD:
        return []
    batches = list(matched["batches"])
    more = f" and {len(batches) - SHOWN:,} more" if len(batches) > SHOWN else ""
    return [
        f"{matched['cells']:,} perturbed cells ({100 * matched['share']:.0f} %) have no control in their own batch and "
        f"are compared with controls of other batches ({'batch' if len(batches) == 1 else 'batches'} "
        f"{', '.join(batches[:SHOWN])}{more}): the differences of batches are part of their effects, for every model "
        "and for the measured cells alike."
    ]
