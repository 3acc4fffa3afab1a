"""A map of cells: controls, measured and predicted cells of a perturbation, on two components of measured cells."""

from pathlib import Path

import anndata as ad
import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from perturbflow.pairs import Pairs
from perturbflow.report.cards import ModelCard
from perturbflow.report.plotting import STYLE, Plots
from perturbflow.report.scatter_plots import Chosen

MOST_CELLS = 400  # of each kind; more hide one another
LEAST_CELLS = 10
MOST_MAPS = 3
CONTROLS, MEASURED = "#999999", "#7b3fb5"  # no model has these (colours.py)


def _dense(X: object) -> np.ndarray:
    """Return a matrix as an array of floats."""
    return np.asarray(X.toarray() if hasattr(X, "toarray") else X, dtype=float)


def _sampled(rows: np.ndarray) -> np.ndarray:
    """Return at most MOST_CELLS of the rows, the same ones every time."""
    return np.sort(np.random.default_rng(0).permutation(rows)[:MOST_CELLS])


@mpl.rc_context(STYLE)
def _map_figure(places: dict[str, tuple[np.ndarray, str]]) -> Figure:
    """Draw cells of several kinds: name → coordinates (cells, 2) and colour."""
    figure = Figure(figsize=(3.0, 2.9))
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.84))
    for name, (cells, colour) in places.items():
        axes.plot(
            *cells.T, "o", color=colour, markersize=2.5, alpha=0.5, markeredgewidth=0, label=name, rasterized=True
        )
        axes.plot(*cells.mean(axis=0), "P", color=colour, markersize=9, markeredgecolor="white", markeredgewidth=0.8)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.legend(
        loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=3, frameon=False, handletextpad=0.1, columnspacing=0.8
    )
    return figure


def cell_maps(
    chosen: Chosen, pairs: Path, predictions: dict[str, Path], cards: dict[str, ModelCard], title: str, plots: Plots
) -> list[dict]:
    """Return maps of the best perturbations and of the worst, as the best learned model predicts their cells.

    The components are principal components of measured cells and controls, so a prediction cannot choose its own.

    Parameters
    ----------
    predictions
        Model → predictions.h5ad.
    """
    model = chosen.models[0]
    cells, predicted = Pairs.open(pairs), ad.read_h5ad(predictions[model], backed="r")
    role = str(predicted.uns.get("perturbflow", {}).get("role", "test"))
    is_scored = (cells.obs["role"] == role).to_numpy()
    controls = _dense(cells.X[_sampled(np.flatnonzero(is_scored & cells.is_control))])
    shown = []
    for label in list(chosen.perturbations)[:MOST_MAPS]:
        measured = np.flatnonzero(is_scored & (cells.labels == label))
        rows = np.flatnonzero((predicted.obs["perturbation"] == label).to_numpy())
        if min(len(measured), len(rows), len(controls)) < LEAST_CELLS:
            continue
        measured = _dense(cells.X[_sampled(measured)])
        both = np.vstack([controls, measured])
        centre = both.mean(axis=0)
        axes = np.linalg.svd(both - centre, full_matrices=False)[2][:2].T
        kinds = {
            "controls": (controls, CONTROLS),
            "measured": (measured, MEASURED),
            model: (_dense(predicted.X[_sampled(rows)]), cards[model].colour),
        }
        places = {name: ((values - centre) @ axes, colour) for name, (values, colour) in kinds.items()}
        alt = f"Cells of {label} on {title}: {', '.join(f'{len(cells)} {name}' for name, (cells, _) in kinds.items())}."
        if svg := plots.svg(alt, _map_figure, places):
            shown.append({"label": label, "svg": svg})
    return shown
