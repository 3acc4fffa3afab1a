"""Control/perturbed pairs: genes selected and counts normalized by training cells, controls matched within the role."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.genes.symbols import CONTROL, entities_of
from perturbflow.io.files import atomic, file_digest, read_json
from perturbflow.io.hdf5 import CsrRows
from perturbflow.io.kernels import add_moments
from perturbflow.splits.divisions import KNOWN, ROLES

logger = logging.getLogger(__name__)

CONTROLS_PER_CELL = 8
ROWS_AT_ONCE = 4096
LEAST_CELLS = 10  # of a perturbation in a context: fewer give noise for an effect
CARRIED_OBS = (
    "perturbation", "is_control", "n_perturbations", "perturbation_type", "cell_type", "batch", "dataset",
    "total_counts", "n_genes_by_counts", "pct_counts_mt",
)  # fmt: skip


class Groups:
    """Groups of cells whose sums hold the mean effects of all perturbations.

    Those are the cells of every perturbation, and the controls of every batch × cell type × role, which are dealt out to two groups
    by turns: so the effects against either half of the controls come from the same sums.

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
        strata = obs.groupby(["batch", "cell_type", "role"], observed=True)
        self.stratum = strata.ngroup().to_numpy()
        # Where a batch has no control of the role, all of the cell type and role serve, as in `match_controls`.
        places = strata.size().index.to_frame(index=False)
        self.strata = (places["batch"].astype(str) + "|" + places["cell_type"].astype(str)).tolist()
        self._relaxed = places.groupby(["cell_type", "role"], observed=True).ngroup().to_numpy()
        turn = pd.Series(self.stratum[is_control]).groupby(self.stratum[is_control]).cumcount().to_numpy() % 2
        self.of_cell = pd.Index(labels).get_indexer(label)
        self.of_cell[is_control] = len(labels) + 2 * self.stratum[is_control] + turn
        n_strata = len(self._relaxed)
        self.n_cells = np.bincount(self.of_cell, minlength=len(labels) + 2 * n_strata)
        shares = np.zeros((len(labels), n_strata))
        np.add.at(shares, (self.of_cell[~is_control], self.stratum[~is_control]), 1.0)
        self._shares = shares / np.maximum(shares.sum(axis=1, keepdims=True), 1.0)

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
        """Return the mean of every perturbation less that of its controls, weighted as its cells are over strata, (perturbations, columns).

        Parameters
        ----------
        sums
            Over the cells of every group, (groups, columns).
        half
            Which half of the controls is compared with, 0 or 1; None is all. A control that is alone in its stratum is in both.
        """
        return self.means(sums) - self.control_weights(half) @ self.control_means(sums, half)

    def n_controls(self, half: int | None = None) -> np.ndarray:
        """Return the controls of each stratum, of one half or of both, (strata,)."""
        return (self.n_cells[len(self.labels) :].reshape(-1, 2) * self._is_of_half(half)).sum(axis=1)

    def control_means(self, sums: np.ndarray, half: int | None = None) -> np.ndarray:
        """Return the mean of the controls of each stratum from the sums over all groups, (strata, columns); 0 without controls."""
        kept = np.where(self._is_of_half(half), 1.0, 0.0)
        controls = np.einsum("st,stg->sg", kept, sums[len(self.labels) :].reshape(len(kept), 2, -1))
        return controls / np.maximum(self.n_controls(half), 1)[:, None]

    def _is_of_half(self, half: int | None) -> np.ndarray:
        n = self.n_cells[len(self.labels) :].reshape(-1, 2)
        return n > 0 if half is None else (n > 0) & ((np.arange(2) == half) | (n.sum(axis=1) < 2)[:, None])

    def control_weights(self, half: int | None = None) -> np.ndarray:
        """Return how much each perturbation is compared with the controls of each stratum, (perturbations, strata); rows sum to 1."""
        n = self.n_controls(half)
        pool = (self._relaxed[:, None] == self._relaxed) & (n == 0)[:, None] | np.eye(len(n), dtype=bool)
        return self._shares @ (pool * n / (pool @ n)[:, None])


@dataclass(frozen=True)
class Context:
    """Where cells are that are asked.

    Attributes
    ----------
    strata
        Batch × cell type of every cell, as `Pairs.strata` writes it.
    levels
        Mean control by stratum, (genes,) each, log1p.
    """

    strata: np.ndarray
    levels: Mapping[str, np.ndarray]

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
            yield np.flatnonzero(self.strata == stratum), Context(np.array([stratum]), self.levels)


@dataclass(frozen=True)
class Pairs:
    """Cells of one or more roles, with their matched controls, as models and metrics read them.

    Attributes
    ----------
    X
        log1p-normalized expression, CSR float32, cells × genes; in memory, or on disk and read when rows are asked for, as X[rows].
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

    def roles(self, *roles: str) -> "Pairs":
        """Return the cells of these roles: always the same object, so that what is measured of them is measured once."""
        if roles not in self._of_roles:
            mask = self.obs["role"].isin(roles).to_numpy()
            if mask.all():
                return self
            self._of_roles[roles] = self.select(mask)
        return self._of_roles[roles]

    def fitted_on(self, scored: str) -> "Pairs":
        """Return what a model is handed whose scores are those of a role: the cells that it learns from, all in the role train.

        Where validation is scored, its cells are there too, in their own role: they draw the curve of a training.
        """
        cells = self.roles("train", "validation")
        role = cells.obs["role"].astype(str)
        return replace(cells, obs=cells.obs.assign(role=role.where(~role.isin(KNOWN[scored]), "train")))

    @cached_property
    def _of_roles(self) -> dict[tuple[str, ...], "Pairs"]:
        return {}

    def blocks(self) -> Iterator[tuple[slice, sparse.csr_matrix]]:
        """Yield all cells in their order, some thousands at once: which rows they are, and their expression."""
        for rows in row_blocks(len(self.rows)):
            yield rows, self.X[rows]

    @cached_property
    def groups(self) -> Groups:
        """The cells of every perturbation, and the controls that they are compared with."""
        return Groups(self.perturbations, self.labels, self.is_control, self.obs)

    @cached_property
    def sums(self) -> tuple[np.ndarray, np.ndarray]:
        """Sums of expression and of its squares over every group, from one pass over the cells, (groups, genes) each."""
        return self.sums_over(self.groups.of_cell, np.ones(len(self.rows), dtype=bool), len(self.groups.n_cells))

    def sums_over(self, group: np.ndarray, mask: np.ndarray, n_groups: int) -> tuple[np.ndarray, np.ndarray]:
        """Return sums of expression and of its squares over groups of the cells under a mask, (groups, genes) each.

        Parameters
        ----------
        group
            Of every cell under the mask.
        """
        of_cell = np.full(len(mask), -1)
        of_cell[mask] = group
        sums, squares = np.zeros((2, n_groups, len(self.genes)))
        for rows, X in self.blocks():
            here = of_cell[rows] >= 0
            kept = X if here.all() else X[here]
            add_moments(kept.data, kept.indices, kept.indptr, of_cell[rows][here], sums, squares)
        return sums, squares

    @cached_property
    def effects_by_context(self) -> dict[tuple[str, str], dict[str, np.ndarray]]:
        """Per batch × cell type with controls, the mean effect of every perturbation that has at least ten cells in it; from one pass.

        Of cells of one role, as each is compared with controls of its own.
        """
        strata = self.obs[["batch", "cell_type"]].astype(str)
        has_controls = set(strata[self.is_control].itertuples(index=False, name=None))
        group = np.full(len(self.labels), -1)
        found: list[tuple[str, str, str, np.ndarray]] = []
        for (batch, cell_type, label), rows in (
            strata.assign(label=self.labels).groupby(["batch", "cell_type", "label"]).indices.items()
        ):
            if label != CONTROL and len(rows) >= LEAST_CELLS and (batch, cell_type) in has_controls:
                group[rows] = len(found)
                found.append((batch, cell_type, label, rows))
        sums, _ = self.sums_over(group[group >= 0], group >= 0, len(found))
        effects: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        for total, (batch, cell_type, label, rows) in zip(sums, found, strict=True):
            mean = (total / len(rows)).astype(np.float32)
            effects.setdefault((batch, cell_type), {})[label] = mean - self.control_mean_for(rows)
        return effects

    def is_of_context(self, context: tuple[str, str]) -> np.ndarray:
        """Return True for the cells of a batch × cell type, (cells,)."""
        return self.strata == "|".join(context)

    def cells_in(self, label: str, stratum: str) -> np.ndarray:
        """Return the rows of one perturbation in a batch × cell type."""
        rows = self.cells_of(label)
        return rows[self.strata[rows] == stratum]

    def without_context(self, context: tuple[str, str]) -> "Pairs":
        """Return the cells of all other batches × cell types; what is known of effects in them is handed on."""
        others = self.select(~self.is_of_context(context))
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
        return (self.obs["batch"].astype(str) + "|" + self.obs["cell_type"].astype(str)).to_numpy()

    @property
    def perturbations(self) -> list[str]:
        """Sorted labels other than control."""
        return sorted(set(self.labels) - {CONTROL})

    def cells_of(self, label: str) -> np.ndarray:
        """Return the rows of one perturbation."""
        return self._rows_of.get(label, np.empty(0, dtype=np.int64))

    @cached_property
    def _control_means(self) -> dict[tuple, np.ndarray]:
        """Mean control per (batch, cell type, role), and per (cell type, role)."""
        controls = self.obs[self.is_control]
        X = self.X[np.flatnonzero(self.is_control)]
        keys = ["batch", "cell_type", "role"]
        groups = {**controls.groupby(keys, observed=True).indices, **controls.groupby(keys[1:], observed=True).indices}
        return {key: np.asarray(X[rows].mean(axis=0)).ravel() for key, rows in groups.items()}

    @cached_property
    def control_level(self) -> np.ndarray:
        """Mean expression of all controls, (genes,)."""
        first = len(self.groups.labels)
        return (self.sums[0][first:].sum(axis=0) / self.groups.n_cells[first:].sum()).astype(self.X.dtype)

    @cached_property
    def control_covariance(self) -> np.ndarray:
        """Covariance of genes over all controls, (genes, genes)."""
        X = self.X[np.flatnonzero(self.is_control)].toarray() - self.control_level
        return X.T @ X / len(X)

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
        strata = self.obs.iloc[rows].groupby(["batch", "cell_type", "role"], observed=True).size()
        means = [n * self._control_means[key if key in self._control_means else key[1:]] for key, n in strata.items()]
        return sum(means) / len(rows)

    def context_of(self, rows: np.ndarray) -> Context:
        """Return where cells of one role are, with the mean control of each place."""
        strata = self.strata[rows]
        names, first = np.unique(strata, return_index=True)
        return Context(
            strata, {str(name): self.control_mean_for(rows[[i]]) for name, i in zip(names, first, strict=True)}
        )

    def effect_of(self, label: str) -> np.ndarray:
        """Return the mean effect of a perturbation: its pseudobulk minus the matched control mean, (genes,)."""
        rows = self.cells_of(label)
        return self.mean_of(rows) - self.control_mean_for(rows)


def row_blocks(n: int) -> Iterator[slice]:
    """Yield n rows in their order, some thousands at once."""
    for first in range(0, n, ROWS_AT_ONCE):
        yield slice(first, min(first + ROWS_AT_ONCE, n))


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
    index = np.full((len(obs), k), -1, dtype=np.int32)
    table = obs.assign(row=np.arange(len(obs)))
    controls = table[table["is_control"].to_numpy(bool)]
    exact = controls.groupby(["role", "cell_type", "batch"], observed=True)["row"].agg(list)
    relaxed = controls.groupby(["role", "cell_type"], observed=True)["row"].agg(list)
    n_relaxed = 0
    perturbed = table[~table["is_control"].to_numpy(bool)]
    for (role, cell_type, batch, label), cells in perturbed.groupby(
        ["role", "cell_type", "batch", "perturbation"], observed=True
    ):
        pool = exact.get((role, cell_type, batch))
        if pool is None:
            n_relaxed += len(cells)
            pool = relaxed.get((role, cell_type))
        if pool is None:
            raise InputError(
                f"no control cell of cell type '{cell_type}' has the role {role}: {label} cannot be compared with anything. "
                "Leave this cell type out through subset in the dataset's block, or drop covariates.cell_type."
            )
        rounds = -(-len(cells) * k // len(pool))
        drawn = np.concatenate([rng.permutation(pool) for _ in range(rounds)])[: len(cells) * k]
        index[cells["row"].to_numpy()] = drawn.reshape(k, len(cells)).T
    return index, n_relaxed


def _halves(obs: pd.DataFrame, seed: int) -> np.ndarray:
    """Divide the cells of every perturbation × held-out role in two, within batch: 'a' is the technical duplicate, 'b' is scored."""
    rng = np.random.default_rng(seed)
    half = np.full(len(obs), "", dtype=object)
    held_out = (obs["role"] != "train").to_numpy() & ~obs["is_control"].to_numpy(bool)
    table = obs.assign(row=np.arange(len(obs)))[held_out]
    for _, cells in table.groupby(["perturbation", "role"], observed=True):
        shuffled = cells.iloc[rng.permutation(len(cells))].sort_values(["batch", "cell_type"], kind="stable")
        half[shuffled["row"].to_numpy()[0::2]] = "b"
        half[shuffled["row"].to_numpy()[1::2]] = "a"
    return half


def pair(harmonized: Path, split: Path, pairs: Path, n_hvg: int) -> None:
    """Write the control/perturbed pairs of one split.

    Parameters
    ----------
    harmonized, split
        The screen and the roles of its cells.
    pairs
        AnnData to be written: X log1p of counts normalized to uns["perturbflow"]["target_sum"], layers["counts"], var.highly_variable,
        var.is_perturbed_gene, obs.role, obs.half, obsm["control_index"].
    n_hvg
        Highly variable genes, chosen on training cells; measured perturbed genes are kept besides.
    """
    roles = read_json(split)
    adata = ad.read_h5ad(harmonized)
    role_of_cell = pd.Series({cell: role for role in ROLES for cell in roles["cells"][role]})
    adata = adata[adata.obs_names.isin(role_of_cell.index)].copy()
    obs = adata.obs[list(CARRIED_OBS)].copy()
    obs["role"] = pd.Categorical(role_of_cell[adata.obs_names].to_numpy(), categories=ROLES)
    is_train = (obs["role"] == "train").to_numpy()
    counts = sparse.csr_matrix(adata.X, dtype=np.float32)

    totals = np.asarray(counts.sum(axis=1)).ravel()
    target_sum = float(np.median(totals[is_train]))
    scale = np.divide(target_sum, totals, out=np.zeros_like(totals), where=totals > 0)
    X = sparse.csr_matrix(sparse.diags(scale.astype(np.float32)) @ counts)
    X.data = np.log1p(X.data)

    highly_variable = np.ones(adata.n_vars, dtype=bool)
    if n_hvg < adata.n_vars:
        import scanpy as sc  # seconds to import, and every training imports this module

        training = ad.AnnData(X=X[is_train], var=pd.DataFrame(index=adata.var_names))
        sc.pp.highly_variable_genes(training, n_top_genes=n_hvg, flavor="seurat")
        highly_variable = training.var["highly_variable"].to_numpy()
    perturbed_genes = {gene for label in obs["perturbation"].unique() for gene in entities_of(label)}
    is_perturbed_gene = adata.var_names.isin(perturbed_genes)
    kept = highly_variable | is_perturbed_gene

    seed = roles["spec"]["seed"]
    control_index, n_relaxed = match_controls(obs, CONTROLS_PER_CELL, seed)
    if n_relaxed:
        logger.warning(
            "%d cells have no control in their own batch and role; controls of other batches serve", n_relaxed
        )
    obs["half"] = pd.Categorical(_halves(obs, seed), categories=["", "a", "b"])
    var = adata.var[["gene_name", "gene_id", "original_name"]].copy()
    var["highly_variable"] = highly_variable
    var["is_perturbed_gene"] = is_perturbed_gene
    out = ad.AnnData(
        X=X[:, kept], obs=obs, var=var[kept], layers={"counts": counts[:, kept]}, obsm={"control_index": control_index}
    )
    out.uns["perturbflow"] = {
        "target_sum": target_sum,
        "n_hvg": int(highly_variable.sum()),
        "n_relaxed_matches": n_relaxed,
        "split_sha256": file_digest(split),
        "train_cells_sha256": roles["sha256"]["train"]["cells"],
    }
    logger.info(
        "%d cells × %d genes (%d highly variable), target sum %g", *out.shape, highly_variable.sum(), target_sum
    )
    with atomic(pairs) as partial:
        out.write_h5ad(partial, compression="gzip")
