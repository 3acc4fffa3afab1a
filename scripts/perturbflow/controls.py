"""Which controls a cell is compared with: one answer for pairs, effects and efficacy.

Cells are compared within strata: batch × cell type, of one role where cells have roles. Where a stratum holds no
control, those of its cell type (and role) in other batches serve. Every pool of controls that may serve has a number:
first the strata themselves, then the cell types (and roles), then all controls.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.io.streaming import row_blocks

KEYS = ("batch", "cell_type", "role")
MOST_CONTEXTS = 8
"""Batches × cell types that are contexts of their own; where there are more, datasets × cell types are."""


class Strata:
    """Cells by batch, cell type and role, and the controls that serve each stratum.

    Parameters
    ----------
    obs
        One row per cell, with the columns `keys`.
    keys
        The first is the batch, which controls of other batches may differ in.

    Attributes
    ----------
    of_cell
        Number of every cell's stratum, (cells,).
    table
        Batch, cell type and role of every stratum, in their order.
    wider
        Number of every stratum's cell type and role, (strata,).
    """

    def __init__(self, obs: pd.DataFrame, keys: Sequence[str] = KEYS) -> None:
        cells = obs.groupby(list(keys), observed=True)
        self.of_cell = cells.ngroup().to_numpy()
        self.table = cells.size().index.to_frame(index=False)
        self.wider = self.table.groupby(list(keys[1:]), observed=True).ngroup().to_numpy()

    def __len__(self) -> int:
        return len(self.wider)

    @cached_property
    def names(self) -> np.ndarray:
        """The first two keys of every stratum, batch and cell type, as one word, (strata,)."""
        first, second = (self.table[column].astype(str) for column in self.table.columns[:2])
        return (first + "|" + second).to_numpy(object)

    @cached_property
    def members(self) -> sparse.csr_matrix:
        """1 where a pool holds the controls of a stratum, (pools, strata)."""
        n, every = len(self), np.arange(len(self))
        pool = np.concatenate([every, n + self.wider, np.full(n, n + self.wider.max(initial=-1) + 1)])
        return sparse.csr_matrix((np.ones(3 * n), (pool, np.tile(every, 3))))

    def serving(self, n_controls: np.ndarray, *, or_all: bool = False) -> np.ndarray:
        """Return the pool that serves each stratum, (strata,): its own, else the wider one; -1 where both are empty.

        Parameters
        ----------
        n_controls
            Controls of each stratum, (strata,).
        or_all
            Whether all controls serve where the wider pool is empty.
        """
        n = self.members @ n_controls
        own = np.arange(len(self))
        wider = len(self) + self.wider
        last = len(n) - 1 if or_all else -1
        return np.where(n_controls > 0, own, np.where(n[wider] > 0, wider, last))


class Groups:
    """Groups of cells whose sums hold the mean effects of all perturbations.

    Those are the cells of every perturbation, and the controls of every stratum, which are dealt out to two groups by
    turns: so the effects against either half of the controls come from the same sums.

    Parameters
    ----------
    labels
        Perturbations, sorted.
    label
        Label of every cell.
    is_control
        Mask of control cells.
    obs
        Columns batch, cell_type and role.

    Attributes
    ----------
    of_cell
        Group of every cell: the number of its label or, for controls, from the number of labels on.
    stratum
        Number of every cell's batch × cell type × role.
    strata
        Batch × cell type of every stratum, as `Pairs.strata` writes it.
    n_cells
        Cells per group.
    """

    def __init__(self, labels: list[str], label: np.ndarray, is_control: np.ndarray, obs: pd.DataFrame) -> None:
        self.labels = labels
        self._strata = Strata(obs)
        self.stratum = self._strata.of_cell
        self.strata = self._strata.names.tolist()
        turn = pd.Series(self.stratum[is_control]).groupby(self.stratum[is_control]).cumcount().to_numpy() % 2
        self.of_cell = pd.Index(labels).get_indexer(label)
        self.of_cell[is_control] = len(labels) + 2 * self.stratum[is_control] + turn
        n_strata = len(self._strata)
        self.n_cells = np.bincount(self.of_cell, minlength=len(labels) + 2 * n_strata)
        places = self.of_cell[~is_control], self.stratum[~is_control]
        shares = sparse.csr_matrix((np.ones(len(places[0])), places), shape=(len(labels), n_strata))
        n_perturbed = np.asarray(shares.sum(axis=1)).ravel()
        self._shares = sparse.diags(1.0 / np.maximum(n_perturbed, 1.0)) @ shares

    def is_of_half(self, half: int) -> np.ndarray:
        """Return True for the controls of one half, (cells,), as `effects` takes them."""
        n = self.n_cells[len(self.labels) :].reshape(-1, 2)
        control = self.of_cell - len(self.labels)
        is_alone = n.sum(axis=1)[np.maximum(control, 0) // 2] < 2
        return (control >= 0) & ((control % 2 == half) | is_alone)

    def indicator(self, rows: slice) -> sparse.csr_matrix:
        """Return 1 where a cell is of a group, (groups, cells), of a range of cells."""
        group = self.of_cell[rows]
        return sparse.csr_matrix(
            (np.ones(len(group)), (group, np.arange(len(group)))), shape=(len(self.n_cells), len(group))
        )

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Return sums of what every cell has, (cells, columns), over every group, (groups, columns)."""
        return sum(self.indicator(rows) @ values[rows] for rows in row_blocks(len(values)))

    def means(self, sums: np.ndarray) -> np.ndarray:
        """Return the mean of every perturbation from the sums over all groups, (perturbations, columns)."""
        return sums[: len(self.labels)] / self.n_cells[: len(self.labels), None]

    def effects(self, sums: np.ndarray, half: int | None = None) -> np.ndarray:
        """Return the mean of every perturbation minus that of its controls, weighted as its cells are over strata.

        Parameters
        ----------
        sums
            Over the cells of every group, (groups, columns).
        half
            Which half of the controls is compared with, 0 or 1; None is all. A control that is alone in its stratum is
            in both.

        Returns
        -------
        (perturbations, columns).
        """
        return self.means(sums) - self._weights(half) @ self.control_means(sums, half)

    def n_controls(self, half: int | None = None) -> np.ndarray:
        """Return the controls of each stratum, of one half or of both, (strata,)."""
        return (self.n_cells[len(self.labels) :].reshape(-1, 2) * self._is_of_half(half)).sum(axis=1)

    def control_means(self, sums: np.ndarray, half: int | None = None) -> np.ndarray:
        """Return the mean of each stratum's controls from sums over all groups, (strata, columns); 0 without any."""
        kept = np.where(self._is_of_half(half), 1.0, 0.0)
        controls = np.einsum("st,stg->sg", kept, sums[len(self.labels) :].reshape(len(kept), 2, -1))
        return controls / np.maximum(self.n_controls(half), 1)[:, None]

    def _is_of_half(self, half: int | None) -> np.ndarray:
        n = self.n_cells[len(self.labels) :].reshape(-1, 2)
        return n > 0 if half is None else (n > 0) & ((np.arange(2) == half) | (n.sum(axis=1) < 2)[:, None])

    def control_weights(self, half: int | None = None) -> np.ndarray:
        """Return the weight of each stratum's controls by perturbation, (perturbations, strata); rows sum to 1."""
        return self._weights(half).toarray()

    def _weights(self, half: int | None) -> sparse.csr_matrix:
        n = self.n_controls(half)
        pool = self._strata.serving(n)
        members = self._strata.members.multiply(n).tocsr()
        members = sparse.diags(1.0 / np.maximum(self._strata.members @ n, 1)) @ members
        unknown = np.where(pool < 0, np.nan, 1.0)  # a stratum that no control serves has no effect
        return self._shares @ (sparse.diags(unknown) @ members[pool])


@dataclass(frozen=True)
class Context:
    """Where cells are that are asked.

    Attributes
    ----------
    strata
        Batch × cell type of every cell, as `Pairs.strata` writes it.
    levels
        Mean control by stratum, (genes,) each, log1p.
    kinds
        Dataset × cell type by stratum, for models whose contexts these are.
    """

    strata: np.ndarray
    levels: Mapping[str, np.ndarray]
    kinds: Mapping[str, str] = field(default_factory=dict)

    @property
    def level(self) -> np.ndarray:
        """Mean control of the cells' strata, weighted as they are, (genes,)."""
        return np.sum([share * self.levels[stratum] for stratum, share in self.shares.items()], axis=0)

    @cached_property
    def shares(self) -> dict[str, float]:
        """Share of the cells in each stratum."""
        names, times = np.unique(self.strata, return_counts=True)
        return {str(name): n / len(self.strata) for name, n in zip(names, times, strict=True)}

    def places(self) -> Iterator[tuple[np.ndarray, "Context"]]:
        """Yield the cells of each stratum, as positions, and where they are."""
        for stratum in self.shares:
            yield np.flatnonzero(self.strata == stratum), replace(self, strata=np.array([stratum]))

    def by_kind(self) -> "Context":
        """Return the same cells by dataset × cell type; the level of one is the mean of its strata's."""
        of_kind: dict[str, list[np.ndarray]] = {}
        for stratum, level in self.levels.items():
            of_kind.setdefault(self.kinds.get(stratum, stratum), []).append(level)
        levels = {kind: np.mean(of, axis=0) for kind, of in of_kind.items()}
        return Context(np.array([self.kinds.get(stratum, stratum) for stratum in self.strata]), levels)


def match_controls(obs: pd.DataFrame, k: int, seed: int) -> tuple[np.ndarray, int]:
    """Return k control rows per perturbed cell, of the same role, batch and cell type, each used equally often.

    Returns
    -------
    index
        int32, cells × k; -1 for controls.
    n_relaxed
        Cells whose batch holds no control of their role: they got controls of their cell type from other batches.

    Raises
    ------
    InputError
        If a role has no control of a cell type at all.
    """
    rng = np.random.default_rng(seed)
    is_control = obs["is_control"].to_numpy(bool)
    strata = Strata(obs)
    pool_of = strata.serving(np.bincount(strata.of_cell[is_control], minlength=len(strata)))
    controls = np.flatnonzero(is_control)
    stratum = strata.of_cell[controls]
    of_pool = Sorted(
        np.concatenate([stratum, len(strata) + strata.wider[stratum]])
    )  # pools by number, as `serving` says
    index = np.full((len(obs), k), -1, dtype=np.int32)
    perturbed = np.flatnonzero(~is_control)
    columns = ["role", "cell_type", "batch", "perturbation"]
    groups = Sorted(obs.iloc[perturbed].groupby(columns, observed=True).ngroup().to_numpy())
    n_relaxed = 0
    for group in range(len(groups)):
        cells = perturbed[groups[group]]
        stratum = strata.of_cell[cells[0]]
        pool = pool_of[stratum]
        if pool < 0:
            role, cell_type, label = (obs[column].iloc[cells[0]] for column in ("role", "cell_type", "perturbation"))
            raise InputError(
                f"no control cell of cell type '{cell_type}' has the role {role}: {label} cannot be compared "
                "with anything. Leave this cell type out through subset in the dataset's block, "
                "or drop covariates.cell_type."
            )
        n_relaxed += len(cells) if pool >= len(strata) else 0
        serving = controls[of_pool[pool] % len(controls)]
        rounds = -(-len(cells) * k // len(serving))
        drawn = np.concatenate([rng.permutation(serving) for _ in range(rounds)])[: len(cells) * k]
        index[cells] = drawn.reshape(k, len(cells)).T
    return index, n_relaxed


class Sorted:
    """The places of every group among some, ascending; groups are numbers from 0."""

    def __init__(self, group: np.ndarray, n_groups: int = 0) -> None:
        self._order = np.argsort(group, kind="stable")
        self._ends = np.append(0, np.cumsum(np.bincount(group, minlength=n_groups)))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, group: int) -> np.ndarray:
        return self._order[self._ends[group] : self._ends[group + 1]]
