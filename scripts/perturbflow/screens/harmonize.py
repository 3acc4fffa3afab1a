"""Bring any screen to one schema, and write an account of all that was dropped.

The schema has raw counts, canonical labels and approved symbols.
"""

import logging
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
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
from perturbflow.io.anndata_file import begin_anndata, write_tables
from perturbflow.io.files import (
    atomic,
    bytes_of,
    content_sha256,
    manifest_files,
    read_json,
    remove_leftovers,
    require_room,
    write_json,
)
from perturbflow.registry.sources import labels_file
from perturbflow.screens.annotation import (
    ambiguous,
    as_text,
    canonical_labels,
    check_controls,
    check_shape,
    contradicting,
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
from perturbflow.screens.doubts import doubtful_labels
from perturbflow.screens.efficacy import DIRECTIONS, OwnGenes
from perturbflow.screens.features import SHOWN, doubtful_features, features_apart, keys_of, write_features
from perturbflow.screens.naming import ENSEMBL_WORDS, NO_NAMES, SYMBOL_WORDS, columns_of
from perturbflow.screens.organism import genomes, mitochondrial, other_organism, some_with_genome, why_no_mitochondrial
from perturbflow.screens.readers import SomeGenes, Source, open_source
from perturbflow.screens.recipes import open_by_recipe
from perturbflow.screens.unassigned import warning as warning_of_no_genes

logger = logging.getLogger(__name__)

BYTES_PER_VALUE = 1.2
"""Of harmonized.h5ad, at the least: count and place, compressed."""

SHARED = 0.1
"""From this share of the genes on, one name for them is no name. Ensembl calls 1 % of its 60,000 genes Y_RNA."""


@dataclass(frozen=True)
class Declared:
    """One screen as the configuration declares it.

    Attributes
    ----------
    name, block
        The dataset's name and its block.
    qc
        Its limits of quality control.
    path
        The file that messages name.
    """

    name: str
    block: dict
    qc: dict
    path: Path

    @property
    def organism(self) -> str:
        """Whose genes are measured."""
        return self.block["organism"]

    @property
    def is_human(self) -> bool:
        """Whether genes are human."""
        return self.organism == "human"

    @property
    def is_drug(self) -> bool:
        """Whether perturbations are drugs; their names are no genes."""
        return self.block["perturbation_type"] == "drug"


@dataclass
class Notes:
    """Collects, on the way, all that the account says of losses and doubts.

    Attributes
    ----------
    cells, genes
        Reason → number of the dropped cells, and genes.
    warnings
        Sentences for the reader.
    """

    cells: Counter[str] = field(default_factory=Counter)
    genes: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)


def _some(names: Iterable[str]) -> str:
    """Return the first names, for a message."""
    shown = list(names)
    return ", ".join(shown[:SHOWN]) + (", ..." if len(shown) > SHOWN else "")


def _rows_of(table: pd.DataFrame, rows: np.ndarray) -> pd.DataFrame:
    """Return some rows of a table.

    Where these are all rows, it returns the table itself: two million cells of obs take half a gigabyte.
    """
    return table if len(rows) == len(table) else table.iloc[rows]


# --- genes ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ChosenGenes:
    """The features of a source that are genes of the screen.

    Attributes
    ----------
    numbers
        Their numbers among all features.
    table
        One row per gene (`gene_table`).
    apart
        Type → numbers of the features that are no gene expression.
    names_apart
        Type → names of these features.
    """

    numbers: np.ndarray
    table: pd.DataFrame
    apart: dict[str, np.ndarray]
    names_apart: dict[str, np.ndarray]

    @property
    def renamed(self) -> dict[str, str]:
        """Name in the source → approved symbol, where these differ."""
        is_renamed = self.table["gene_name"] != self.table["original_name"]
        return dict(self.table.loc[is_renamed, ["original_name", "gene_name"]].to_numpy())


def _split_by_type(source: Source, declared: Declared) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the numbers of the features that are gene expression, and of the others by type."""
    perturbation = declared.block["perturbation"]
    column, separator = perturbation["column"], perturbation["separator"]
    labels = as_text(source.obs[column]).categories if column in source.obs else []
    named = {part for label in labels for part in (label, *(label.split(separator) if separator else ()))}
    apart = features_apart(source.var, named, declared.path)
    genes = np.setdiff1d(np.arange(len(source.var)), np.concatenate([np.empty(0, int), *apart.values()]))
    return genes, apart


def _of_own_genome(source: Source, wanted: np.ndarray, declared: Declared, notes: Notes) -> np.ndarray:
    """Return the wanted genes without those of another genome, by the genomes that gene names hold.

    Raises
    ------
    InputError
        If no gene is of the declared organism.
    """
    organism = declared.organism
    var = source.var.iloc[wanted]
    of_genome, prefixes = genomes(var, columns_of(var, (*ENSEMBL_WORDS, *SYMBOL_WORDS)))
    if problem := some_with_genome(var.index):
        notes.warnings.append(problem)
    if not prefixes:
        return wanted
    is_own = np.isin(of_genome, (organism, ""))
    held = " and ".join(prefixes)
    if not (of_genome == organism).any():
        raise InputError(
            f"{declared.path}: gene names hold {held}, but organism is {organism}. "
            "Set the organism in the dataset's block."
        )
    notes.warnings.append(f"gene names hold {held}, which is removed from them.")
    if not is_own.all():
        notes.genes["other_genome"] = int((~is_own).sum())
        notes.warnings[-1] += (
            f" {notes.genes['other_genome']:,} genes of the other genome are dropped; organism is {organism}."
        )
    return wanted[is_own]


def _check_names(genes: pd.DataFrame, numbers: np.ndarray, path: Path) -> None:
    """Raise InputError if genes have no name, or many share one."""
    nameless = np.flatnonzero(genes["original_name"].isin(NO_NAMES))
    if len(nameless):
        raise InputError(
            f"{path}: {len(nameless):,} of {len(genes):,} genes have no name "
            f"(the first is number {numbers[nameless[0]] + 1:,} of its genes). "
            "Give each a name of its own in var_names, or in features.tsv; or keep the others by gene_pattern: '.'."
        )
    shared = genes["original_name"].value_counts()
    if len(genes) and shared.iloc[0] >= max(SHARED * len(genes), 10):
        raise InputError(
            f"{path}: {shared.iloc[0]:,} of {len(genes):,} genes are called '{shared.index[0]}'. Put the name of each "
            "gene into var_names, or into the second column of features.tsv; or drop these genes by gene_pattern."
        )


def _chosen_genes(source: Source, declared: Declared, notes: Notes) -> ChosenGenes:
    """Return the wanted genes of the declared organism; notes count the others.

    Raises
    ------
    InputError
        If the genes evidently are those of another organism, or have no usable names.
    """
    numbers, apart = _split_by_type(source, declared)
    names_apart = {kind: source.var.index[others].astype(str).to_numpy(object) for kind, others in apart.items()}
    notes.genes.update({kind: len(others) for kind, others in apart.items()})
    numbers = _of_own_genome(source, numbers, declared, notes)
    table = gene_table(source.var.iloc[numbers], declared.block)
    notes.warnings += table.attrs.pop("notes")
    if "gene_pattern" in declared.block:
        is_of_pattern = is_wanted(table, declared.block["gene_pattern"], declared.path)
        notes.genes["gene_pattern"] = int((~is_of_pattern).sum())
        numbers, table = numbers[is_of_pattern], table[is_of_pattern].reset_index(drop=True)
    notes.warnings += doubtful_features(source.var.iloc[numbers], table)
    _check_names(table, numbers, declared.path)
    if reason := other_organism(table, declared.organism):
        raise InputError(f"{declared.path}: organism is {declared.organism}, but {reason}")
    return ChosenGenes(numbers, table, apart, names_apart)


def _merged_genes(genes: pd.DataFrame, organism: str) -> tuple[Genes, pd.DataFrame]:
    """Return how genes of one symbol become one, and the table of unique genes."""
    codes, unique = pd.factorize(genes["gene_name"])
    joined = genes.groupby(codes)["original_name"].agg("; ".join)
    is_mt = np.bincount(codes, mitochondrial(genes, organism), len(unique)) > 0
    genes = genes.drop_duplicates("gene_name").set_index(pd.Index(unique)).drop(columns="source_name")
    genes["original_name"] = joined.to_numpy()
    return Genes(codes, is_mt), genes


def _seen_genes(screened: Screened, declared: Declared, notes: Notes) -> np.ndarray:
    """Return which genes have a count in enough cells; notes count the others.

    Raises
    ------
    InputError
        If no gene has.
    """
    limit = declared.qc["min_cells_per_gene"]
    if limit is None:
        return np.ones(len(screened.n_cells), bool)
    is_seen = screened.n_cells >= limit
    if not is_seen.any():
        raise InputError(
            f"{declared.path}: qc.min_cells_per_gene = {limit} leaves no gene; lower it in the dataset's block."
        )
    notes.genes["qc.min_cells_per_gene"] = int((~is_seen).sum())
    return is_seen


# --- cells ----------------------------------------------------------------------------------------------------------


def _wanted_rows(source: Source, declared: Declared, notes: Notes) -> tuple[np.ndarray, pd.DataFrame]:
    """Return the rows of the cells that `subset` and `exclude` leave, and their obs; notes count the others."""
    block, path = declared.block, declared.path
    is_control = is_control_label(source.obs, block, path)
    rows = np.flatnonzero(in_subset(source.obs, block["subset"], path))
    check_controls(is_control, is_control[rows], "subset", path)
    if block["subset"]:
        notes.cells["subset"] = len(source.obs) - len(rows)
    source_obs = _rows_of(source.obs, rows)
    if "exclude" in block:
        excluded = is_excluded(source_obs, block["exclude"], path)
        notes.cells["exclude"] = int(excluded.sum())
        check_controls(is_control, is_control[rows[~excluded]], "exclude", path)
        rows, source_obs = rows[~excluded], _rows_of(source_obs, np.flatnonzero(~excluded))
    return rows, source_obs


def _renamed_labels(source_labels: pd.Series, labels: pd.Series, block: dict) -> dict[str, str]:
    """Return label in the file → canonical label, where these differ; controls aside."""
    pairs = pd.DataFrame({"before": source_labels.array, "after": labels.array}).drop_duplicates()
    # The dose of a column is no part of a label's name.
    named = (lambda label: SEPARATOR.join(entities_of(label))) if "dose" in block["perturbation"] else str
    return {
        str(before): named(after)
        for before, after in pairs.itertuples(index=False)
        if after != CONTROL and str(before) != named(after)
    }


def _chosen_cells(
    source: Source, genes: pd.DataFrame, declared: Declared, notes: Notes
) -> tuple[np.ndarray, pd.DataFrame, dict[str, Any]]:
    """Return the rows of the cells with an assigned perturbation, their obs, and the account's part on labels.

    Notes count the other cells by reason.
    """
    block, path = declared.block, declared.path
    rows, source_obs = _wanted_rows(source, declared, notes)
    doubtful = doubtful_labels(source_obs, block, genes, path, notes.warnings)
    labels = canonical_labels(source_obs, block, genes, path)
    dose_unit = labels.attrs["dose_unit"]
    assigned = np.flatnonzero(labels.notna())
    notes.cells["unassigned"] = len(labels) - len(assigned)
    rows, labels, source_obs = rows[assigned], labels.iloc[assigned], _rows_of(source_obs, assigned)
    obs = schema_obs(source_obs, labels, declared.name, block, path)
    if not obs.index.is_unique:
        obs.index = ad.utils.make_index_unique(obs.index)
    of_labels = {
        "renamed": _renamed_labels(source_obs[block["perturbation"]["column"]], labels, block),
        "controls_declared": block["perturbation"].get("control", []),
        **doubtful,
        "dose_unit": dose_unit,
    }
    if of_labels["no_gene"]:
        notes.warnings.append(warning_of_no_genes(of_labels["no_gene"]))
    return rows, obs, of_labels


# --- quality control ------------------------------------------------------------------------------------------------


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
        Label → cells: of the kept perturbations with the control, and of those that lose all their cells.
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

    @property
    def is_written(self) -> np.ndarray:
        """Per cell that was read, whether it is kept."""
        written = np.zeros(len(self.is_within), bool)
        written[self.rows] = True
        return written


def _too_few_controls(n_controls: int, limit: int, path: Path, lost: str) -> InputError:
    """Return the error on a screen with too few controls; `lost` says which limits drop controls."""
    least = max(limit, 3)
    left = f"only {n_controls} control cells are left" if n_controls else "quality control leaves no control cells"
    remedy = f" Of the controls, {lost}, under qc in the dataset's block." if lost else ""
    if n_controls >= 3 or limit > 3:
        lower = "; lower it" if n_controls >= 3 else ""
        remedy += f" The least number is qc.min_cells_per_perturbation = {limit}{lower}."
    remedy = remedy or " Declare all labels of controls in perturbation.control, or bring a file with more of them."
    return InputError(f"{path}: {left}; at least {least} are needed to measure an effect.{remedy}")


def _no_perturbation(too_few: dict[str, int], limit: int, path: Path, lost: str) -> InputError:
    """Return the error on a screen without a perturbation of enough cells; `lost` says which limits drop such cells."""
    remedy = f" Of the perturbed cells, {lost}, under qc in the dataset's block." if lost else ""
    if too_few:
        remedy += f" {'Or lower' if remedy else 'Lower'} qc.min_cells_per_perturbation in the dataset's block."
    if not remedy:
        remedy = " All cells with a label are controls: is perturbation.column the right one, and drop not too wide?"
    wanted = f"{limit} cells or more" if limit > 1 else "a cell"
    most = max(too_few.values(), default=0)
    return InputError(f"{path}: no perturbation has {wanted} (most: {most}).{remedy}")


def _rare_perturbations(
    perturbation: pd.Series, limit: int, path: Path, lost: dict[bool, str], *, controls_only: bool = False
) -> tuple[dict[str, int], dict[str, int]]:
    """Return label → cells of the perturbations that have enough, control included, and of those that have too few.

    Parameters
    ----------
    lost
        Which limits drop controls (True) and which perturbed cells (False), for messages.
    controls_only
        Whether the block says that there is no perturbed cell.

    Raises
    ------
    InputError
        If the controls or all perturbations are too few.
    """
    n_cells = perturbation.value_counts()
    n_cells = {label: int(n) for label, n in n_cells[n_cells > 0].items()}
    n_controls = n_cells.get(CONTROL, 0)
    if n_controls < max(limit, 3):
        raise _too_few_controls(n_controls, limit, path, lost[True])
    too_few = {label: n for label, n in n_cells.items() if n < limit and label != CONTROL}
    kept = {label: n for label, n in n_cells.items() if label not in too_few}
    if len(kept) < 2 and not controls_only:
        raise _no_perturbation(too_few, limit, path, lost[False])
    if too_few:
        shown = ", ".join(f"{label} ({n})" for label, n in list(too_few.items())[:8])
        logger.warning("%d perturbations have fewer than %d cells and are left out: %s ...", len(too_few), limit, shown)
    return kept, too_few


def _own_genes(screened: Screened, declared: Declared, notes: Notes) -> tuple[np.ndarray, dict[str, int], dict]:
    """Return which of the cells within the limits changed enough in their own genes.

    Beside them it returns how many cells each limit drops, and the account of own genes.

    Raises
    ------
    InputError
        If a limit cannot be met.
    """
    kind = declared.block["perturbation_type"]
    direction = DIRECTIONS.get(kind, "")
    limits = {name: declared.qc.get(name) for name in ("min_efficacy", "min_cell_efficacy")}
    for name, limit in limits.items():
        if limit is not None and direction == "down" and limit > 1:
            raise InputError(
                f"{declared.path}: qc.{name} = {limit}: a knock-down takes at most all of it, 1. "
                "Lower it in the dataset's block."
            )
        if limit is not None and not direction:
            notes.warnings.append(f"qc.{name} drops nothing: the direction in which {kind} takes a gene is not known.")
        elif limit is not None and not screened.own.own.pairs:
            notes.warnings.append(f"qc.{name} drops nothing: no perturbed gene is among the measured ones.")
    found = screened.own.efficacy(direction)
    passes, dropped = screened.own.passes(found, direction, *(limits.values() if direction else (None, None)))
    by_label: dict[str, dict] = {}
    for row in found.to_dict("records"):
        numbers = {name: float(f"{row[name]:.4g}") for name in ("expected", "ratio", "low", "high")}
        entry = {"cells": row["cells"], **numbers, "is_told": row["is_told"]}
        by_label.setdefault(row["label"], {})[row["member"]] = entry
    return passes, dropped, {"direction": direction, "perturbations": by_label}


def _kept_cells(screened: Screened, obs: pd.DataFrame, declared: Declared, notes: Notes) -> Kept:
    """Return the cells within all limits and of a perturbation that has enough of them; notes count the others.

    Raises
    ------
    InputError
        If a limit leaves too few cells, controls or perturbations.
    """
    qc, path = declared.qc, declared.path
    is_within, dropped_by_limit = within_limits(screened, qc, path)
    notes.cells.update(dropped_by_limit)
    is_effective, dropped_by_efficacy, efficacy = _own_genes(screened, declared, notes)
    notes.cells.update(dropped_by_efficacy)
    perturbation = obs["perturbation"][is_within]
    is_control = obs["is_control"].to_numpy()
    lost = {which: limits_on(is_control == which, screened, qc) for which in (True, False)}
    weak = [
        f"{limit} = {qc[limit.removeprefix('qc.')]} drops {n:,}; lower it"
        for limit, n in dropped_by_efficacy.items()
        if n
    ]
    lost[False] = ". ".join(filter(None, [lost[False], *weak]))
    limit, alone = qc["min_cells_per_perturbation"] or 0, declared.block.get("controls_only", False)
    kept, too_few = _rare_perturbations(perturbation[is_effective], limit, path, lost, controls_only=alone)
    is_rare = perturbation.isin(list(too_few)).to_numpy()
    if too_few:
        notes.cells["qc.min_cells_per_perturbation"] = int((is_effective & is_rare).sum())
    ineffective = perturbation[~is_effective & ~perturbation.isin(list(kept))].value_counts()
    left_out = {**{label: int(n) for label, n in ineffective.items() if n}, **too_few}
    return Kept(is_within, is_effective & ~is_rare, kept, left_out, efficacy)


# --- the account ----------------------------------------------------------------------------------------------------


def _provenance(raw: Path, files: dict[str, Path]) -> dict:
    """Return file, bytes and sha256 of the source, a file or a folder; of several files by their role.

    Raises
    ------
    InputError
        If a file was changed after its download.
    """
    downloaded = read_json(raw)["files"] if raw.name == "manifest.json" else {}
    described = {
        role: {"file": str(path), "bytes": bytes_of(path), "sha256": content_sha256(path)}
        for role, path in files.items()
    }
    for role, entry in downloaded.items():
        if described[role]["sha256"] != entry["sha256"]:
            raise InputError(
                f"{files[role]} was changed after its download: it has another sha256. Delete {raw} and run again."
            )
    return described["file"] if list(described) == ["file"] else described


@dataclass(frozen=True)
class Harmonized:
    """One harmonized screen, as its account and its `uns` describe it.

    Attributes
    ----------
    source_shape, source_files, provenance
        Cells and genes of the source, its files by role, and the result of `_provenance`.
    n_merged
        Genes of the source that became one with another.
    var
        The kept genes.
    """

    declared: Declared
    notes: Notes
    source_shape: tuple[int, int]
    source_files: dict[str, Path]
    provenance: dict
    genes: ChosenGenes
    n_merged: int
    labels: dict[str, Any]
    kept: Kept
    var: pd.DataFrame

    @cached_property
    def perturbed(self) -> set[str]:
        """Perturbed genes; drugs are none."""
        if self.declared.is_drug:
            return set()
        return {gene for label in self.kept.perturbations for gene in entities_of(label)}

    @cached_property
    def contradictions(self) -> dict[str, str]:
        """Genes whose name and Ensembl id contradict each other."""
        return contradicting(self.var) if self.declared.is_human else {}

    @property
    def versions(self) -> dict[str, str]:
        """Versions of the packages that read and write the screen."""
        return {name: version(name) for name in ("anndata", "h5py", "scanpy")} | {"perturbflow": __version__}

    def warn(self) -> None:
        """Add the warnings on the kept genes to the notes, and log all warnings."""
        if len(self.perturbed) > 1 and self.perturbed.isdisjoint(self.var.index):
            self.notes.warnings.append(
                f"none of the {len(self.perturbed):,} perturbed genes ({_some(sorted(self.perturbed))}) is among the "
                f"measured ones ({_some(self.var.index)}): are these names of another kind? Bring them together in the "
                "file, or by perturbation.pattern or rename."
            )
        if len(self.contradictions) > 0.05 * len(self.var):
            self.notes.warnings.append(
                f"names and Ensembl ids of {len(self.contradictions):,} genes contradict one another; are they shifted?"
            )
        for warning in self.notes.warnings:
            logger.warning("%s: %s", self.declared.path, warning)

    def account(self) -> dict[str, Any]:
        """Return the content of harmonization.json."""
        n_cells, n_genes = self.source_shape
        keys = keys_of(self.genes.apart)
        return {
            "dataset": self.declared.name,
            "note": self.declared.block.get("note") or "",
            "organism": self.declared.organism,
            "source": self.provenance,
            "cells": {"source": n_cells, "kept": len(self.kept.rows), "dropped": dict(self.notes.cells)},
            "genes": {
                "source": n_genes,
                "kept": len(self.var),
                "dropped": dict(self.notes.genes),
                "merged": self.n_merged,
                "renamed": self.genes.renamed,
                "contradicting": self.contradictions,
            },
            "features_apart": {
                kind: {"features": len(names), "first": names[:SHOWN].tolist(), "obsm": keys[kind]}
                for kind, names in self.genes.names_apart.items()
            },
            "perturbations": {
                "kept": self.kept.perturbations,
                "dropped": self.kept.left_out,
                **self.labels,
                "not_measured": sorted(self.perturbed - set(self.var.index)),
            },
            "ambiguous": ambiguous(sorted({*self.perturbed, *self.var.index})) if self.declared.is_human else {},
            "efficacy": self.kept.efficacy,
            "warnings": self.notes.warnings,
            "qc": self.declared.qc,
            "versions": self.versions,
        }

    def uns(self) -> dict[str, Any]:
        """Return `uns` of harmonized.h5ad."""
        sha256 = self.provenance.get("sha256") or {role: entry["sha256"] for role, entry in self.provenance.items()}
        keys = keys_of(self.genes.apart)
        return {
            "perturbflow": {
                "source": "; ".join(map(str, self.source_files.values())),
                "sha256": sha256,
                "versions": self.versions,
                "dropped_cells": {reason.replace("/", "_"): n for reason, n in self.notes.cells.items()},
                "dropped_genes": {reason.replace("/", "_"): n for reason, n in self.notes.genes.items()},
                "features_apart": {keys[kind]: names for kind, names in self.genes.names_apart.items()},
                "dose_unit": self.labels["dose_unit"],
            }
        }


# --- the step -------------------------------------------------------------------------------------------------------


def _opened(raw: Path, block: dict) -> tuple[Source, dict[str, Path]]:
    """Open the source of a screen, and return it with its files by role."""
    files = manifest_files(raw) if raw.name == "manifest.json" else {"file": raw}
    if labels := labels_file(block):
        files["labels"] = Path(labels)
    return open_by_recipe(block["recipe"], files, block) if "recipe" in block else open_source(files, block), files


def _with_totals(obs: pd.DataFrame, totals: pd.DataFrame) -> pd.DataFrame:
    """Return obs of the kept cells with their totals as columns, without unused categories."""
    obs = obs.copy(deep=False)
    for column in totals:
        obs[column] = totals[column].to_numpy()
    for column in obs.select_dtypes("category"):
        obs[column] = obs[column].cat.remove_unused_categories()
    return obs


def harmonize(raw: Path, harmonized: Path, report: Path, name: str, dataset: dict, qc: dict, threads: int = 1) -> None:
    """Bring one screen to the schema of harmonized.h5ad and write an account of everything dropped or renamed.

    It reads the counts once, in blocks of cells. It knows only at the end which genes and perturbations are too rare.
    Until then the counts of the cells within the limits lie beside the output, in a file without a name.
    That file takes little more than a byte per nonzero value.

    Parameters
    ----------
    raw
        The user's file or folder, or the manifest of a download.
    harmonized
        AnnData to be written: X raw UMI counts (CSR float32, integer-valued), obs and var as in
        docs/reference/files.md. obsm holds the counts of features that are no gene expression, one matrix per type.
    report
        JSON to be written: cells, genes and perturbations kept, dropped and renamed, by reason; how perturbed genes
        changed (`efficacy`); and sentences that a reader should know (`warnings`).
    name, dataset, qc
        The dataset's name, its block and its limits of quality control.
    threads
        Threads that decode and encode beside the one that counts.

    Raises
    ------
    InputError
        For a file, column, label or value that cannot be used; the message has the fix.
    """
    source, files = _opened(raw, dataset)
    declared, notes = Declared(name, dataset, qc, source.files[0]), Notes()
    n_source = len(source.obs), len(source.var)
    logger.info("%s: %s cells × %s genes", declared.path, f"{n_source[0]:,}", f"{n_source[1]:,}")
    if note := dataset.get("note"):
        logger.warning("%s: %s", name, note)
    check_shape(n_source, dataset, declared.path)
    chosen = _chosen_genes(source, declared, notes)
    if len(chosen.numbers) < len(source.var):
        source = SomeGenes(source, chosen.numbers, chosen.apart)
    harmonized.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(harmonized)
    source.threads, source.scratch = threads, harmonized.parent
    rows, obs, labels = _chosen_cells(source, chosen.table, declared, notes)
    source.obs = source.obs[[]]  # its columns are in obs now
    genes, var = _merged_genes(chosen.table, declared.organism)
    if qc["max_pct_mt"] is not None and not genes.is_mt.any():
        why = why_no_mitochondrial(chosen.table)
        notes.warnings.append(f"qc.max_pct_mt = {qc['max_pct_mt']} drops nothing: {why}.")

    with ThreadPoolExecutor(1) as beside:
        described = beside.submit(_provenance, raw, files)
        own = OwnGenes.of(obs, var.index[:0] if declared.is_drug else var.index)
        screened = screen_counts(source, rows, genes, qc, own)
        provenance = described.result()
    notes.warnings += doubtful_counts(screened)
    kept = _kept_cells(screened, obs, declared, notes)
    obs = _rows_of(obs, kept.rows)
    is_seen = _seen_genes(screened, declared, notes)
    n_merged = len(chosen.table) - len(genes.is_mt)
    found = Harmonized(declared, notes, n_source, files, provenance, chosen, n_merged, labels, kept, var[is_seen])
    found.warn()
    for reason, n in notes.cells.items():
        logger.info("dropped %s cells: %s", f"{n:,}", reason)
    shape = f"{len(kept.rows):,} cells × {len(found.var):,} genes"
    logger.info("kept %s, %d perturbations", shape, len(kept.perturbations) - 1)
    require_room(harmonized.parent, BYTES_PER_VALUE * screened.n_entries * len(kept.rows) / len(rows), harmonized.name)
    with atomic(harmonized) as partial, h5py.File(partial, "w") as file:
        totals = write_counts(file.create_group("X"), screened, kept.is_kept, is_seen, genes.is_mt, threads)
        begin_anndata(file)
        write_tables(file, _with_totals(obs, totals), found.var, found.uns())
        if chosen.apart:
            write_features(file["obsm"], screened.source, chosen.apart, kept.is_written, threads)
    write_json(report, found.account())
