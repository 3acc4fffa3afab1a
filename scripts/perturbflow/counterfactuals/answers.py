"""What if these genes were perturbed in these cells? Answered per cell, with a distribution of outcomes and an interval that was tested."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from scipy.spatial.distance import cdist

from perturbflow.controls import Context
from perturbflow.counterfactuals.contexts import Place, Places, contexts_of
from perturbflow.counterfactuals.questions import expanded, holding, perturbed_genes
from perturbflow.counterfactuals.search import Direction, ranked
from perturbflow.counterfactuals.warranty import fitting, was_checked
from perturbflow.embeddings import Embeddings
from perturbflow.errors import InputError
from perturbflow.genes.symbols import CONTROL, entities_of, entity_of, members_of
from perturbflow.io.anndata_file import begin_anndata, write_tables
from perturbflow.io.artefacts import load_artefact
from perturbflow.io.files import atomic, read_json
from perturbflow.models.base import Model, build
from perturbflow.models.calibration import Calibration, Scale, case_of
from perturbflow.pairs import Pairs
from perturbflow.progress import Progress

logger = logging.getLogger(__name__)

QUANTILES = (0.05, 0.5, 0.95)
LEVEL = 0.9  # of the intervals
MAX_CELLS = 1000
MAX_ROWS = 20_000  # perturbations × cells that are written
LEAST_CELLS = 50  # of a perturbation, however many are asked
CELLS_PER_BLOCK = 32
PROBED = 4  # cells that are asked first, whether the model has an answer
MANY = 20  # perturbations: of more, the table has the strongest genes only
GENES_OF_MANY = 50
LAYERS = ("before", "effect", *(f"q{int(100 * quantile):02d}" for quantile in QUANTILES))


def selected_cells(cells: Pairs, selection: str | dict) -> Pairs:
    """Return the test controls of a selection.

    Parameters
    ----------
    cells
        All cells of pairs.h5ad.
    selection
        "control", or {obs column: [values]}.

    Raises
    ------
    InputError
        If a column or value is not there.
    """
    test = cells.roles("test")
    mask = test.is_control.copy()
    if isinstance(selection, dict):
        mask &= holding(test.obs, selection, "cells")
    if not mask.any():
        raise InputError(
            f"cells: {selection} selects no test control; what-if questions start from controls that no model was trained on."
        )
    return test.select(mask)


@dataclass(frozen=True)
class Known:
    """What training knew of a perturbation.

    Attributes
    ----------
    words
        In words.
    case
        One of `conformal.CASES`.
    distance
        Of its unseen gene (the farthest, of several) to the nearest training gene, in units of the median distance of training genes to their nearest;
        0 where all genes were seen, NaN for a gene without a vector.
    is_elsewhere
        Whether training measured it in none of the contexts that are asked.
    """

    words: str
    case: str
    distance: float
    is_elsewhere: bool = False


class Knowledge:
    """Tells what training knew of perturbations."""

    def __init__(self, training: Pairs, vectors: Embeddings, chosen: Pairs) -> None:
        self.labels = set(training.perturbations)
        self.seen = sorted({gene for other in training.perturbations for gene in entities_of(other)})
        table = vectors.standardized(sorted({gene for other in training.perturbations for gene in members_of(other)}))
        self.table = table.groupby(
            list(map(entity_of, table.index))
        ).first()  # a compound has one vector, whatever its dose
        self.without_vector = set(map(entity_of, vectors.without_vector))
        own = self.table.reindex(self.seen).dropna().to_numpy()
        among = cdist(own, own)
        np.fill_diagonal(among, np.inf)
        self.typical = float(np.median(among.min(axis=1))) if len(own) > 1 else np.nan
        self.own = own
        self.asked = set(contexts_of(chosen.obs))
        self.places = Places(training)

    def of(self, label: str, asked: set[Place] | None = None) -> Known:
        """Return what was known of a canonical label in some of the contexts that are asked; in all of them without `asked`."""
        if label == CONTROL:
            return Known("no perturbation", "measured", 0.0)
        asked = self.asked if asked is None else asked
        case = case_of(label, self.labels, set(self.seen))
        where, is_elsewhere = self.places.words(label, asked), self.places.is_elsewhere(label, asked)
        unseen = [gene for gene in entities_of(label) if gene not in self.seen]
        if not unseen:
            is_single = len(members_of(label)) == 1
            words = (
                "measured"
                if case == "measured"
                else "measured at other doses"
                if is_single
                else "composed of measured genes"
            )
            return Known(words + where, case, 0.0, is_elsewhere)
        without = [gene for gene in unseen if gene not in self.table.index or gene in self.without_vector]
        words = f"extrapolation{',' if where else ''}{where}: {len(unseen)} gene(s) never perturbed in training"
        if without:
            return Known(f"{words}, {len(without)} of them without a vector", case, np.nan, is_elsewhere)
        distance = float(cdist(self.table.loc[unseen].to_numpy(), self.own).min(axis=1).max() / self.typical)
        words += f", {distance:.1f} times as far from the nearest as training genes are from one another"
        return Known(words, case, distance, is_elsewhere)

    def by_group(self, label: str, chosen: Pairs, groups: pd.Series) -> dict[str, Known]:
        """Return what was known of a label in all cells that are asked, and in every group of them."""
        contexts = pd.Series(contexts_of(chosen.obs), index=groups.index)
        of_groups = {name: self.of(label, set(contexts[groups == name])) for name in sorted(groups.unique())}
        return {"all": self.of(label), **of_groups}


@dataclass
class Answer:
    """One perturbation in all cells that are asked.

    Attributes
    ----------
    effects
        Expected effect of each cell, (cells, genes).
    up
        Share of samples above the start cell, ties half, per cell, (cells, genes).
    uncertainty
        Variance that the model gives its own idea of the mean effect, (genes,); None where it has none.
    """

    label: str
    known: Known
    effects: np.ndarray
    up: np.ndarray
    uncertainty: np.ndarray | None

    def response(self, is_target: np.ndarray) -> np.ndarray:
        """Return how far each cell goes the way of the mean effect, (cells,): 1 as the mean does, 0 not at all; perturbed genes left out."""
        mean = np.where(is_target, 0.0, self.effects.mean(axis=0))
        return self.effects @ mean / max(float(mean @ mean), 1e-12)


def blocks_of(
    model: Model, start: np.ndarray, context: Context, label: str, samples: int, seed: int
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield outcomes of a few cells at a time, (cells, samples, genes)."""
    for first in range(0, len(start), CELLS_PER_BLOCK):
        block = slice(first, min(first + CELLS_PER_BLOCK, len(start)))
        here = Context(context.strata[block], context.levels)
        yield block, model.counterfactual(start[block], [label], samples, seed + first, here)[0]


class Writer:
    """Writes {query}.h5ad block by block."""

    def __init__(self, file: h5py.File, n: int, genes: list[str], samples: int | None) -> None:
        self.file, self.genes = file, genes
        shape, chunks = (n, len(genes)), (min(n, CELLS_PER_BLOCK), len(genes))
        of = {"dtype": "f4", "compression": "gzip", "compression_opts": 1}
        begin_anndata(file)
        self.tables = {"X": file.create_dataset("X", shape, chunks=chunks, **of)}
        self.tables |= {name: file["layers"].create_dataset(name, shape, chunks=chunks, **of) for name in LAYERS}
        if samples:
            self.tables["samples"] = file["obsm"].create_dataset(
                "samples", (n, samples, len(genes)), chunks=(1, samples, len(genes)), **of
            )
        for table in self.tables.values():
            table.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})

    def finish(self, obs: pd.DataFrame, uns: dict) -> None:
        """Write what tells the rows."""
        for column in ("perturbation", "cell_type", "batch", "known"):
            obs[column] = pd.Categorical(obs[column])
        write_tables(self.file, obs, pd.DataFrame(index=self.genes), uns)


def answered(
    model: Model, start: np.ndarray, context: Context, label: str, known: Known, samples: int, seed: int, writer: Writer, first_row: int,
    progress: Progress,
) -> Answer:  # fmt: skip
    """Ask one perturbation of all cells, writing as the answers come."""
    effects = model.individual_effects(start, label, seed, context).astype(np.float32)
    up = np.zeros(start.shape, dtype=np.float32)
    for block, outcomes in blocks_of(model, start, context, label, samples, seed):
        rows = slice(first_row + block.start, first_row + block.stop)
        written = {"X": outcomes.mean(axis=1), "before": start[block], "effect": effects[block]}
        written |= dict(zip(LAYERS[2:], _quantiles(outcomes), strict=True))
        if "samples" in writer.tables:
            written["samples"] = outcomes
        for name, values in written.items():
            writer.tables[name][rows] = values
        before = start[block][:, None]
        up[block] = (outcomes > before).mean(axis=1) + 0.5 * (outcomes == before).mean(axis=1)
        progress.step()
    return Answer(label, known, effects, up, model.uncertainty(label, context))


def _quantiles(outcomes: np.ndarray) -> list[np.ndarray]:
    """Return the sample at each of QUANTILES, (cells, genes) each: an outcome that a cell can have, not a number between two."""
    n = outcomes.shape[1]
    ranks = [min(n - 1, max(0, round(quantile * n - 0.5))) for quantile in QUANTILES]
    placed = np.partition(outcomes, sorted(set(ranks)), axis=1)
    return [placed[:, rank] for rank in ranks]


def effect_table(
    answer: Answer,
    genes: list[str],
    groups: pd.Series,
    calibration: Calibration,
    scale: Scale,
    known: dict[str, Known],
    warranty: dict,
) -> pd.DataFrame:
    """Return one row per group of cells × gene, strongest first, see `counterfactual`; no interval where the warranty checked no such answer."""
    own = calibration.for_case(answer.known.case)
    reach = (
        own.reach(LEVEL) * scale.at(own.typical_sampling, answer.uncertainty)
        if own.labels and answer.label != CONTROL
        else np.full(len(genes), np.nan)
    )
    is_target = np.isin(genes, entities_of(answer.label))
    masks = {"all": np.ones(len(groups), dtype=bool)}
    if len(names := sorted(groups.unique())) > 1:
        masks |= {name: (groups == name).to_numpy() for name in names}
    tables = []
    for name, mask in masks.items():
        half = reach if was_checked(warranty, known[name].is_elsewhere) else np.full(len(genes), np.nan)
        effect, up = answer.effects[mask].mean(axis=0), answer.up[mask].mean(axis=0)
        table = pd.DataFrame(
            {
                "perturbation": answer.label, "group": name, "gene": genes, "effect": effect, "low": effect - half, "high": effect + half,
                "cells_low": np.quantile(answer.effects[mask], 0.05, axis=0), "cells_high": np.quantile(answer.effects[mask], 0.95, axis=0),
                "probability_of_sign": np.where(effect >= 0, up, 1.0 - up), "is_perturbed_gene": is_target, "known": known[name].words,
                "in_other_contexts": known[name].is_elsewhere,
            }
        )  # fmt: skip
        table["rank"] = table["effect"].abs().rank(ascending=False, method="first").astype(int)
        tables.append(table.sort_values("rank"))
    return pd.concat(tables)


def counterfactual(
    pairs: Path,
    embeddings: Path,
    model: Path,
    warranty: Path,
    calibration: Path,
    cells: Path,
    effects: Path,
    ranking: Path,
    implementation: str,
    params: dict,
    query: dict,
    seed: int,
    scored: str = "test",
) -> None:
    """Answer one query: each perturbation in each selected cell, with a distribution of outcomes.

    Parameters
    ----------
    pairs, embeddings, model, warranty, calibration
        The pairs of the split, its gene vectors, a model trained on both, and what its warranty has shown.
    cells
        AnnData to be written, one row per perturbation × cell: X mean outcome; layers before, effect (expected change of this cell), q05, q50, q95
        of its outcomes; obsm samples (cells, samples, genes), if asked for; obs perturbation, cell (name of the start cell), cell_type, batch, known,
        response (how far the cell goes the way of the mean effect); uns["perturbflow"] with the warranty.
    effects
        Table to be written, one row per perturbation × group of cells × gene: verdict (of the warranty, in words), effect (mean over cells,
        log1p-normalized), low and high (90 % conformal interval of what a screen would measure; empty without held-out perturbations), cells_low and cells_high (5 and 95 % quantile of
        the cells' effects), probability_of_sign (share of outcomes on the effect's side of the start cell), rank (by size), is_perturbed_gene, known, in_other_contexts
        (training measured it in none of the contexts of these cells: low and high are empty unless the warranty was checked on such perturbations).
        Of more than 20 perturbations, the 50 strongest genes of each.
    ranking
        Table to be written, one row per perturbation: size of the effect, genes whose interval leaves out zero, share of non-responding cells, known,
        distance, verdict, and for a search its score, chance and whether it is within the budget.
    query
        perturbations, cells, samples_per_cell, keep_samples, groups and search.
    scored
        Role that the model is scored on: it has learned from the others.

    Raises
    ------
    InputError
        For a gene that the screen does not know or the model cannot tell from others, or a selection without cells.
    """
    everything = Pairs.open(pairs)
    chosen = selected_cells(everything, query["cells"])
    family = build(implementation, params)
    family.restore(load_artefact(model))
    training, vectors = everything.fitted_on(scored).roles("train"), Embeddings.read(embeddings)
    labels = expanded(query["perturbations"], perturbed_genes(vectors, everything.perturbations), chosen.genes)
    knowledge = Knowledge(training, vectors, chosen)
    _check_answerable(family, labels, knowledge, chosen.X[:PROBED].toarray(), seed)
    most = max(LEAST_CELLS, min(MAX_CELLS, MAX_ROWS // len(labels)))
    if len(chosen.rows) > most:
        keep = np.zeros(len(chosen.rows), dtype=bool)
        keep[np.random.default_rng(seed).choice(len(keep), most, replace=False)] = True
        logger.info("%d of %d selected cells are asked", most, len(keep))
        chosen = chosen.select(keep)
    groups = _groups(chosen, query["groups"])
    shown = read_json(warranty)
    checked = {elsewhere: fitting(shown, elsewhere) for elsewhere in (False, True)}
    said = {
        **_warranty_words(checked, {label: knowledge.of(label).is_elsewhere for label in labels}), "cells": str(query["cells"]), "samples_per_cell": query["samples_per_cell"], "seed": seed,
        "level_of_intervals": LEVEL,
    }  # fmt: skip
    logger.info("verdict on this model: %s", said["verdict"])
    direction = Direction.of(query["search"], everything, chosen) if query["search"] else None
    with np.load(calibration) as arrays:
        stored = dict(arrays)
    found, scale = Calibration.from_arrays(stored), Scale(stored["variance"], stored["spread"])
    start, context = chosen.X[:].toarray(), chosen.context_of(np.arange(len(chosen.rows)))
    tables, rows, observed, means = [], [], [], {}
    logger.info(
        "%d perturbations are asked in %d cells, %d outcomes each", len(labels), len(start), query["samples_per_cell"]
    )
    progress = Progress(f"blocks of {CELLS_PER_BLOCK} cells", len(labels) * -(-len(start) // CELLS_PER_BLOCK))
    with atomic(cells) as partial, h5py.File(partial, "w") as file:
        writer = Writer(
            file, len(labels) * len(start), chosen.genes, query["samples_per_cell"] if query["keep_samples"] else None
        )
        for i, label in enumerate(labels):
            answer = answered(
                family,
                start,
                context,
                label,
                knowledge.of(label),
                query["samples_per_cell"],
                seed,
                writer,
                i * len(start),
                progress,
            )
            response = answer.response(np.isin(chosen.genes, entities_of(label)))
            in_context = {context: knowledge.of(label, {context}).words for context in knowledge.asked}
            known = [in_context[context] for context in contexts_of(chosen.obs)]
            obs = (
                chosen.obs[["cell_type", "batch"]]
                .astype(str)
                .assign(perturbation=label, cell=chosen.obs.index, known=known)
            )
            observed.append(obs.assign(response=response).set_axis([f"{label}:{cell}" for cell in chosen.obs.index]))
            table = effect_table(
                answer, chosen.genes, groups, found, scale, knowledge.by_group(label, chosen, groups), shown
            )
            table.insert(
                1,
                "verdict",
                table["in_other_contexts"].map({elsewhere: words[0] for elsewhere, words in checked.items()}),
            )
            means[label] = answer.effects.mean(axis=0)
            rows.append(_row(answer, table, response))
            tables.append(table[table["rank"] <= GENES_OF_MANY] if len(labels) > MANY else table)
            logger.info("%s (%s): largest effects %s", label, answer.known.words, rows[-1]["strongest"])
        writer.finish(pd.concat(observed), {"perturbflow": said})
    with atomic(effects) as partial:
        pd.concat(tables, ignore_index=True).to_csv(partial, sep="\t", index=False, float_format="%.6g")
    summary = pd.DataFrame(rows)
    if direction:
        summary = ranked(summary, means, chosen.genes, direction, query["search"]["budget"])
        logger.info("towards %s: %s", direction.words, ", ".join(summary["perturbation"].head(5)))
    with atomic(ranking) as partial:
        summary.to_csv(partial, sep="\t", index=False, float_format="%.6g")
    logger.info("warranty: %s", said["warranty"])


def _check_answerable(model: Model, labels: list[str], knowledge: Knowledge, cells: np.ndarray, seed: int) -> None:
    """Raise InputError for labels that the model refuses, or that it never saw and answers with no change at all: that is no answer."""
    refused = {label: reason for label in labels if (reason := model.refusal(label))}
    for label in labels:
        if (
            label not in refused
            and knowledge.of(label).case.startswith("unseen")
            and not model.individual_effects(cells, label, seed).any()
        ):
            refused[label] = (
                "it never saw it perturbed, and what it says of it is no change at all. Ask another model, such as set_gp"
            )
    if refused:
        raise InputError(
            " ".join(f"'{label}' cannot be answered by this model: {reason}." for label, reason in refused.items())
        )


def _warranty_words(checked: dict[bool, tuple[str, str]], is_elsewhere: dict[str, bool]) -> dict[str, str]:
    """Return verdict and warranty of an answer in words; where some perturbations were measured in other contexts alone, theirs after it.

    Parameters
    ----------
    checked
        Verdict and warranty on perturbations that are measured in other contexts alone (True), and on others.
    """
    labels = [label for label, elsewhere in is_elsewhere.items() if elsewhere]
    verdict, words = checked[len(labels) == len(is_elsewhere)]
    if len(labels) not in (0, len(is_elsewhere)):
        named = ", ".join(labels[:5]) + (f" and {len(labels) - 5} more" if len(labels) > 5 else "")
        verdict, words = (
            f"{own}. Of {named}, measured in other contexts: {other}"
            for own, other in zip(*checked.values(), strict=True)
        )
    return {"verdict": verdict, "warranty": words}


def _groups(chosen: Pairs, column: str) -> pd.Series:
    if column not in chosen.obs:
        raise InputError(f"groups: there is no obs column '{column}'; possible: {', '.join(chosen.obs.columns)}.")
    return chosen.obs[column].astype(str)


def _row(answer: Answer, table: pd.DataFrame, response: np.ndarray) -> dict[str, object]:
    """Return one perturbation's row of the ranking."""
    table = table[table["group"] == "all"]
    others = table[~table["is_perturbed_gene"]]
    told = (others["low"] > 0) | (others["high"] < 0)
    return {
        "perturbation": answer.label, "verdict": table["verdict"].iloc[0], "size": float(np.linalg.norm(others["effect"])), "n_genes_told": int(told.sum()),
        "not_responding": float((response < 0.5).mean()), "spread_of_response": float(response.std()),
        "strongest": ", ".join(f"{row.gene} {row.effect:+.2f}" for row in table.head(5).itertuples()),
        "known": answer.known.words, "distance": answer.known.distance, "in_other_contexts": answer.known.is_elsewhere,
    }  # fmt: skip
