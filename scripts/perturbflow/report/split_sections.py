"""Sections on the runs of one dataset × split: data, roles, audit, every perturbation, effects and training curves."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import pandas as pd

from perturbflow.evaluation import Scored
from perturbflow.io.files import read_json
from perturbflow.pairs import Pairs
from perturbflow.report.boards import Titled
from perturbflow.report.cards import ModelCard, place_of, read_table
from perturbflow.report.cell_map import cell_maps
from perturbflow.report.context_agreement import Agreement, matrix_figure
from perturbflow.report.heatmap import effect_heatmap
from perturbflow.report.plotting import Plots
from perturbflow.report.scatter_plots import Chosen, choose, effect_figures, scored_of
from perturbflow.report.sections import (
    CORRELATION,
    Names,
    PerturbationTable,
    history_of,
    perturbation_table,
    training_curves,
)
from perturbflow.splits.divisions import ROLES

logger = logging.getLogger(__name__)

PERTURBATION_ROWS = 4000  # of the tables of perturbations, on a page of less than 10 MB

Place = tuple[str, ...]


@dataclass(frozen=True)
class RunFiles:
    """Files of the runs by place: dataset, split, model and seed, or dataset and split.

    Attributes
    ----------
    facts
        The content of every run.json.
    scores
        All rows of metrics.tsv.
    divisions, audits
        The content of every split.json and audit.json.
    predictions, pairs
        Paths.
    """

    facts: dict[Place, dict]
    scores: pd.DataFrame
    predictions: dict[Place, Path]
    divisions: dict[Place, dict]
    audits: dict[Place, dict]
    pairs: dict[Place, Path]

    @classmethod
    def read(
        cls,
        runs: Iterable[Path],
        metrics: Iterable[Path],
        predictions: Iterable[Path],
        splits: Iterable[Path],
        audits: Iterable[Path],
        pairs: Iterable[Path],
    ) -> Self:
        """Read the files, as `report` has them."""
        return cls(
            {place_of(path, 4): read_json(path) for path in runs},
            read_table(metrics),
            {place_of(path, 4): path for path in predictions},
            {place_of(path, 2): read_json(path) for path in splits},
            {place_of(path, 2): read_json(path) for path in audits},
            {place_of(path, 2): path for path in pairs},
        )

    @property
    def seeds(self) -> list[int]:
        """Seeds, in the order of the runs."""
        return list(dict.fromkeys(int(run["seed"]) for run in self.facts.values()))

    def scores_of(self, dataset: str, split: str) -> pd.DataFrame:
        """Return the rows of metrics.tsv of one dataset × split."""
        return self.scores[(self.scores["dataset"] == dataset) & (self.scores["split"] == split)]


@dataclass
class SplitSection(Titled):
    """The runs of one dataset × split: its data, roles and audit, its scores, effects and curves."""

    dataset: str
    split: str
    spec: dict
    roles: dict[str, dict]
    contexts: dict[str, list[str]]  # per role, where contexts are held out
    n_cells: int
    n_genes: int
    checks: dict[str, str]  # of the audit → passed
    perturbations: PerturbationTable
    left_out: Names
    without_row: dict[str, Names]
    without_vector: Names
    matched: dict[str, Any]  # across batches, of the audit
    matched_batches: Names
    chosen: Chosen | None = None
    agreement: dict[str, Any] | None = None  # of the effects of contexts, where contexts are held out
    heatmap: str | None = None  # of measured and predicted effects
    maps: list[dict] = field(default_factory=list)  # of cells
    effects: list[dict] = field(default_factory=list)
    other_effects: list[dict] = field(default_factory=list)
    curves: list[dict] = field(default_factory=list)

    @classmethod
    def of(cls, dataset: str, split: str, run: RunFiles, cards: dict[str, ModelCard]) -> Self:
        """Gather the facts of one dataset × split; effects and curves come later."""
        division, audited = run.divisions[dataset, split], run.audits[dataset, split]
        n_cells, n_genes = Pairs.open(run.pairs[dataset, split]).X.shape
        scores = run.scores_of(dataset, split)
        models = [model for model in cards if model in set(scores["model"])]
        matched = audited["matched_across_batches"]
        return cls(
            dataset,
            split,
            division["spec"],
            {role: _role(division, role) for role in ROLES},
            division.get("contexts") or {},
            n_cells,
            n_genes,
            audited["checks"],
            perturbation_table(scores, models, PERTURBATION_ROWS // len(run.divisions)),
            Names.of(division["left_out"]),
            {source: Names.of(genes) for source, genes in audited["without_row"].items() if genes},
            Names.of(audited["without_vector"]),
            matched,
            Names.of(f"{batch} ({n:,})" for batch, n in matched["batches"].items()),
            choose(scores[scores["metric"] == CORRELATION], cards),
        )


def _role(division: dict, role: str) -> dict[str, Any]:
    """Return the perturbations and numbers of cells of one role."""
    labels = division["perturbations"][role]
    return {
        "perturbations": Names.of(labels),
        "n": len(labels),
        "controls": division["controls"][role],
        "cells": division["n_cells"][role],
    }


def _curves(section: SplitSection, run: RunFiles, cards: dict[str, ModelCard], plots: Plots) -> list[dict]:
    """Return the training curves of the models of one dataset × split."""
    histories: dict[str, list[list[dict]]] = {}
    for place, facts in run.facts.items():
        if place[:2] == (section.dataset, section.split) and facts["history"]:
            histories.setdefault(place[2], []).append(history_of(facts))
    return training_curves(histories, section.title, cards, plots)


def _predictions(section: SplitSection, chosen: Chosen, run: RunFiles) -> dict[str, Path]:
    """Return the predictions of the models that are shown of one dataset × split, for the first seed."""
    place = section.dataset, section.split
    return {model: run.predictions[(*place, model, f"seed_{run.seeds[0]}")] for model in chosen.models}


def _effects(
    section: SplitSection,
    chosen: Chosen,
    scored: dict[str, Scored],
    run: RunFiles,
    cards: dict[str, ModelCard],
    plots: Plots,
) -> list[dict]:
    """Return the scatter plots of the chosen perturbations and models of one dataset × split, for the first seed."""
    here = run.scores_of(section.dataset, section.split)
    here = here[(here["metric"] == CORRELATION) & (here["seed"] == run.seeds[0])]
    correlations = here.set_index(["model", "perturbation"])["value"].to_dict()
    genes = Pairs.open(run.pairs[section.dataset, section.split]).genes
    return effect_figures(chosen, scored, genes, correlations, cards, plots)


def _agreement(section: SplitSection, run: RunFiles, plots: Plots) -> dict[str, Any] | None:
    """Return the matrix of contexts of a split that holds some out, as a figure and in words."""
    if not section.contexts:
        return None
    found = Agreement.of(Pairs.open(run.pairs[section.dataset, section.split]), section.spec["covariate"])
    if found is None:
        return None
    alternative = f"{section.title}: agreement of effects, by source and target context"
    return {"words": found.words, "figure": plots.svg(alternative, matrix_figure, found)}


def split_sections(run: RunFiles, cards: dict[str, ModelCard], plots: dict[str, Plots]) -> list[SplitSection]:
    """Return a section per dataset × split of the runs.

    Parameters
    ----------
    plots
        Those of the sections "training", "contexts", "heatmaps", "maps" and "effects".
    """
    sections = []
    for dataset, split in dict.fromkeys((dataset, split) for dataset, split, _, _ in run.facts):
        section = SplitSection.of(dataset, split, run, cards)
        section.curves = _curves(section, run, cards, plots["training"])
        n_figures = sum(len(model["panels"]) for model in section.curves)
        logger.info("%s: %d figures of training", section.title, n_figures)
        section.agreement = _agreement(section, run, plots["contexts"])
        sections.append(section)
    # The best and worst perturbations of every split first, then as many others as there is room for.
    scored: dict[str, dict[str, Scored]] = {}
    for section in sections:
        if section.chosen and plots["effects"].bytes_left > 0:
            pairs, predictions = run.pairs[section.dataset, section.split], _predictions(section, section.chosen, run)
            scored[section.title] = scored_of(section.chosen, pairs, predictions)
            shown = section.chosen, scored[section.title], Pairs.open(pairs).genes, section.title
            section.heatmap = effect_heatmap(*shown, plots["heatmaps"])
            section.maps = cell_maps(section.chosen, pairs, predictions, cards, section.title, plots["maps"])
            section.effects = _effects(section, section.chosen, scored[section.title], run, cards, plots["effects"])
    for section in sections:
        if section.title in scored and section.chosen and section.chosen.others and plots["effects"].bytes_left > 0:
            others = section.chosen.rest()
            section.other_effects = _effects(section, others, scored[section.title], run, cards, plots["effects"])
    return sections
