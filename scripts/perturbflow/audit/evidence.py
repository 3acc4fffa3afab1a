"""The data that training reads of one split, and the checks of its roles: nothing held out has a cell in training."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow.errors import InputError
from perturbflow.genes.symbols import (
    CONTROL,
    SEPARATOR,
    at_dose,
    entities_of,
    entity_of,
    gene_within,
    members_of,
    without_dose,
)
from perturbflow.io.anndata_file import measured_by_all, read_columns
from perturbflow.io.hdf5 import CsrRows
from perturbflow.io.kernels import add_moments
from perturbflow.io.streaming import row_blocks
from perturbflow.pairs import CARRIED_OBS
from perturbflow.progress import progressed
from perturbflow.screens.copies import digests_of
from perturbflow.splits.contexts import CONTEXT_KINDS, n_sources
from perturbflow.splits.divisions import KNOWN, ROLES, members_seen
from perturbflow.splits.split import LABEL_KINDS, names_digest

Findings = list[str]


TABLES = ("obs", "var", "uns", "obsm", "varm", "obsp", "varp", "layers")


@dataclass(frozen=True)
class Evidence:
    """The data that training reads of one split, and their sources.

    Attributes
    ----------
    split
        Content of split.json.
    pairs
        Tables of pairs.h5ad, and its matched controls.
    expression
        X of pairs.h5ad, in memory or on disk.
    screen
        Tables of harmonized.h5ad: the cells of `pairs`, in the same order.
    counts
        X of harmonized.h5ad for these cells, in memory or on disk.
    carried
        File → place → names of all that lies there.
    embeddings
        Gene vectors, genes × dimensions.
    genes
        Columns of `counts` that hold the genes of `screen`: those that every cell was measured in.
    """

    split: dict
    pairs: ad.AnnData
    expression: sparse.csr_matrix | CsrRows
    screen: ad.AnnData
    counts: sparse.csr_matrix | CsrRows
    carried: dict[str, dict[str, set[str]]]
    embeddings: pd.DataFrame
    genes: np.ndarray

    @classmethod
    def of(cls, split: dict, pairs: ad.AnnData, screen: ad.AnnData, embeddings: pd.DataFrame) -> "Evidence":
        """Return what is in memory; `screen` may hold further cells."""
        screen = screen[pairs.obs_names]
        files = {"harmonized.h5ad": screen, "pairs.h5ad": pairs}
        carried = {name: {place: {*getattr(file, place)} for place in TABLES} for name, file in files.items()}
        genes, counts = measured_by_all(screen.varm, screen.n_vars), sparse.csr_matrix(screen.X)
        return cls(
            split, pairs, sparse.csr_matrix(pairs.X), screen[:, genes], counts, carried, embeddings, genes
        )  # fmt: skip

    @classmethod
    def open(cls, split: dict, pairs: Path, harmonized: Path, embeddings: pd.DataFrame) -> "Evidence":
        """Open files; expression and counts stay on disk."""
        of_pairs, of_screen = h5py.File(pairs), h5py.File(harmonized)
        obs, var, uns = (ad.io.read_elem(of_pairs[place]) for place in ("obs", "var", "uns"))
        index = ad.io.read_elem(of_pairs["obsm/control_index"])
        covariate = {split["spec"].get("covariate", "batch")} & {*of_screen["obs"]}
        cells = read_columns(of_screen["obs"], [*dict.fromkeys((*CARRIED_OBS, *covariate))])
        rows = cells.index.get_indexer(obs.index)
        if (rows < 0).any():
            raise InputError(f"{pairs} has {(rows < 0).sum():,} cells that {harmonized} lacks. Run `pair` again.")
        var_of_screen, of_source = (ad.io.read_elem(of_screen[place]) for place in ("var", "uns"))
        genes = measured_by_all(of_screen["varm"], len(var_of_screen))
        files = {"harmonized.h5ad": of_screen, "pairs.h5ad": of_pairs}
        carried = {name: {place: _names(file[place]) for place in TABLES} for name, file in files.items()}
        return cls(
            split,
            ad.AnnData(obs=obs, var=var, uns=uns, obsm={"control_index": index}),
            CsrRows(of_pairs["X"], Path(pairs)),
            ad.AnnData(obs=cells.iloc[rows], var=var_of_screen.iloc[genes], uns=of_source),
            CsrRows(of_screen["X"], Path(harmonized)).select(rows),
            carried,
            embeddings,
            genes,
        )

    @property
    def holds_out_perturbations(self) -> bool:
        """Whether the split holds out perturbations, and not contexts or cells."""
        return self.split["spec"]["kind"] in LABEL_KINDS

    @cached_property
    def read(self) -> "Counted":
        """What one pass over counts and expression tells."""
        columns = self.screen.var_names.get_indexer(self.pairs.var_names)
        found = Counted(len(self.is_train), self.screen.n_vars)
        for rows in progressed([*row_blocks(len(self.is_train))], "blocks of cells"):
            counts = self.counts_of(rows)
            found.add(rows, counts, self.is_train[rows])
            scale = np.divide(
                self.target_sum, found.totals[rows], out=np.zeros(counts.shape[0]), where=found.totals[rows] > 0
            )
            expected = sparse.csr_matrix(sparse.diags(scale) @ counts[:, columns]).log1p()
            found.worst = max(found.worst, abs(expected - self.expression[rows]).max())
        return found

    @property
    def target_sum(self) -> float:
        """Sum of a cell's counts after normalization, as pairs.h5ad has it."""
        return float(self.pairs.uns["perturbflow"]["target_sum"])

    def counts_of(self, rows: slice | np.ndarray) -> sparse.csr_matrix:
        """Return the counts of cells, all genes ascending and none 0: equal cells have equal arrays."""
        counts = self.counts[rows]
        counts = counts.copy() if len(self.genes) == counts.shape[1] else counts[:, self.genes]
        counts.eliminate_zeros()
        counts.sort_indices()
        return counts

    @cached_property
    def is_train(self) -> np.ndarray:
        """Mask of training cells."""
        return (self.pairs.obs["role"] == "train").to_numpy()

    @property
    def holdouts(self) -> Iterator[tuple[list[str], list[str]]]:
        """Scored perturbations, and those that the scored model learns from: once for validation, once for test."""
        of_role = self.split["perturbations"]
        for role, known in KNOWN.items():
            yield of_role[role], [label for other in known for label in of_role[other]]

    def gene_of(self, member: str) -> str:
        """Return the measured gene that a member is a guide or another form of, at the member's dose.

        Any other member comes back as it is.
        """
        name, dose = without_dose(member)
        gene = gene_within(name, self.screen.var_names.__contains__)
        return at_dose(gene, dose) if gene else member


def _names(group: h5py.Group) -> set[str]:
    return {*group} - {group.attrs.get("_index")}


class Counted:
    """What one pass over the counts finds.

    Attributes
    ----------
    totals
        Counts per cell over all genes of the screen, (cells,).
    digests
        Of all counts of every cell, 64 bits each, (cells,).
    sums, squares
        Of the training cells' counts ÷ totals, and of their squares, (genes,).
    worst
        Largest difference of X from counts that are normalized anew.
    """

    def __init__(self, n_cells: int, n_genes: int) -> None:
        self.totals = np.zeros(n_cells)
        self.digests = np.zeros(n_cells, np.uint64)
        self._moments = np.zeros((2, 1, n_genes))
        self.worst = 0.0

    @property
    def sums(self) -> np.ndarray:
        """Sums over training cells, (genes,)."""
        return self._moments[0, 0]

    @property
    def squares(self) -> np.ndarray:
        """Sums of squares over training cells, (genes,)."""
        return self._moments[1, 0]

    def add(self, rows: slice, counts: sparse.csr_matrix, is_train: np.ndarray) -> None:
        """Take in the counts of the next cells."""
        totals = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
        self.totals[rows] = totals
        self.digests[rows] = digests_of(counts)
        trained = counts[is_train]
        fractions = trained.data / np.repeat(totals[is_train], np.diff(trained.indptr))
        add_moments(fractions, trained.indices, trained.indptr, np.zeros(trained.shape[0], np.int64), *self._moments)


def roles_are_disjoint(evidence: Evidence) -> Findings:
    """No cell has two roles.

    Where perturbations are held out, no perturbation has two either, whatever the order of its members.
    """
    split, found = evidence.split, []
    for i, first in enumerate(ROLES):
        for second in ROLES[i + 1 :]:
            sets = [
                {SEPARATOR.join(sorted(members_of(label))) for label in split["perturbations"][role]}
                for role in (first, second)
            ]
            if evidence.holds_out_perturbations and (shared := sorted(sets[0] & sets[1])):
                found.append(f"perturbations in both {first} and {second}: {', '.join(shared[:5])}")
            named = split.get("cells") or {first: [], second: []}  # else each row has one number
            if shared := sorted(set(named[first]) & set(named[second])):
                found.append(f"{len(shared)} cells in both {first} and {second}, for example {shared[0]}")
    return found


def labels_are_canonical(evidence: Evidence) -> Findings:
    """Members of every label are sorted, so that A+B and B+A are one perturbation."""
    labels = evidence.pairs.obs["perturbation"].unique()
    wrong = [label for label in labels if label != CONTROL and members_of(label) != sorted(set(members_of(label)))]
    return [f"labels with unsorted or repeated members: {', '.join(wrong[:5])}"] if wrong else []


def roles_of_cells_agree(evidence: Evidence) -> Findings:
    """Every cell has the role that the split gives it, and that its perturbation may have."""
    split, obs, found = evidence.split, evidence.pairs.obs, []
    roles = obs["role"].astype(str)
    for role in ROLES:
        allowed = {*split["perturbations"][role], CONTROL}
        strangers = sorted(set(obs.loc[roles == role, "perturbation"].astype(str)) - allowed)
        if strangers:
            found.append(
                f"cells of {', '.join(strangers[:5])} have the role {role}, which the split does not give them"
            )
        if names_digest(obs.index[roles == role].tolist()) != split["sha256"][role]["cells"]:
            found.append(f"the cells with the role {role} are not those of the split")
    return found


def held_out_genes_are_unseen(evidence: Evidence) -> Findings:
    """In unseen_perturbation, no model learns from a gene or compound of a held-out single, at any dose."""
    if evidence.split["spec"]["kind"] != "unseen_perturbation":
        return []
    leaked = set()
    for held_out, trained in evidence.holdouts:
        seen = {name for label in trained for name in entities_of(label)}
        leaked |= {label for label in held_out if len(members_of(label)) == 1 and entity_of(label) in seen}
    return (
        [f"held-out genes or compounds that training holds, alone or in a combination: {', '.join(sorted(leaked)[:5])}"]
        if leaked
        else []
    )


def held_out_combinations_are_unseen(evidence: Evidence) -> Findings:
    """In unseen_combination, models learn from no held-out combination at other doses."""
    if evidence.split["spec"]["kind"] != "unseen_combination":
        return []
    leaked = []
    for held_out, trained in evidence.holdouts:
        seen = {tuple(entities_of(label)): label for label in trained if len(members_of(label)) > 1}
        leaked += [f"{label} and {seen[pair]}" for label in held_out if (pair := tuple(entities_of(label))) in seen]
    return (
        [f"combinations, one held out and one in training, that differ by dose alone: {', '.join(leaked[:5])}"]
        if leaked
        else []
    )


def held_out_doses_lie_among_others(evidence: Evidence) -> Findings:
    """In unseen_dose, models learn from another dose of every held-out single.

    They do not learn from the held-out dose in any combination.
    """
    if evidence.split["spec"]["kind"] != "unseen_dose":
        return []
    leaked, unknown = set(), set()
    for held_out, trained in evidence.holdouts:
        seen = {member for label in trained for member in members_of(label)}
        alone = {entity_of(label) for label in trained if len(members_of(label)) == 1}
        singles = [label for label in held_out if len(members_of(label)) == 1]
        leaked |= set(singles) & seen
        unknown |= {label for label in singles if entity_of(label) not in alone}
    found = []
    if leaked:
        found.append(f"held-out doses that training holds in a combination: {', '.join(sorted(leaked)[:5])}")
    if unknown:
        found.append(f"held-out doses of compounds that training holds no dose of: {', '.join(sorted(unknown)[:5])}")
    return found


def members_seen_are_told(evidence: Evidence) -> Findings:
    """The split states how many genes or compounds of every held-out perturbation models saw alone, at any dose."""
    if not evidence.holds_out_perturbations:
        return []
    expected, stated = members_seen(evidence.split["perturbations"]), evidence.split["members_seen"]
    wrong = sorted(label for label, n in expected.items() if stated.get(label) != n)
    return (
        [
            "members_seen is wrong for "
            f"{', '.join(f'{label} ({stated.get(label)} for {expected[label]})' for label in wrong[:5])}"
        ]
        if wrong
        else []
    )


def guides_of_a_gene_stay_together(evidence: Evidence) -> Findings:
    """A gene's guides are no perturbations of their own: none is held out while models learn from another."""
    if not evidence.holds_out_perturbations:
        return []

    def perturbed(label: str) -> str:
        return SEPARATOR.join(sorted({evidence.gene_of(member) for member in members_of(label)}))

    shared = []
    for held_out, learned in evidence.holdouts:
        trained = {perturbed(label): label for label in learned}
        shared += [
            f"{label} and {trained[perturbed(label)]}"
            for label in held_out
            if trained.get(perturbed(label), label) != label
        ]
        # Alone or in a combination, a gene is seen or it is not.
        if evidence.split["spec"]["kind"] == "unseen_perturbation":
            names = {name for label in learned for name in entities_of(label)}
            guide = {evidence.gene_of(name): name for name in names}
            unseen = [(label, name) for label in held_out for name in entities_of(label) if name not in names]
            shared += [
                f"{label} and {guide[gene]}" for label, name in unseen if (gene := evidence.gene_of(name)) in guide
            ]
    return (
        [
            f"guides of one gene, one held out and one in training: {', '.join(dict.fromkeys(shared[:5]))}; label "
            "cells by gene"
        ]
        if shared
        else []
    )


def held_out_contexts_are_unseen(evidence: Evidence) -> Findings:
    """In unseen_context, training and validation hold no cell of a held-out context, and test no other.

    This includes controls. Where a part of it trains (support_fraction, support), test alone is bound to it.
    """
    spec = evidence.split["spec"]
    if spec["kind"] != "unseen_context":
        return []
    covariate, held_out = spec["covariate"], evidence.split["contexts"]["test"]
    is_test = (evidence.pairs.obs["role"] == "test").to_numpy()
    is_inside = evidence.screen.obs[covariate].astype(str).isin(held_out).to_numpy()
    wrong = is_test & ~is_inside if "support_fraction" in spec or "support" in spec else is_inside != is_test
    if spec.get("support_fraction") == 0:
        wrong |= is_inside & ~is_test & ~evidence.pairs.obs["is_control"].to_numpy(bool)
    return (
        [f"{wrong.sum()} cells are on the wrong side of the held-out {covariate} {', '.join(held_out)}"]
        if wrong.any()
        else []
    )


def _perturbed_places(evidence: Evidence) -> pd.DataFrame:
    """Return perturbation, context and role of the perturbed cells, each combination once."""
    covariate = evidence.split["spec"]["covariate"]
    table = evidence.pairs.obs[["perturbation", "role"]].astype(str)
    table["context"] = evidence.screen.obs[covariate].astype(str).to_numpy()
    return table[table["perturbation"] != CONTROL].drop_duplicates()


def _places(table: pd.DataFrame) -> set[tuple[str, str]]:
    return set(zip(table["perturbation"], table["context"], strict=True))


def held_out_places_are_unseen(evidence: Evidence) -> Findings:
    """No perturbation that is tested in a context trains in it.

    In unseen_perturbation_in_context, no perturbation with one of its members does either, at any dose.
    """
    kind = evidence.split["spec"]["kind"]
    if kind not in CONTEXT_KINDS:
        return []
    table = _perturbed_places(evidence)
    is_test = table["role"] == "test"
    if kind == "unseen_perturbation_in_context":
        # A partner that trains is no leak: a combination is held out with its held-out member.
        alone = table[is_test & (table["perturbation"].map(members_of).map(len) == 1)]
        tested = _places(alone.assign(perturbation=alone["perturbation"].map(entity_of)))
        others = table[~is_test]
        learned = _places(others.assign(perturbation=others["perturbation"].map(entities_of)).explode("perturbation"))
    else:
        tested, learned = _places(table[is_test]), _places(table[~is_test])
    leaked = sorted(f"{label} in {context}" for label, context in tested & learned)
    return [f"perturbations that are tested in a context and train in it: {', '.join(leaked[:5])}"] if leaked else []


def sources_are_told(evidence: Evidence) -> Findings:
    """The split states of every tested perturbation how many contexts have it among the cells of training."""
    if evidence.split["spec"]["kind"] not in CONTEXT_KINDS:
        return []
    table = _perturbed_places(evidence)
    expected = n_sources(table["perturbation"], table["context"], table["role"])
    stated = evidence.split["n_sources"]
    wrong = sorted(label for label, n in expected.items() if stated.get(label) != n)
    told = ", ".join(f"{label} ({stated.get(label)} for {expected[label]})" for label in wrong[:5])
    return [f"n_sources is wrong for {told}"] if wrong else []
