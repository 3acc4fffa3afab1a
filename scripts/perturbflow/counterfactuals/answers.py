"""What if these genes were perturbed in these cells? Each cell has a distribution of outcomes and a tested interval."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Self

import h5py
import numpy as np
import pandas as pd

from perturbflow.controls import Context
from perturbflow.counterfactuals.contexts import contexts_of
from perturbflow.counterfactuals.effects_file import EffectsFile, effects_file
from perturbflow.counterfactuals.novelty import Novelty, TrainingKnowledge
from perturbflow.counterfactuals.questions import expanded, holding, perturbed_genes, term_of
from perturbflow.counterfactuals.search import Direction, ranked
from perturbflow.counterfactuals.trust import Kept, Trust
from perturbflow.counterfactuals.warranty import Fitting, fitting, was_checked
from perturbflow.embeddings import Embeddings
from perturbflow.errors import InputError
from perturbflow.genes.symbols import CONTROL, entities_of
from perturbflow.io.anndata_file import begin_anndata, write_tables
from perturbflow.io.artefacts import load_artefact
from perturbflow.io.files import atomic, read_json
from perturbflow.models.base import Model, build
from perturbflow.models.calibration import Calibration, Scale, promised
from perturbflow.pairs import Pairs
from perturbflow.progress import Progress, progressed

logger = logging.getLogger(__name__)

QUANTILES = (0.05, 0.5, 0.95)
LEVEL = 0.9  # of the intervals
MAX_CELLS = 1000
MAX_ROWS = 20_000  # perturbations × cells that are written
LEAST_CELLS = 50  # of a perturbation, whatever their number
CELLS_PER_BLOCK = 32
PROBED = 4  # cells that are asked first, to see whether the model has an answer
MANY = 20  # perturbations: of more, the table has the strongest genes only
GENES_OF_MANY = 50
MOST_DRAWN = MAX_ROWS // LEAST_CELLS  # perturbations: of more, the best of the ranking alone have cells
N_LEANT_ON = 8  # training perturbations that are named
LABELS_AT_ONCE = 250  # of which only means are asked
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
            f"cells: {selection} selects no test control. What-if questions start from controls that no model was "
            "trained on."
        )
    return test.select(mask)


@dataclass(frozen=True)
class Question:
    """A model, and the cells that it is asked about.

    Attributes
    ----------
    start
        Control cells, (cells, genes).
    context
        Their batches and cell types.
    samples
        Outcomes per cell.
    """

    model: Model
    start: np.ndarray
    context: Context
    samples: int
    seed: int


@dataclass(frozen=True)
class Checks:
    """The checks of a model: its warranty, the words of it, and the calibration of its intervals.

    Attributes
    ----------
    content
        Of warranty.json.
    words
        For perturbations that training measured in other contexts alone (True), and for others.
    known_kept
        What answers like one kept, by novelty and promise.
    """

    content: dict
    words: dict[bool, Fitting]
    calibration: Calibration
    scale: Scale
    known_kept: dict[tuple[str, float], Kept | None] = field(default_factory=dict)

    @classmethod
    def read(cls, warranty: Path, calibration: Path) -> Self:
        """Read the files of the rule warranty."""
        content = read_json(warranty)
        with np.load(calibration) as arrays:
            stored = dict(arrays)
        return cls(
            content,
            {elsewhere: fitting(content, elsewhere) for elsewhere in (False, True)},
            Calibration.from_arrays(stored),
            Scale(stored["variance"], stored["spread"], stored["mean"]),
        )

    def half_width(self, answer: Answer, is_elsewhere: bool) -> np.ndarray:
        """Return half the width of the intervals of an answer, (genes,); NaN where no such answer was checked."""
        own = self.calibration.for_novelty(answer.novelty.kind)
        if not own.labels or answer.label == CONTROL or not was_checked(self.content, is_elsewhere):
            return np.full(answer.effects.shape[1], np.nan)
        return own.reach(LEVEL) * self.scale.at(own.typical_sampling, answer.uncertainty)

    def trust(self, answer: Answer, knowledge: TrainingKnowledge, genes: list[str]) -> Trust:
        """Return how far an answer can be believed."""
        kept, effect = ~np.isin(genes, entities_of(answer.label)), answer.effects.mean(axis=0)
        sampling = self.calibration.typical_sampling
        unit = self.scale.at(sampling if np.isfinite(sampling) else 0.0, answer.uncertainty)
        promise = promised(effect[kept], unit[kept])
        variance = answer.uncertainty
        is_known = was_checked(self.content, answer.novelty.is_elsewhere) and answer.label != CONTROL
        return Trust(
            answer.novelty.kind,
            promise,
            np.nan if variance is None else float(np.sqrt(variance[kept].mean())),
            set(entities_of(answer.label)) <= set(genes),
            *knowledge.neighbourhood.of(answer.label),
            self._kept_of(answer.novelty.kind, round(promise, 2)) if is_known else None,
            tuple(knowledge.neighbourhood.names(answer.label)[:N_LEANT_ON]),
            answer.novelty.is_elsewhere,
        )

    def _kept_of(self, novelty: str, promise: float) -> Kept | None:
        """Look up what answers like one kept; of a thousand answers with one promise, once."""
        if (novelty, promise) not in self.known_kept:
            self.known_kept[novelty, promise] = Kept.of(self.calibration, novelty, promise)
        return self.known_kept[novelty, promise]

    def words_of(self, is_elsewhere: dict[str, bool]) -> dict[str, str]:
        """Return verdict and warranty of an answer in words.

        Parameters
        ----------
        is_elsewhere
            Label → whether it was measured in other contexts alone. If some labels were, their words come last.
        """
        labels = [label for label, elsewhere in is_elsewhere.items() if elsewhere]
        verdict, warranty = self.words[len(labels) == len(is_elsewhere)]
        if len(labels) not in (0, len(is_elsewhere)):
            named = ", ".join(labels[:5]) + (f" and {len(labels) - 5} more" if len(labels) > 5 else "")
            verdict, warranty = (
                f"{own}. Of {named}, measured in other contexts: {other}"
                for own, other in zip(self.words[False], self.words[True], strict=True)
            )
        return {"verdict": verdict, "warranty": warranty}


@dataclass
class Answer:
    """One perturbation in all cells that are asked.

    Attributes
    ----------
    effects
        Expected effect in each cell, (cells, genes).
    up
        Share of samples above the start cell, ties half, per cell, (cells, genes).
    uncertainty
        The model's own variance of the mean effect, (genes,); None where it has none.
    trust
        How far it can be believed.
    """

    label: str
    novelty: Novelty
    effects: np.ndarray
    up: np.ndarray
    uncertainty: np.ndarray | None
    trust: Trust | None = None

    def response(self, is_target: np.ndarray) -> np.ndarray:
        """Return how far each cell goes along the mean effect, (cells,): 1 as far as the mean, 0 not at all.

        Perturbed genes are left out.
        """
        mean = np.where(is_target, 0.0, self.effects.mean(axis=0))
        return self.effects @ mean / max(float(mean @ mean), 1e-12)


def blocks_of(question: Question, label: str) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield outcomes of a few cells at a time, (cells, samples, genes)."""
    start, context = question.start, question.context
    for first in range(0, len(start), CELLS_PER_BLOCK):
        block = slice(first, min(first + CELLS_PER_BLOCK, len(start)))
        here = replace(context, strata=context.strata[block])
        yield (
            block,
            question.model.counterfactual(start[block], [label], question.samples, question.seed + first, here)[0],
        )


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
        """Write the tables that describe the rows."""
        for column in ("perturbation", "cell_type", "batch", "known"):
            obs[column] = pd.Categorical(obs[column])
        write_tables(self.file, obs, pd.DataFrame(index=self.genes), uns)


def answered(
    question: Question, label: str, novelty: Novelty, writer: Writer, first_row: int, progress: Progress
) -> Answer:
    """Ask one perturbation of all cells, writing as the answers come."""
    start, context = question.start, question.context
    effects = question.model.individual_effects(start, label, question.seed, context).astype(np.float32)
    up = np.zeros(start.shape, dtype=np.float32)
    for block, outcomes in blocks_of(question, label):
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
    return Answer(label, novelty, effects, up, question.model.uncertainty(label, context))


def _quantiles(outcomes: np.ndarray) -> list[np.ndarray]:
    """Return the sample at each of QUANTILES, (cells, genes) each: an outcome of a cell, not a number between two."""
    n = outcomes.shape[1]
    ranks = [min(n - 1, max(0, round(quantile * n - 0.5))) for quantile in QUANTILES]
    placed = np.partition(outcomes, sorted(set(ranks)), axis=1)
    return [placed[:, rank] for rank in ranks]


def effect_table(
    answer: Answer, genes: list[str], groups: pd.Series, novelties: dict[str, Novelty], checks: Checks
) -> pd.DataFrame:
    """Return one row per group of cells × gene, strongest first, see `counterfactual`."""
    is_target = np.isin(genes, entities_of(answer.label))
    masks = {"all": np.ones(len(groups), dtype=bool)}
    if len(names := sorted(groups.unique())) > 1:
        masks |= {name: (groups == name).to_numpy() for name in names}
    tables = []
    for name, mask in masks.items():
        novelty = novelties[name]
        half = checks.half_width(answer, novelty.is_elsewhere)
        effect, up = answer.effects[mask].mean(axis=0), answer.up[mask].mean(axis=0)
        table = pd.DataFrame(
            {
                "perturbation": answer.label,
                "verdict": checks.words[novelty.is_elsewhere].verdict,
                "trust": answer.trust.words if answer.trust else "",
                "group": name,
                "gene": genes,
                "effect": effect,
                "low": effect - half,
                "high": effect + half,
                "cells_low": np.quantile(answer.effects[mask], 0.05, axis=0),
                "cells_high": np.quantile(answer.effects[mask], 0.95, axis=0),
                "probability_of_sign": np.where(effect >= 0, up, 1.0 - up),
                "is_perturbed_gene": is_target,
                "known": novelty.words,
                "in_other_contexts": novelty.is_elsewhere,
            }
        )
        table["rank"] = table["effect"].abs().rank(ascending=False, method="first").astype(int)
        tables.append(table.sort_values("rank"))
    return pd.concat(tables)


class Results:
    """Tables of the answers to one query, gathered as the answers come.

    Parameters
    ----------
    chosen, groups
        The cells of the question, and the group of each.
    is_long
        Whether tables of effects have the strongest genes only.
    """

    def __init__(
        self, chosen: Pairs, groups: pd.Series, knowledge: TrainingKnowledge, checks: Checks, is_long: bool
    ) -> None:
        self.chosen, self.groups, self.knowledge, self.checks = chosen, groups, knowledge, checks
        self.is_long = is_long
        self.obs: list[pd.DataFrame] = []
        self.effects: list[pd.DataFrame] = []
        self.ranking: list[dict] = []
        self.means: dict[str, np.ndarray] = {}
        self.half_widths: list[np.ndarray] = []

    def add(self, answer: Answer) -> None:
        """Take in the answer on one perturbation."""
        label, chosen = answer.label, self.chosen
        answer.trust = self.checks.trust(answer, self.knowledge, chosen.genes)
        response = answer.response(np.isin(chosen.genes, entities_of(label)))
        in_context = {context: self.knowledge.of(label, {context}).words for context in self.knowledge.asked}
        known = [in_context[context] for context in contexts_of(chosen.obs)]
        obs = chosen.obs[["cell_type", "batch"]].astype(str)
        obs = obs.assign(perturbation=label, cell=chosen.obs.index, known=known, response=response)
        self.obs.append(obs.set_axis([f"{label}:{cell}" for cell in chosen.obs.index]))
        novelties = self.knowledge.by_group(label, chosen, self.groups)
        table = effect_table(answer, chosen.genes, self.groups, novelties, self.checks)
        self.effects.append(table[table["rank"] <= GENES_OF_MANY] if self.is_long else table)
        self.means[label] = answer.effects.mean(axis=0)
        self.half_widths.append(self.checks.half_width(answer, answer.novelty.is_elsewhere))
        self.ranking.append(_row(answer, chosen.genes, self.half_widths[-1], self.checks, response))
        logger.info("%s (%s): largest effects %s", label, answer.novelty.words, self.ranking[-1]["strongest"])


def counterfactual(
    pairs: Path,
    embeddings: Path,
    model: Path,
    warranty: Path,
    calibration: Path,
    cells: Path,
    effects: Path,
    ranking: Path,
    all_effects: Path,
    implementation: str,
    params: dict,
    query: dict,
    seed: int,
    scored: str = "test",
    gene_vectors: Path | None = None,
    annotations: list[Path] | None = None,
    roles: list | None = None,
) -> None:
    """Answer one query: each perturbation in each selected cell, with a distribution of outcomes.

    Parameters
    ----------
    pairs, embeddings, model, warranty, calibration
        The pairs of the split, its gene vectors, a model trained on both, and the files of its warranty.
    cells
        AnnData to be written, one row per perturbation × cell. X is the mean outcome. Layers are before, effect (the
        expected change of this cell), and q05, q50, q95 of its outcomes. obsm has samples (cells, samples, genes), if
        asked for. obs has perturbation, cell (name of the start cell), cell_type, batch, known, and response (how far
        the cell goes along the mean effect). uns["perturbflow"] has the warranty. Of more than 400 perturbations, it
        has the first of the ranking alone, as many as the query's `drawn`.
    effects
        Table to be written, one row per perturbation × group of cells × gene; of more than 20 perturbations, the 50
        strongest genes of each. verdict is that of the warranty, and trust says what answers like it were worth, in
        words. effect is the mean over cells,
        log1p-normalized. low and high are the 90 % conformal interval of a screen's measurement. cells_low and
        cells_high are the 5 and 95 % quantile of the cells' effects. probability_of_sign is the share of outcomes on
        the effect's side of the start cell. rank is by size. is_perturbed_gene and known follow. in_other_contexts
        marks perturbations that training measured in none of the contexts of these cells. low and high are empty
        without held-out perturbations, or if the warranty was not checked on such perturbations.
    ranking
        Table to be written, one row per perturbation: verdict and trust, in words; promised, kept and the other
        numbers of trust (`trust.Trust`); size of the effect, genes whose interval leaves out zero, share
        of cells that do not respond, known, distance, verdict. A search adds its score, chance and whether the
        perturbation is within the budget. Of more than 400 perturbations, the best is first: by score, or by size.
    all_effects
        AnnData to be written, perturbations × genes, of all that were asked (`effects_file.EffectsFile`).
    query
        perturbations, cells, samples_per_cell, keep_samples, groups, search and drawn.
    scored
        Role that the model is scored on. It has learned from the others.
    gene_vectors
        Vectors of all genes; None: only genes that are perturbed or measured in the screen can be asked about.
    annotations, roles
        Files of GO annotations, and the role of each, for a question about the genes of a term.

    Raises
    ------
    InputError
        For a gene that has no vector or that the model does not distinguish from others, or a selection without cells.
    """
    everything = Pairs.open(pairs)
    chosen = selected_cells(everything, query["cells"])
    family = build(implementation, params)
    family.restore(load_artefact(model))
    vectors, everyone = Embeddings.read(embeddings), Embeddings.read(gene_vectors) if gene_vectors else None
    of_term = term_of(query["perturbations"], annotations or [], roles or [])
    perturbed = perturbed_genes(vectors, everything.perturbations)
    labels = expanded(query["perturbations"], perturbed, chosen.genes, everyone, of_term)
    training = everything.fitted_on(scored)
    vectors = _with_asked_genes(family, training, vectors, everyone or vectors, labels, seed)
    knowledge = TrainingKnowledge(training.roles("train"), vectors, chosen)
    _check_answerable(family, labels, knowledge, chosen.X[:PROBED].toarray(), seed)
    checks = Checks.read(warranty, calibration)
    direction = Direction.of(query["search"], everything, chosen) if query["search"] else None
    drawn, known_of_all = labels, pd.DataFrame()
    answers = Answers(family, chosen, knowledge, checks, query, seed)
    with effects_file(all_effects, len(labels), chosen.genes) as file:
        if len(labels) > MOST_DRAWN:
            sought = direction, query["search"]
            known_of_all = ranked_by_means(family, labels, chosen, knowledge, checks, *sought, seed, file)
            drawn = known_of_all["perturbation"].head(query.get("drawn", MANY)).tolist()
        answers.write(drawn, cells)
        results, summary = answers.results, pd.DataFrame(answers.results.ranking)
        if not known_of_all.empty:
            summary = completed(known_of_all, summary)
        else:
            file.add(labels, np.stack(list(results.means.values())), np.stack(results.half_widths))
            if direction:
                summary = ranked(summary, results.means, chosen.genes, direction, query["search"]["budget"])
                logger.info("towards %s: %s", direction.words, ", ".join(summary["perturbation"].head(5)))
        file.finish(summary, {"perturbflow": answers.words | {"level_of_intervals": LEVEL}})
    _write_table(effects, pd.concat(results.effects, ignore_index=True))
    _write_table(ranking, summary)
    logger.info("warranty: %s", answers.words["warranty"])


class Answers:
    """The answers to one query, with cells drawn for every perturbation, see `counterfactual`."""

    def __init__(
        self, model: Model, chosen: Pairs, knowledge: TrainingKnowledge, checks: Checks, query: dict, seed: int
    ) -> None:
        self.model, self.chosen, self.knowledge, self.checks = model, chosen, knowledge, checks
        self.query, self.seed = query, seed

    def write(self, labels: list[str], cells: Path) -> None:
        """Answer, and write {query}.h5ad; the tables are in `results`, verdict and warranty in `words`."""
        query, knowledge = self.query, self.knowledge
        chosen = _few_enough(self.chosen, len(labels), self.seed)
        groups = _groups(chosen, query["groups"])
        self.results = results = Results(chosen, groups, knowledge, self.checks, len(labels) > MANY)
        self.words = self.checks.words_of({label: knowledge.of(label).is_elsewhere for label in labels})
        logger.info("verdict on this model: %s", self.words["verdict"])
        samples = query["samples_per_cell"]
        facts = {
            "cells": str(query["cells"]), "samples_per_cell": samples, "seed": self.seed, "level_of_intervals": LEVEL,
        }  # fmt: skip
        start, context = chosen.X[:].toarray(), chosen.context_of(np.arange(len(chosen.rows)))
        question = Question(self.model, start, context, samples, self.seed)
        logger.info("%d perturbations are asked in %d cells, %d outcomes each", len(labels), len(start), samples)
        progress = Progress(f"blocks of {CELLS_PER_BLOCK} cells", len(labels) * -(-len(start) // CELLS_PER_BLOCK))
        with atomic(cells) as partial, h5py.File(partial, "w") as file:
            writer = Writer(file, len(labels) * len(start), chosen.genes, samples if query["keep_samples"] else None)
            for i, label in enumerate(labels):
                results.add(answered(question, label, knowledge.of(label), writer, i * len(start), progress))
            writer.finish(pd.concat(results.obs), {"perturbflow": self.words | facts})


def _with_asked_genes(
    model: Model, training: Pairs, vectors: Embeddings, everyone: Embeddings, labels: list[str], seed: int
) -> Embeddings:
    """Return the vectors of perturbed genes and of those that are asked about, after the model took these in."""
    joined = vectors.with_genes_of(everyone, [name for label in labels for name in entities_of(label)])
    if n_further := len(joined.table) - len(vectors.table):
        logger.info("%d genes are asked that the screen does not perturb", n_further)
        model.add_genes(training, joined, seed)
    return joined


def ranked_by_means(
    model: Model,
    labels: list[str],
    chosen: Pairs,
    knowledge: TrainingKnowledge,
    checks: Checks,
    direction: Direction | None,
    search: dict | None,
    seed: int,
    file: EffectsFile,
) -> pd.DataFrame:
    """Return the ranking of many perturbations by mean effects alone; these are written, a block of them at a time.

    Columns of the ranking that need drawn cells are not there yet.
    """
    cells = _few_enough(chosen, len(labels), seed)
    start, context = cells.X[:].toarray(), cells.context_of(np.arange(len(cells.rows)))
    logger.info("%d perturbations are ranked by their mean effects in %d cells", len(labels), len(start))
    rows, sought = [], []
    blocks = [labels[first : first + LABELS_AT_ONCE] for first in range(0, len(labels), LABELS_AT_ONCE)]
    for block in progressed(blocks, f"blocks of {LABELS_AT_ONCE} perturbations", len(blocks)):
        means = model.mean_effects(start, block, seed, context).astype(np.float32)
        variances, half_widths = model.uncertainties(block, context), []
        for i, label in enumerate(block):
            variance = None if variances is None else variances[i]
            answer = Answer(label, knowledge.of(label), means[i][None], np.zeros((0, 0)), variance)
            answer.trust = checks.trust(answer, knowledge, chosen.genes)
            half_widths.append(checks.half_width(answer, answer.novelty.is_elsewhere))
            rows.append(mean_row(answer, chosen.genes, half_widths[-1], checks))
        file.add(block, means, np.stack(half_widths))
        if direction:
            sought.append(direction.scored(block, means, chosen.genes))
    table = pd.DataFrame(rows)
    if direction and search:
        found = direction.ranked(table, pd.concat(sought, ignore_index=True), search["budget"])
        logger.info("towards %s: %s", direction.words, ", ".join(found["perturbation"].head(5)))
        return found
    return table.sort_values("size", ascending=False, ignore_index=True)


def completed(of_all: pd.DataFrame, drawn: pd.DataFrame) -> pd.DataFrame:
    """Return the ranking of all perturbations, with the columns that only drawn cells give where there are some."""
    further = [column for column in drawn if column not in of_all]
    return of_all.merge(drawn[["perturbation", *further]], on="perturbation", how="left")


def _few_enough(chosen: Pairs, n_perturbations: int, seed: int) -> Pairs:
    """Return a sample of the chosen cells, if they are too many for so many perturbations."""
    most = max(LEAST_CELLS, min(MAX_CELLS, MAX_ROWS // n_perturbations))
    if len(chosen.rows) <= most:
        return chosen
    keep = np.zeros(len(chosen.rows), dtype=bool)
    keep[np.random.default_rng(seed).choice(len(keep), most, replace=False)] = True
    logger.info("%d of %d selected cells are asked", most, len(keep))
    return chosen.select(keep)


def _write_table(path: Path, table: pd.DataFrame) -> None:
    with atomic(path) as partial:
        table.to_csv(partial, sep="\t", index=False, float_format="%.6g")


def _check_answerable(
    model: Model, labels: list[str], knowledge: TrainingKnowledge, cells: np.ndarray, seed: int
) -> None:
    """Raise InputError for labels that the model refuses, or answers with no change because it never saw them.

    Of more than MOST_DRAWN labels, the first MANY unseen ones are asked alone: a model is silent on all or on none.
    """
    refused = {label: reason for label in labels if (reason := model.refusal(label))}
    unseen = (label for label in labels if label not in refused and knowledge.of(label).kind.startswith("unseen"))
    for label in itertools.islice(unseen, MANY if len(labels) > MOST_DRAWN else None):
        if not model.individual_effects(cells, label, seed).any():
            refused[label] = (
                "it never saw it perturbed, and predicts no change at all. Ask another model, such as set_gp"
            )
    if refused:
        named = [f"'{label}' cannot be answered by this model: {reason}." for label, reason in refused.items()]
        more = [f"So it is with {len(named) - MANY:,} more."] if len(named) > MANY else []
        raise InputError(" ".join(named[:MANY] + more))


def _groups(chosen: Pairs, column: str) -> pd.Series:
    if column not in chosen.obs:
        raise InputError(f"groups: there is no obs column '{column}'; possible: {', '.join(chosen.obs.columns)}.")
    return chosen.obs[column].astype(str)


def mean_row(answer: Answer, genes: list[str], half: np.ndarray, checks: Checks) -> dict[str, object]:
    """Return the part of a perturbation's row of the ranking that its mean effect and its interval tell."""
    effect = answer.effects.mean(axis=0)
    others = ~np.isin(genes, entities_of(answer.label))
    strongest = np.argsort(-np.abs(effect), kind="stable")[:5]
    return {
        "perturbation": answer.label,
        "verdict": checks.words[answer.novelty.is_elsewhere].verdict,
        **(answer.trust.row if answer.trust else {}),
        "size": float(np.linalg.norm(effect[others])),
        "n_genes_told": int((np.abs(effect) > half)[others].sum()),
        "strongest": ", ".join(f"{genes[i]} {effect[i]:+.2f}" for i in strongest),
        "known": answer.novelty.words,
        "distance": answer.novelty.distance,
        "in_other_contexts": answer.novelty.is_elsewhere,
    }


def _row(answer: Answer, genes: list[str], half: np.ndarray, checks: Checks, response: np.ndarray) -> dict[str, object]:
    """Return one perturbation's row of the ranking."""
    return mean_row(answer, genes, half, checks) | {
        "not_responding": float((response < 0.5).mean()),
        "spread_of_response": float(response.std()),
    }
