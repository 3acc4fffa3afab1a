"""Control/perturbed pairs: genes selected and counts normalized by training cells, controls matched within the role."""

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.controls import KEYS, MOST_CONTEXTS, Context, Groups, Sorted, Strata, match_controls
from perturbflow.genes.symbols import CONTROL, entities_of
from perturbflow.genes.variable import highly_variable
from perturbflow.io.anndata_file import measured_by_all, read_columns
from perturbflow.io.files import atomic, file_digest, read_json, require_room
from perturbflow.io.hdf5 import Appended, AppendedRows, CsrRows
from perturbflow.io.kernels import add_moments, add_rows
from perturbflow.io.streaming import row_blocks
from perturbflow.splits.divisions import KNOWN, ROLES
from perturbflow.splits.stored_roles import roles_of_cells

logger = logging.getLogger(__name__)

CONTROLS_PER_CELL = 8
BYTES_PER_VALUE = 3.0  # of pairs.h5ad, at the least: normalized value, place and count, compressed
VALUES_IN_MEMORY = 50_000_000  # of expression, 8 bytes each: of more, rows are read when they are asked for
VALUES_OF_SUMS = 10_000_000  # sums over the finest groups of cells, 16 bytes each with those of squares
LEAST_CELLS = 10  # of a perturbation in a context: fewer give noise for an effect
CARRIED_OBS = (
    "perturbation", "is_control", "n_perturbations", "perturbation_type", "cell_type", "batch", "dataset",
    "total_counts", "n_genes_by_counts", "pct_counts_mt",
)  # fmt: skip


@dataclass(frozen=True)
class Pairs:
    """Cells of one or more roles, with their matched controls, as models and metrics read them.

    Attributes
    ----------
    X
        log1p-normalized expression, CSR float32, cells × genes; in memory, or on disk and read when rows are asked for,
        as X[rows].
    obs
        One row per cell: perturbation, is_control, batch, cell_type, role, half.
    genes
        Gene symbols, the columns of X.
    control_index
        int32, cells × k: rows of X that hold controls matched on batch and cell type; -1 for controls.
    rows
        Row of pairs.h5ad for every row of X.
    about
        uns["perturbflow"] of pairs.h5ad: target_sum, split_sha256 and others.
    """

    X: sparse.csr_matrix | CsrRows
    obs: pd.DataFrame
    genes: list[str]
    control_index: np.ndarray
    rows: np.ndarray
    about: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> "Pairs":
        """Read pairs.h5ad; raw counts stay on disk."""
        cells = cls.open(path)
        return replace(cells, X=cells.X[:])

    @classmethod
    def load(cls, path: Path) -> "Pairs":
        """Read pairs.h5ad where its expression is small (`VALUES_IN_MEMORY`), open it otherwise."""
        cells = cls.open(path)
        return replace(cells, X=cells.X[:]) if cells.X.n_stored.sum() <= VALUES_IN_MEMORY else cells

    @classmethod
    def open(cls, path: Path) -> "Pairs":
        """Read pairs.h5ad but for X, whose rows are read when they are asked for, as X[rows]."""
        file = h5py.File(path)
        obs, var = ad.io.read_elem(file["obs"]), ad.io.read_elem(file["var"])
        index = ad.io.read_elem(file["obsm/control_index"])
        about = ad.io.read_elem(file["uns"]).get("perturbflow", {})
        return cls(CsrRows(file["X"], Path(path)), obs, list(var.index), index, np.arange(len(obs)), about)

    def select(self, mask: np.ndarray) -> "Pairs":
        """Return the cells under the mask; controls are matched within a role, so keep or drop roles whole."""
        keep = np.flatnonzero(mask)
        position = np.full(len(mask) + 1, -1, dtype=np.int32)  # the last entry serves index -1
        position[keep] = np.arange(len(keep), dtype=np.int32)
        X = self.X.select(keep) if isinstance(self.X, CsrRows) else self.X[keep]
        return Pairs(
            X, self.obs.iloc[keep], self.genes, position[self.control_index[keep]], self.rows[keep], self.about
        )

    def rematched(self, mask: np.ndarray, seed: int) -> "Pairs":
        """Return the cells under the mask, matched anew with the controls among them."""
        kept = self.select(mask)
        return replace(kept, control_index=match_controls(kept.obs, self.control_index.shape[1], seed)[0])

    def with_roles(self, role: np.ndarray, seed: int) -> "Pairs":
        """Return the cells that have a role, in these roles: controls are matched and halves drawn anew.

        Parameters
        ----------
        role
            train, validation, test or missing, (cells,).
        """
        has_role = pd.notna(role)
        kept = self.select(has_role)
        obs = kept.obs.assign(role=pd.Categorical(role[has_role], categories=list(ROLES)))
        obs["half"] = pd.Categorical(_halves(obs, seed), categories=["", "a", "b"])
        control_index, _ = match_controls(obs, self.control_index.shape[1], seed)
        return replace(kept, obs=obs, control_index=control_index, rows=np.arange(len(obs)))

    def roles(self, *roles: str) -> "Pairs":
        """Return the cells of these roles: always the same object, so that its cached values are computed once."""
        if roles not in self._of_roles:
            mask = self.obs["role"].isin(roles).to_numpy()
            if mask.all():
                return self
            self._of_roles[roles] = self.select(mask).by(self.context_keys)  # all roles of a screen have the same
        return self._of_roles[roles]

    def fitted_on(self, scored: str) -> "Pairs":
        """Return the cells that a model learns from whose scores are those of a role: all in the role train.

        Where validation is scored, its cells are there too, in their own role: they draw the curve of a training.
        """
        cells = self.roles("train", "validation")
        role = cells.obs["role"].astype(str)
        return replace(cells, obs=cells.obs.assign(role=role.where(~role.isin(KNOWN[scored]), "train")))

    @cached_property
    def _of_roles(self) -> dict[tuple[str, ...], "Pairs"]:
        return {}

    def blocks(self, rows: np.ndarray | None = None) -> Iterator[tuple[slice, sparse.csr_matrix]]:
        """Yield all cells or these rows in their order, some thousands at once: which ones, and their expression."""
        for part in row_blocks(len(self.rows) if rows is None else len(rows)):
            yield part, self.X[part if rows is None else rows[part]]

    @cached_property
    def groups(self) -> Groups:
        """The cells of every perturbation, and the controls that they are compared with."""
        return Groups(self.perturbations, self.labels, self.is_control, self.obs)

    @cached_property
    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Sums of expression and of its squares over every group, from one pass, (groups, genes) each."""
        return self.sums_over(self.groups.of_cell, np.ones(len(self.rows), dtype=bool), len(self.groups.n_cells))

    def sums_over(self, group: np.ndarray, mask: np.ndarray, n_groups: int) -> tuple[np.ndarray, np.ndarray]:
        """Return sums of expression and of its squares over groups of the cells under a mask, (groups, genes) each.

        Parameters
        ----------
        group
            Of every cell under the mask.
        """
        if (derived := self._from_finest(group, mask, n_groups)) is not None:
            return derived
        return self._summed(group, mask, n_groups)

    def _summed(self, group: np.ndarray, mask: np.ndarray, n_groups: int) -> tuple[np.ndarray, np.ndarray]:
        """Return `sums_over` by one pass over the cells under the mask."""
        sums, squares = np.zeros((2, n_groups, self.X.shape[1]))
        for part, X in self.blocks(None if mask.all() else np.flatnonzero(mask)):
            add_moments(X.data, X.indices, X.indptr, group[part], sums, squares)
        return sums, squares

    @cached_property
    def _finest(self) -> tuple[np.ndarray, int]:
        """Group of every cell by perturbation, batch, cell type, role and turn of controls; and their number.

        The sums over most other groups are sums of these. Where they are too many there are none: (0,) and 0.
        """
        key = self.groups.of_cell.astype(np.int64) * len(self._within) + self._within.of_cell
        numbers, group = np.unique(key, return_inverse=True)
        return (group, len(numbers)) if len(numbers) * len(self.genes) <= VALUES_OF_SUMS else (group[:0], 0)

    @cached_property
    def _finest_sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Sums of expression and of its squares over the finest groups, (groups, genes) each."""
        group, n_groups = self._finest
        return self._summed(group, np.ones(len(group), dtype=bool), n_groups)

    def _from_finest(self, group: np.ndarray, mask: np.ndarray, n_groups: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return `sums_over` from the sums over the finest groups; None where a group splits one of these."""
        finest, n_finest = self._finest
        if not n_finest:
            return None
        of_cell, of_finest = np.full(len(mask), -1), np.full(n_finest, -1)
        of_cell[mask] = group
        of_finest[finest] = of_cell
        if (of_finest[finest] != of_cell).any():
            return None
        kept = np.flatnonzero(of_finest >= 0)
        coarse = sparse.csr_matrix((np.ones(len(kept)), (of_finest[kept], kept)), shape=(n_groups, n_finest))
        sums, squares = self._finest_sums
        return coarse @ sums, coarse @ squares

    @cached_property
    def context_keys(self) -> tuple[str, str]:
        """The two columns of obs that tell contexts apart: batch and cell type, or dataset and cell type.

        Few batches may differ as days of an experiment do, and each is a context. Many (`MOST_CONTEXTS`) repeat one
        another, and a perturbation has few cells in each: then a context is a cell type of a dataset.
        """
        if "dataset" not in self.obs:
            return KEYS[0], KEYS[1]
        controls = self.obs[self.is_control]
        n_fine, n_coarse = (len(controls[[key, KEYS[1]]].drop_duplicates()) for key in (KEYS[0], "dataset"))
        return ("dataset" if n_fine > MOST_CONTEXTS and n_coarse > 1 else KEYS[0], KEYS[1])

    def by(self, keys: tuple[str, str]) -> "Pairs":
        """Return the same cells with contexts that these columns tell apart."""
        cells = replace(self)
        vars(cells)["context_keys"] = keys
        return cells

    @cached_property
    def contexts(self) -> np.ndarray:
        """Context of every cell (`context_keys`), as one word."""
        places = Strata(self.obs, self.context_keys)
        return places.names[places.of_cell]

    @cached_property
    def effects_by_context(self) -> dict[tuple[str, str], dict[str, np.ndarray]]:
        """Mean effect of every perturbation with at least ten cells in a context with controls, by one pass.

        Of cells of one role, as each is compared with controls of its own.
        """
        places = Strata(self.obs, self.context_keys)
        names = places.table.astype(str)
        rank = names.groupby(list(self.context_keys)).ngroup().to_numpy()
        contexts = list(names.iloc[np.argsort(rank)].itertuples(index=False, name=None))
        place = rank[places.of_cell]
        label, labels = pd.factorize(self.labels, sort=True)
        has_controls = np.bincount(place[self.is_control], minlength=len(places)) > 0
        number, group, size = np.unique(place * len(labels) + label, return_inverse=True, return_counts=True)
        is_found = (
            (size >= LEAST_CELLS) & has_controls[number // len(labels)] & (labels[number % len(labels)] != CONTROL)
        )
        mask = is_found[group]
        group = (np.cumsum(is_found) - 1)[group[mask]]
        # Single precision is enough for sums of some dozens of cells, and contexts × perturbations are many.
        values = np.zeros((is_found.sum(), len(self.genes)), np.float32)
        if (derived := self._from_finest(group, mask, len(values))) is not None:
            values[:] = derived[0]
        else:
            for part, X in self.blocks(np.flatnonzero(mask)):
                add_rows(X.data, X.indices, X.indptr, group[part], values)
        shape = len(values), len(self._within)
        weights = sparse.csr_matrix((1.0 / size[is_found][group], (group, self._within.of_cell[mask])), shape=shape)
        effects: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        for i, (found, n) in enumerate(zip(number[is_found], size[is_found], strict=True)):
            values[i] = values[i] / n - weights[i] @ self._control_levels
            effects.setdefault(contexts[found // len(labels)], {})[labels[found % len(labels)]] = values[i]
        return effects

    def is_of_context(self, context: tuple[str, str]) -> np.ndarray:
        """Return True for the cells of a context, (cells,)."""
        return self.contexts == "|".join(context)

    def cells_in(self, label: str, context: Context) -> np.ndarray:
        """Return the rows of one perturbation in the batches and cell types of a context."""
        rows = self.cells_of(label)
        return rows[np.isin(self.strata[rows], list(context.shares))]

    def without_context(self, context: tuple[str, str]) -> "Pairs":
        """Return the cells of all other contexts; what is known of effects in them is handed on."""
        is_other = ~self.is_of_context(context)
        others = self.select(is_other).by(self.context_keys)
        if others._finest[1] and (sums := self._from_finest(others._finest[0], is_other, others._finest[1])):
            vars(others)["_finest_sums"] = sums
        vars(others)["effects_by_context"] = {
            other: of for other, of in self.effects_by_context.items() if other != context
        }
        return others

    @cached_property
    def is_control(self) -> np.ndarray:
        """Boolean mask of control cells."""
        return self.obs["is_control"].to_numpy(bool)

    @cached_property
    def labels(self) -> np.ndarray:
        """Perturbation label per cell."""
        return self.obs["perturbation"].astype(str).to_numpy()

    @cached_property
    def _rows_of(self) -> dict[str, np.ndarray]:
        return pd.Series(self.labels).groupby(self.labels, sort=False).indices

    @cached_property
    def strata(self) -> np.ndarray:
        """Batch and cell type of every cell, as one word."""
        places = Strata(self.obs, KEYS[:2])
        return places.names[places.of_cell]

    @cached_property
    def _within(self) -> Strata:
        """Batch, cell type and role of every cell."""
        return Strata(self.obs)

    @property
    def perturbations(self) -> list[str]:
        """Sorted labels other than control."""
        return sorted(set(self.labels) - {CONTROL})

    def cells_of(self, label: str) -> np.ndarray:
        """Return the rows of one perturbation."""
        return self._rows_of.get(label, np.empty(0, dtype=np.int64))

    @cached_property
    def _control_levels(self) -> np.ndarray:
        """Mean of the controls that serve each stratum, (strata, genes), log1p."""
        within, n = self._within, self.groups.n_controls()
        pool = within.serving(n)
        n_serving = np.where(pool < 0, np.nan, (within.members @ n)[pool])
        sums = self.groups.control_means(self.sums[0]) * n[:, None]
        return (within.members[pool] @ sums / n_serving[:, None]).astype(self.X.dtype)

    @cached_property
    def control_level(self) -> np.ndarray:
        """Mean expression of all controls, (genes,)."""
        first = len(self.groups.labels)
        return (self.sums[0][first:].sum(axis=0) / self.groups.n_cells[first:].sum()).astype(self.X.dtype)

    @cached_property
    def control_variance(self) -> np.ndarray:
        """Variance of expression over all controls, (genes,)."""
        first, (sums, squares) = len(self.groups.labels), self.sums
        n = self.groups.n_cells[first:].sum()
        return squares[first:].sum(axis=0) / n - (sums[first:].sum(axis=0) / n) ** 2

    @cached_property
    def control_covariance(self) -> np.ndarray:
        """Covariance of genes over all controls, (genes, genes)."""
        products = np.zeros((len(self.genes), len(self.genes)), self.X.dtype)
        for _, X in self.blocks(np.flatnonzero(self.is_control)):
            centred = X.toarray() - self.control_level
            products += centred.T @ centred
        return products / self.is_control.sum()

    def mean_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the mean expression of cells, (genes,)."""
        return np.asarray(self.X[rows].mean(axis=0)).ravel()

    def variance_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the variance of expression over cells, (genes,)."""
        X = self.X[rows].astype(np.float64)
        return np.asarray(X.power(2).mean(axis=0)).ravel() - np.asarray(X.mean(axis=0)).ravel() ** 2

    def control_mean_for(self, rows: np.ndarray) -> np.ndarray:
        """Return the mean control of the cells' role, weighted as the cells are over batch and cell type, (genes,).

        A perturbation with many cells in one batch is compared with that batch, so that batch effects are no effects.
        For a batch without controls those of the role's other batches serve, as they do in `match_controls`.
        """
        strata, n = np.unique(self._within.of_cell[rows], return_counts=True)
        return (n / len(rows) @ self._control_levels[strata]).astype(self.X.dtype)

    def context_of(self, rows: np.ndarray) -> Context:
        """Return where cells of one role are, with the mean control of each place."""
        strata = np.unique(self._within.of_cell[rows])
        levels = dict(zip(self._within.names[strata].tolist(), self._control_levels[strata], strict=True))
        kinds = {}
        if "dataset" in self.obs:
            names, first = np.unique(self.strata[rows].astype(str), return_index=True)
            of_names = self.obs[["dataset", KEYS[1]]].iloc[rows[first]].astype(str)
            kinds = dict(zip(names.tolist(), of_names["dataset"] + "|" + of_names[KEYS[1]], strict=True))
        return Context(self.strata[rows], levels, kinds)

    def effect_of(self, label: str) -> np.ndarray:
        """Return the mean effect of a perturbation: its pseudobulk minus the matched control mean, (genes,)."""
        return self._effects[self.groups.labels.index(label)]

    @cached_property
    def _effects(self) -> np.ndarray:
        """Mean effect of every perturbation, (perturbations, genes)."""
        return self.groups.effects(self.sums[0]).astype(self.X.dtype)

    @property
    def squared_errors(self) -> np.ndarray:
        """Squared standard error of every perturbation's mean, (perturbations, genes): sampling of its cells alone."""
        groups, (sums, squares) = self.groups, self.sums
        variances = groups.means(squares) - groups.means(sums) ** 2
        return variances / groups.n_cells[: len(groups.labels), None]

    @cached_property
    def mean_effect(self) -> np.ndarray:
        """Mean over perturbations of their effects, (genes,)."""
        return self._effects.mean(axis=0)

    def effects_of_halves(self, label: str) -> list[np.ndarray]:
        """Return the mean effect by each half of a perturbation's cells that is not empty, against all controls."""
        group, sums = self._halves
        groups = 2 * self.groups.labels.index(label) + np.arange(2)
        rows = self.cells_of(label)
        found = [(i, rows[group[rows] == i]) for i in groups]
        return [
            (sums[i] / len(of_half)).astype(self.X.dtype) - self.control_mean_for(of_half)
            for i, of_half in found
            if len(of_half)
        ]

    @cached_property
    def _halves(self) -> tuple[np.ndarray, np.ndarray]:
        """Half of a perturbation per cell, -1 for none, (cells,), and sums over the halves, (halves, genes)."""
        half = pd.Categorical(self.obs["half"].astype(str), categories=["a", "b"]).codes
        group = np.where((half >= 0) & ~self.is_control, 2 * self.groups.of_cell + half, -1)
        return group, self.sums_over(group[group >= 0], group >= 0, 2 * len(self.groups.labels))[0]

    def controls_at(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Return the expression of controls by their rows; all controls are kept in memory, as many ask for them."""
        at, X = self._controls
        return X[np.searchsorted(at, rows)]

    @cached_property
    def _controls(self) -> tuple[np.ndarray, sparse.csr_matrix]:
        rows = np.flatnonzero(self.is_control)
        return rows, self.X[rows]


def _halves(obs: pd.DataFrame, seed: int) -> np.ndarray:
    """Divide the cells of every perturbation × held-out role in two, within batch.

    Half 'a' is the technical duplicate, half 'b' is scored.
    """
    rng = np.random.default_rng(seed)
    half = np.full(len(obs), "", dtype=object)
    held_out = np.flatnonzero((obs["role"] != "train").to_numpy() & ~obs["is_control"].to_numpy(bool))
    cells = obs.iloc[held_out]
    place = cells.groupby(["batch", "cell_type"], observed=True).ngroup().to_numpy()
    groups = Sorted(cells.groupby(["perturbation", "role"], observed=True).ngroup().to_numpy())
    for group in range(len(groups)):
        shuffled = rng.permutation(groups[group])
        shuffled = held_out[shuffled[np.argsort(place[shuffled], kind="stable")]]
        half[shuffled[0::2]] = "b"
        half[shuffled[1::2]] = "a"
    return half


@dataclass(frozen=True)
class Screen:
    """The cells of harmonized.h5ad that a split places; counts stay on disk.

    Attributes
    ----------
    counts
        Raw counts, CSR on disk, cells × genes of the file.
    obs, var
        `CARRIED_OBS` and role of every cell; the genes that every cell was measured in.
    genes
        Columns of `counts` that hold these genes.
    """

    counts: CsrRows
    obs: pd.DataFrame
    var: pd.DataFrame
    genes: np.ndarray

    @classmethod
    def open(cls, harmonized: Path, split: Mapping[str, Any]) -> "Screen":
        """Open a screen; `split` is the content of split.json."""
        file = h5py.File(harmonized)
        obs = read_columns(file["obs"], CARRIED_OBS)
        code = roles_of_cells(split, obs.index)
        placed = np.flatnonzero(code >= 0)
        obs = obs.iloc[placed].copy()
        for column in obs.select_dtypes("category"):
            obs[column] = obs[column].cat.remove_unused_categories()
        obs["role"] = pd.Categorical.from_codes(code[placed], categories=list(ROLES))
        var = ad.io.read_elem(file["var"])
        genes = measured_by_all(file["varm"], len(var))
        return cls(CsrRows(file["X"], Path(harmonized)).select(placed), obs, var.iloc[genes], genes)

    @cached_property
    def is_train(self) -> np.ndarray:
        """Mask of training cells."""
        return (self.obs["role"] == "train").to_numpy()

    def blocks(self) -> Iterator[tuple[slice, sparse.csr_matrix]]:
        """Yield all cells in their order, some thousands at once: which they are, and their counts."""
        for rows in row_blocks(len(self.obs)):
            counts = self.counts[rows].astype(np.float32, copy=False)
            yield rows, counts if len(self.genes) == counts.shape[1] else counts[:, self.genes]

    @cached_property
    def totals(self) -> np.ndarray:
        """Counts per cell over all genes, (cells,)."""
        return self._first_pass[0]

    @cached_property
    def target_sum(self) -> float:
        """Median of the training cells' totals."""
        return float(np.median(self.totals[self.is_train]))

    @cached_property
    def _first_pass(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Totals of cells; training sums of counts ÷ total, and of their squares; counts above 0 per gene."""
        n_values = np.zeros(len(self.var), np.int64)
        totals = np.zeros(len(self.obs), np.float32)
        sums, squares = np.zeros((2, 1, len(self.var)))
        for rows, counts in self.blocks():
            totals[rows] = np.asarray(counts.sum(axis=1)).ravel()
            n_values += np.bincount(counts.indices, minlength=len(n_values))
            is_train = self.is_train[rows]
            kept = counts[is_train]
            fractions = kept.data / np.repeat(totals[rows][is_train], np.diff(kept.indptr))
            add_moments(fractions, kept.indices, kept.indptr, np.zeros(kept.shape[0], np.int64), sums, squares)
        return totals, sums[0], squares[0], n_values

    @property
    def n_values(self) -> np.ndarray:
        """Counts above 0 of all cells, (genes,)."""
        return self._first_pass[3]

    def highly_variable(self, n_genes: int) -> np.ndarray:
        """Return the genes that training cells select, (genes,): all where no more are measured."""
        if n_genes >= len(self.var):
            return np.ones(len(self.var), dtype=bool)
        _, sums, squares, _ = self._first_pass
        return highly_variable(self.target_sum * sums, self.target_sum**2 * squares, int(self.is_train.sum()), n_genes)

    def normalized(self, rows: slice, counts: sparse.csr_matrix) -> np.ndarray:
        """Return log1p of some cells' counts, of any genes, scaled to the target sum, (values,) float32."""
        totals = self.totals[rows]
        scale = np.divide(self.target_sum, totals, out=np.zeros_like(totals), where=totals > 0)
        return np.log1p(np.repeat(scale, np.diff(counts.indptr)) * counts.data)


def _write_matrices(file: h5py.File, screen: Screen, genes: np.ndarray, threads: int) -> None:
    """Write X and layers["counts"] of some genes, block by block.

    The two have the same places of values: the layer has them as hard links, which any reader follows, and costs the
    counts alone.
    """
    if "X" in file:
        del file["X"]
    X, layer = file.create_group("X"), file["layers"].create_group("counts")
    with ThreadPoolExecutor(threads) as pool:
        written = AppendedRows(X, len(genes), len(screen.obs), pool)
        counted = Appended(layer, "data", np.float32, len(screen.obs) * len(genes), pool)
        for rows, block in screen.blocks():
            counts = block[:, genes]
            counts.sort_indices()
            counted.append(counts.data)
            X_block = screen.normalized(rows, counts)
            written.append(sparse.csr_matrix((X_block, counts.indices, counts.indptr), shape=counts.shape))
        written.finish()
        counted.finish()
    layer.attrs.update(X.attrs)
    for name in ("indices", "indptr"):
        layer[name] = X[name]


def pair(harmonized: Path, split: Path, pairs: Path, n_hvg: int, threads: int = 1) -> None:
    """Write the control/perturbed pairs of one split; counts are read twice, in blocks of cells.

    Parameters
    ----------
    harmonized, split
        The screen and the roles of its cells.
    pairs
        AnnData to be written: X log1p of counts normalized to uns["perturbflow"]["target_sum"], layers["counts"],
        var.highly_variable, var.is_perturbed_gene, obs.role, obs.half, obsm["control_index"].
    n_hvg
        Highly variable genes, chosen on training cells; measured perturbed genes are kept besides.
    threads
        Threads that encode.
    """
    roles = read_json(split)
    seed = roles["spec"]["seed"]
    screen = Screen.open(harmonized, roles)
    obs = screen.obs
    highly_variable = screen.highly_variable(n_hvg)
    perturbed_genes = {gene for label in obs["perturbation"].unique() for gene in entities_of(label)}
    var = screen.var[["gene_name", "gene_id", "original_name"]].assign(
        highly_variable=highly_variable, is_perturbed_gene=screen.var.index.isin(perturbed_genes)
    )
    kept = np.flatnonzero(var["highly_variable"] | var["is_perturbed_gene"])
    require_room(pairs.parent, BYTES_PER_VALUE * screen.n_values[kept].sum(), pairs.name)
    control_index, n_relaxed = match_controls(obs, CONTROLS_PER_CELL, seed)
    if n_relaxed:
        logger.warning(
            "%d cells have no control in their own batch and role; controls of other batches serve", n_relaxed
        )
    obs["half"] = pd.Categorical(_halves(obs, seed), categories=["", "a", "b"])
    tables = ad.AnnData(obs=obs, var=var.iloc[kept], obsm={"control_index": control_index})
    tables.uns["perturbflow"] = {
        "target_sum": screen.target_sum,
        "n_hvg": int(highly_variable.sum()),
        "n_relaxed_matches": n_relaxed,
        "split_sha256": file_digest(split),
        "train_cells_sha256": roles["sha256"]["train"]["cells"],
    }
    logger.info(
        "%d cells × %d genes (%d highly variable), target sum %g",
        *tables.shape,
        highly_variable.sum(),
        screen.target_sum,
    )
    with atomic(pairs) as partial:
        tables.write_h5ad(partial, compression="gzip")
        with h5py.File(partial, "r+") as file:
            _write_matrices(file, screen, kept, threads)
