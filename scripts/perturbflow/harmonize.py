"""Bring any screen to one schema: raw counts, canonical labels, approved symbols, and an account of what was dropped."""

import logging
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import scanpy as sc
from scipy import sparse

from perturbflow import __version__
from perturbflow.annotation import (
    ambiguous,
    canonical_labels,
    check_shape,
    contradicting,
    gene_table,
    in_subset,
    is_excluded,
    is_wanted,
    schema_obs,
)
from perturbflow.errors import InputError
from perturbflow.files import atomic, file_digest, manifest_files, write_json
from perturbflow.recipes import RECIPES
from perturbflow.sources import NotCounts, SomeGenes, Source, open_source
from perturbflow.symbols import CONTROL, members_of

logger = logging.getLogger(__name__)


def read_source(raw: Path, dataset: dict) -> Source:
    """Open the screen as it came: the user's h5ad, or what the manifest of a download names."""
    files = manifest_files(raw) if raw.name == "manifest.json" else {"file": raw}
    return RECIPES[dataset["recipe"]](files, dataset) if "recipe" in dataset else open_source(files, dataset)


def raw_counts(source: Source, rows: np.ndarray) -> sparse.csr_matrix:
    """Return raw UMI counts of the wanted rows, cells × genes: X if it holds them, else layers['counts'].

    Raises
    ------
    InputError
        If neither holds non-negative integers.
    """
    problems = []
    candidate: Source | None = source
    while candidate is not None:
        try:
            counts = sparse.vstack([block for _, block in candidate.blocks(rows)], format="csr")
        except NotCounts as problem:
            problems.append(f"{candidate.place}: {problem}")
            candidate = candidate.alternative
        else:
            if problems:
                logger.info("%s: counts are taken from %s (%s)", source.files[0], candidate.place, problems[0])
            return counts
    raise InputError(
        f"{source.files[0]}: raw UMI counts are needed, {'; '.join(problems)}. "
        "Put the integer counts into X or layers['counts']; normalization is done later, on training cells."
    )


def _merge_duplicates(counts: sparse.csr_matrix, genes: pd.DataFrame) -> tuple[sparse.csr_matrix, pd.DataFrame, int]:
    """Sum the counts of rows of one symbol, so that the gene index is unique."""
    codes, unique = pd.factorize(genes["gene_name"])
    n_merged = len(genes) - len(unique)
    if n_merged:
        indicator = sparse.csr_matrix((np.ones(len(codes), np.float32), (np.arange(len(codes)), codes)))
        counts = sparse.csr_matrix(counts @ indicator)
        joined = genes.groupby(codes)["original_name"].agg("; ".join)
        genes = genes.drop_duplicates("gene_name").reset_index(drop=True)
        genes["original_name"] = joined.to_numpy()
    return counts, genes, n_merged


# --- quality control ------------------------------------------------------------------------------------------------


def _explain_empty(name: str, limit: float, values: np.ndarray, path: Path) -> InputError:
    middle = np.median(values) if len(values) else float("nan")
    return InputError(
        f"{path}: qc.{name} = {limit} leaves no cell (median of the file: {middle:g}). "
        f"Set a limit that suits this screen, or null, under qc in its block."
    )


def _quality_control(adata: ad.AnnData, qc: dict, organism: str, path: Path, dropped: Counter) -> ad.AnnData:
    adata.var["mt"] = adata.var_names.str.startswith("mt-" if organism == "mouse" else "MT-")
    sc.pp.calculate_qc_metrics(adata, qc_vars=["mt"], percent_top=None, log1p=False, inplace=True)
    adata.obs["pct_counts_mt"] = adata.obs["pct_counts_mt"].fillna(0.0)
    for name, column, is_lower_limit in (
        ("min_counts", "total_counts", True),
        ("min_genes", "n_genes_by_counts", True),
        ("max_pct_mt", "pct_counts_mt", False),
    ):
        if qc[name] is None:
            continue
        values = adata.obs[column].to_numpy()
        keep = values >= qc[name] if is_lower_limit else values <= qc[name]
        if not keep.any():
            raise _explain_empty(name, qc[name], values, path)
        dropped[f"qc.{name}"] = int((~keep).sum())
        adata = adata[keep].copy()
    if not adata.obs["is_control"].any():
        raise InputError(f"{path}: quality control leaves no control cells. Lower the limits under qc in the dataset's block.")
    return adata


# --- the step -------------------------------------------------------------------------------------------------------


def harmonize(raw: Path, harmonized: Path, report: Path, name: str, dataset: dict, qc: dict) -> None:
    """Bring one screen to the schema of harmonized.h5ad and write an account of everything dropped or renamed.

    Parameters
    ----------
    raw
        The user's h5ad, or the manifest of a download.
    harmonized
        AnnData to be written: X raw UMI counts (CSR float32, integer-valued), obs and var as in config/README.md.
    report
        JSON to be written: cells, genes and perturbations kept, dropped and renamed, by reason.
    name, dataset, qc
        The dataset's name, its block and its limits of quality control.

    Raises
    ------
    InputError
        For a file, column, label or value that cannot be used; the message has the fix.
    """
    source = read_source(raw, dataset)
    path = source.files[0]
    n_source = len(source.obs), len(source.var)
    logger.info("%s: %s cells × %s genes", path, f"{n_source[0]:,}", f"{n_source[1]:,}")
    if note := dataset.get("note"):
        logger.warning("%s: %s", name, note)
    check_shape(n_source, dataset, path)
    genes = gene_table(source.var, dataset)
    dropped, dropped_genes = Counter(), Counter()
    if "gene_pattern" in dataset:
        wanted = np.flatnonzero(is_wanted(genes, dataset["gene_pattern"], path))
        dropped_genes["gene_pattern"] = len(genes) - len(wanted)
        source, genes = SomeGenes(source, wanted), genes.iloc[wanted].reset_index(drop=True)
    rows = np.flatnonzero(in_subset(source.obs, dataset["subset"], path))
    if dataset["subset"]:
        dropped["subset"] = n_source[0] - len(rows)
    if "exclude" in dataset:
        excluded = is_excluded(source.obs.iloc[rows], dataset["exclude"], path)
        dropped["exclude"] = int(excluded.sum())
        rows = rows[~excluded]
    labels = canonical_labels(source.obs.iloc[rows], dataset, genes, path)
    assigned = labels.notna().to_numpy()
    dropped["unassigned"] = int((~assigned).sum())
    rows, labels = rows[assigned], labels[assigned]
    source_obs = source.obs.iloc[rows]
    pairs = pd.DataFrame({"before": source_obs[dataset["perturbation"]["column"]].to_numpy(), "after": labels.to_numpy()}).drop_duplicates()
    renamed_labels = {
        str(before): str(after) for before, after in pairs.itertuples(index=False) if str(before) != after and after != CONTROL
    }

    counts = raw_counts(source, rows)
    renamed_genes = dict(genes.loc[genes["gene_name"] != genes["original_name"], ["original_name", "gene_name"]].to_numpy())
    counts, genes, n_merged = _merge_duplicates(counts, genes)

    obs = schema_obs(source_obs, labels, name, dataset, path)
    var = genes.set_index(pd.Index(genes["gene_name"].to_numpy()))
    clean = ad.AnnData(X=counts, obs=obs, var=var)
    if not clean.obs_names.is_unique:
        clean.obs_names_make_unique()

    clean = _quality_control(clean, qc, dataset["organism"], path, dropped)
    if qc["min_cells_per_gene"] is not None:
        seen = clean.X.getnnz(axis=0) >= qc["min_cells_per_gene"]
        if not seen.any():
            raise InputError(f"{path}: qc.min_cells_per_gene = {qc['min_cells_per_gene']} leaves no gene; lower it in the dataset's block.")
        dropped_genes["qc.min_cells_per_gene"] = int((~seen).sum())
        clean = clean[:, seen].copy()
        # The totals in obs are those of the genes that are kept.
        sc.pp.calculate_qc_metrics(clean, qc_vars=["mt"], percent_top=None, log1p=False, inplace=True)
        clean.obs["pct_counts_mt"] = clean.obs["pct_counts_mt"].fillna(0.0)
    n_cells = clean.obs["perturbation"].value_counts()
    n_cells = n_cells[n_cells > 0]
    limit = qc["min_cells_per_perturbation"] or 0
    too_few = {label: int(n) for label, n in n_cells.items() if n < limit and label != CONTROL}
    if n_cells[CONTROL] < max(limit, 3):
        raise InputError(
            f"{path}: only {n_cells[CONTROL]} control cells are left; at least {max(limit, 3)} are needed to measure an effect."
        )
    if too_few:
        logger.warning("%d perturbations have fewer than %d cells and are left out: %s", len(too_few), limit, too_few)
        keep = ~clean.obs["perturbation"].isin(list(too_few)).to_numpy()
        dropped["qc.min_cells_per_perturbation"] = int((~keep).sum())
        clean = clean[keep].copy()
    kept = {label: int(n) for label, n in n_cells.items() if label not in too_few}
    if len(kept) < 2:
        raise InputError(
            f"{path}: no perturbation has {limit} cells or more (most: {n_cells.drop(CONTROL).max() if len(n_cells) > 1 else 0}). "
            "Lower qc.min_cells_per_perturbation in the dataset's block."
        )

    for column in clean.obs.select_dtypes("category"):
        clean.obs[column] = clean.obs[column].cat.remove_unused_categories()
    clean.var = clean.var[["gene_name", "gene_id", "original_name"]]
    is_human = dataset["organism"] == "human"
    perturbed = {gene for label in kept for gene in members_of(label)} if dataset["perturbation_type"] != "drug" else set()
    contradictions = contradicting(clean.var) if is_human else {}
    if len(contradictions) > 0.05 * clean.n_vars:
        logger.warning("%s: names and Ensembl ids of %d genes contradict one another; are they shifted?", path, len(contradictions))
    account = {
        "dataset": name,
        "note": note or "",
        "organism": dataset["organism"],
        "source": {"file": str(path), "bytes": path.stat().st_size, "sha256": file_digest(path)},
        "cells": {"source": n_source[0], "kept": clean.n_obs, "dropped": dict(dropped)},
        "genes": {"source": n_source[1], "kept": clean.n_vars, "dropped": dict(dropped_genes), "merged": n_merged,
                  "renamed": renamed_genes, "contradicting": contradictions},
        "perturbations": {"kept": kept, "dropped": too_few, "renamed": renamed_labels,
                          "not_measured": sorted(perturbed - set(clean.var_names))},
        "ambiguous": ambiguous(sorted({*perturbed, *clean.var_names})) if is_human else {},
        "qc": qc,
        "versions": {"perturbflow": __version__, "anndata": version("anndata"), "scanpy": version("scanpy")},
    }  # fmt: skip
    clean.uns = {
        "perturbflow": {
            "source": str(path),
            "sha256": account["source"]["sha256"],
            "versions": account["versions"],
            "dropped_cells": {reason.replace("/", "_"): n for reason, n in dropped.items()},
            "dropped_genes": dict(dropped_genes),
        }
    }
    for reason, n in dropped.items():
        logger.info("dropped %s cells: %s", f"{n:,}", reason)
    logger.info("kept %s cells × %s genes, %d perturbations", f"{clean.n_obs:,}", f"{clean.n_vars:,}", len(kept) - 1)
    with atomic(harmonized) as partial:
        clean.write_h5ad(partial, compression="gzip")
    write_json(report, account)
