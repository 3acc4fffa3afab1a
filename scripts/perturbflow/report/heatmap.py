"""Measured and predicted effects of many perturbations beside one another."""

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage

from perturbflow.evaluation import Scored
from perturbflow.genes.symbols import entities_of
from perturbflow.report.plotting import STYLE, Plots
from perturbflow.report.scatter_plots import Chosen

MOST_GENES = 40
MOST_ROWS = 40  # perturbations: of more, those with the largest measured effects


def _in_order(effects: np.ndarray) -> np.ndarray:
    """Return an order of the rows in which like ones stand together."""
    return leaves_list(linkage(effects, "average")) if len(effects) > 2 else np.arange(len(effects))


@mpl.rc_context(STYLE)
def _heatmap_figure(panels: dict[str, np.ndarray], labels: list[str], genes: list[str]) -> Figure:
    """Draw one panel per name: perturbations × genes."""
    width, height = 3.3 * len(panels) + 1.6, 1.25 + 0.14 * len(labels)
    figure = Figure(figsize=(width, height))
    left, bottom, top = 0.2 + 0.066 * max(map(len, labels)), 0.85, 0.25
    limit = float(np.quantile(np.abs(panels["measured"]), 0.99)) or 1.0
    each = (width - left - 0.7) / len(panels)
    for i, (name, values) in enumerate(panels.items()):
        place = ((left + i * each) / width, bottom / height, (each - 0.12) / width, (height - bottom - top) / height)
        axes = figure.add_axes(place)
        axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto", interpolation="nearest")
        axes.set_title(name, fontsize=8)
        axes.set_xticks(range(len(genes)), genes, rotation=90, fontsize=5)
        axes.set_yticks(range(len(labels)), labels if i == 0 else [""] * len(labels), fontsize=6)
        axes.tick_params(length=0)
    bar = figure.add_axes((1 - 0.55 / width, bottom / height, 0.1 / width, (height - bottom - top) / height))
    figure.colorbar(figure.axes[0].images[0], cax=bar).ax.tick_params(labelsize=6)
    return figure


def effect_heatmap(chosen: Chosen, scored: dict[str, Scored], genes: list[str], title: str, plots: Plots) -> str | None:
    """Return the heatmap of measured effects, of the best learned model and of the best baseline; None without room.

    Parameters
    ----------
    scored
        As `scatter_plots.scored_of` returns it.
    genes
        Measured genes.
    title
        Dataset × split.
    """
    models = [model for model in dict.fromkeys((chosen.models[0], chosen.models[-1])) if model in scored]
    labels = sorted(set.intersection(*(set(scored[model].labels) for model in models))) if models else []
    if len(labels) < 2:
        return None
    predicted, measured = {}, np.empty(0)
    for model in models:
        of = scored[model]
        of_labels = [of.labels.index(label) for label in labels]
        measured = np.asarray(of.measured)[of_labels] - np.asarray(of.control)[of_labels]
        predicted[model] = np.asarray(of.predicted)[of_labels] - np.asarray(of.control)[of_labels]
    targets = {gene for label in labels for gene in entities_of(label)}
    strength = np.abs(measured).mean(axis=0)
    strength[np.isin(genes, list(targets))] = 0.0  # a perturbed gene would fill the scale
    columns = np.argsort(-strength, kind="stable")[: min(MOST_GENES, int((strength > 0).sum()))]
    if not len(columns):
        return None
    rows = np.argsort(-np.abs(measured[:, columns]).mean(axis=1), kind="stable")[:MOST_ROWS]
    rows = rows[_in_order(measured[np.ix_(rows, columns)])]
    columns = columns[_in_order(measured[np.ix_(rows, columns)].T)]
    panels = {name: values[np.ix_(rows, columns)] for name, values in {"measured": measured, **predicted}.items()}
    r = "; ".join(
        f"{name}: r {np.corrcoef(panels['measured'].ravel(), panels[name].ravel())[0, 1]:.2f}"
        if panels[name].std() > 0
        else f"{name}: no effect"
        for name in models
    )
    alt = f"Effects on {title}, {len(rows)} perturbations × {len(columns)} genes, measured and predicted; {r}."
    return plots.svg(alt, _heatmap_figure, panels, [labels[i] for i in rows], [genes[i] for i in columns])
