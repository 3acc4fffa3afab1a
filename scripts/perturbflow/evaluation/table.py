"""From files to the table of scores."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from perturbflow.evaluation.inputs import score_inputs
from perturbflow.evaluation.metrics import METRICS
from perturbflow.genes.symbols import members_of
from perturbflow.io.files import atomic, read_json

if TYPE_CHECKING:  # seconds to import, and the report takes METRICS alone from this package
    import anndata as ad

    from perturbflow.pairs import Pairs

logger = logging.getLogger(__name__)


def scores(
    predictions: ad.AnnData,
    cells: Pairs,
    members_seen: Mapping[str, int],
    provenance: dict | None = None,
    n_sources: Mapping[str, int] | None = None,
) -> pd.DataFrame:
    """Return one row per metric × perturbation.

    Parameters
    ----------
    predictions
        Predicted cells, in memory or backed by their file. Where uns["perturbflow"]["noise_removed"] is true, they
        are half of the measured cells. They stand for a perfect predictor of the mean (`Metric.reachable`). For the
        perturbations of uns["perturbflow"]["missing"] no prediction was made: n_predicted is 0.
    cells
        All cells of pairs.h5ad.
    members_seen
        Number of members of every predicted perturbation that training saw alone.
    provenance
        Values of the columns dataset, split, model and seed; empty where there are none.
    n_sources
        Number of contexts that training has every predicted perturbation in; NaN where a split holds out no contexts.

    Raises
    ------
    InputError
        As `score_inputs`.
    """
    scored = score_inputs(predictions, cells)
    about = predictions.uns.get("perturbflow", {})
    is_noise_removed, missing = bool(about.get("noise_removed", False)), list(about.get("missing", []))
    table = pd.DataFrame(
        {
            **{key: (provenance or {}).get(key, "") for key in ("dataset", "split", "model", "seed")},
            "perturbation": scored.labels,
            "n_members": [len(members_of(label)) for label in scored.labels],
            "members_seen": [members_seen[label] for label in scored.labels],
            "n_sources": [(n_sources or {}).get(label, np.nan) for label in scored.labels],
            "n_cells": scored.n_cells,
            "n_predicted": np.where(np.isin(scored.labels, missing), 0, scored.n_predicted),
            "reliability": scored.reliability,
            "effect_size": scored.effect_size,
        }
    )
    return pd.concat(
        [
            table.assign(metric=name, value=metric.reachable(scored) if is_noise_removed else metric.function(scored))
            for name, metric in METRICS.items()
        ]
    )


def evaluate(predictions: Path, pairs: Path, split: Path, metrics: Path, provenance: dict | None = None) -> None:
    """Score one model on one split.

    Parameters
    ----------
    predictions, pairs, split
        Predicted cells, measured cells and roles.
    metrics
        Table to be written: one row per perturbation × metric.
    """
    import anndata as ad  # seconds to import, and the report takes METRICS alone from this package

    from perturbflow.pairs import Pairs

    roles = read_json(split)
    predicted, cells = ad.read_h5ad(predictions, backed="r"), Pairs.open(pairs)
    table = scores(predicted, cells, roles["members_seen"], provenance, roles.get("n_sources"))
    write_scores(metrics, table)
    for name, values in table.groupby("metric", sort=False)["value"]:
        logger.info("%s: %.4f (mean of %d perturbations)", name, values.mean(), values.notna().sum())


def write_scores(path: Path, table: pd.DataFrame) -> None:
    """Write metrics.tsv."""
    with atomic(path) as partial:
        table.to_csv(partial, sep="\t", index=False, float_format="%.6g")
