"""Power: how many cells a perturbation needs, from the screen's own variance.

The effect of a perturbation is measured as the mean of n cells minus that of n₀ controls. Over genes its error has the
squared norm V (1/n + 1/n₀) in expectation. V = Σ_g v_g, and v_g is the variance of a gene over controls of one batch
and cell type. The true effect has the squared norm S, which is that of the measured one minus the error's. Two
measurements correlate at

    reliability(n, n₀) = S / ( S + V (1/n + 1/n₀) ),

so that n = 1 / ( S (1 − R) / (R V) − 1/n₀ ) cells are needed for a reliability R; with too few controls no number is
enough. In a single gene, n cells and n₀ controls detect a change of (z₁₋α/₂ + z_power) √(v_g (1/n + 1/n₀)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.stats import norm

from perturbflow.genes.symbols import CONTROL
from perturbflow.quality.sample import Sample

RELIABLE = 0.5
"""Reliability from which on a perturbation can be scored: half of its measured variance is effect."""
ALPHA, POWER = 0.05, 0.8
CELLS = (10, 20, 40, 80, 160, 320)
FURTHER = (10, 20, 40, 80, 160)
"""Cells more per perturbation, of which the first that makes a difference is told."""


def reliability(
    signal: np.ndarray | float, noise: float, cells: np.ndarray | float, controls: np.ndarray | float
) -> np.ndarray:
    """Return the expected correlation of two measurements of so many cells and controls each.

    Parameters
    ----------
    signal, noise
        S and V.
    """
    error = noise * (1.0 / np.asarray(cells, float) + 1.0 / np.asarray(controls, float))
    return np.asarray(signal) / np.maximum(np.asarray(signal) + error, 1e-24)


def cells_for(wanted: float, signal: np.ndarray, noise: float, controls: np.ndarray) -> np.ndarray:
    """Return the cells that a reliability needs; infinite where the controls do not allow it."""
    per_cell = np.asarray(signal) * (1.0 - wanted) / (wanted * noise) - 1.0 / np.asarray(controls, float)
    return np.where(per_cell > 0, 1.0 / np.maximum(per_cell, 1e-12), np.inf)


def detectable(variance: np.ndarray, cells: float, controls: float, share: float = 0.5) -> float:
    """Return the change of a gene, log1p, that is found with power 0.8 at p < 0.05.

    Parameters
    ----------
    variance
        Of genes over controls, (genes,).
    share
        The gene, by its place among the variances: 0.5 is the median one.
    """
    z = norm.ppf(1 - ALPHA / 2) + norm.ppf(POWER)
    return float(z * np.sqrt(np.quantile(variance, share) * (1.0 / cells + 1.0 / controls)))


@dataclass(frozen=True)
class Power:
    """What a screen's variance allows.

    Attributes
    ----------
    labels
        Perturbations.
    signal
        S of every perturbation, (perturbations,).
    controls
        Effective number n₀ of its controls, by its cells in every stratum, (perturbations,).
    variance
        v_g, (genes,).
    """

    labels: list[str]
    signal: np.ndarray
    controls: np.ndarray
    variance: np.ndarray

    @property
    def noise(self) -> float:
        """V."""
        return float(self.variance.sum())

    @classmethod
    def of(cls, sample: Sample) -> Power:
        """Estimate all from one pass over a sample of the cells, on highly variable genes."""
        labels = sorted(set(sample.label) - {CONTROL})
        group = pd.Index(labels).get_indexer(sample.label)
        is_control = group < 0
        group[is_control] = len(labels) + sample.stratum[is_control]
        n_strata = int(sample.stratum.max(initial=0)) + 1
        sums, squares = sample.moments(group, len(labels) + n_strata)
        n = np.bincount(group, minlength=len(sums)).astype(float)
        within = (squares - sums**2 / np.maximum(n, 1)[:, None])[len(labels) :].sum(axis=0)
        variance = np.maximum(within / max(1.0, np.maximum(n[len(labels) :] - 1, 0).sum()), 1e-12)
        cells = sparse.coo_matrix(
            (np.ones((~is_control).sum()), (group[~is_control], sample.stratum[~is_control])),
            shape=(len(labels), n_strata),
        ).toarray()
        n_controls = _serving(n[len(labels) :], sample)
        shares = cells / np.maximum(n[: len(labels)], 1)[:, None]
        levels = _levels(sums[len(labels) :], n[len(labels) :], sample)
        effects = sums[: len(labels)] / np.maximum(n[: len(labels)], 1)[:, None] - shares @ levels
        controls = 1.0 / np.maximum((shares**2 / n_controls).sum(axis=1), 1e-12)
        effects -= effects.mean(axis=1, keepdims=True)
        error = variance.sum() * (1.0 / np.maximum(n[: len(labels)], 1) + 1.0 / controls)
        return cls(labels, np.maximum((effects**2).sum(axis=1) - error, 0.0), controls, variance)

    def table(self, n_cells: pd.Series) -> pd.DataFrame:
        """Return reliability and cells_needed of every perturbation.

        Parameters
        ----------
        n_cells
            All cells of every perturbation; half of them are scored where it is held out.
        """
        cells = n_cells.reindex(self.labels).to_numpy(float)
        found = reliability(self.signal, self.noise, np.maximum(cells / 2, 0.5), self.controls)
        needed = 2 * np.ceil(cells_for(RELIABLE, self.signal, self.noise, self.controls))
        index = pd.Index(self.labels, name="perturbation")
        return pd.DataFrame({"reliability": found, "cells_needed": needed}, index=index)

    def account(self, table: pd.DataFrame) -> dict[str, Any]:
        """Return the power of the screen for quality.json.

        Parameters
        ----------
        table
            With n_cells and the columns of `table`.
        """
        controls = float(np.median(self.controls))
        return {
            "reliable_from": RELIABLE,
            "n_reliable": int((table["reliability"] >= RELIABLE).sum()),
            "n_reliable_with": {str(n): int((table["n_cells"] + n >= table["cells_needed"]).sum()) for n in FURTHER},
            "detectable": [
                {
                    "cells": n,
                    "controls": round(share * controls),
                    "median_gene": detectable(self.variance, n, share * controls),
                    "noisiest_tenth": detectable(self.variance, n, share * controls, 0.9),
                }
                for share in (0.5, 1.0, 2.0)
                for n in CELLS
            ],
        }


def _serving(n_controls: np.ndarray, sample: Sample) -> np.ndarray:
    """Return the controls that every stratum is compared with: its own, else those of its cell type, else all."""
    of_type = _of_strata(sample)
    by_type = np.bincount(of_type, weights=n_controls)
    found = np.where(n_controls > 0, n_controls, by_type[of_type])
    return np.maximum(np.where(found > 0, found, n_controls.sum()), 1.0)


def _levels(sums: np.ndarray, n_controls: np.ndarray, sample: Sample) -> np.ndarray:
    """Return the mean control of every stratum, (strata, genes), as `_serving` counts them."""
    of_type = _of_strata(sample)
    by_type = np.zeros((of_type.max(initial=0) + 1, sums.shape[1]))
    np.add.at(by_type, of_type, sums)
    n_type = np.bincount(of_type, weights=n_controls)
    own = sums / np.maximum(n_controls, 1)[:, None]
    wider = (by_type / np.maximum(n_type, 1)[:, None])[of_type]
    everyone = sums.sum(axis=0) / max(1.0, n_controls.sum())
    return np.where((n_controls > 0)[:, None], own, np.where((n_type[of_type] > 0)[:, None], wider, everyone))


def _of_strata(sample: Sample) -> np.ndarray:
    """Return the cell type of every stratum of the sample."""
    found = np.zeros(int(sample.stratum.max(initial=0)) + 1, dtype=int)
    found[sample.stratum] = sample.cell_type
    return found


def sentence(account: dict[str, Any], n: int) -> str:
    """Return in words how many perturbations the screen can score, and what more cells would make of it."""
    n_reliable = account["n_reliable"]
    text = (
        f"This screen can score {n_reliable:,} of {n:,} perturbations: the half of their cells that is scored measures "
        f"their effect with a reliability of {RELIABLE:g} or more."
    )
    for further, reached in account["n_reliable_with"].items():
        if reached >= n_reliable + max(1, 0.05 * n):
            return f"{text} {further} more cells each would make it {reached:,}."
    return f"{text} {FURTHER[-1]} more cells each would make it {account['n_reliable_with'][str(FURTHER[-1])]:,}."
