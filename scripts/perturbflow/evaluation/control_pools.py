"""Measured control cells, by batch and cell type: all perturbed cells are compared with them."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.evaluation.profiles import Spread, mean_and_variance, mean_profile
from perturbflow.evaluation.ranks import SortedCells


def strata_of(obs: pd.DataFrame) -> tuple[np.ndarray, list[tuple[str, str]]]:
    """Return the stratum of each cell, and the batch and cell type of each stratum."""
    grouped = obs.groupby(["batch", "cell_type"], observed=True, sort=False)
    return grouped.ngroup().to_numpy(), [(str(batch), str(cell_type)) for batch, cell_type in grouped.size().index]


class ControlPools:
    """Measured controls of one role, in pools: one per stratum (batch and cell type), and one per cell type."""

    def __init__(self, X: sparse.csr_matrix, obs: pd.DataFrame) -> None:
        keys = obs[["batch", "cell_type"]].astype(str)
        self.X = X
        self.rows = {**keys.groupby(["batch", "cell_type"]).indices, **keys.groupby("cell_type").indices}

    def pools(self, strata: list[tuple[str, str]]) -> np.ndarray:
        """Return the pool of each stratum, -1 for none.

        A stratum without controls has those of its cell type in other batches, as in `pairs.match_controls`.
        """
        place = {name: i for i, name in enumerate(self.rows)}
        return np.array([place.get(stratum, place.get(stratum[1], -1)) for stratum in strata])

    def shares(self, pool: np.ndarray) -> np.ndarray:
        """Return the share of cells in each pool, (pools,), given the pool of each cell."""
        return np.bincount(pool, minlength=len(self.rows)) / len(pool)

    @cached_property
    def counts(self) -> sparse.csr_matrix:
        """Normalized counts, in the order of X."""
        return self.X.expm1()

    @cached_property
    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and sampling variance of log1p-normalized controls, (pools, genes) each."""
        found = [(*mean_and_variance(self.X[rows]), len(rows)) for rows in self.rows.values()]
        return np.stack([mean for mean, _, _ in found]), np.stack(
            [np.nan_to_num(variance) / n for _, variance, n in found]
        )

    @cached_property
    def profiles(self) -> tuple[np.ndarray, Spread]:
        """Mean normalized counts and their spread, pools first; a single control is taken for exact."""
        found = [mean_profile(self.counts[rows]) for rows in self.rows.values()]
        parts = ([getattr(spread, name) for _, spread in found] for name in Spread.__annotations__)
        return np.stack([mean for mean, _ in found]), Spread(*(np.nan_to_num(np.stack(part)) for part in parts))

    def sorted(self, pools: np.ndarray) -> SortedCells:
        """Return the controls of these pools, each gene's values in order."""
        return SortedCells(
            self.X, [rows if pool in pools else rows[:0] for pool, rows in enumerate(self.rows.values())]
        )

    def halves(self, obs: pd.DataFrame) -> list[ControlPools]:
        """Divide the controls, whose obs this is, in two, evenly over strata."""
        half = np.empty(len(obs), dtype=int)
        half[np.argsort(strata_of(obs)[0], kind="stable")] = np.arange(len(obs)) % 2
        return [ControlPools(self.X[half == i], obs[half == i]) for i in (0, 1)]
