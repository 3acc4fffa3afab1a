"""What if these genes were perturbed in these cells? Answered per cell, with a distribution of outcomes."""

import logging
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd

from perturbflow.artefacts import load_artefact
from perturbflow.embeddings import Embeddings
from perturbflow.errors import InputError
from perturbflow.files import atomic
from perturbflow.models.base import Model, build
from perturbflow.pairs import Pairs
from perturbflow.symbols import CONTROL, SEPARATOR, canonical_label, members_of

logger = logging.getLogger(__name__)

QUANTILES = (0.05, 0.5, 0.95)
MAX_CELLS = 1000
CELLS_PER_BLOCK = 64


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
        for column, values in selection.items():
            if column not in test.obs:
                raise InputError(f"cells: there is no obs column '{column}'; possible: {', '.join(test.obs.columns)}.")
            mask &= test.obs[column].astype(str).isin(list(map(str, values))).to_numpy()
    if not mask.any():
        raise InputError(f"cells: {selection} selects no test control; what-if questions start from controls that no model was trained on.")
    return test.select(mask)


def _is_new_context(training: Pairs, chosen: Pairs) -> bool:
    """Tell whether training saw no cell of the batches and cell types of the cells that are asked."""
    context = ["dataset", "batch", "cell_type"]
    return training.obs[context].drop_duplicates().merge(chosen.obs[context].drop_duplicates()).empty


def _extrapolation(label: str, training: list[str], vectors: Embeddings, is_new_context: bool) -> str:
    """Say what training knew of a perturbation."""
    if label == CONTROL:
        return "no perturbation"
    seen = {gene for other in training for gene in members_of(other)}
    unseen = [gene for gene in members_of(label) if gene not in seen]
    if unseen:
        n_without = sum(gene not in vectors.table.index or gene in vectors.without_vector for gene in unseen)
        return f"{len(unseen)} gene(s) never perturbed in training" + (f", {n_without} of them without a vector" if n_without else "")
    return ("measured" if label in training else "composed of measured genes") + (", in other contexts" if is_new_context else "")


def summarize(model: Model, start: np.ndarray, label: str, samples: int, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Ask one question of all cells, block by block.

    Parameters
    ----------
    start
        Control cells, (cells, genes).

    Returns
    -------
    layers
        mean and quantiles of the outcomes of each cell, (cells, genes).
    probability_up
        Share of samples above the start cell, ties half, mean over cells, (genes,).
    effects
        Mean effect of each cell, (cells, genes).
    """
    names = ["mean", *(f"q{int(100 * quantile):02d}" for quantile in QUANTILES)]
    layers = {name: np.empty_like(start, dtype=np.float32) for name in names}
    up = np.zeros(start.shape[1])
    for first in range(0, len(start), CELLS_PER_BLOCK):
        block = slice(first, first + CELLS_PER_BLOCK)
        outcomes = model.counterfactual(start[block], [label], samples, seed + first)[0]  # (cells, samples, genes)
        layers["mean"][block] = outcomes.mean(axis=1)
        for name, values in zip(names[1:], np.quantile(outcomes, QUANTILES, axis=1), strict=True):
            layers[name][block] = values
        before = start[block][:, None]
        up += ((outcomes > before) + 0.5 * (outcomes == before)).mean(axis=1).sum(axis=0)
    return layers, up / len(start), layers["mean"] - start


def counterfactual(
    pairs: Path, embeddings: Path, model: Path, cells: Path, effects: Path, implementation: str, params: dict, query: dict, seed: int
) -> None:
    """Answer one query: each perturbation in each selected cell, with a distribution of outcomes.

    Parameters
    ----------
    pairs, embeddings, model
        The pairs of the split, its gene vectors, and a model trained on both.
    cells
        AnnData to be written: X mean outcome per cell × perturbation; layers before, q05, q50, q95 of a cell's outcomes;
        obs perturbation, cell (name of the start cell), cell_type, batch, known.
    effects
        Table to be written, one row per perturbation × gene: effect (mean difference over cells, log1p-normalized), low and high
        (5 and 95 % quantile of the cells' mean effects), probability_of_sign (share of outcomes on the effect's side of the
        start cell), rank (by size of the effect), is_perturbed_gene, known.
    query
        perturbations, cells and samples_per_cell.

    Raises
    ------
    InputError
        For a gene that the model cannot tell from others, or a selection without cells.
    """
    everything = Pairs.read(pairs)
    chosen = selected_cells(everything, query["cells"])
    if len(chosen.rows) > MAX_CELLS:
        keep = np.zeros(len(chosen.rows), dtype=bool)
        keep[np.random.default_rng(seed).choice(len(keep), MAX_CELLS, replace=False)] = True
        logger.info("%d of %d selected cells are asked", MAX_CELLS, len(keep))
        chosen = chosen.select(keep)
    family = build(implementation, params)
    family.restore(load_artefact(model))
    training = everything.roles("train")
    vectors = Embeddings.read(embeddings)
    is_new_context = _is_new_context(training, chosen)
    start = chosen.X.toarray()
    blocks, tables = [], []
    measured = dict(zip(chosen.genes, chosen.genes, strict=True))
    for text in dict.fromkeys(query["perturbations"]):
        label = canonical_label(text, {CONTROL}, SEPARATOR, measured=measured)
        if reason := family.refusal(label):
            raise InputError(f"'{text}' cannot be answered by this model: {reason}.")
        layers, probability_up, cell_effects = summarize(family, start, label, query["samples_per_cell"], seed)
        known = _extrapolation(label, training.perturbations, vectors, is_new_context)
        obs = chosen.obs[["cell_type", "batch"]].astype(str).assign(perturbation=label, cell=chosen.obs.index, known=known)
        obs.index = [f"{label}:{cell}" for cell in chosen.obs.index]
        mean = layers.pop("mean")
        blocks.append(ad.AnnData(X=mean, obs=obs, var=pd.DataFrame(index=chosen.genes), layers={"before": start, **layers}))
        effect = cell_effects.mean(axis=0)
        low, high = np.quantile(cell_effects, [0.05, 0.95], axis=0)
        table = pd.DataFrame(
            {
                "perturbation": label,
                "gene": chosen.genes,
                "effect": effect,
                "low": low,
                "high": high,
                "probability_of_sign": np.where(effect >= 0, probability_up, 1.0 - probability_up),
                "is_perturbed_gene": np.isin(chosen.genes, members_of(label)),
                "known": known,
            }
        )
        table["rank"] = table["effect"].abs().rank(ascending=False, method="first").astype(int)
        tables.append(table.sort_values("rank"))
        logger.info(
            "%s (%s): largest effects %s",
            label,
            known,
            ", ".join(f"{row.gene} {row.effect:+.2f}" for row in tables[-1].head(5).itertuples()),
        )
    answer = ad.concat(blocks)
    answer.uns["perturbflow"] = {"cells": str(query["cells"]), "samples_per_cell": query["samples_per_cell"], "seed": seed}
    with atomic(cells) as partial:
        answer.write_h5ad(partial, compression="gzip")
    with atomic(effects) as partial:
        pd.concat(tables, ignore_index=True).to_csv(partial, sep="\t", index=False, float_format="%.6g")
