"""From files to the table of scores."""

import logging
from pathlib import Path

import pandas as pd

from perturbflow.evaluation.inputs import score_inputs
from perturbflow.evaluation.metrics import METRICS
from perturbflow.files import atomic, read_json
from perturbflow.symbols import members_of

logger = logging.getLogger(__name__)


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

    members_seen = read_json(split)["members_seen"]
    scored = score_inputs(ad.read_h5ad(predictions, backed="r"), Pairs.open(pairs))
    table = pd.DataFrame(
        {
            **{key: (provenance or {}).get(key, "") for key in ("dataset", "split", "model", "seed")},
            "perturbation": scored.labels,
            "n_members": [len(members_of(label)) for label in scored.labels],
            "members_seen": [members_seen[label] for label in scored.labels],
            "n_cells": scored.n_cells,
            "reliability": scored.reliability,
            "effect_size": scored.effect_size,
        }
    )
    table = pd.concat([table.assign(metric=name, value=metric.function(scored)) for name, metric in METRICS.items()])
    with atomic(metrics) as partial:
        table.to_csv(partial, sep="\t", index=False, float_format="%.6g")
    for name, values in table.groupby("metric", sort=False)["value"]:
        logger.info("%s: %.4f (mean of %d perturbations)", name, values.mean(), values.notna().sum())
