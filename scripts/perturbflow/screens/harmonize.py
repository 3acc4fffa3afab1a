"""Bring any screen to one schema: raw counts, canonical labels, approved symbols, and an account of what was dropped."""

import logging
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd

from perturbflow import __version__
from perturbflow.errors import InputError
from perturbflow.genes.symbols import CONTROL, SEPARATOR, entities_of
from perturbflow.io.files import (
    atomic,
    bytes_of,
    content_sha256,
    manifest_files,
    read_json,
    remove_leftovers,
    write_json,
)
from perturbflow.registry.origins import labels_file
from perturbflow.screens.annotation import (
    ambiguous,
    as_text,
    canonical_labels,
    check_controls,
    check_shape,
    contradicting,
    doubtful_labels,
    gene_table,
    in_subset,
    is_control_label,
    is_excluded,
    is_wanted,
    schema_obs,
)
from perturbflow.screens.counts import (
    Genes,
    Screened,
    doubtful_counts,
    limits_on,
    screen_counts,
    within_limits,
    write_counts,
)
from perturbflow.screens.efficacy import DIRECTIONS, OwnGenes
from perturbflow.screens.features import SHOWN, doubtful_features, features_apart, keys_of, write_features
from perturbflow.screens.naming import ENSEMBL_WORDS, NO_NAMES, SYMBOL_WORDS, columns_of
from perturbflow.screens.organism import genomes, mitochondrial, other_organism, some_with_genome, why_no_mitochondrial
from perturbflow.screens.readers import SomeGenes, Source, open_source
from perturbflow.screens.recipes import open_by_recipe
from perturbflow.screens.unassigned import warning as warning_of_no_genes

logger = logging.getLogger(__name__)

SHARED = 0.1
"""Share of the genes from which on one name for them is none: of Ensembl's 60,000 genes 1 % are called Y_RNA."""


def _merged_genes(genes: pd.DataFrame, organism: str) -> tuple[Genes, pd.DataFrame]:
    """Return how genes of one symbol become one, and the table of unique genes."""
    codes, unique = pd.factorize(genes["gene_name"])
    joined = genes.groupby(codes)["original_name"].agg("; ".join)
    is_mt = np.bincount(codes, mitochondrial(genes, organism), len(unique)) > 0
    genes = genes.drop_duplicates("gene_name").set_index(pd.Index(unique)).drop(columns="source_name")
    genes["original_name"] = joined.to_numpy()
    return Genes(codes, is_mt), genes


def _rare_perturbations(
    perturbation: pd.Series, limit: int, path: Path, lost: dict[bool, str]
) -> tuple[dict[str, int], dict[str, int]]:
    """Return the cells per perturbation of those that have enough, control included, and of those that have too few.

    Parameters
    ----------
    lost
        Which limits drop controls (True) and which perturbed cells (False), for messages.

    Raises
    ------
    InputError
        If the controls or all perturbations are too few.
    """
    n_cells = perturbation.value_counts()
    n_cells = {label: int(n) for label, n in n_cells[n_cells > 0].items()}
    n_controls = n_cells.get(CONTROL, 0)
    if n_controls < max(limit, 3):
        left = f"only {n_controls} control cells are left" if n_controls else "quality control leaves no control cells"
        remedy = f" Of the controls, {lost[True]}, under qc in the dataset's block." if lost[True] else ""
        if n_controls >= 3 or limit > 3:
            remedy += f" The least number is qc.min_cells_per_perturbation = {limit}{'; lower it' if n_controls >= 3 else ''}."
        remedy = remedy or " Declare all labels of controls in perturbation.control, or bring a file with more of them."
        raise InputError(f"{path}: {left}; at least {max(limit, 3)} are needed to measure an effect.{remedy}")
    too_few = {label: n for label, n in n_cells.items() if n < limit and label != CONTROL}
    kept = {label: n for label, n in n_cells.items() if label not in too_few}
    if len(kept) < 2:
        remedy = f" Of the perturbed cells, {lost[False]}, under qc in the dataset's block." if lost[False] else ""
        if too_few:
            remedy += f" {'Or lower' if remedy else 'Lower'} qc.min_cells_per_perturbation in the dataset's block."
        remedy = (
            remedy
            or " All cells with a label are controls: is perturbation.column the right one, and drop not too wide?"
        )
        raise InputError(
            f"{path}: no perturbation has {f'{limit} cells or more' if limit > 1 else 'a cell'} (most: {max(too_few.values(), default=0)}).{remedy}"
        )
    if too_few:
        shown = ", ".join(f"{label} ({n})" for label, n in list(too_few.items())[:8])
        logger.warning("%d perturbations have fewer than %d cells and are left out: %s ...", len(too_few), limit, shown)
    return kept, too_few


def _provenance(raw: Path, files: dict[str, Path]) -> dict:
    """Return file, bytes and sha256 of the source, a file or a folder; of several files by their role.

    Raises
    ------
    InputError
        If a file is not what was downloaded: it was changed since.
    """
    downloaded = read_json(raw)["files"] if raw.name == "manifest.json" else {}
    described = {
        role: {"file": str(path), "bytes": bytes_of(path), "sha256": content_sha256(path)}
        for role, path in files.items()
    }
    for role, entry in downloaded.items():
        if described[role]["sha256"] != entry["sha256"]:
            raise InputError(
                f"{files[role]} was changed after its download: its sha256 is another. Delete {raw} and run again."
            )
    return described["file"] if list(described) == ["file"] else described


def _some(names: Iterable[str]) -> str:
    """Return the first names, for a message."""
    shown = list(names)
    return ", ".join(shown[:SHOWN]) + (", ..." if len(shown) > SHOWN else "")


def _rows_of(table: pd.DataFrame, rows: np.ndarray) -> pd.DataFrame:
    """Return some rows of a table; the table itself where these are all, for two million cells of obs are half a gigabyte."""
    return table if len(rows) == len(table) else table.iloc[rows]


def _split_by_type(source: Source, dataset: dict) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the numbers of the features that are gene expression, and those of the others by type."""
    declared = dataset["perturbation"]
    labels = as_text(source.obs[declared["column"]]).categories if declared["column"] in source.obs else []
    named = {
        part
        for label in labels
        for part in (label, *(label.split(declared["separator"]) if declared["separator"] else ()))
    }
    apart = features_apart(source.var, named, source.files[0])
    genes = np.setdiff1d(np.arange(len(source.var)), np.concatenate([np.empty(0, int), *apart.values()]))
    return genes, apart


def _chosen_genes(
    source: Source, dataset: dict, dropped: Counter, warnings: list[str]
) -> tuple[np.ndarray, pd.DataFrame, dict]:
    """Return the numbers of the wanted genes of the declared organism, their table, and features of other types; count what is no such gene.

    Raises
    ------
    InputError
        If the genes evidently are those of another organism.
    """
    path, organism = source.files[0], dataset["organism"]
    wanted, apart = _split_by_type(source, dataset)
    dropped.update({kind: len(numbers) for kind, numbers in apart.items()})
    var = source.var.iloc[wanted]
    of_genome, prefixes = genomes(var, columns_of(var, (*ENSEMBL_WORDS, *SYMBOL_WORDS)))
    if problem := some_with_genome(var.index):
        warnings.append(problem)
    if prefixes:
        is_own = np.isin(of_genome, (organism, ""))
        if not (of_genome == organism).any():
            raise InputError(
                f"{path}: gene names hold {' and '.join(prefixes)}, and organism is {organism}. Set the organism in the dataset's block."
            )
        warnings.append(f"gene names hold {' and '.join(prefixes)}, which is left out of them.")
        if not is_own.all():
            dropped["other_genome"] = int((~is_own).sum())
            warnings[-1] += (
                f" {dropped['other_genome']:,} genes of the other genome are dropped; organism is {organism}."
            )
            wanted = wanted[is_own]
    genes = gene_table(source.var.iloc[wanted], dataset)
    warnings += genes.attrs.pop("told")
    if "gene_pattern" in dataset:
        is_of_pattern = is_wanted(genes, dataset["gene_pattern"], path)
        dropped["gene_pattern"] = int((~is_of_pattern).sum())
        wanted, genes = wanted[is_of_pattern], genes[is_of_pattern].reset_index(drop=True)
    warnings += doubtful_features(source.var.iloc[wanted], genes)
    nameless = np.flatnonzero(genes["original_name"].isin(NO_NAMES))
    if len(nameless):
        raise InputError(
            f"{path}: {len(nameless):,} of {len(genes):,} genes have no name (the first is number {wanted[nameless[0]] + 1:,} of its genes). "
            "Give each a name of its own in var_names, or in features.tsv; or keep the others by gene_pattern: '.'."
        )
    shared = genes["original_name"].value_counts()
    if len(genes) and shared.iloc[0] >= max(SHARED * len(genes), 10):
        raise InputError(
            f"{path}: {shared.iloc[0]:,} of {len(genes):,} genes are called '{shared.index[0]}'. Put the name of each gene into var_names, or into the "
            "second column of features.tsv; or leave these out by gene_pattern."
        )
    if reason := other_organism(genes, organism):
        raise InputError(f"{path}: organism is {organism}, but {reason}")
    return wanted, genes, apart


def _own_genes(
    screened: Screened, dataset: dict, qc: dict, path: Path, warnings: list[str]
) -> tuple[np.ndarray, dict[str, int], dict]:
    """Return which of the cells within the limits changed enough in their own genes, how many did not, and the account of it.

    Raises
    ------
    InputError
        If a limit cannot be met.
    """
    direction = DIRECTIONS.get(dataset["perturbation_type"], "")
    limits = {name: qc.get(name) for name in ("min_efficacy", "min_cell_efficacy")}
    for name, limit in limits.items():
        if limit is not None and direction == "down" and limit > 1:
            raise InputError(
                f"{path}: qc.{name} = {limit}: a knock-down takes at most all of it, 1. Lower it in the dataset's block."
            )
        if limit is not None and not direction:
            warnings.append(f"qc.{name} drops nothing: where {dataset['perturbation_type']} takes a gene is not known.")
        elif limit is not None and not screened.own.own.pairs:
            warnings.append(f"qc.{name} drops nothing: no perturbed gene is among the measured ones.")
    found = screened.own.efficacy(direction)
    passes, dropped = screened.own.passes(found, direction, *(limits.values() if direction else (None, None)))
    told: dict[str, dict] = {}
    for row in found.to_dict("records"):
        numbers = {name: float(f"{row[name]:.4g}") for name in ("expected", "ratio", "low", "high")}
        told.setdefault(row["label"], {})[row["member"]] = {"cells": row["cells"], **numbers, "is_told": row["is_told"]}
    return passes, dropped, {"direction": direction, "perturbations": told}


def _chosen_cells(
    source: Source, genes: pd.DataFrame, name: str, dataset: dict, dropped: Counter, warnings: list[str]
) -> tuple[np.ndarray, pd.DataFrame, dict[str, dict]]:
    """Return the rows of cells with an assigned perturbation, their obs, and what is to be told of labels; count the others by reason."""
    path = source.files[0]
    is_control = is_control_label(source.obs, dataset, path)
    rows = np.flatnonzero(in_subset(source.obs, dataset["subset"], path))
    check_controls(is_control, is_control[rows], "subset", path)
    if dataset["subset"]:
        dropped["subset"] = len(source.obs) - len(rows)
    source_obs = _rows_of(source.obs, rows)
    if "exclude" in dataset:
        excluded = is_excluded(source_obs, dataset["exclude"], path)
        dropped["exclude"] = int(excluded.sum())
        check_controls(is_control, is_control[rows[~excluded]], "exclude", path)
        rows, source_obs = rows[~excluded], _rows_of(source_obs, np.flatnonzero(~excluded))
    doubtful = doubtful_labels(source_obs, dataset, genes, path, warnings)
    labels = canonical_labels(source_obs, dataset, genes, path)
    dose_unit = labels.attrs["dose_unit"]
    assigned = np.flatnonzero(labels.notna())
    dropped["unassigned"] = len(labels) - len(assigned)
    rows, labels, source_obs = rows[assigned], labels.iloc[assigned], _rows_of(source_obs, assigned)
    pairs = pd.DataFrame(
        {"before": source_obs[dataset["perturbation"]["column"]].array, "after": labels.array}
    ).drop_duplicates()
    # The dose of a column is no part of a label's name.
    named = (lambda label: SEPARATOR.join(entities_of(label))) if "dose" in dataset["perturbation"] else str
    renamed_labels = {
        str(before): named(after)
        for before, after in pairs.itertuples(index=False)
        if after != CONTROL and str(before) != named(after)
    }
    obs = schema_obs(source_obs, labels, name, dataset, path)
    if not obs.index.is_unique:
        obs.index = ad.utils.make_index_unique(obs.index)
    of_labels = {
        "renamed": renamed_labels,
        "controls_declared": dataset["perturbation"].get("control", []),
        **doubtful,
        "dose_unit": dose_unit,
    }
    return rows, obs, of_labels


@dataclass(frozen=True)
class Kept:
    """The cells and perturbations that quality control keeps.

    Attributes
    ----------
    is_within
        Per cell that was read, whether it is within the limits on cells.
    is_kept
        Per cell within these, whether it is kept.
    perturbations, left_out
        Label → cells, of those that are kept, control included, and of those that are left out with all their cells.
    efficacy
        How perturbed genes changed in their own cells.
    """

    is_within: np.ndarray
    is_kept: np.ndarray
    perturbations: dict[str, int]
    left_out: dict[str, int]
    efficacy: dict[str, Any]

    @property
    def rows(self) -> np.ndarray:
        """Numbers of the kept cells among those that were read."""
        return np.flatnonzero(self.is_within)[self.is_kept]


def _kept_cells(
    screened: Screened, obs: pd.DataFrame, dataset: dict, qc: dict, path: Path, dropped: Counter, warnings: list[str]
) -> Kept:
    """Return which cells are within all limits and of a perturbation that has enough of them; count the others by reason.

    Raises
    ------
    InputError
        If a limit leaves too few cells, controls or perturbations.
    """
    is_within, dropped_by_limit = within_limits(screened, qc, path)
    dropped.update(dropped_by_limit)
    is_effective, dropped_by_efficacy, efficacy = _own_genes(screened, dataset, qc, path, warnings)
    dropped.update(dropped_by_efficacy)
    perturbation = obs["perturbation"][is_within]
    is_control = obs["is_control"].to_numpy()
    lost = {which: limits_on(is_control == which, screened, qc) for which in (True, False)}
    weak = [
        f"{limit} = {qc[limit.removeprefix('qc.')]} drops {n:,}; lower it"
        for limit, n in dropped_by_efficacy.items()
        if n
    ]
    lost[False] = ". ".join(filter(None, [lost[False], *weak]))
    kept, too_few = _rare_perturbations(perturbation[is_effective], qc["min_cells_per_perturbation"] or 0, path, lost)
    is_rare = perturbation.isin(list(too_few)).to_numpy()
    if too_few:
        dropped["qc.min_cells_per_perturbation"] = int((is_effective & is_rare).sum())
    ineffective = perturbation[~is_effective & ~perturbation.isin(list(kept))].value_counts()
    left_out = {**{label: int(n) for label, n in ineffective.items() if n}, **too_few}
    return Kept(is_within, is_effective & ~is_rare, kept, left_out, efficacy)


def _write_tables(file: h5py.File, obs: pd.DataFrame, totals: pd.DataFrame, var: pd.DataFrame, uns: dict) -> None:
    """Write what stands beside X in harmonized.h5ad; obs gets the totals as columns."""
    for column in totals:
        obs[column] = totals[column].to_numpy()
    for column in obs.select_dtypes("category"):
        obs[column] = obs[column].cat.remove_unused_categories()
    file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    for place in ("obsm", "varm", "obsp", "varp", "layers"):
        ad.io.write_elem(file, place, {})
    for place, content in (("obs", obs), ("var", var), ("uns", uns)):
        ad.io.write_elem(file, place, content, dataset_kwargs={"compression": "gzip"})


def harmonize(raw: Path, harmonized: Path, report: Path, name: str, dataset: dict, qc: dict, threads: int = 1) -> None:
    """Bring one screen to the schema of harmonized.h5ad and write an account of everything dropped or renamed.

    The counts are read once, in blocks of cells. Which genes and perturbations are too rare is known only at the end; until then the
    counts of the cells within the limits lie beside the output in a file without a name (somewhat more than a byte per nonzero value).

    Parameters
    ----------
    raw
        The user's file or folder, or the manifest of a download.
    harmonized
        AnnData to be written: X raw UMI counts (CSR float32, integer-valued), obs and var as in config/README.md; obsm holds the counts of
        features that are no gene expression, one matrix per type.
    report
        JSON to be written: cells, genes and perturbations kept, dropped and renamed, by reason; how perturbed genes changed (`efficacy`);
        and what a reader should know (`warnings`).
    name, dataset, qc
        The dataset's name, its block and its limits of quality control.
    threads
        Threads that decode and encode beside the one that counts.

    Raises
    ------
    InputError
        For a file, column, label or value that cannot be used; the message has the fix.
    """
    files = manifest_files(raw) if raw.name == "manifest.json" else {"file": raw}
    if labels := labels_file(dataset):
        files["labels"] = Path(labels)
    source = open_by_recipe(dataset["recipe"], files, dataset) if "recipe" in dataset else open_source(files, dataset)
    path = source.files[0]
    n_source = len(source.obs), len(source.var)
    logger.info("%s: %s cells × %s genes", path, f"{n_source[0]:,}", f"{n_source[1]:,}")

    if note := dataset.get("note"):
        logger.warning("%s: %s", name, note)
    check_shape(n_source, dataset, path)
    dropped: Counter[str] = Counter()
    dropped_genes: Counter[str] = Counter()
    warnings: list[str] = []
    wanted, source_genes, apart = _chosen_genes(source, dataset, dropped_genes, warnings)
    names_apart = {kind: source.var.index[numbers].astype(str).to_numpy(object) for kind, numbers in apart.items()}
    if len(wanted) < len(source.var):
        source = SomeGenes(source, wanted, apart)
    harmonized.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(harmonized)
    source.threads, source.scratch = threads, harmonized.parent
    rows, obs, of_labels = _chosen_cells(source, source_genes, name, dataset, dropped, warnings)
    if of_labels["no_gene"]:
        warnings.append(warning_of_no_genes(of_labels["no_gene"]))
    source.obs = source.obs[[]]  # its columns are in obs now
    renamed_genes = dict(
        source_genes.loc[
            source_genes["gene_name"] != source_genes["original_name"], ["original_name", "gene_name"]
        ].to_numpy()
    )
    genes, var = _merged_genes(source_genes, dataset["organism"])
    if qc["max_pct_mt"] is not None and not genes.is_mt.any():
        warnings.append(f"qc.max_pct_mt = {qc['max_pct_mt']} drops nothing: {why_no_mitochondrial(source_genes)}.")
    is_drug = dataset["perturbation_type"] == "drug"

    with ThreadPoolExecutor(1) as beside:
        described = beside.submit(_provenance, raw, files)
        screened = screen_counts(source, rows, genes, qc, OwnGenes.of(obs, var.index[:0] if is_drug else var.index))
        provenance = described.result()
    warnings += doubtful_counts(screened)
    cells = _kept_cells(screened, obs, dataset, qc, path, dropped, warnings)
    obs = _rows_of(obs, cells.rows)
    is_seen = np.ones(len(var), bool)
    if qc["min_cells_per_gene"] is not None:
        is_seen = screened.n_cells >= qc["min_cells_per_gene"]
        if not is_seen.any():
            raise InputError(
                f"{path}: qc.min_cells_per_gene = {qc['min_cells_per_gene']} leaves no gene; lower it in the dataset's block."
            )
        dropped_genes["qc.min_cells_per_gene"] = int((~is_seen).sum())
    var = var[is_seen]
    is_human = dataset["organism"] == "human"
    perturbed = set() if is_drug else {gene for label in cells.perturbations for gene in entities_of(label)}
    if len(perturbed) > 1 and perturbed.isdisjoint(var.index):
        warnings.append(
            f"none of the {len(perturbed):,} perturbed genes ({_some(sorted(perturbed))}) is among the measured ones ({_some(var.index)}): are these names "
            "of another kind? Bring them together in the file, or by perturbation.pattern or rename."
        )
    contradictions = contradicting(var) if is_human else {}
    if len(contradictions) > 0.05 * len(var):
        warnings.append(
            f"names and Ensembl ids of {len(contradictions):,} genes contradict one another; are they shifted?"
        )
    for warning in warnings:
        logger.warning("%s: %s", path, warning)

    keys = keys_of(apart)
    account = {
        "dataset": name,
        "note": note or "",
        "organism": dataset["organism"],
        "source": provenance,
        "cells": {"source": n_source[0], "kept": len(obs), "dropped": dict(dropped)},
        "genes": {"source": n_source[1], "kept": len(var), "dropped": dict(dropped_genes), "merged": len(source_genes) - len(genes.is_mt),
                  "renamed": renamed_genes, "contradicting": contradictions},
        "features_apart": {kind: {"features": len(names), "first": names[:SHOWN].tolist(), "obsm": keys[kind]}
                           for kind, names in names_apart.items()},
        "perturbations": {"kept": cells.perturbations, "dropped": cells.left_out, **of_labels,
                          "not_measured": sorted(perturbed - set(var.index))},
        "ambiguous": ambiguous(sorted({*perturbed, *var.index})) if is_human else {},
        "efficacy": cells.efficacy,
        "warnings": warnings,
        "qc": qc,
        "versions": {name: version(name) for name in ("anndata", "h5py", "scanpy")} | {"perturbflow": __version__},
    }  # fmt: skip
    uns = {
        "perturbflow": {
            "source": "; ".join(map(str, files.values())),
            "sha256": provenance["sha256"]
            if "sha256" in provenance
            else {role: entry["sha256"] for role, entry in provenance.items()},
            "versions": account["versions"],
            "dropped_cells": {reason.replace("/", "_"): n for reason, n in dropped.items()},
            "dropped_genes": {reason.replace("/", "_"): n for reason, n in dropped_genes.items()},
            "features_apart": {keys[kind]: names for kind, names in names_apart.items()},
            "dose_unit": of_labels["dose_unit"],
        }
    }
    for reason, n in dropped.items():
        logger.info("dropped %s cells: %s", f"{n:,}", reason)
    logger.info(
        "kept %s cells × %s genes, %d perturbations", f"{len(obs):,}", f"{len(var):,}", len(cells.perturbations) - 1
    )
    with atomic(harmonized) as partial, h5py.File(partial, "w") as file:
        totals = write_counts(file.create_group("X"), screened, cells.is_kept, is_seen, genes.is_mt, threads)
        _write_tables(file, obs.copy(deep=False), totals, var, uns)
        if apart:
            is_written = np.zeros(len(cells.is_within), bool)
            is_written[cells.rows] = True
            write_features(file["obsm"], screened.source, apart, is_written, threads)
    write_json(report, account)
