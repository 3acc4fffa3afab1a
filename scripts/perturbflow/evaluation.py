"""Scores of predicted cells against measured ones.

Notation: x̄ mean of the measured cells of a perturbation (half 'b', the same for every model), c̄ mean of the measured
controls of the test role, weighted as the perturbation's cells are over batch and cell type, x̂ mean of the predicted cells
less the mean of the controls that they started from plus c̄; all log1p-normalized. That removes the chance with which
starting controls were drawn: `no_change` has x̂ = c̄, as in the definitions. The measured controls are used on both sides.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.spatial.distance import cdist, pdist
from sklearn.decomposition import PCA

from perturbflow.errors import InputError
from perturbflow.files import atomic, read_json
from perturbflow.pairs import Pairs
from perturbflow.symbols import members_of

logger = logging.getLogger(__name__)

N_HIGH_EXPRESSION = 1000
N_COMPONENTS = 50
BULK_TOTAL = 5e4
MAX_CELLS_OF_DISTANCE = 2000
NO_EFFECT = 1e-5  # a predicted effect smaller than this everywhere is none: its correlation would be that of rounding errors


@dataclass(frozen=True)
class Scored:
    """All perturbations of one model, as the metrics read them. P perturbations × genes throughout.

    Attributes
    ----------
    labels
        The P perturbations.
    predicted, measured, control
        x̂, x̄ and c̄.
    predicted_bulk, measured_bulk, control_bulk
        log(1 + 5·10⁴ · share of the summed normalized counts).
    reference
        Mean of the training perturbations' means, (genes,).
    highly_expressed
        Mask of the 1,000 genes with the highest mean in measured controls.
    own_target
        Mask of the perturbed genes of each perturbation, (P, genes).
    predicted_components, measured_components
        Per perturbation, cells × 50 principal components fitted on training cells.
    predicted_start
        Per perturbation, which control each predicted cell started from, (cells,).
    """

    labels: list[str]
    predicted: np.ndarray
    measured: np.ndarray
    control: np.ndarray
    predicted_bulk: np.ndarray
    measured_bulk: np.ndarray
    control_bulk: np.ndarray
    reference: np.ndarray
    highly_expressed: np.ndarray
    own_target: np.ndarray
    predicted_components: list[np.ndarray]
    measured_components: list[np.ndarray]
    predicted_start: list[np.ndarray]


@dataclass(frozen=True)
class Metric:
    """One score: its name says its variant."""

    name: str
    function: Callable[[Scored], np.ndarray]  # → (P,)
    family: str
    formula: str
    source: str
    direction: str  # "higher", "lower" or, where the value nearest to perfect is best, "target"
    unit: str
    range: tuple[float, float]
    needs: str
    perfect: float
    useless: float | None
    headline: bool

    def loss(self, values: np.ndarray) -> np.ndarray:
        """Return how far values are from perfect: lower is better."""
        if self.direction == "target":
            return np.abs(values - self.perfect)
        return self.perfect - values if self.direction == "higher" else values - self.perfect


def _correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return Pearson's r per row; 0 where a row is constant or smaller than NO_EFFECT."""
    is_flat = (np.abs(a).max(axis=1) < NO_EFFECT) | (np.abs(b).max(axis=1) < NO_EFFECT)
    a = a - a.mean(axis=1, keepdims=True)
    b = b - b.mean(axis=1, keepdims=True)
    norm = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    return np.where(is_flat, 0.0, np.divide((a * b).sum(axis=1), norm, out=np.zeros(len(a)), where=norm > 0))


def mae(scored: Scored) -> np.ndarray:
    """Mean over genes of |x̂ − x̄|."""
    return np.abs(scored.predicted - scored.measured).mean(axis=1)


def l2_heg1000(scored: Scored) -> np.ndarray:
    """Euclidean distance of x̂ and x̄ over the 1,000 genes most expressed in controls (Ahlmann-Eltze et al. 2025)."""
    genes = scored.highly_expressed
    return np.linalg.norm(scored.predicted[:, genes] - scored.measured[:, genes], axis=1)


def pearson_delta_ctrl(scored: Scored) -> np.ndarray:
    """Pearson's r of x̂ − c̄ and x̄ − c̄ over the same 1,000 genes (Ahlmann-Eltze et al. 2025)."""
    genes = scored.highly_expressed
    control = scored.control[:, genes]
    return _correlation(scored.predicted[:, genes] - control, scored.measured[:, genes] - control)


def l2_heg1000_off_target(scored: Scored) -> np.ndarray:
    """l2_heg1000 without the perturbed genes themselves, whose level is the easiest part of an effect to predict."""
    difference = np.where(scored.own_target, 0.0, scored.predicted - scored.measured)
    return np.linalg.norm(difference[:, scored.highly_expressed], axis=1)


def pearson_delta_ctrl_off_target(scored: Scored) -> np.ndarray:
    """pearson_delta_ctrl without the perturbed genes themselves."""
    values = []
    for predicted, measured, control, own in zip(scored.predicted, scored.measured, scored.control, scored.own_target, strict=True):
        genes = scored.highly_expressed & ~own
        values.append(_correlation((predicted - control)[None, genes], (measured - control)[None, genes])[0])
    return np.array(values)


def pearson_delta_pert(scored: Scored) -> np.ndarray:
    """Pearson's r of x̂ − r and x̄ − r over all genes, r the mean of training perturbations' means (Systema 2025)."""
    return _correlation(scored.predicted - scored.reference, scored.measured - scored.reference)


def pds_cosine(scored: Scored) -> np.ndarray:
    """Perturbation discrimination score, cosine: 1 − k/(n−1) with k the measured effects nearer to the prediction than its own.

    Effects are differences of log bulks, log(1 + 5·10⁴·P/ΣP), to the controls', weighted as c̄ is: otherwise the batches that a
    perturbation was measured in would tell it from others. P sums normalized counts, each cell alike, on both sides. All perturbed genes of the panel are left out; ties count half (Virtual Cell Challenge 2026, metric 1).
    0.5 is chance.
    """
    n = len(scored.labels)
    if n < 2:
        return np.full(n, np.nan)
    genes = ~scored.own_target.any(axis=0)
    predicted = (scored.predicted_bulk - scored.control_bulk)[:, genes]
    measured = (scored.measured_bulk - scored.control_bulk)[:, genes]
    norms = np.linalg.norm(predicted, axis=1)[:, None] * np.linalg.norm(measured, axis=1)[None, :]
    cosine = np.divide(predicted @ measured.T, norms, out=np.zeros((n, n)), where=norms > NO_EFFECT)
    distance = 1.0 - cosine  # (predicted, measured); 1 where an effect is zero
    own = np.diag(distance)[:, None]
    k = (distance < own).sum(axis=1) + 0.5 * ((distance == own).sum(axis=1) - 1)
    return 1.0 - k / (n - 1)


def energy_distance(scored: Scored) -> np.ndarray:
    """2 E‖X−Y‖ − E‖X−X'‖ − E‖Y−Y'‖ of predicted and measured cells, unsquared Euclidean, U-statistic, 50 train-fitted PCs.

    Predicted cells of one starting control are no independent draws: such pairs are left out of E‖X−X'‖.
    """
    values = []
    for predicted, start, measured in zip(scored.predicted_components, scored.predicted_start, scored.measured_components, strict=True):
        independent = pdist(start[:, None].astype(float)) > 0
        within_predicted = pdist(predicted)[independent].mean() if independent.any() else np.nan
        within_measured = pdist(measured).mean() if len(measured) > 1 else np.nan
        values.append(2 * cdist(predicted, measured).mean() - within_predicted - within_measured)
    return np.array(values)


def _metric(function: Callable[[Scored], np.ndarray], family: str, direction: str, perfect: float, headline: bool = False) -> Metric:
    formula = " ".join((function.__doc__ or "").split())
    return Metric(
        function.__name__, function, family, formula, "", direction, "", (-np.inf, np.inf), "pseudobulk", perfect, None, headline
    )  # fmt: skip


METRICS = {
    metric.name: metric
    for metric in (
        _metric(mae, "error", "lower", 0.0),
        _metric(l2_heg1000, "error", "lower", 0.0, headline=True),
        _metric(l2_heg1000_off_target, "error", "lower", 0.0),
        _metric(pearson_delta_ctrl, "effect", "higher", 1.0),
        _metric(pearson_delta_ctrl_off_target, "effect", "higher", 1.0),
        _metric(pearson_delta_pert, "effect", "higher", 1.0, headline=True),
        _metric(pds_cosine, "discrimination", "higher", 1.0, headline=True),
        _metric(energy_distance, "distribution", "lower", 0.0, headline=True),
    )
}


def _bulk(profile: np.ndarray) -> np.ndarray:
    """Return log(1 + 5·10⁴·P/ΣP), P the sum or mean of normalized counts over cells, (genes,)."""
    profile = np.asarray(profile, dtype=np.float64).ravel()
    return np.log1p(BULK_TOTAL * profile / max(profile.sum(), 1e-12))


def _mean(X: sparse.csr_matrix) -> np.ndarray:
    return np.asarray(X.mean(axis=0), dtype=np.float64).ravel()


def scored_role(predictions: ad.AnnData) -> str:
    """Return the role whose measured cells these predictions are scored on: the role belongs to cells, not to labels."""
    return str(predictions.uns.get("perturbflow", {}).get("role", "test"))


def score_inputs(predictions: ad.AnnData, cells: Pairs) -> Scored:
    """Bring predicted and measured cells together.

    Parameters
    ----------
    predictions
        predictions.h5ad.
    cells
        All cells of pairs.h5ad.

    Raises
    ------
    InputError
        If genes differ, or a predicted perturbation was not held out.
    """
    if list(predictions.var_names) != cells.genes:
        raise InputError("predictions and pairs differ in their genes or gene order; predict again.")
    predicted_labels = predictions.obs["perturbation"].astype(str).to_numpy()
    labels = sorted(set(predicted_labels))
    training = cells.roles("train")
    role = scored_role(predictions)
    held_out = cells.roles(role)
    if strangers := sorted(set(labels) - set(held_out.perturbations)):
        raise InputError(f"predictions of the role {role} hold perturbations without {role} cells: {', '.join(strangers[:5])}.")
    scored_half = (held_out.obs["half"] == "b").to_numpy()
    controls = held_out.X[held_out.is_control]
    reference = np.mean([training.mean_of(training.cells_of(label)) for label in training.perturbations], axis=0)
    control_mean = np.asarray(controls.mean(axis=0)).ravel()
    highly_expressed = np.zeros(len(cells.genes), dtype=bool)
    highly_expressed[np.argsort(-control_mean, kind="stable")[:N_HIGH_EXPRESSION]] = True
    rng = np.random.default_rng(0)
    n_components = min(N_COMPONENTS, len(cells.genes) - 1, training.X.shape[0] - 1)
    sample = training.X
    if sample.shape[0] > 20_000:
        sample = sample[np.sort(rng.choice(sample.shape[0], 20_000, replace=False))]
    pca = PCA(n_components, svd_solver="randomized", random_state=0).fit(sample.toarray())

    def sampled(X: sparse.csr_matrix) -> np.ndarray:
        rows = np.arange(X.shape[0])
        return rows if len(rows) <= MAX_CELLS_OF_DISTANCE else np.sort(rng.choice(rows, MAX_CELLS_OF_DISTANCE, replace=False))

    X = sparse.csr_matrix(predictions.X)
    # A ceiling's cells are measured ones: they started from nothing.
    declared = predictions.uns.get("perturbflow", {}).get("starts_from_controls", True)
    starts_from_controls = bool(declared) and "control_index" in predictions.obs
    start = predictions.obs["control_index"].to_numpy() if starts_from_controls else np.arange(predictions.n_obs)
    columns: dict[str, list] = {name: [] for name in Scored.__annotations__}
    counts = replace(held_out, X=held_out.X.expm1())  # normalized, no longer logarithmic
    for label in labels:
        rows = held_out.cells_of(label)
        rows = rows[scored_half[rows]]
        of_label = np.flatnonzero(predicted_labels == label)
        predicted, measured = X[of_label], held_out.X[rows]
        control, control_profile = held_out.control_mean_for(rows), counts.control_mean_for(rows)
        mean, profile = _mean(predicted), _mean(predicted.expm1())
        if starts_from_controls:
            begun = cells.X[start[of_label]]
            mean = mean - _mean(begun) + control
            profile = np.maximum(profile - _mean(begun.expm1()) + control_profile, 0.0)
        columns["predicted"].append(mean)
        columns["measured"].append(held_out.mean_of(rows).astype(np.float64))
        columns["control"].append(control.astype(np.float64))
        columns["predicted_bulk"].append(_bulk(profile))
        columns["measured_bulk"].append(_bulk(counts.mean_of(rows)))
        columns["control_bulk"].append(_bulk(control_profile))
        chosen = sampled(predicted)
        columns["predicted_components"].append(pca.transform(predicted[chosen].toarray()))
        columns["predicted_start"].append(start[of_label][chosen])
        columns["measured_components"].append(pca.transform(measured[sampled(measured)].toarray()))
    stacked = {
        name: np.stack(columns[name]) for name in ("predicted", "measured", "control", "predicted_bulk", "measured_bulk", "control_bulk")
    }
    return Scored(
        labels=labels,
        **stacked,
        reference=reference,
        highly_expressed=highly_expressed,
        own_target=np.stack([np.isin(cells.genes, members_of(label)) for label in labels]),
        predicted_components=columns["predicted_components"],
        measured_components=columns["measured_components"],
        predicted_start=columns["predicted_start"],
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
    roles = read_json(split)
    cells = Pairs.read(pairs)
    predicted = ad.read_h5ad(predictions)
    scored = score_inputs(predicted, cells)
    is_scored = (cells.obs["half"] == "b") & (cells.obs["role"] == scored_role(predicted))
    n_cells = cells.obs.loc[is_scored.to_numpy(), "perturbation"].value_counts()
    keys = {key: (provenance or {}).get(key, "") for key in ("dataset", "split", "model", "seed")}
    rows = [
        {
            **keys,
            "perturbation": label,
            "n_members": len(members_of(label)),
            "members_seen": roles["members_seen"][label],
            "n_cells": int(n_cells[label]),
            "reliability": np.nan,
            "effect_size": np.nan,
            "metric": metric.name,
            "value": value,
        }
        for metric in METRICS.values()
        for label, value in zip(scored.labels, metric.function(scored), strict=True)
    ]
    table = pd.DataFrame(rows)
    with atomic(metrics) as partial:
        table.to_csv(partial, sep="\t", index=False, float_format="%.6g")
    for name, values in table.groupby("metric", sort=False)["value"]:
        logger.info("%s: %.4f (mean of %d perturbations)", name, values.mean(), values.notna().sum())
