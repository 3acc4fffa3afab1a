"""All scores in one table, each with an interval over perturbations."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from perturbflow.evaluation import METRICS
from perturbflow.files import atomic

logger = logging.getLogger(__name__)

N_RESAMPLES = 10_000
KEYS = ["dataset", "split", "model", "seed", "metric"]


def bootstrap_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean over perturbations; NaN for fewer than two."""
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return float("nan"), float("nan")
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (N_RESAMPLES, len(values)))].mean(axis=1)
    return tuple(np.percentile(means, [2.5, 97.5]))


def summarize(scores: pd.DataFrame) -> pd.DataFrame:
    """Return one row per dataset × split × model × seed × metric, in the order of the scores.

    The same seed resamples the same perturbations for every model, so that intervals differ by model alone.
    """
    rows = []
    for keys, values in scores.groupby(KEYS, sort=False, dropna=False)["value"]:
        low, high = bootstrap_interval(values.to_numpy(float))
        rows.append(
            {
                **dict(zip(KEYS, keys, strict=True)),
                "value": values.mean(),
                "ci_low": low,
                "ci_high": high,
                "n_perturbations": int(values.notna().sum()),
                "better": METRICS[keys[-1]].direction,
            }
        )
    return pd.DataFrame(rows)


def benchmark(metrics: list[Path], benchmark: Path) -> None:
    """Write results/benchmark.tsv.

    Parameters
    ----------
    metrics
        The metrics.tsv of every run.
    benchmark
        Table to be written: mean over perturbations, 95 % bootstrap interval, number of perturbations, direction.
    """
    scores = pd.concat([pd.read_csv(path, sep="\t", keep_default_na=False, na_values=[""]) for path in metrics], ignore_index=True)
    table = summarize(scores)
    with atomic(benchmark) as partial:
        table.to_csv(partial, sep="\t", index=False, float_format="%.6g")
    logger.info("%d rows of %d runs", len(table), len(metrics))
