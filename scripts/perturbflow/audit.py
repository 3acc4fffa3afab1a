"""Look for anything of held-out cells in what a model is trained on. A leak fails the run and is named."""

import logging
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from scipy import sparse

from perturbflow.embeddings import Embeddings, coexpression
from perturbflow.errors import InputError
from perturbflow.files import file_digest, read_json, write_json
from perturbflow.pairs import Pairs
from perturbflow.splits import ROLES, names_digest
from perturbflow.symbols import CONTROL, SEPARATOR, members_of

logger = logging.getLogger(__name__)

Findings = list[str]


def roles_are_disjoint(split: dict, adata: ad.AnnData) -> Findings:
    """No perturbation and no cell has two roles, whatever the order of a combination's members."""
    found = []
    for i, first in enumerate(ROLES):
        for second in ROLES[i + 1 :]:
            sets = [{SEPARATOR.join(sorted(members_of(label))) for label in split["perturbations"][role]} for role in (first, second)]
            if shared := sorted(sets[0] & sets[1]):
                found.append(f"perturbations in both {first} and {second}: {', '.join(shared[:5])}")
            if shared := sorted(set(split["cells"][first]) & set(split["cells"][second])):
                found.append(f"{len(shared)} cells in both {first} and {second}, for example {shared[0]}")
    return found


def labels_are_canonical(split: dict, adata: ad.AnnData) -> Findings:
    """Members of every label are sorted, so that A+B and B+A cannot part ways."""
    wrong = [
        label for label in adata.obs["perturbation"].unique() if label != CONTROL and members_of(label) != sorted(set(members_of(label)))
    ]
    return [f"labels with unsorted or repeated members: {', '.join(wrong[:5])}"] if wrong else []


def roles_of_cells_agree(split: dict, adata: ad.AnnData) -> Findings:
    """Every cell has the role that the split gives its perturbation, and controls have all three."""
    found = []
    roles = adata.obs["role"].astype(str)
    for role in ROLES:
        allowed = {*split["perturbations"][role], CONTROL}
        strangers = sorted(set(adata.obs.loc[roles == role, "perturbation"].astype(str)) - allowed)
        if strangers:
            found.append(f"cells of {', '.join(strangers[:5])} have the role {role}, which the split does not give them")
        if names_digest(adata.obs_names[roles == role].tolist()) != split["sha256"][role]["cells"]:
            found.append(f"the cells with the role {role} are not those of the split")
    return found


def controls_are_of_the_role(split: dict, adata: ad.AnnData) -> Findings:
    """Matched controls are controls, and of the cell's own role and cell type."""
    index = np.asarray(adata.obsm["control_index"])
    perturbed = np.flatnonzero(~adata.obs["is_control"].to_numpy(bool))
    matched = index[perturbed]
    found = []
    if (matched < 0).any():
        return ["perturbed cells without a matched control"]
    if not adata.obs["is_control"].to_numpy(bool)[matched].all():
        found.append("matched controls that are perturbed cells")
    for column in ("role", "cell_type"):
        codes = adata.obs[column].astype("category").cat.codes.to_numpy()
        n_wrong = int((codes[matched] != codes[perturbed][:, None]).any(axis=1).sum())
        if n_wrong:
            found.append(f"{n_wrong} cells are matched with controls of another {column}")
    return found


def held_out_genes_are_unseen(split: dict, adata: ad.AnnData) -> Findings:
    """In unseen_perturbation, no gene of a held-out single occurs in any training perturbation."""
    if split["spec"]["kind"] != "unseen_perturbation":
        return []
    seen = {gene for label in split["perturbations"]["train"] for gene in members_of(label)}
    singles = [label for role in ("validation", "test") for label in split["perturbations"][role] if len(members_of(label)) == 1]
    leaked = sorted(set(singles) & seen)
    return [f"held-out genes that training holds, alone or in a combination: {', '.join(leaked[:5])}"] if leaked else []


def normalization_is_of_training(split: dict, adata: ad.AnnData) -> Findings:
    """The normalization target is the median of training cells' totals, over all genes of the screen."""
    training = adata.obs[(adata.obs["role"] == "train").to_numpy()]
    expected = float(training["total_counts_all_genes"].median())
    found = float(adata.uns["perturbflow"]["target_sum"])
    return [] if np.isclose(found, expected, rtol=1e-5) else [f"target sum {found:g} is not the training cells' median {expected:g}"]


def expression_is_normalized(split: dict, adata: ad.AnnData) -> Findings:
    """X is log1p of the counts scaled to the recorded target sum, cell by cell."""
    totals = adata.obs["total_counts_all_genes"].to_numpy(float)
    scale = np.divide(float(adata.uns["perturbflow"]["target_sum"]), totals, out=np.zeros_like(totals), where=totals > 0)
    expected = sparse.csr_matrix(sparse.diags(scale) @ sparse.csr_matrix(adata.layers["counts"])).log1p()
    worst = abs(expected - sparse.csr_matrix(adata.X)).max() if adata.n_obs else 0.0
    return [] if worst < 1e-3 else [f"X is not the counts normalized to the target sum: it differs by up to {worst:g}"]


def genes_are_of_training(split: dict, adata: ad.AnnData) -> Findings:
    """The highly variable genes are those that training cells alone select."""
    n_hvg = int(adata.uns["perturbflow"]["n_hvg"])
    if adata.uns["all_genes_are_variable"]:
        return []
    training = adata.uns["normalized_training"]
    sc.pp.highly_variable_genes(training, n_top_genes=n_hvg, flavor="seurat")
    expected = set(training.var_names[training.var["highly_variable"]])
    found = set(adata.var_names[adata.var["highly_variable"]])
    return [] if found == expected else [f"{len(found - expected)} of {n_hvg} highly variable genes are not those of the training cells"]


CHECKS: tuple[Callable[[dict, ad.AnnData], Findings], ...] = (
    roles_are_disjoint,
    labels_are_canonical,
    roles_of_cells_agree,
    controls_are_of_the_role,
    held_out_genes_are_unseen,
    normalization_is_of_training,
    expression_is_normalized,
    genes_are_of_training,
)


def _embedding_leaks(table: pd.DataFrame, cells: Pairs) -> Findings:
    """The co-expression part of the embeddings is what training cells alone give."""
    columns = [column for column in table if column.startswith("coexpression:")]
    if not columns:
        return []
    expected = coexpression(cells, table.index.tolist())
    if not np.allclose(table[columns], expected[columns], atol=1e-3, equal_nan=True):
        return ["co-expression embeddings differ from those of the training cells alone"]
    return []


def audit(harmonized: Path, split: Path, pairs: Path, embeddings: Path, audit: Path) -> None:
    """Check one split for leaks and write what was checked.

    Parameters
    ----------
    harmonized, split, pairs, embeddings
        The screen, the roles, the pairs and the gene vectors of one split.
    audit
        JSON to be written: every check by name, and the SHA-256 of every file that training reads.

    Raises
    ------
    InputError
        If anything leaked; nothing is written then.
    """
    roles = read_json(split)
    adata = ad.read_h5ad(pairs)
    screen = ad.read_h5ad(harmonized)
    screen = screen[adata.obs_names]
    totals = np.asarray(screen.X.sum(axis=1)).ravel()
    adata.obs["total_counts_all_genes"] = totals
    adata.uns["all_genes_are_variable"] = bool(adata.var["highly_variable"].all()) and adata.n_vars == screen.n_vars
    if not adata.uns["all_genes_are_variable"]:
        training = screen[(adata.obs["role"] == "train").to_numpy()].copy()
        sc.pp.normalize_total(training, target_sum=float(np.median(totals[(adata.obs["role"] == "train").to_numpy()])))
        sc.pp.log1p(training)
        adata.uns["normalized_training"] = training
    results = {check.__name__: check(roles, adata) for check in CHECKS}
    results["embeddings_are_of_training"] = _embedding_leaks(Embeddings.read(embeddings).table, Pairs.read(pairs))
    leaks = [f"{name}: {finding}" for name, findings in results.items() for finding in findings]
    if leaks:
        raise InputError(f"Leak in {pairs.parent}: training would see what it is tested on.\n" + "\n".join(leaks))
    logger.info("%d checks, no leak", len(results))
    write_json(
        audit,
        {
            "checks": dict.fromkeys(results, "passed"),
            "sha256": {path.name: file_digest(path) for path in (split, pairs, embeddings)},
            "split_sha256": roles["sha256"],
        },
    )
