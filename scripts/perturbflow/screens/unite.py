"""Unite harmonized screens into one in the same schema.

Members keep their own rules of quality control, which ran once. Their counts are read in blocks of cells, so memory
does not grow with them.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib.metadata import version
from itertools import combinations
from pathlib import Path
from typing import Any

import anndata as ad
import h5py
import numpy as np
import pandas as pd
from scipy import sparse

from perturbflow import __version__
from perturbflow.errors import InputError
from perturbflow.genes.symbols import CONTROL, SEPARATOR, at_dose, entities_of, members_of, without_dose
from perturbflow.io.anndata_file import begin_anndata, read_columns, write_tables
from perturbflow.io.files import atomic, read_json, require_room, write_json
from perturbflow.io.hdf5 import AppendedRows, CsrRows
from perturbflow.io.kernels import cell_totals
from perturbflow.io.streaming import row_blocks
from perturbflow.screens.annotation import SCHEMA_OBS, UNKNOWN, ambiguous
from perturbflow.screens.copies import digests_of, improbability_of, least_improbability
from perturbflow.screens.counts import totals_table
from perturbflow.screens.organism import mitochondrial

logger = logging.getLogger(__name__)

TOTALS = ("total_counts", "n_genes_by_counts", "pct_counts_mt")
OF_CELLS = tuple(column for column in SCHEMA_OBS if column not in TOTALS)
SHOWN = 8
BYTES_PER_VALUE = 1.5  # of X, compressed
DOUBTS = ("looks_like_control", "no_gene", "not_split")


@dataclass(frozen=True)
class Member:
    """One harmonized screen of a union.

    Attributes
    ----------
    name
        Of its dataset.
    X
        Raw counts, CSR on disk, cells × genes.
    obs, var
        `OF_CELLS` of every cell; the genes.
    account
        Content of its harmonization.json.
    rows
        Numbers of the cells that the union takes.
    """

    name: str
    X: CsrRows
    obs: pd.DataFrame
    var: pd.DataFrame
    account: dict
    rows: np.ndarray

    @classmethod
    def open(cls, name: str, harmonized: Path, account: Path) -> "Member":
        """Open a member; its counts stay on disk."""
        file = h5py.File(harmonized)
        obs, var = read_columns(file["obs"], OF_CELLS), ad.io.read_elem(file["var"])
        var = var.astype(dict.fromkeys(("gene_name", "gene_id"), str))  # a file that AnnData wrote anew has categories
        return cls(name, CsrRows(file["X"], Path(harmonized)), obs, var, read_json(account), np.arange(len(obs)))

    @cached_property
    def labels(self) -> dict[str, int]:
        """Label → cells, of those that the union takes."""
        n = self.obs["perturbation"].iloc[self.rows].astype(str).value_counts()
        return {str(label): int(cells) for label, cells in n.items() if cells}

    @property
    def perturbed(self) -> set[str]:
        """Perturbed genes or compounds."""
        return {entity for label in self.labels for entity in entities_of(label)}

    @property
    def type(self) -> str:
        """How it perturbs."""
        return str(self.obs["perturbation_type"].iloc[0])

    def renamed(self, names: Mapping[str, str]) -> "Member":
        """Return the member with genes, measured and perturbed ones, under other names."""
        if not names:
            return self
        var = self.var.rename(index=names).assign(gene_name=self.var["gene_name"].replace(names))
        before = self.obs["perturbation"].astype("category")
        labels = {str(label): _with_names(str(label), names) for label in before.cat.categories}
        return replace(
            self, var=var, obs=self.obs.assign(perturbation=before.astype(str).map(labels).astype("category"))
        )

    def table(self) -> pd.DataFrame:
        """Return obs of the cells that the union takes: names, batches and dataset say which screen they are of."""
        obs = self.obs.iloc[self.rows].copy()
        batch = obs["batch"].astype(str)
        named = f"{self.name}:" + batch
        obs["batch"] = named.where(batch != UNKNOWN, self.name)
        obs["dataset"] = self.name
        obs.index = f"{self.name}:" + obs.index.astype(str)
        return obs


def _with_names(label: str, names: Mapping[str, str]) -> str:
    """Return a label whose members have other names."""
    if label == CONTROL:
        return label
    members = [(names.get(name, name), dose) for name, dose in map(without_dose, members_of(label))]
    return SEPARATOR.join(sorted({at_dose(name, dose) for name, dose in members}))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


# --- one name per gene, one type per gene ---------------------------------------------------------------------------


def names_of_one_gene(members: Sequence[Member]) -> dict[str, dict[str, str]]:
    """Return member → its name of a gene → the name in the union, where members call an Ensembl id differently.

    The name that most members have serves, and of equally frequent ones that of the first.

    Raises
    ------
    InputError
        If a member has the name for another gene.
    """
    known = pd.concat([of.var[["gene_name", "gene_id"]].assign(member=i) for i, of in enumerate(members)])
    known = known[known["gene_id"] != ""].drop_duplicates(["gene_id", "member"])
    several = known.groupby("gene_id")["gene_name"].transform("nunique") > 1
    renamed: dict[str, dict[str, str]] = {member.name: {} for member in members}
    for gene_id, of_gene in known[several].groupby("gene_id"):
        chosen = str(of_gene["gene_name"].value_counts(sort=False).pipe(lambda n: n.index[n.argmax()]))
        for name, number in zip(of_gene["gene_name"], of_gene["member"], strict=True):
            member = members[number]
            if name == chosen:
                continue
            if chosen in member.var.index or name in renamed[member.name]:
                first = members[of_gene["member"][of_gene["gene_name"] == chosen].iloc[0]].name
                raise InputError(
                    f"{gene_id} is called {chosen} in {first} and {name} in {member.name}, which has another gene of "
                    f"the name {chosen}. Give each gene one name in both files, or leave {name} out of {member.name} "
                    "through gene_pattern in its block."
                )
            renamed[member.name][name] = chosen
    return renamed


def of_one_type(members: Sequence[Member], types: Sequence[str]) -> list[Member]:
    """Return the members without the cells whose genes another member perturbs by a type that comes before theirs.

    Parameters
    ----------
    types
        In order: a gene that several types perturb is kept in the first of them.

    Raises
    ------
    InputError
        If a member has another type, or nothing is left of one.
    """
    if unknown := next((member for member in members if member.type not in types), None):
        raise InputError(
            f"{unknown.name} perturbs by {unknown.type}, which perturbation_types of the union does not list; "
            f"harmonize it again, or list {unknown.type} too."
        )
    kept = []
    for member in members:
        before = {
            gene for other in members if types.index(other.type) < types.index(member.type) for gene in other.perturbed
        }
        lost = {label for label in member.labels if not before.isdisjoint(entities_of(label))}
        rows = member.rows[~member.obs["perturbation"].astype(str).isin(lost).to_numpy()]
        if lost and not set(member.labels) - lost - {CONTROL}:
            raise InputError(
                f"all genes that {member.name} perturbs by {member.type} are perturbed by a type that comes before it "
                f"in perturbation_types ({', '.join(types)}); leave {member.name} out of the union."
            )
        kept.append(replace(member, rows=rows) if lost else member)
    return kept


# --- genes ----------------------------------------------------------------------------------------------------------


def united_genes(members: Sequence[Member], genes: str | Sequence[str]) -> tuple[pd.DataFrame, np.ndarray]:
    """Return the genes of a union in the order of the first member that has them, and who measured them.

    Parameters
    ----------
    genes
        shared: those that all members measure; any: those that some measure; or names, which all must measure.

    Returns
    -------
    var, and a mask (genes, members).

    Raises
    ------
    InputError
        If members share no gene, or a name is not measured by all.
    """
    var = pd.concat([member.var for member in members])
    var = var[~var.index.duplicated()]
    measured = np.column_stack([var.index.isin(member.var.index) for member in members])
    if genes == "any":
        return var, measured
    if genes == "shared":
        if not measured.all(axis=1).any():
            of_each = "; ".join(f"{of.name}: {_some(of.var.index[:3].tolist())}" for of in members)
            raise InputError(
                f"the members share no measured gene ({of_each}). Are names of one of them ids or of another organism? "
                "genes: any would keep all, and no model reads a gene that only some measure."
            )
        kept = measured.all(axis=1)
    else:
        for member in members:
            if missing := [name for name in genes if name not in member.var.index]:
                raise InputError(
                    f"genes of the union: {member.name} does not measure {_some(missing)}. Remove "
                    f"{'it' if len(missing) == 1 else 'them'}, or take genes: shared."
                )
        kept = var.index.isin(genes)
    return var[kept], measured[kept]


@dataclass
class Streamed:
    """What the pass over the counts finds.

    Attributes
    ----------
    totals
        Totals of cells, block by block.
    digests, improbability
        Of every cell, by member (`perturbflow.screens.copies`).
    """

    totals: list[pd.DataFrame] = field(default_factory=list)
    digests: dict[str, list[np.ndarray]] = field(default_factory=dict)
    improbability: dict[str, list[np.ndarray]] = field(default_factory=dict)


def _blocks(member: Member, var: pd.DataFrame) -> Iterator[sparse.csr_matrix]:
    """Yield the counts of a member's cells, some thousands at once, genes in the order of the union."""
    column = var.index.get_indexer(member.var.index)
    for block in row_blocks(len(member.rows)):
        found = member.X[member.rows[block]]
        place = column[found.indices]
        is_kept = (place >= 0) & (found.data != 0)
        indptr = np.append(0, np.cumsum(is_kept))[found.indptr]
        counts = sparse.csr_matrix((found.data[is_kept], place[is_kept], indptr), shape=(found.shape[0], len(var)))
        counts.sort_indices()
        yield counts


def _stream(group: h5py.Group, members: Sequence[Member], var: pd.DataFrame, organism: str, threads: int) -> Streamed:
    """Write X of all members, one after the other."""
    found, is_mt = Streamed(), mitochondrial(var, organism)
    with ThreadPoolExecutor(threads) as pool:
        written = AppendedRows(group, len(var), sum(len(member.rows) for member in members), pool)
        for member in members:
            logger.info("%s: %s cells", member.name, f"{len(member.rows):,}")
            of_member = found.digests.setdefault(member.name, []), found.improbability.setdefault(member.name, [])
            for counts in _blocks(member, var):
                written.append(counts)
                of_member[0].append(digests_of(counts))
                of_member[1].append(improbability_of(counts))
                total, of_mt = cell_totals(counts.data, counts.indices, counts.indptr, is_mt)
                found.totals.append(totals_table(total, of_mt, np.diff(counts.indptr)))
        written.finish()
    return found


def check_copies(members: Sequence[Member], found: Streamed) -> None:
    """Raise InputError if two members hold the same cell."""
    of = {name: np.concatenate(digests) for name, digests in found.digests.items()}
    depth = {name: np.concatenate(of_cells) for name, of_cells in found.improbability.items()}
    for first, second in combinations(members, 2):
        least = least_improbability(len(first.rows), len(second.rows))
        deep = [np.flatnonzero(depth[member.name] > least) for member in (first, second)]
        digests = [of[member.name][cells] for member, cells in zip((first, second), deep, strict=True)]
        _, here, there = np.intersect1d(digests[0], digests[1], return_indices=True)
        if len(here):
            cells = [
                member.obs.index[member.rows[cells[place[0]]]]
                for member, cells, place in zip((first, second), deep, (here, there), strict=True)
            ]
            raise InputError(
                f"{len(here):,} cells of {first.name} and {second.name} have the same counts in every gene, for "
                f"example {cells[0]} and {cells[1]}: they are the same cells twice. Leave one of the two datasets out "
                "of the union, or the copies through subset in its block."
            )


# --- the account ----------------------------------------------------------------------------------------------------


def _dose_unit(members: Sequence[Member]) -> str | None:
    """Return the unit of doses; InputError if members have several."""
    units = {of.name: unit for of in members if (unit := of.account["perturbations"].get("dose_unit"))}
    if len(set(units.values())) > 1:
        of_each = ", ".join(f"{name} ({unit})" for name, unit in units.items())
        raise InputError(f"doses of the members are in several units: {of_each}. Bring them to one in the files.")
    return next(iter(units.values()), None)


def _efficacy(members: Sequence[Member]) -> dict[str, Any]:
    """Return how perturbed genes changed: of each label that of the member with most of its cells."""
    directions = {of.account["efficacy"]["direction"] for of in members}
    of_labels = (
        (of.labels.get(label, 0), label, found)
        for of in members
        for label, found in of.account["efficacy"]["perturbations"].items()
    )
    best = {label: found for _, label, found in sorted(of_labels, key=lambda one: one[0])}
    return {"direction": directions.pop() if len(directions) == 1 else "", "perturbations": best}


def _together(members: Sequence[Member], key: str) -> dict[str, int]:
    """Return label → cells over all members, of one part of their accounts."""
    n: Counter[str] = Counter()
    for member in members:
        n.update(member.account["perturbations"][key])
    return dict(n)


def _of_genes(members: Sequence[Member], var: pd.DataFrame, renamed: Mapping[str, dict]) -> dict[str, Any]:
    """Return the account's part on genes."""
    n_genes = len(set().union(*[member.var.index for member in members]))
    return {
        "source": n_genes,
        "kept": len(var),
        "dropped": {"union": n_genes - len(var)} if n_genes > len(var) else {},
        "merged": 0,
        "renamed": {old: new for of_member in renamed.values() for old, new in of_member.items()},
        "contradicting": {},
    }


def _of_labels(members: Sequence[Member], labels: Mapping[str, int], not_measured: set[str]) -> dict[str, Any]:
    """Return the account's part on perturbations."""
    accounts = [member.account["perturbations"] for member in members]
    return {
        "kept": dict(labels),
        "dropped": {label: n for label, n in _together(members, "dropped").items() if label not in labels},
        "renamed": {old: new for account in accounts for old, new in account["renamed"].items()},
        "controls_declared": sorted({label for account in accounts for label in account["controls_declared"]}),
        **{key: _together(members, key) for key in DOUBTS},
        "dose_unit": _dose_unit(members),
        "not_measured": sorted(not_measured),
    }


def account_of(
    name: str, union: dict, note: str, members: Sequence[Member], var: pd.DataFrame, renamed: Mapping[str, dict]
) -> dict[str, Any]:
    """Return harmonization.json of a union: the keys of a screen's, and `union`, what each member brings."""
    labels: Counter[str] = Counter()
    for member in members:
        labels.update(member.labels)
    accounts = {member.name: member.account for member in members}
    n_cells, n_taken = (sum(map(len, of)) for of in zip(*[(of.obs, of.rows) for of in members], strict=True))
    perturbed = {gene for label in labels for gene in entities_of(label)}
    warnings = [f"{of}: {warning}" for of, account in accounts.items() for warning in account["warnings"]]
    if len(union["perturbation_types"]) > 1:
        warnings.append(f"perturbations are of several types: {', '.join(union['perturbation_types'])}.")
    return {
        "dataset": name,
        "note": note,
        "organism": union["organism"],
        "source": {of: account["source"] for of, account in accounts.items()},
        "cells": {
            "source": n_cells,
            "kept": n_taken,
            "dropped": {"perturbation_types": n_cells - n_taken} if n_cells > n_taken else {},
        },
        "genes": _of_genes(members, var, renamed),
        "features_apart": {},
        "perturbations": _of_labels(members, labels, perturbed - set(var.index)),
        "ambiguous": ambiguous(sorted({*perturbed, *var.index})) if union["organism"] == "human" else {},
        "efficacy": _efficacy(members),
        "warnings": warnings,
        "qc": {},
        "versions": {package: version(package) for package in ("anndata", "h5py")} | {"perturbflow": __version__},
        "union": {
            of.name: {"cells": len(of.rows), "genes": len(of.var), "perturbations": len(of.labels) - 1, "type": of.type}
            for of in members
        },
    }


def unknown_account(dose_unit: str | None) -> dict[str, Any]:
    """Return the account of a member that has no harmonization.json: what the union asks of it, and nothing known."""
    perturbations: dict[str, Any] = {"dropped": {}, "renamed": {}, "controls_declared": [], "dose_unit": dose_unit}
    return {
        "source": {},
        "warnings": [],
        "efficacy": {"direction": "", "perturbations": {}},
        "perturbations": {**perturbations, **{key: {} for key in DOUBTS}},
    }


# --- the step -------------------------------------------------------------------------------------------------------


def _united(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the cells of all members as one table; text columns are categories."""
    obs = pd.DataFrame(index=pd.Index(np.concatenate([table.index.to_numpy(object) for table in tables])))
    for column in OF_CELLS:
        values = [table[column] for table in tables]
        if column in ("is_control", "n_perturbations"):
            obs[column] = np.concatenate([of.to_numpy() for of in values])
        else:
            obs[column] = pd.api.types.union_categoricals(
                [of.astype(str).astype("category") for of in values], sort_categories=True
            )
    return obs


def unite(
    members: list[Path],
    accounts: list[Path],
    harmonized: Path,
    report: Path,
    name: str,
    union: dict,
    note: str = "",
    threads: int = 1,
) -> None:
    """Unite harmonized screens into one file of the same schema, and write an account like theirs.

    Cells are called `screen:cell` and batches `screen:batch`; obs.dataset is the screen. Of obs the columns of the
    schema remain; totals are those over the genes of the union.

    Parameters
    ----------
    members, accounts
        harmonized.h5ad and harmonization.json of every member, in the order of the union.
    harmonized
        AnnData to be written. With genes: any, varm["measured"] (genes, members) says who measured a gene, and
        uns["perturbflow"]["members"] in which order; counts that nobody measured are 0.
    report
        JSON to be written, with the keys of a screen's account and `union`.
    name, union
        The dataset's name, and of its block members, genes, perturbation_types and organism.
    note
        What its user should know.
    threads
        Threads that encode.

    Raises
    ------
    InputError
        If the members cannot be one screen; the message has the fix.
    """
    opened = [Member.open(*of) for of in zip(union["members"], members, accounts, strict=True)]
    renamed = names_of_one_gene(opened)
    for member, names in renamed.items():
        if names:
            logger.info("%s: %d genes are called as the other members call them", member, len(names))
    opened = of_one_type([member.renamed(renamed[member.name]) for member in opened], union["perturbation_types"])
    var, measured = united_genes(opened, union["genes"])
    require_room(harmonized.parent, BYTES_PER_VALUE * sum(int(of.X.n_stored.sum()) for of in opened), harmonized.name)
    account = account_of(name, union, note, opened, var, renamed)
    obs = _united([member.table() for member in opened])
    uns = {"members": union["members"], "versions": account["versions"], "dose_unit": _dose_unit(opened) or ""}
    with atomic(harmonized) as partial, h5py.File(partial, "w") as file:
        begin_anndata(file)
        found = _stream(file.create_group("X"), opened, var, union["organism"], threads)
        check_copies(opened, found)
        totals = pd.concat(found.totals, ignore_index=True)
        for column in totals:
            obs[column] = totals[column].to_numpy()
        write_tables(file, obs, var, {"perturbflow": uns})
        if not measured.all():
            ad.io.write_elem(file["varm"], "measured", measured)
    for warning in account["warnings"]:
        logger.warning("%s", warning)
    shape = f"{account['cells']['kept']:,} cells × {len(var):,} genes"
    logger.info("%s: %s, %d perturbations", name, shape, len(account["perturbations"]["kept"]) - 1)
    write_json(report, account)
