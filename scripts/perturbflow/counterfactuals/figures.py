"""Figures of an answer: effects with intervals, cells that respond, cells before and after, and a heatmap."""

import logging
from pathlib import Path
from typing import Any

import anndata as ad
import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from sklearn.decomposition import PCA

from perturbflow.colours import COLOURS
from perturbflow.genes.symbols import entities_of
from perturbflow.io.files import atomic

logger = logging.getLogger(__name__)

PANELS = 6  # perturbations that get a panel of their own
GENES = 15
GENES_OF_HEATMAP = 40
PERTURBATIONS_OF_HEATMAP = 60
ARROWS = 150
STYLE: Any = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "font.family": ["DejaVu Sans"],
    "font.size": 8,
    "text.parse_math": False,
    "savefig.dpi": 150,
    "figure.facecolor": "white",
}


def draw(
    cells: Path, effects: Path, ranking: Path, effects_figure: Path, responders: Path, map: Path, heatmap: Path
) -> None:
    """Plot the answer to one query.

    Parameters
    ----------
    cells, effects, ranking
        The files of `counterfactual`.
    effects_figure
        PNG to be written: the strongest genes of up to six perturbations, with their intervals and the spread over
        cells.
    responders
        How far cells go the way of the mean effect, and the strongest genes in the cells that go farthest and least
        far.
    map
        Cells before and after, on the principal components of both.
    heatmap
        Effects of all perturbations on the genes that any of them moves most, in the order of the ranking.
    """
    answer = ad.read_h5ad(cells)
    table = pd.read_csv(
        effects, sep="\t", keep_default_na=False, na_values=[""], dtype={"perturbation": str, "group": str}
    )
    ranked = pd.read_csv(ranking, sep="\t", keep_default_na=False, na_values=[""], dtype={"perturbation": str})
    ranked = ranked[ranked["perturbation"].isin(answer.obs["perturbation"].unique())]  # those with cells
    shown = ranked["perturbation"].tolist()[:PANELS]
    of_all = table[table["group"] == "all"]
    with mpl.rc_context(STYLE):
        figures = {
            effects_figure: _effects(of_all, shown, str(answer.uns["perturbflow"]["verdict"])),
            responders: _responders(answer, shown),
            map: _map(answer, shown),
            heatmap: _heatmap(answer, ranked),
        }
        for path, figure in figures.items():
            with atomic(path) as partial:
                figure.savefig(partial, format="png", bbox_inches="tight")


def _grid(n: int, width: float, height: float, columns: int = 3) -> tuple[Figure, list]:
    columns = min(n, columns)
    rows = -(-n // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns)).ravel()
    for panel in panels[n:]:
        panel.set_axis_off()
    return figure, list(panels[:n])


def _effects(table: pd.DataFrame, shown: list[str], verdict: str) -> Figure:
    figure, panels = _grid(len(shown), 3.2, 3.2)
    for panel, label in zip(panels, shown, strict=True):
        top = table[table["perturbation"] == label].sort_values("rank").head(GENES)
        rows = np.arange(len(top))
        panel.axvline(0, color="#888888", linewidth=0.6)
        panel.hlines(
            rows, top["low"], top["high"], color=COLOURS[0], linewidth=4, alpha=0.3, label="90 % interval of the mean"
        )
        panel.hlines(
            rows, top["cells_low"], top["cells_high"], color=COLOURS[1], linewidth=1, label="middle 90 % of cells"
        )
        panel.plot(top["effect"], rows, "o", color=COLOURS[0], markersize=3.5, label="mean effect")
        genes = [f"{gene} *" if own else gene for gene, own in zip(top["gene"], top["is_perturbed_gene"], strict=True)]
        panel.set_yticks(rows, genes)
        panel.set_ylim(len(top) - 0.5, -0.5)
        panel.set_title(f"{label}\n{_cut(top['known'].iloc[0])}", fontsize=7)
        panel.set_xlabel("effect on log1p expression")
    figure.suptitle(f"Verdict on this model: {verdict}", fontsize=7, wrap=True)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=7
    )
    return figure


def _cut(words: str) -> str:
    return words if len(words) <= 60 else words[:57] + "…"


def _responders(answer: ad.AnnData, shown: list[str]) -> Figure:
    figure, panels = _grid(2 * len(shown), 2.6, 2.6, columns=4) if len(shown) > 1 else _grid(2, 3.6, 3.0)
    labels = answer.obs["perturbation"].to_numpy()
    for i, label in enumerate(shown):
        histogram, genes = panels[2 * i], panels[2 * i + 1]
        rows = np.flatnonzero(labels == label)
        response = answer.obs["response"].to_numpy(float)[rows]
        histogram.hist(response, bins=40, range=_range(response), color=COLOURS[0], alpha=0.8)
        histogram.axvline(0.5, color="#888888", linewidth=0.8, linestyle="--")
        histogram.set_title(
            f"{label}: {100 * (response < 0.5).mean():.0f} % of cells respond less than half", fontsize=7
        )
        histogram.set_xlabel("response (mean effect = 1)")
        histogram.set_ylabel("cells")
        effect = np.asarray(answer.layers["effect"][rows])
        kept = ~np.isin(answer.var_names, entities_of(label))
        top = np.argsort(-np.abs(effect.mean(axis=0)) * kept)[:8]
        thirds = np.quantile(response, [1 / 3, 2 / 3])
        height = np.arange(len(top))
        for mask, name, colour, offset in (
            (response <= thirds[0], "third that responds least", COLOURS[6], -0.18),
            (response >= thirds[1], "third that responds most", COLOURS[0], 0.18),
        ):
            genes.barh(height + offset, effect[mask][:, top].mean(axis=0), 0.34, color=colour, label=name)
        genes.set_yticks(height, answer.var_names[top])
        genes.invert_yaxis()
        genes.axvline(0, color="#888888", linewidth=0.6)
        genes.set_xlabel("effect on log1p expression")
    figure.legend(
        *panels[1].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=7
    )
    return figure


def _range(response: np.ndarray) -> tuple[float, float]:
    low, high = np.clip(np.quantile(response, [0.0, 1.0]), -2.0, 4.0)
    return low - 1e-3, high + 1e-3


def _map(answer: ad.AnnData, shown: list[str]) -> Figure:
    figure, panels = _grid(len(shown), 3.2, 3.0)
    labels = answer.obs["perturbation"].to_numpy()
    first = np.flatnonzero(labels == shown[0])
    before = np.asarray(answer.layers["before"][first])
    effects = [np.asarray(answer.layers["effect"][labels == label]) for label in shown]
    # Cells where their own effect takes them: the noise of a single outcome would hide the way.
    space = PCA(2, random_state=0).fit(np.vstack([before, *[before + effect for effect in effects]]))
    start = space.transform(before)
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.choice(len(before), min(ARROWS, len(before)), replace=False))
    for panel, label, effect in zip(panels, shown, effects, strict=True):
        end = space.transform(before + effect)
        panel.scatter(*start.T, s=4, color=COLOURS[6], alpha=0.5, linewidths=0, label="before")
        panel.scatter(*end.T, s=4, color=COLOURS[0], alpha=0.5, linewidths=0, label="after")
        panel.quiver(
            *start[chosen].T,
            *(end - start)[chosen].T,
            angles="xy",
            scale_units="xy",
            scale=1,
            width=0.003,
            color="#333333",
            alpha=0.35,
        )
        panel.set_title(label, fontsize=8)
        panel.set_xlabel("component 1")
        panel.set_ylabel("component 2")
    figure.legend(
        *panels[0].get_legend_handles_labels(),
        loc="outside lower center",
        ncols=2,
        frameon=False,
        fontsize=7,
        markerscale=3,
    )
    return figure


def _heatmap(answer: ad.AnnData, ranked: pd.DataFrame) -> Figure:
    shown = ranked["perturbation"].tolist()[:PERTURBATIONS_OF_HEATMAP]
    labels = answer.obs["perturbation"].to_numpy()
    effects = np.stack([np.asarray(answer.layers["effect"][labels == label]).mean(axis=0) for label in shown])
    top = np.argsort(-np.abs(effects).max(axis=0))[:GENES_OF_HEATMAP]
    if len(shown) > 1:
        top = top[np.argsort(PCA(1, random_state=0).fit_transform(effects[:, top].T)[:, 0])]
    figure = Figure(figsize=(2.2 + 0.16 * len(top), 1.6 + 0.16 * len(shown)), layout="constrained")
    axes = figure.subplots()
    limit = float(np.quantile(np.abs(effects[:, top]), 0.98)) or 1.0
    image = axes.imshow(effects[:, top], cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
    axes.set_xticks(np.arange(len(top)), answer.var_names[top], rotation=90, fontsize=6)
    names = shown
    if "score" in ranked:
        names = [
            f"{row.search_rank}. {row.perturbation} ({row.score:+.2f})" for row in ranked.head(len(shown)).itertuples()
        ]
    axes.set_yticks(np.arange(len(shown)), names, fontsize=6)
    figure.colorbar(image, ax=axes, label="effect on log1p expression", shrink=min(1.0, 6 / (1 + len(shown)) + 0.4))
    return figure
