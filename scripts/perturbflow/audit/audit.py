"""Look for anything of held-out cells in the training data; a leak fails the run and is named."""

import hashlib
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

from perturbflow.audit.caveats import caveats_of, matched_across_batches
from perturbflow.audit.evidence import (
    Evidence,
    Findings,
    guides_of_a_gene_stay_together,
    held_out_combinations_are_unseen,
    held_out_contexts_are_unseen,
    held_out_doses_lie_among_others,
    held_out_genes_are_unseen,
    held_out_places_are_unseen,
    labels_are_canonical,
    members_seen_are_told,
    roles_are_disjoint,
    roles_of_cells_agree,
    sources_are_told,
)
from perturbflow.controls import match_controls
from perturbflow.embeddings import Embeddings, coexpression
from perturbflow.errors import InputError
from perturbflow.genes.symbols import members_of
from perturbflow.genes.variable import highly_variable
from perturbflow.io.files import file_digest, read_json, write_json
from perturbflow.pairs import CARRIED_OBS, CONTROLS_PER_CELL, Pairs
from perturbflow.progress import progressed
from perturbflow.screens.copies import improbability_of, least_improbability
from perturbflow.splits.split import names_digest

logger = logging.getLogger(__name__)

PLACES = {"uns": {"perturbflow"}, "obsm": set(), "varm": set(), "obsp": set(), "varp": set(), "layers": set()}
PLACES_OF_PAIRS = {
    **PLACES,
    "obsm": {"control_index"},
    "layers": {"counts"},
    "obs": {*CARRIED_OBS, "role", "half"},
    "var": {"gene_name", "gene_id", "original_name", "highly_variable", "is_perturbed_gene"},
}

# --- cells ---------------------------------------------------------------------------------------------------------


def no_cell_twice(evidence: Evidence) -> Findings:
    """No held-out cell has the counts of a training cell in every gene.

    Such cells are one experiment under two names, or copies. Shallow cells, of which the screen is expected to hold
    chance copies, are passed over (`perturbflow.screens.copies`).
    """
    digests, is_train = evidence.read.digests, evidence.is_train
    trained, held_out = np.flatnonzero(is_train), np.flatnonzero(~is_train)
    trained = trained[np.argsort(digests[trained], kind="stable")]
    twin = trained[np.searchsorted(digests[trained], digests[held_out], side="right") - 1]  # -1 is the last one
    is_twin = digests[twin] == digests[held_out]
    least = least_improbability(len(trained), len(held_out))
    copies = [pair for pair in zip(held_out[is_twin], twin[is_twin], strict=True) if _are_equal(evidence, *pair, least)]
    if not copies:
        return []
    obs = evidence.screen.obs

    def place(i: int) -> str:
        return f"{obs.index[i]} ({obs['perturbation'].iloc[i]}, {obs['dataset'].iloc[i]}, {obs['batch'].iloc[i]})"

    return [
        f"{len(copies)} held-out cells have the counts of a training cell in every gene, for example "
        f"{place(copies[0][0])} and {place(copies[0][1])}; keep one of the copies through subset in the "
        "dataset's block"
    ]


def _are_equal(evidence: Evidence, one: int, other: int, least: float) -> bool:
    """Return whether two cells have all counts in common, and no chance copy is as deep."""
    first, second = (evidence.counts_of(np.array([cell])) for cell in (one, other))
    is_equal = np.array_equal(first.indices, second.indices) and np.array_equal(first.data, second.data)
    return bool(is_equal and improbability_of(first)[0] > least)


# --- controls -------------------------------------------------------------------------------------------------------


def controls_are_of_the_role(evidence: Evidence) -> Findings:
    """Matched controls are controls, and of the cell's own role and cell type."""
    obs = evidence.pairs.obs
    is_control = obs["is_control"].to_numpy(bool)
    perturbed = np.flatnonzero(~is_control)
    matched = np.asarray(evidence.pairs.obsm["control_index"])[perturbed]
    found = []
    if (matched < 0).any():
        return ["perturbed cells without a matched control"]
    if not is_control[matched].all():
        found.append("matched controls that are perturbed cells")
    for column in ("role", "cell_type"):
        codes = obs[column].astype("category").cat.codes.to_numpy()
        n_wrong = int((codes[matched] != codes[perturbed][:, None]).any(axis=1).sum())
        if n_wrong:
            found.append(f"{n_wrong} cells are matched with controls of another {column}")
    return found


def controls_are_matched_by_seed(evidence: Evidence) -> Findings:
    """The matching is the one of the split's seed.

    So a pairing can be made again, and none was chosen by its outcome.
    """
    try:
        expected, _ = match_controls(evidence.pairs.obs, CONTROLS_PER_CELL, evidence.split["spec"]["seed"])
    except InputError as error:
        return [str(error)]
    differs = (np.asarray(evidence.pairs.obsm["control_index"]) != expected).any(axis=1)
    return (
        [f"{differs.sum()} cells are matched with other controls than the split's seed gives"] if differs.any() else []
    )


# --- fitted values -----------------------------------------------------------------------------------------------


def nothing_else_is_carried(evidence: Evidence) -> Findings:
    """The files hold what this workflow computes, and no result of the source.

    Such results are DE lists, coordinates and columns derived from outcomes. harmonized.h5ad keeps the source's obs; of
    these, only `CARRIED_OBS` reach the models.
    """
    found = []
    # Guides and antibodies of the same cells, which pairs.h5ad does not carry.
    apart = set(evidence.screen.uns.get("perturbflow", {}).get("features_apart", {}))
    of_screen = {**PLACES, "obsm": apart, "varm": {"measured"}}
    known = {"harmonized.h5ad": of_screen, "pairs.h5ad": PLACES_OF_PAIRS}
    for name, places in known.items():
        for place, names in places.items():
            if unknown := sorted(evidence.carried[name][place] - names):
                found.append(f"{name} carries {place} {', '.join(unknown[:5])}, which this workflow does not make")
    return found


def cells_are_those_of_the_screen(evidence: Evidence) -> Findings:
    """Labels and covariates are those of harmonized.h5ad, cell by cell."""
    pairs, screen = evidence.pairs.obs, evidence.screen.obs
    columns = [column for column in CARRIED_OBS if _differ(pairs[column], screen[column])]
    return [f"pairs.h5ad and harmonized.h5ad differ in obs {', '.join(columns)}"] if columns else []


def _differ(one: pd.Series, other: pd.Series) -> bool:
    """Return whether two columns of the same cells differ."""
    if one.dtype == other.dtype and one.dtype != object:
        return not one.equals(other)
    return bool((one.astype(str).to_numpy() != other.astype(str).to_numpy()).any())


def normalization_is_of_training(evidence: Evidence) -> Findings:
    """The normalization target is the median of training cells' totals, over all genes of the screen."""
    expected = float(np.median(evidence.read.totals[evidence.is_train]))
    found = evidence.target_sum
    return (
        []
        if np.isclose(found, expected, rtol=1e-5)
        else [f"target sum {found:g} is not the training cells' median {expected:g}"]
    )


def expression_is_normalized(evidence: Evidence) -> Findings:
    """X is log1p of the screen's counts scaled to the recorded target sum, cell by cell."""
    worst = evidence.read.worst
    return [] if worst < 1e-3 else [f"X is not the counts normalized to the target sum: it differs by up to {worst:g}"]


def genes_are_of_training(evidence: Evidence) -> Findings:
    """The highly variable genes are those that training cells alone select."""
    pairs, screen = evidence.pairs, evidence.screen
    if pairs.n_vars == screen.n_vars and pairs.var["highly_variable"].all():
        return []
    n_hvg = int(pairs.uns["perturbflow"]["n_hvg"])
    read = evidence.read
    target_sum = float(np.median(read.totals[evidence.is_train]))
    chosen = highly_variable(target_sum * read.sums, target_sum**2 * read.squares, int(evidence.is_train.sum()), n_hvg)
    expected = set(screen.var_names[chosen])
    found = set(pairs.var_names[pairs.var["highly_variable"]])
    return (
        []
        if found == expected
        else [f"{len(found - expected)} of {n_hvg} highly variable genes are not those of the training cells"]
    )


def embeddings_are_of_training(evidence: Evidence) -> Findings:
    """The co-expression part of the embeddings is that of training cells alone."""
    table = evidence.embeddings.filter(like="coexpression:")
    if table.empty:
        return []
    pairs = evidence.pairs
    cells = Pairs(
        evidence.expression,
        pairs.obs,
        list(pairs.var_names),
        pairs.obsm["control_index"],
        np.arange(pairs.n_obs),
    )
    expected = coexpression(cells, table.index.tolist())
    if not np.allclose(table, expected[table.columns], atol=1e-3, equal_nan=True):
        return ["co-expression embeddings differ from those of the training cells alone"]
    return []


CHECKS: tuple[Callable[[Evidence], Findings], ...] = (
    roles_are_disjoint,
    labels_are_canonical,
    roles_of_cells_agree,
    held_out_genes_are_unseen,
    held_out_combinations_are_unseen,
    held_out_doses_lie_among_others,
    members_seen_are_told,
    guides_of_a_gene_stay_together,
    held_out_contexts_are_unseen,
    held_out_places_are_unseen,
    sources_are_told,
    no_cell_twice,
    controls_are_of_the_role,
    controls_are_matched_by_seed,
    nothing_else_is_carried,
    cells_are_those_of_the_screen,
    normalization_is_of_training,
    expression_is_normalized,
    genes_are_of_training,
    embeddings_are_of_training,
)


# --- the step -------------------------------------------------------------------------------------------------------


def fitted_digests(evidence: Evidence) -> dict[str, str]:
    """Return the SHA-256 of the training cells and of each thing fitted on them.

    They are equal where two runs learned from the same.
    """
    pairs = evidence.pairs
    table = evidence.embeddings.filter(like="coexpression:")
    vectors = [names_digest(list(table.index)).encode(), np.ascontiguousarray(table.to_numpy("<f4")).tobytes()]
    return {
        "training_cells": names_digest(pairs.obs_names[evidence.is_train].tolist()),
        "target_sum": hashlib.sha256(repr(float(pairs.uns["perturbflow"]["target_sum"])).encode()).hexdigest(),
        "highly_variable_genes": names_digest(pairs.var_names[pairs.var["highly_variable"]].tolist()),
        "coexpression": hashlib.sha256(b"".join(vectors)).hexdigest(),
    }


def passed(evidence: Evidence, place: str) -> dict[str, str]:
    """Return every check by name, with "passed".

    Parameters
    ----------
    evidence
        Everything that training reads.
    place
        Where the pairs are, for the message.

    Raises
    ------
    InputError
        If anything leaked: one line for every finding.
    """
    results = {check.__name__: check(evidence) for check in progressed(CHECKS, "checks")}
    leaks = [f"{name}: {finding}" for name, findings in results.items() for finding in findings]
    if leaks:
        raise InputError(f"Leak in {place}: training would see its test data.\n" + "\n".join(leaks))
    logger.info("%d checks, no leak", len(results))
    return dict.fromkeys(results, "passed")


def audit(harmonized: Path, split: Path, pairs: Path, embeddings: Path, audit: Path) -> None:
    """Check one split for leaks and write the results of the checks.

    Parameters
    ----------
    harmonized, split, pairs, embeddings
        The screen, the roles, the pairs and the gene vectors of one split.
    audit
        JSON to be written. It has every check by name, and the SHA-256 of every file that training reads, of training
        cells, and of each thing fitted on them. It has the perturbed genes that each source of vectors has no row for,
        and those that none has. It has the cells that are compared with controls of other batches, and the caveats of
        every verdict.

    Raises
    ------
    InputError
        If anything leaked; nothing is written then.
    """
    roles = read_json(split)
    vectors = Embeddings.read(embeddings)
    evidence = Evidence.open(roles, pairs, harmonized, vectors.table)
    cells = evidence.pairs
    checks = passed(evidence, str(pairs.parent))
    perturbed = {member for label in cells.obs["perturbation"].unique() for member in members_of(label)}
    of_perturbed = Embeddings(vectors.table[vectors.table.index.isin(perturbed)])
    matched = matched_across_batches(cells.obs, np.asarray(cells.obsm["control_index"]))
    caveats = caveats_of(cells.obs, matched, vectors.knows)
    for caveat in caveats:
        logger.warning("%s", caveat)
    write_json(
        audit,
        {
            "checks": checks,
            "sha256": {path.name: file_digest(path) for path in (split, pairs, embeddings)},
            "split_sha256": roles["sha256"],
            "fitted_sha256": fitted_digests(evidence),
            "without_row": of_perturbed.without_row(),
            "without_vector": of_perturbed.without_vector,
            "matched_across_batches": matched,
            "caveats": caveats,
        },
    )
