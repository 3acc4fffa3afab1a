"""What metrics see, drawn at random, and predictions made from measured cells."""

from collections.abc import Callable

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.special import ndtr

from perturbflow.evaluation import METRICS, Differential, Scored
from perturbflow.models.thinning import with_mean_effect
from perturbflow.pairs import Pairs

P, N_GENES = 5, 30


def random_scored(seed: int = 0, **changes: object) -> Scored:
    """Return random predictions and measurements of five perturbations, the first three genes being targets."""
    rng = np.random.default_rng(seed)
    sides = ("predicted", "measured", "control")
    arrays = {
        name: rng.normal(size=(P, N_GENES)) for name in (*sides, "reference", *(f"{side}_bulk" for side in sides))
    }
    spreads = (*(f"{side}_bulk_variance" for side in sides), "predicted_variance", "measured_variance", "coverage")
    arrays |= {name: rng.uniform(0.01, 0.05, (P, N_GENES)) for name in spreads}
    z, lfc = rng.normal(0.0, 3.0, (2, 2, P, N_GENES))
    tests = [Differential(z[i], 2 * ndtr(-np.abs(z[i])), lfc[i]) for i in (0, 1)]
    values = {
        **arrays,
        "labels": [f"L{i}" for i in range(P)],
        "predicted_test": tests[0],
        "measured_test": tests[1],
        "n_cells": np.arange(P) + 2,
        "n_predicted": np.arange(P) + 3,
        "reliability": np.ones(P),
        "effect_size": np.ones(P),
        "highly_expressed": np.arange(N_GENES) % 2 == 0,
        "own_target": np.eye(P, N_GENES, dtype=bool)
        | (np.arange(N_GENES) == 4),  # L0 and gene 0, ..., and gene 4 for all
        "predicted_components": [rng.normal(size=(6 + i, 4)) for i in range(P)],
        "measured_components": [rng.normal(1.0, size=(9 - i, 4)) for i in range(P)],
        "predicted_off_target_components": [rng.normal(size=(6 + i, 4)) for i in range(P)],
        "measured_off_target_components": [rng.normal(1.0, size=(9 - i, 4)) for i in range(P)],
        **changes,
    }
    values.setdefault("predicted_start", [np.arange(len(cells)) for cells in values["predicted_components"]])
    return Scored(**values)


def score(name: str, scored: Scored) -> np.ndarray:
    """Return one metric's values."""
    return METRICS[name].function(scored)


def predictions_from(
    cells: Pairs, change: Callable[[str, np.ndarray], np.ndarray] = lambda label, X: X, role: str = "test"
) -> ad.AnnData:
    """Return predictions: matched controls of measured cells with the mean of all controls, changed."""
    held_out = cells.roles(role)
    blocks, labels, starts = [], [], []
    for label in held_out.perturbations:
        start = held_out.control_index[held_out.cells_of(label), 0]
        controls = held_out.X[start].toarray()
        lacking = held_out.control_mean_for(start) - controls.mean(axis=0, dtype=float)
        blocks.append(change(label, with_mean_effect(controls, lacking, None, np.random.default_rng(0))))
        labels += [label] * len(blocks[-1])
        starts += held_out.rows[start].tolist()
    obs = cells.obs.iloc[starts][["batch", "cell_type"]].astype(str).reset_index(drop=True)
    obs = obs.assign(perturbation=pd.Categorical(labels), control_index=starts)
    obs.index = [f"p{i}" for i in range(len(labels))]
    X = sparse.csr_matrix(np.vstack(blocks).astype(np.float32))
    return ad.AnnData(
        X=X,
        obs=obs,
        var=pd.DataFrame(index=cells.genes),
        uns={"perturbflow": {"role": role, "starts_from_controls": True}},
    )
