"""Is this screen good enough? One section per dataset: cells, controls, own genes, response, escaping cells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from perturbflow.colours import COLOURS
from perturbflow.io.files import read_json
from perturbflow.report.plotting import INK, STYLE, Plots, new_axes, number

POINTS = 400
"""Perturbations that a figure shows one by one: of more, this many in even steps."""
BATCHES = 40
PERTURBED, CONTROLS, MUTED = COLOURS[0], COLOURS[4], COLOURS[6]


def _spread(table: pd.DataFrame, by: str) -> pd.DataFrame:
    """Return rows that have a value, in its order; of too many, some in even steps."""
    table = table[table[by].notna()].sort_values(by, kind="stable")
    return (
        table.iloc[np.unique(np.linspace(0, len(table) - 1, min(len(table), POINTS)).astype(int))]
        if len(table)
        else table
    )


def _logarithmic(axes: Axes, which: Literal["x", "y"], low: float, high: float) -> None:
    """Make an axis logarithmic from low to high, and name more than powers of ten where there are few."""
    axes.set(**{f"{which}scale": "log", f"{which}lim": (low / 1.15, high * 1.15)})
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_formatter("{x:,g}")
    if high < 20 * low:
        axis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if high < 4 * low else (1, 2, 5), numticks=12))
    axis.set_minor_formatter(NullFormatter())


@mpl.rc_context(STYLE)
def _cells_figure(n_cells: np.ndarray) -> Figure:
    figure, axes = new_axes(3.6, 2.2, left=0.55)
    edges = np.geomspace(0.8 * n_cells.min(), 1.25 * n_cells.max(), 25)
    axes.hist(n_cells, edges.tolist(), color=PERTURBED, alpha=0.8)
    axes.axvline(np.median(n_cells), color=INK, linewidth=1, linestyle="--")
    _logarithmic(axes, "x", edges[0], edges[-1])
    axes.set_xlabel("cells of a perturbation")
    axes.set_ylabel("perturbations")
    return figure


@mpl.rc_context(STYLE)
def _batches_figure(batches: pd.DataFrame) -> Figure:
    figure, axes = new_axes(3.6, 2.2, left=0.65)
    x = np.arange(len(batches))
    axes.bar(x, batches["perturbed"], color=PERTURBED, alpha=0.8, label="perturbed")
    axes.bar(x, batches["controls"], bottom=batches["perturbed"], color=CONTROLS, label="control")
    lone = batches["controls"].to_numpy() == 0
    axes.plot(
        x[lone],
        batches["perturbed"].to_numpy()[lone],
        "v",
        color=INK,
        markersize=4,
        label="no controls" if lone.any() else "_",
    )
    axes.set_xticks([])
    axes.set_ylim(0, 1.25 * float((batches["perturbed"] + batches["controls"]).max()))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel(
        "one batch and cell type" if len(batches) == 1 else f"{len(batches)} batches × cell types, largest first"
    )
    axes.set_ylabel("cells")
    axes.legend(frameon=False, fontsize=7, ncols=3, loc="upper right", handlelength=1, columnspacing=1)
    return figure


@mpl.rc_context(STYLE)
def _multiplicity_figure(cells: dict[str, int]) -> Figure:
    figure, axes = new_axes(3.6, 2.2, left=0.65)
    names = ["control" if n == "0" else n for n in cells]
    axes.bar(names, list(cells.values()), color=[CONTROLS if n == "0" else PERTURBED for n in cells], alpha=0.8)
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("perturbations of a cell")
    axes.set_ylabel("cells")
    return figure


@mpl.rc_context(STYLE)
def _own_genes_figure(table: pd.DataFrame) -> Figure:
    figure, axes = new_axes(3.6, 2.2, left=0.55)
    x = np.linspace(0, 100, len(table)) if len(table) > 1 else np.array([50.0])
    lowest = max(float(table["ratio"][table["ratio"] > 0].min()) / 2, 1e-3) if (table["ratio"] > 0).any() else 1e-3
    axes.vlines(
        x, table["ratio_low"].clip(lower=lowest), table["ratio_high"], color=PERTURBED, alpha=0.35, linewidth=1.2
    )
    axes.plot(x, table["ratio"].clip(lower=lowest), "o", color=PERTURBED, markersize=2.5)
    axes.axhline(1, color=INK, linewidth=1, linestyle="--")
    _logarithmic(axes, "y", min(lowest, 0.9), max(float(table["ratio_high"].max()), 1.1))
    axes.set_xlabel("% of perturbations")
    axes.set_ylabel("own gene ÷ controls")
    return figure


@mpl.rc_context(STYLE)
def _response_figure(table: pd.DataFrame) -> Figure:
    figure, axes = new_axes(3.6, 2.2, left=0.55)
    responds = table["responds"].eq(True).to_numpy()
    for is_shown, colour, name in ((~responds, MUTED, "like controls"), (responds, COLOURS[2], "responds")):
        axes.plot(
            table["n_cells"][is_shown],
            table["energy_distance"][is_shown],
            "o",
            color=colour,
            markersize=3,
            alpha=0.7,
            label=name,
        )
    _logarithmic(axes, "x", table["n_cells"].min(), table["n_cells"].max())
    middle, highest = (float(value) for value in table["energy_distance"].abs().quantile([0.5, 1]))
    if highest > 20 * middle > 0:
        axes.set_yscale("symlog", linthresh=middle)
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_xlabel("cells of a perturbation")
    axes.set_ylabel("energy distance")
    axes.legend(frameon=False, fontsize=7, loc="best", handlelength=1)
    return figure


@mpl.rc_context(STYLE)
def _escaping_figure(shares: np.ndarray) -> Figure:
    figure, axes = new_axes(3.6, 2.2, left=0.55)
    axes.hist(100 * shares, np.linspace(0, 100, 21).tolist(), color=COLOURS[3], alpha=0.8)
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of a perturbation's cells that look like controls")
    axes.set_ylabel("perturbations")
    return figure


def _quantiles(values: pd.Series) -> str:
    low, middle, high = (number(float(value)) for value in values.quantile([0.1, 0.5, 0.9]))
    return f"{middle} in the middle, {low} to {high} for the middle 80 %"


class _Panel(NamedTuple):
    """A figure of a screen; without content (n is 0) it is not plotted."""

    title: str
    alt: str
    plot: Callable[..., Figure]
    content: object
    n: int


def _batches_panel(batches: pd.DataFrame) -> _Panel:
    """Return the figure of the batches × cell types of a screen, the largest first."""
    by_size = batches.assign(n=batches["controls"] + batches["perturbed"])
    by_size = by_size.sort_values("n", ascending=False, kind="stable").head(BATCHES)
    return _Panel(
        f"Cells per batch × cell type{f', the largest {BATCHES}' if len(batches) > BATCHES else ''}",
        f"{(batches['controls'] == 0).sum()} of {len(batches)} batches × cell types hold no controls; "
        f"perturbed cells: {_quantiles(batches['perturbed'])}.",
        _batches_figure,
        by_size,
        len(by_size),
    )


def _panels(account: dict, table: pd.DataFrame) -> list[_Panel]:
    """Return the figures of a screen, given quality.json and quality.tsv."""
    multiplicity = account["cells_by_n_perturbations"]
    n_cells, escaping = table["n_cells"], table["escaping"].dropna().to_numpy()
    own, tested = (_spread(table, column) for column in ("ratio", "energy_distance"))
    return [
        _Panel(
            "Cells per perturbation",
            f"Cells of a perturbation: {_quantiles(n_cells)}.",
            _cells_figure,
            n_cells.to_numpy(),
            len(table),
        ),
        _batches_panel(pd.DataFrame(account["batches"])),
        _Panel(
            "Perturbations per cell",
            "; ".join(f"{n} perturbations: {size:,} cells" for n, size in multiplicity.items()) + ".",
            _multiplicity_figure,
            multiplicity,
            len(multiplicity),
        ),
        _Panel(
            "On target: every perturbation's own gene, with its 95 % interval",
            f"Level of the own gene over that of controls: {_quantiles(table['ratio'])}.",
            _own_genes_figure,
            own,
            len(own),
        ),
        _Panel(
            "Does it do anything? Energy distance to controls",
            f"Energy distance: {_quantiles(table['energy_distance'])}.",
            _response_figure,
            tested,
            len(tested),
        ),
        _Panel(
            "Escaping cells, of perturbations that respond",
            f"Share of cells like controls: {_quantiles(table['escaping'])}.",
            _escaping_figure,
            escaping,
            len(escaping),
        ),
    ]


def screen_section(path: Path, plots: Plots, n_rows: int) -> dict[str, Any]:
    """Return the content of the section on one screen.

    Parameters
    ----------
    path
        quality.json; quality.tsv lies beside it.
    plots
        They make the figures.
    n_rows
        Perturbations in the table: of more, those with fewest cells.
    """
    account = read_json(path)
    # A gene called NA stays a word.
    table = pd.read_csv(
        path.with_suffix(".tsv"),
        sep="\t",
        keep_default_na=False,
        na_values=[""],
        dtype={"perturbation": str, "own_gene": str},
    )
    table["responds"] = table["responds"].map({True: True, False: False, "True": True, "False": False})
    figures = [
        {"title": panel.title, "svg": svg}
        for panel in _panels(account, table)
        if panel.n and (svg := plots.svg(panel.alt, panel.plot, panel.content))
    ]
    order = table.sort_values("n_cells", kind="stable")
    shown = order.head(n_rows)
    return {
        **account,
        "figures": figures,
        "rows": shown.astype(object).where(shown.notna(), "").to_dict("records"),
        "n_rows_left_out": len(order) - len(shown),
        "path": path.with_suffix(".tsv"),
    }
