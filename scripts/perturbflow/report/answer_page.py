"""One page for one what-if question, to be sent on: effects, who responds, trust, warranty, and what would tell."""

from pathlib import Path
from typing import Any

import anndata as ad
import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from perturbflow.colours import COLOURS
from perturbflow.counterfactuals.questions import in_words
from perturbflow.genes.symbols import CONTROL
from perturbflow.io.files import atomic
from perturbflow.quality.power import RELIABLE, cells_for
from perturbflow.report.plotting import STYLE, Plots, name_rows, new_axes, room_for
from perturbflow.report.rendering import render
from perturbflow.report.what_if import found_words

TEMPLATE = "answer_page.html"
FIGURE_BYTES = 2_000_000
ANSWERS = 6  # perturbations that have a section of their own
OTHERS = 40  # rows of the table of all
GENES = 15


@mpl.rc_context(STYLE)
def _effects_figure(top: pd.DataFrame) -> Figure:
    names = [f"{gene} *" if own else gene for gene, own in zip(top["gene"], top["is_perturbed_gene"], strict=True)]
    figure, axes = new_axes(3.6, 0.62 + 0.2 * len(top), left=room_for(pd.Series(names)))
    rows = np.arange(len(top))
    axes.axvline(0, color="#888888", linewidth=0.6)
    axes.hlines(rows, top["low"], top["high"], color=COLOURS[0], linewidth=4, alpha=0.35)
    axes.plot(top["effect"], rows, "o", color=COLOURS[0], markersize=4)
    name_rows(axes, names)
    axes.set_xlabel("effect on log1p expression")
    return figure


@mpl.rc_context(STYLE)
def _responders_figure(response: np.ndarray) -> Figure:
    figure, axes = new_axes(3.6, 2.2, left=0.5)
    axes.hist(np.clip(response, -2.0, 4.0), bins=30, color=COLOURS[0], alpha=0.8)
    axes.axvline(0.5, color="#888888", linewidth=0.8, linestyle="--")
    axes.set_xlabel("response of a cell (mean effect = 1)")
    axes.set_ylabel("cells")
    return figure


def answer_page(cells: Path, effects: Path, ranking: Path, calibration: Path, answer_page: Path, query: dict) -> None:
    """Write one page on one question.

    Parameters
    ----------
    cells, effects, ranking
        The files of `counterfactual`.
    calibration
        calibration.npz of the model: variances of genes.
    answer_page
        HTML to be written, which fetches nothing.
    query
        The question: dataset, split, model, cells and search.
    """
    answer = ad.read_h5ad(cells)
    table, ranked = _read(effects), _read(ranking)
    with np.load(calibration) as arrays:
        variance = arrays["variance"]
    drawn = set(answer.obs["perturbation"].unique())
    shown = ranked[ranked["perturbation"].isin(drawn)].head(ANSWERS)
    plots = Plots("answer", FIGURE_BYTES)
    about = answer.uns["perturbflow"]
    content = render(
        TEMPLATE,
        question=_question(ranked, shown, query),
        asked=_asked(answer, query),
        found=found_words(ranked),
        answers=[_section(row, table, answer, variance, plots) for row in shown.to_dict("records")],
        others=ranked.head(OTHERS).to_dict("records") if len(ranked) > 1 else [],
        n_asked=f"{len(ranked):,}",
        order=_order(ranked, query),
        has_score="score" in ranked,
        warranty=str(about["warranty"]),
    )
    with atomic(answer_page) as partial:
        partial.write_text(content, encoding="utf-8")


def _read(path: Path) -> pd.DataFrame:
    """Read a table; a gene may be called NA."""
    texts = dict.fromkeys(("perturbation", "group", "gene", "trust", "known", "leans_on"), str)
    return pd.read_csv(path, sep="\t", keep_default_na=False, na_values=[""], dtype=texts)


def _question(ranked: pd.DataFrame, shown: pd.DataFrame, query: dict) -> str:
    """Return the question in words."""
    if query["search"]:
        towards = query["search"]["towards"]
        state = f"cells of {in_words(towards['cells'])}" if "cells" in towards else "a signature"
        return f"Which of {len(ranked):,} perturbations moves these cells towards {state}?"
    names = shown["perturbation"].tolist()
    listed = ", ".join(names[:-1]) + (f" or {names[-1]}" if len(names) > 1 else names[0])
    more = f" (and {len(ranked) - len(names):,} others)" if len(ranked) > len(names) else ""
    return f"What if {listed}{more} were perturbed in these cells?"


def _asked(answer: ad.AnnData, query: dict) -> str:
    """Return whom and what was asked, in a sentence."""
    n = answer.obs["cell"].nunique()
    which = "control cells" if query["cells"] == "control" else f"control cells of {in_words(query['cells'])}"
    types = ", ".join(map(str, answer.obs["cell_type"].unique()[:5]))
    return (
        f"Asked of the model {query['model']}, trained on {query['dataset']} (split {query['split']}), about {n:,} "
        f"{which} (cell type: {types}) that it was not trained on. These are predictions, also where training measured "
        "the perturbation."
    )


def _order(ranked: pd.DataFrame, query: dict) -> str:
    best = f"the first {min(len(ranked), OTHERS):,} are shown"
    if query["search"]:
        return (
            f"Best first, by the cosine of predicted effect and wanted change; {best}. chance: how often the best of "
            "all candidates scores as high towards nothing."
        )
    return f"In the order of the table {best}."


def _section(row: dict[Any, Any], table: pd.DataFrame, answer: ad.AnnData, variance: np.ndarray, plots: Plots) -> dict:
    label = row["perturbation"]
    own = table[(table["perturbation"] == label) & (table["group"] == "all")]
    top = own.sort_values("rank").head(GENES)
    response = answer.obs.loc[answer.obs["perturbation"] == label, "response"].to_numpy(float)
    varies, responding = len(response) > 1 and response.std() > 1e-3, 100 * (response >= 0.5).mean()
    listed = ", ".join(f"{gene} {effect:+.2f}" for gene, effect in zip(top["gene"], top["effect"], strict=True))
    return {
        "label": label,
        "trust": row["trust"],
        "promise": _promise(row),
        "effects": plots.svg(f"Effects of {label}: {listed}.", _effects_figure, top),
        "has_own": bool(top["is_perturbed_gene"].any()),
        "has_intervals": bool(top["low"].notna().any()),
        "responders": plots.svg(f"Responses of cells to {label}.", _responders_figure, response) if varies else None,
        "responding": f"Who responds: {responding:.0f} % of cells at least half as strongly as the mean",
        "known": row["known"],
        "leans_on": row["leans_on"] if isinstance(row["leans_on"], str) else "the mean effect of training alone",
        "to_know": _to_know(row, variance),
    }


def _promise(row: dict[Any, Any]) -> str:
    """Return the numbers of trust in sentences."""
    parts = [f"The model itself expects a correlation of {row['promised']:.2f} with a measurement."]
    if row["n_sources"]:
        parts.append(f"{row['n_sources']} sources of vectors know its unseen gene.")
        if np.isfinite(row["neighbours_agree"]):
            parts.append(f"The effects of its neighbours agree by {row['neighbours_agree']:.2f} (0 to 1).")
    if not row["on_panel"]:
        parts.append("The screen does not measure the gene itself.")
    return " ".join(parts)


def _to_know(row: dict[Any, Any], variance: np.ndarray) -> str:
    """Return the experiment that would tell, with the cells that it takes."""
    if row["perturbation"] == CONTROL:
        return "nothing."
    sd = row["sd"] if np.isfinite(row["sd"]) else 0.0
    signal = np.array([row["size"] ** 2 + len(variance) * sd**2])
    cells = float(cells_for(RELIABLE, signal, float(variance.sum()), np.array([np.inf]))[0])
    if row["in_other_contexts"]:
        return f"{row['perturbation']} in these contexts: training measured it in others alone."
    if row["known"].startswith("measured"):
        return (
            f"more cells of {row['perturbation']} in these contexts; its uncertainty is what its own cells leave open."
        )
    return (
        f"{row['perturbation']} itself, in about {np.ceil(cells):,.0f} cells beside as many controls or more: then its "
        f"effect, if it is as large as expected, is measured with a reliability of {RELIABLE:g}. Which perturbations "
        "tell most of all the others: perturbflow design."
    )
