"""One row per model over all contexts that were held out in turn: cell lines, donors, days or batches."""

import numpy as np
import pandas as pd

from perturbflow.benchmark.panel import Panel
from perturbflow.benchmark.tables import TOO_FEW, ways, with_metric_facts, words
from perturbflow.evaluation.bootstrap import (
    MIN_CONTEXTS,
    estimate_over_contexts,
    mean,
    mean_over_contexts,
    n_contexts,
)
from perturbflow.registry.families import FAMILIES

CONTEXTS = [
    *("dataset", "split", "metric", "metric_family", "headline", "model", "family", "kind"),
    *("value", "ci_low", "ci_high", "lowest", "highest", "baseline", "difference", "difference_low"),
    *("difference_high", "margin", "verdict", "n_contexts", "n_perturbations", "is_trusted"),
]


def _by_context(panel: Panel, values: np.ndarray) -> np.ndarray:
    """Return scores of folds × perturbations by context, (K, M, S, folds·P) → (K, C, M, S, P); NaN where missing."""
    fold, folds = pd.factorize(panel.perturbations["fold"])
    label, labels = pd.factorize(panel.perturbations["perturbation"])
    found = np.full((len(folds), *values.shape[:3], len(labels)), np.nan)
    found[fold, ..., label] = np.moveaxis(values, -1, 0)
    return np.moveaxis(found, 0, 1)


def _best_others(losses: np.ndarray, baselines: list[int]) -> list[int | None]:
    """Return the best baseline for every model, another one than itself, from losses (C, M, S, P)."""
    means = mean_over_contexts(losses)
    n = (~np.isnan(losses)).any(axis=2).sum(axis=(0, 2))
    most = max((n[i] for i in baselines), default=0)
    ranked = sorted((i for i in baselines if n[i] == most > 0), key=lambda i: means[i])
    return [next((i for i in ranked if i != m), None) for m in range(losses.shape[1])]


def across_contexts(panel: Panel, families: dict[str, str], least_difference: float) -> pd.DataFrame:
    """Return one row per metric × model: the mean over contexts, and how much better than the best baseline it is.

    Every context counts the same. lowest and highest are the means of single contexts. Above zero, difference says
    that the loss is below that of the baseline with the lowest mean loss, on what both predict. Intervals hold what
    other contexts, perturbations and seeds would change (`bootstrap.estimate_over_contexts`). verdict and margin are
    those of `tables.compare`. Below MIN_CONTEXTS intervals are too narrow: is_trusted is false, the verdict too few.

    Parameters
    ----------
    panel
        The scores of all folds (`panel.panels_of_contexts`).
    families
        Model → name of its family.
    least_difference
        Share of the way from no change to the ceiling; a smaller difference does not count.
    """
    kinds = [FAMILIES[families[model]].kind for model in panel.models]
    baselines = [i for i, kind in enumerate(kinds) if kind == "baseline"]
    values, losses = (_by_context(panel, array) for array in (panel.values, panel.losses))
    margins = np.nan_to_num(least_difference * ways(panel, families, np.moveaxis(losses, 0, 1), estimate_over_contexts))
    parts = []
    for metric, of_metric, of_losses, margin in zip(panel.metrics, values, losses, margins, strict=True):
        others = _best_others(of_losses, baselines)
        gain = np.stack(
            [
                np.full(of_losses[:, m].shape, np.nan) if other is None else of_losses[:, other] - of_losses[:, m]
                for m, other in enumerate(others)
            ],
            axis=1,
        )
        found, gained = estimate_over_contexts(of_metric), estimate_over_contexts(gain)
        of_context = np.stack([mean(one) for one in of_metric])
        n = n_contexts(of_metric)
        part = {
            "metric": metric,
            "model": panel.models,
            "family": [families[model] for model in panel.models],
            "kind": kinds,
            "value": found.mean,
            "ci_low": found.low,
            "ci_high": found.high,
            "lowest": np.fmin.reduce(of_context),
            "highest": np.fmax.reduce(of_context),
            "baseline": ["" if other is None else panel.models[other] for other in others],
            "difference": gained.mean,
            "difference_low": gained.low,
            "difference_high": gained.high,
            "margin": margin,
            "verdict": np.where(n < MIN_CONTEXTS, TOO_FEW, words(gained, margin)),
            "n_contexts": n,
            "n_perturbations": found.n,
            "is_trusted": n >= MIN_CONTEXTS,
        }
        parts.append(pd.DataFrame(part))
    return with_metric_facts(pd.concat(parts, ignore_index=True)).assign(**panel.keys)[CONTEXTS]
