"""The effect of a perturbation on its own gene: the gene's level in the perturbed cells, against matched controls."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.controls import KEYS, Strata
from perturbflow.genes.symbols import CONTROL, entity_of, members_of

DIRECTIONS = {"CRISPRi": "down", "CRISPRko": "down", "CRISPRcas13": "down", "CRISPRa": "up"}
"""The direction in which a kind of perturbation changes its own gene."""

LEAST_MOLECULES = 10
"""Molecules that the cells of a perturbation hold, or would hold at the controls' level.

A change of fewer is mostly chance.
"""

Z = 1.959964
COLUMNS = ["label", "member", "cells", "expected", "ratio", "low", "high", "share", "is_told"]


@dataclass(frozen=True)
class OwnGenes:
    """Which genes are counted in which cells.

    Attributes
    ----------
    label
        Label of every cell, as its number among `labels`.
    labels
        Canonical labels, `control` among them.
    strata
        Batch × cell type of every cell, and the controls that serve each.
    genes
        Genes that are perturbed and measured, as numbers of the screen's genes, ascending.
    pairs
        Label, member and place in `genes` of all measured members, by label.
    n_pairs
        Measured members per label.
    """

    label: np.ndarray
    labels: list[str]
    strata: Strata
    genes: np.ndarray
    pairs: list[tuple[str, str, int]]
    n_pairs: np.ndarray

    @classmethod
    def of(cls, obs: pd.DataFrame, gene_names: pd.Index) -> OwnGenes:
        """Return the genes to be counted, for cells (`perturbation`, `batch`, `cell_type`) and genes."""
        labels = obs["perturbation"].cat.categories.tolist()
        members = [[(member, entity_of(member)) for member in members_of(label)] for label in labels]
        row = {name: i for i, name in enumerate(gene_names)}
        genes = np.unique([row[gene] for of_label in members for _, gene in of_label if gene in row]).astype(np.int64)
        place = {gene: i for i, gene in enumerate(genes.tolist())}
        measured = [[(member, place[row[gene]]) for member, gene in of_label if gene in row] for of_label in members]
        pairs = [(label, *pair) for label, of_label in zip(labels, measured, strict=True) for pair in of_label]
        n_pairs = np.array([len(of_label) for of_label in measured], np.int64)
        return cls(
            obs["perturbation"].cat.codes.to_numpy(),
            labels,
            Strata(obs, KEYS[:2]),
            genes,
            pairs,
            n_pairs,
        )

    def pairs_of(self, label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return cell and number of the pair for every measured member of every cell, given the cells' labels."""
        n = self.n_pairs[label]
        cell = np.repeat(np.arange(len(label)), n)
        nth = np.arange(len(cell)) - np.repeat(np.cumsum(n) - n, n)
        return cell, (np.cumsum(self.n_pairs) - self.n_pairs)[label[cell]] + nth

    @cached_property
    def place(self) -> np.ndarray:
        """Place in `genes` per pair."""
        return np.array([place for _, _, place in self.pairs], np.int64)


@dataclass
class OwnCounts:
    """The counts of the perturbed genes from one pass over all counts.

    Memory: a value per cell × measured member, and two per batch × cell type with controls × perturbed gene.
    """

    own: OwnGenes
    n_controls: np.ndarray = field(init=False)  # (strata,)
    sums: np.ndarray = field(init=False)  # of rates and of their squares in controls, (2, strata, genes)
    rates: list[np.ndarray] = field(
        default_factory=list
    )  # a block each: counts of own genes ÷ counts, cell by cell, member by member
    totals: list[np.ndarray] = field(default_factory=list)
    is_within: list[np.ndarray] = field(default_factory=list)
    n_read: int = 0

    def __post_init__(self) -> None:
        n_strata = len(self.own.strata)
        self.n_controls = np.zeros(n_strata)
        self.sums = np.zeros((2, n_strata, len(self.own.genes)))

    def add(self, counts: sparse.csr_matrix, totals: np.ndarray, is_within: np.ndarray) -> None:
        """Add the next block of cells.

        It takes counts with ascending genes, their sums, and which cells are within the limits of quality.
        """
        cells = slice(self.n_read, self.n_read + counts.shape[0])
        label, stratum = self.own.label[cells], self.own.strata.of_cell[cells]
        self.n_read = cells.stop
        rate = np.divide(1.0, totals, out=np.zeros(len(totals)), where=totals > 0)

        cell, pair = self.own.pairs_of(label)
        found = np.asarray(counts[cell, self.own.genes[self.own.place[pair]]]).ravel() if len(cell) else np.empty(0)
        self.rates.append((found * rate[cell]).astype(np.float32))
        self.totals.append(np.asarray(totals, np.float32))
        self.is_within.append(is_within)

        controls = np.flatnonzero(is_within & (label == self.own.labels.index(CONTROL)))
        if len(controls) and len(self.own.genes):
            of_controls = sparse.csr_matrix(sparse.diags(rate[controls]) @ counts[controls][:, self.own.genes])
            indicator = sparse.csr_matrix((np.ones(len(controls)), (stratum[controls], np.arange(len(controls)))),
                                          shape=(len(self.n_controls), len(controls)))  # fmt: skip
            for sums, values in zip(self.sums, (of_controls, of_controls.power(2)), strict=True):
                sums += (indicator @ values).toarray()
            self.n_controls += np.bincount(stratum[controls], minlength=len(self.n_controls))

    def _pools(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return mean rate and its sampling variance per pool of controls and gene, and the pool of each stratum.

        A stratum without controls is compared with those of its cell type in all batches, as pairs are; without any,
        with all.
        """
        members = self.own.strata.members
        n = members @ self.n_controls
        sums, squares = (members @ values for values in self.sums)
        size = np.maximum(n, 1.0)[:, None]
        mean = sums / size
        variance = np.maximum(squares / size - mean**2, 0.0) / size
        return mean, variance, self.own.strata.serving(self.n_controls, or_all=True)

    def _by_pair(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the cell, the number of the pair and the rate, for every cell within the limits × measured member."""
        cell, pair = self.own.pairs_of(self.own.label[: self.n_read])
        kept = np.concatenate(self.is_within)[cell]
        return cell[kept], pair[kept], np.concatenate(self.rates)[kept].astype(float)

    def efficacy(self, direction: str) -> pd.DataFrame:
        """Return how every perturbed gene changed in its cells, one row per label × measured member.

        Rates are a cell's counts of the gene ÷ all its counts. `ratio` is the mean rate of the perturbed cells ÷ that
        of the controls. The controls are weighted as the perturbed cells are distributed over batches and cell types. 1
        − ratio is the knock-down of cell-load and STATE (they divide means of log1p-normalized expression). Its 95 %
        interval is that of a log ratio of means (delta method). The perturbed cells get half a molecule more, and no
        variance is taken to be below a Poisson count's.

        Parameters
        ----------
        direction
            down, up, or empty where none is expected.

        Returns
        -------
        Columns label, member, cells, expected (molecules at the controls' level), ratio, low, high, share
        (changed in the direction: 1 − ratio down, ratio − 1 up; NaN without one) and is_told (whether
        expected or found molecules suffice for a ratio).
        """
        mean, variance, pool = self._pools()
        cell, pair, rate = self._by_pair()
        totals = np.concatenate(self.totals)[cell]
        size = np.divide(1.0, totals, out=np.zeros(len(cell)), where=totals > 0)  # the rate of one molecule
        n_pairs = len(self.own.pairs)
        n, total, squares, sizes = (
            np.bincount(pair, values, n_pairs) for values in (np.ones(len(pair)), rate, rate**2, size)
        )
        shares = sparse.csr_matrix(
            (np.ones(len(pair)), (pair, pool[self.own.strata.of_cell[cell]])), shape=(n_pairs, len(mean))
        )
        n_controls = max(self.n_controls.sum(), 1.0)
        rows = []
        for i, (label, member, place) in enumerate(self.own.pairs):
            if not sizes[i]:
                continue
            here = slice(shares.indptr[i], shares.indptr[i + 1])
            pools, weights = shares.indices[here], shares.data[here] / n[i]
            found, level, molecule = total[i] / n[i], weights @ mean[pools, place], sizes[i] / n[i]
            raised, base = found + molecule / (2 * n[i]), max(level, molecule / (2 * n_controls))
            error = max(weights**2 @ variance[pools, place], base * molecule / n_controls) / base**2
            spread = max(squares[i] / n[i] - found**2, raised * molecule) / n[i] / raised**2
            reach = np.exp(Z * np.sqrt(spread + error))
            ratio = found / level if level > 0 else raised / base
            share = {"down": 1 - ratio, "up": ratio - 1}.get(direction, np.nan)
            expected, molecules = (rate * n[i] / molecule for rate in (level, found))
            is_told = max(expected, molecules) >= LEAST_MOLECULES
            rows.append(
                (
                    label,
                    member,
                    int(n[i]),
                    expected,
                    ratio,
                    raised / base / reach,
                    raised / base * reach,
                    share,
                    is_told,
                )
            )
        return pd.DataFrame(rows, columns=COLUMNS).astype({"is_told": bool})

    def passes(
        self, efficacy: pd.DataFrame, direction: str, least: float | None, least_of_cell: float | None
    ) -> tuple[np.ndarray, dict[str, int]]:
        """Return which of the cells within the limits changed enough in their own genes, and how many each limit drops.

        A perturbation passes where every member of enough molecules changed by the share `least`. Then a cell passes
        where its own rate differs by `least_of_cell` from the mean of its controls. Members of too few molecules, or
        not measured, drop nothing.
        """
        is_within = np.concatenate(self.is_within)
        dropped: dict[str, int] = {}
        passes = np.ones(self.n_read, bool)
        reliable = efficacy[efficacy["is_told"]]
        if least is not None:
            weak = set(reliable.loc[reliable["share"] < least, "label"])
            is_weak = np.array([label in weak for label in self.own.labels])[self.own.label[: self.n_read]]
            passes &= ~is_weak
            dropped["qc.min_efficacy"] = int((is_within & is_weak).sum())
        if least_of_cell is not None:
            mean, _, pool = self._pools()
            cell, pair, rate = self._by_pair()
            level = mean[pool[self.own.strata.of_cell[cell]], self.own.place[pair]]
            of_reliable = set(zip(reliable["label"], reliable["member"], strict=True))
            is_reliable = np.array([(label, member) in of_reliable for label, member, _ in self.own.pairs], bool)
            changed = (rate - level) * (1 if direction == "up" else -1)
            is_weak = np.zeros(self.n_read, bool)
            is_weak[cell[(changed < least_of_cell * level) & is_reliable[pair]]] = True
            dropped["qc.min_cell_efficacy"] = int((is_within & passes & is_weak).sum())
            passes &= ~is_weak
        return passes[is_within], dropped
