"""The data that training reads of one split, and the checks of its roles: nothing held out has a cell in training."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import anndata as ad
import numpy as np
import pandas as pd
from scipy import sparse

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
from perturbflow.splits.divisions import KNOWN, ROLES, members_seen
from perturbflow.splits.split import LABEL_KINDS, names_digest

Findings = list[str]


@dataclass(frozen=True)
class Evidence:
    """The data that training reads of one split, and their sources.

    Attributes
    ----------
    split
        Content of split.json.
    pairs
        pairs.h5ad.
    screen
        harmonized.h5ad: the cells of `pairs`, in the same order.
    embeddings
        Gene vectors, genes × dimensions.
    """

    split: dict
    pairs: ad.AnnData
    screen: ad.AnnData
    embeddings: pd.DataFrame

    @property
    def holds_out_perturbations(self) -> bool:
        """Whether the split holds out perturbations, and not contexts or cells."""
        return self.split["spec"]["kind"] in LABEL_KINDS

    @cached_property
    def counts(self) -> sparse.csr_matrix:
        """Counts of all genes of the screen, cells × genes."""
        counts = sparse.csr_matrix(self.screen.X)
        counts.eliminate_zeros()
        counts.sort_indices()
        return counts

    @cached_property
    def totals(self) -> np.ndarray:
        """Counts per cell over all genes of the screen, (cells,)."""
        return np.asarray(self.counts.sum(axis=1)).ravel()

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
            if shared := sorted(set(split["cells"][first]) & set(split["cells"][second])):
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

    This includes controls.
    """
    if evidence.split["spec"]["kind"] != "unseen_context":
        return []
    covariate, held_out = evidence.split["spec"]["covariate"], evidence.split["contexts"]["test"]
    is_test = (evidence.pairs.obs["role"] == "test").to_numpy()
    wrong = evidence.screen.obs[covariate].astype(str).isin(held_out).to_numpy() != is_test
    return (
        [f"{wrong.sum()} cells are on the wrong side of the held-out {covariate} {', '.join(held_out)}"]
        if wrong.any()
        else []
    )
