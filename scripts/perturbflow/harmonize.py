"""Bring any screen to one schema: raw counts, canonical labels, approved symbols, and an account of what was dropped."""

import logging
import re
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import scanpy as sc
from scipy import sparse

from perturbflow import __version__
from perturbflow.errors import InputError
from perturbflow.files import atomic, file_digest, read_json, write_json
from perturbflow.recipes import RECIPES
from perturbflow.symbols import CONTROL, SEPARATOR, approved_symbol, canonical_label, members_of

logger = logging.getLogger(__name__)

UNKNOWN = "unknown"
ENSEMBL_COLUMNS = ("gene_id", "ensembl_id", "ensemble_id", "ensembl_gene_id", "gene_ids")
SYMBOL_COLUMNS = ("gene_name", "gene_symbol", "symbol", "feature_name", "gene_short_name")
ENSEMBL_ID = re.compile(r"^ENS[A-Z]*G\d{11}(\.\d+)?$")
SCHEMA_OBS = (
    "perturbation", "is_control", "n_perturbations", "perturbation_type", "cell_type", "batch", "dataset",
    "total_counts", "n_genes_by_counts", "pct_counts_mt",
)  # fmt: skip


# --- reading --------------------------------------------------------------------------------------------------------


def _read_h5ad(path: Path) -> ad.AnnData:
    if not h5py.is_hdf5(path):
        start = path.open("rb").read(64)
        shown = "an HTML page" if start.lstrip().lower().startswith((b"<!doctype", b"<html")) else f"it starts with {start[:8]!r}"
        raise InputError(f"{path} is not an h5ad file ({shown}). Save the screen with anndata's write_h5ad.")
    try:
        return ad.read_h5ad(path)
    except Exception as error:
        raise InputError(f"{path} is an HDF5 file that anndata cannot read ({type(error).__name__}: {error}). Is it complete?") from error


def read_source(raw: Path, dataset: dict) -> tuple[ad.AnnData, Path]:
    """Return the screen as it came, and the file it came from.

    `raw` is the user's h5ad, or the manifest that `download` wrote beside the file.
    """
    path = raw
    if raw.name == "manifest.json":
        manifest = read_json(raw)
        path = raw.parent / manifest["file"]
        if not path.exists() or path.stat().st_size != manifest["bytes"]:
            raise InputError(f"{path} is missing or not the {manifest['bytes']:,} bytes that were downloaded. Delete {raw} and run again.")
    if "recipe" in dataset:
        return RECIPES[dataset["recipe"]](path, dataset["source"].get("member", "")), path
    return _read_h5ad(path), path


def _problem_with_counts(X: sparse.csr_matrix) -> str | None:
    values = X.data
    if not np.isfinite(values).all():
        return "it holds NaN or infinite values"
    if values.size and values.min() < 0:
        return f"it holds negative values (the lowest is {values.min():g})"
    fractional = np.abs(values - np.rint(values)) > 1e-4
    if fractional.any():
        return f"it holds values that are no integers (for example {values[fractional][0]:g})"
    return None


def raw_counts(adata: ad.AnnData, path: Path) -> sparse.csr_matrix:
    """Return raw UMI counts, cells × genes: X if it holds them, else layers['counts'].

    Raises
    ------
    InputError
        If neither holds non-negative integers.
    """
    problems = []
    for place, matrix in (("X", adata.X), ("layers['counts']", adata.layers.get("counts"))):
        if matrix is None:
            continue
        counts = sparse.csr_matrix(matrix)
        counts.eliminate_zeros()
        problem = _problem_with_counts(counts)
        if problem is None:
            if problems:
                logger.info("%s: counts are taken from %s (X: %s)", path, place, problems[0])
            counts.data = np.rint(counts.data).astype(np.float32)
            return counts.astype(np.float32)
        problems.append(f"{place}: {problem}")
    raise InputError(
        f"{path}: raw UMI counts are needed, {'; '.join(problems)}. "
        "Put the integer counts into X or layers['counts']; normalization is done later, on training cells."
    )


# --- labels and genes -----------------------------------------------------------------------------------------------


def _column(obs: pd.DataFrame, column: str, key: str, path: Path) -> pd.Series:
    if column not in obs:
        raise InputError(f"{path}: obs has no column '{column}' ({key}). Its columns: {', '.join(map(str, obs.columns)) or '(none)'}.")
    return obs[column]


def _labels(obs: pd.DataFrame, dataset: dict, path: Path) -> pd.Series:
    """Return canonical labels; missing where the cell has no assigned perturbation."""
    declared = dataset["perturbation"]
    source = _column(obs, declared["column"], "perturbation.column", path)
    text = source.astype(object).where(source.notna(), None).map(lambda value: None if value is None else str(value))
    unassigned = set(declared["drop"])

    def is_assigned(label: str) -> bool:
        # A combination with an unassigned member ("A+nan") is no single perturbation either.
        members = label.split(declared["separator"]) if declared["separator"] else [label]
        return label not in unassigned and not unassigned & {member for member in members if member}

    unique = [label for label in text.unique() if label is not None and is_assigned(label)]
    renamed = {label: canonical_label(label, declared["control"], declared["separator"], dataset["organism"]) for label in unique}
    for label, canonical in renamed.items():
        if SEPARATOR in label and declared["separator"] != SEPARATOR and canonical != CONTROL:
            raise InputError(
                f"{path}: the label '{label}' holds '{SEPARATOR}', which joins the members of a combination here, but "
                f"perturbation.separator is {declared['separator']!r}. Set it to '{SEPARATOR}', or rename the label in the file."
            )
    labels = text.map({label: canonical for label, canonical in renamed.items() if canonical})
    if not (labels == CONTROL).any():
        common = ", ".join(f"'{label}' ({n:,})" for label, n in Counter(text.dropna()).most_common(8))
        raise InputError(
            f"{path}: no control cells: none of perturbation.control = {declared['control']} is in obs['{declared['column']}']. "
            f"Its most common labels: {common}. Name the control label in perturbation.control."
        )
    return labels


def _genes(var: pd.DataFrame, organism: str) -> pd.DataFrame:
    """Return gene_name (approved symbol), gene_id (Ensembl id or empty) and original_name per source gene."""
    names = pd.Series(var.index.astype(str), index=var.index)
    ids = next((var[column].astype(object).where(var[column].notna(), "").astype(str) for column in ENSEMBL_COLUMNS if column in var), None)
    if names.str.match(ENSEMBL_ID).mean() > 0.5:
        ids = names
        symbols = next((var[column] for column in SYMBOL_COLUMNS if column in var), None)
        if symbols is not None:
            usable = symbols.notna() & (symbols.astype(str).str.len() > 0)
            names = symbols.astype(object).where(usable, names).astype(str)
    if ids is None:
        ids = pd.Series("", index=var.index)
    ids = ids.where(ids.str.match(ENSEMBL_ID), "").str.replace(r"\.\d+$", "", regex=True)
    approved = names.map(lambda name: approved_symbol(name, organism))
    # A previous symbol whose successor is measured too would merge two genes: it is left as it is.
    taken = set(names)
    approved = approved.where(~((approved != names) & approved.isin(taken)), names)
    return pd.DataFrame({"gene_name": approved.to_numpy(), "gene_id": ids.to_numpy(), "original_name": names.to_numpy()})


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
    adata, path = read_source(raw, dataset)
    logger.info("%s: %s cells × %s genes", path, f"{adata.n_obs:,}", f"{adata.n_vars:,}")
    dropped: Counter = Counter()
    n_source = adata.shape
    for column, values in dataset["subset"].items():
        keep = _column(adata.obs, column, "subset", path).astype(str).isin(list(map(str, values))).to_numpy()
        if not keep.any():
            found = ", ".join(map(str, adata.obs[column].astype(str).unique()[:8]))
            raise InputError(f"{path}: subset {column} = {values} keeps no cell. obs['{column}'] holds: {found}.")
        dropped["subset"] += int((~keep).sum())
        adata = adata[keep].copy()

    labels = _labels(adata.obs, dataset, path)
    assigned = labels.notna().to_numpy()
    dropped["unassigned"] = int((~assigned).sum())
    adata, labels = adata[assigned].copy(), labels[assigned]
    source_labels = adata.obs[dataset["perturbation"]["column"]].astype(str)
    renamed_labels = {
        str(before): after for before, after in zip(source_labels, labels, strict=True) if before != after and after != CONTROL
    }

    counts = raw_counts(adata, path)
    genes = _genes(adata.var, dataset["organism"])
    renamed_genes = dict(genes.loc[genes["gene_name"] != genes["original_name"], ["original_name", "gene_name"]].to_numpy())
    counts, genes, n_merged = _merge_duplicates(counts, genes)

    obs = pd.DataFrame(index=adata.obs_names.astype(str))
    obs["perturbation"] = pd.Categorical(labels.to_numpy())
    obs["is_control"] = (labels == CONTROL).to_numpy()
    obs["n_perturbations"] = labels.map(lambda label: len(members_of(label))).to_numpy(np.int64)
    obs["perturbation_type"] = pd.Categorical([dataset["perturbation_type"]] * len(obs))
    for covariate, undeclared in (("cell_type", UNKNOWN), ("batch", UNKNOWN), ("dataset", name)):
        column = dataset["covariates"].get(covariate)
        if column is None:
            values = pd.Series(undeclared, index=adata.obs_names)
        else:
            values = _column(adata.obs, column, f"covariates.{covariate}", path).astype(object)
            values = values.where(values.notna(), UNKNOWN).astype(str)
        obs[covariate] = pd.Categorical(values.to_numpy())
    if "dataset" in dataset["covariates"]:
        # Lane 1 of one screen and lane 1 of another are two batches.
        obs["batch"] = pd.Categorical(obs["dataset"].astype(str) + ":" + obs["batch"].astype(str))
    for column in adata.obs:
        values = adata.obs[column]
        kept_as = str(column)
        while kept_as in SCHEMA_OBS or (kept_as != column and kept_as in adata.obs):
            kept_as = f"source_{kept_as}"
        obs[kept_as] = pd.Categorical(values.astype(str)) if values.dtype == object else values.to_numpy()
    var = genes.set_index(pd.Index(genes["gene_name"].to_numpy()))
    clean = ad.AnnData(X=counts, obs=obs, var=var)
    if not clean.obs_names.is_unique:
        clean.obs_names_make_unique()

    clean = _quality_control(clean, qc, dataset["organism"], path, dropped)
    dropped_genes: Counter = Counter()
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
    account = {
        "dataset": name,
        "organism": dataset["organism"],
        "source": {"file": str(path), "bytes": path.stat().st_size, "sha256": file_digest(path)},
        "cells": {"source": n_source[0], "kept": clean.n_obs, "dropped": dict(dropped)},
        "genes": {"source": n_source[1], "kept": clean.n_vars, "dropped": dict(dropped_genes), "merged": n_merged,
                  "renamed": renamed_genes},
        "perturbations": {"kept": kept, "dropped": too_few, "renamed": renamed_labels,
                          "not_measured": sorted({gene for label in kept for gene in members_of(label)} - set(clean.var_names))},
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
