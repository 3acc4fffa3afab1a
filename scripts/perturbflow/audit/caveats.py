"""What is no leak and has to be said with every verdict: controls of other batches, scored cells of a single batch, vectors that may know the screen."""

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
    """Return what has to be said with every verdict, one sentence each.

    Parameters
    ----------
    obs
        Cells of pairs.h5ad: is_control, batch and role.
    matched
        What `matched_across_batches` gives.
    knows
        Source of vectors → what of the screen's outcome it may know, in words.
    """
    of_vectors = [
        f"The vectors of {source} know {what}: models that read them may have an outcome from elsewhere."
        for source, what in (knows or {}).items()
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
        f"{matched['cells']:,} perturbed cells ({100 * matched['share']:.0f} %) have no control in their own batch and are compared with controls of "
        f"other batches ({'batch' if len(batches) == 1 else 'batches'} {', '.join(batches[:SHOWN])}{more}): "
        "what batches differ by is part of their effects, for every model and for the measured cells alike."
    ]
