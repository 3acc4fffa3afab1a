"""How many cells, checked by thinning: the reliability that a screen's variance predicts, beside the one that is found.

    python workflow_tests/benchmarks/power_thinning.py results/DATASET/harmonized.h5ad ...

Of every perturbation two disjoint sets of n cells are drawn five times, each against its own half of the controls.
Found is the correlation of the two effects. Predicted is `quality.power.reliability` for n cells and half of the
controls, with the signal of all cells of the perturbation, or (pilot) of 20 further cells that are in neither set.
Printed per n: perturbations, means over them with 90 % intervals by bootstrap, and Spearman's correlation over these.
"""

import argparse
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from perturbflow.evaluation.bootstrap import mean_with_interval  # noqa: E402
from perturbflow.genes.symbols import CONTROL  # noqa: E402
from perturbflow.quality.power import Power, reliability  # noqa: E402
from perturbflow.quality.sample import Sample  # noqa: E402

CELLS, PILOT, DRAWS = (5, 10, 20, 40, 80), 20, 5


def part(sample: Sample, X: np.ndarray, rows: np.ndarray) -> SimpleNamespace:
    """Return some cells of a sample, as `Power.of` reads them."""

    def moments(group: np.ndarray, n_groups: int) -> tuple[np.ndarray, np.ndarray]:
        sums, squares = np.zeros((2, n_groups, X.shape[1]))
        for one in np.unique(group):
            cells = X[rows[group == one]]
            sums[one], squares[one] = cells.sum(axis=0), (cells**2).sum(axis=0)
        return sums, squares

    return SimpleNamespace(
        label=sample.label[rows], stratum=sample.stratum[rows], cell_type=sample.cell_type[rows], moments=moments
    )


def effect(X: np.ndarray, stratum: np.ndarray, cells: np.ndarray, controls: np.ndarray) -> np.ndarray:
    """Return the mean of cells minus that of controls, weighted as the cells are over strata."""
    found = X[cells].mean(axis=0)
    for one, n in zip(*np.unique(stratum[cells], return_counts=True), strict=True):
        own = controls[stratum[controls] == one]
        found = found - n / len(cells) * X[own if len(own) else controls].mean(axis=0)
    return found


def thinned(sample: Sample, seed: int = 0) -> pd.DataFrame:
    """Return predicted and found reliabilities, one row per perturbation × n."""
    X = np.concatenate([block[:, sample.genes].toarray() for block in sample.expression()]).astype(np.float64)
    every, rng = np.arange(len(X)), np.random.default_rng(seed)
    controls = np.flatnonzero(sample.label == CONTROL)
    whole = Power.of(part(sample, X, every))
    rows = []
    for label, signal, n0 in zip(whole.labels, whole.signal, whole.controls, strict=True):
        cells = np.flatnonzero(sample.label == label)
        for n in (n for n in CELLS if 2 * n + PILOT <= len(cells)):
            correlations, pilots = [], []
            for _ in range(DRAWS):
                drawn, half = rng.permutation(cells), rng.permutation(controls)
                halves = half[: len(half) // 2], half[len(half) // 2 :]
                a, b = (effect(X, sample.stratum, drawn[i * n : (i + 1) * n], halves[i]) for i in (0, 1))
                correlations.append(np.corrcoef(a, b)[0, 1])
                pilot = effect(X, sample.stratum, drawn[2 * n : 2 * n + PILOT], controls)
                pilots.append(((pilot - pilot.mean()) ** 2).sum() - whole.noise * (1 / PILOT + 1 / n0))
            of_pilot = reliability(np.maximum(pilots, 0.0), whole.noise, n, n0 / 2)
            predicted = reliability(signal, whole.noise, n, n0 / 2)
            rows.append((label, n, np.mean(correlations), float(predicted), float(np.mean(of_pilot))))
    return pd.DataFrame(rows, columns=["perturbation", "cells", "found", "predicted", "pilot"])


def main() -> None:
    """Print one table per screen."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    for path in parser.parse_args().files:
        table = thinned(Sample(path))
        print(path)
        for n, of_n in table.groupby("cells"):
            found, predicted, pilot = (
                mean_with_interval(of_n[name].tolist()) for name in ("found", "predicted", "pilot")
            )
            texts = [f"{one['mean']:.2f} ({one['low']:.2f} to {one['high']:.2f})" for one in (found, predicted, pilot)]
            rho = [spearmanr(of_n[name], of_n["found"]).statistic for name in ("predicted", "pilot")]
            print(
                f"{n:4d} cells, {len(of_n):3d} perturbations: found {texts[0]}, predicted {texts[1]}, "
                f"of a pilot {texts[2]}; Spearman {rho[0]:.2f}, {rho[1]:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
