"""Answered what-if questions: the warranties of the models, and the strongest genes of every answer."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from perturbflow.colours import COLOURS, MARKERS
from perturbflow.counterfactuals.warranty import fitting
from perturbflow.evaluation.bootstrap import MIN_PERTURBATIONS
from perturbflow.io.files import read_json
from perturbflow.report.cards import ModelCard, place_of, read_table
from perturbflow.report.plotting import INK, STYLE, Plots, interval, name_rows, new_axes, number, room_for

# Bounds of this section, besides its bytes of figures.
COUNTERFACTUAL_TABLES = 60
SHOWN_FIRST = 3  # figures of an answer; the others are folded
GENES_OF_COUNTERFACTUAL = 15
BEST_OF_SEARCH = 3  # perturbations that the sentence of a search names
FOUND_BELOW = 0.05  # a greater chance is no finding
CAPTIONS = {  # of the figures of an answer
    "responders": "Who responds, and in which genes",
    "map": "Cells before and after, where their own expected effect takes them",
    "heatmap": "All perturbations of the question beside one another",
}
FACTS_OF_ANSWER = (
    "perturbation",
    "verdict",
    "trust",
    "known",
    "group",
    "in_other_contexts",
)  # columns that the table omits


@mpl.rc_context(STYLE)
def _counterfactual_figure(genes: pd.DataFrame, card: ModelCard) -> Figure:
    figure, axes = new_axes(3.6, 0.62 + 0.2 * len(genes), left=room_for(genes["gene"]))
    rows = np.arange(len(genes))
    axes.axvline(0, color="#888888", linewidth=0.6)
    axes.hlines(rows, genes["low"], genes["high"], color=card.colour, linewidth=4, alpha=0.35)
    axes.plot(genes["effect"], rows, "o", color=card.colour, markersize=4)
    name_rows(axes, list(genes["gene"]))
    axes.set_xlabel("effect on log1p expression")
    return figure


def warranty_rows(paths: list[Path]) -> list[dict]:
    """Return one row per checked model, from warranty.json files."""
    rows = []
    for path in paths:
        dataset, split, model, seed = place_of(path, 4)
        content = read_json(path)
        covered = {round(100 * row["nominal"]): row for row in content["coverage"]}
        widths = content["coverage"][-1]["width"]
        least = widths["ceiling"]["mean"] / widths["no_change"]["mean"]
        place = {"dataset": dataset, "split": split, "model": model, "seed": seed, "path": path}
        rows.append({**place, "covered": covered, "least_width": least, **content})
    return rows


@mpl.rc_context(STYLE)
def _coverage_figure(rows: list[dict], cards: dict[str, ModelCard]) -> Figure:
    names = [f"{row['model']}, {row['seed'].replace('_', ' ')}" for row in rows]
    figure, axes = new_axes(3.6, 0.62 + 0.3 * len(rows), left=room_for(names))
    for y, row in enumerate(rows):
        card = cards[row["model"]]
        for offset, (nominal, covered) in zip((-0.15, 0.15), sorted(row["covered"].items()), strict=True):
            axes.plot(
                [100 * covered["low"], 100 * covered["high"]],
                [y + offset] * 2,
                color=card.colour,
                linewidth=4,
                alpha=0.35,
                solid_capstyle="butt",
            )
            axes.plot(100 * covered["measured"], y + offset, card.marker, color=card.colour, markersize=5)
            axes.plot([nominal] * 2, [y + offset - 0.14, y + offset + 0.14], color=INK, linewidth=1.4)
    name_rows(axes, names)
    axes.set_xlabel("% of measured effects in 80 and 90 % intervals")
    return figure


def _by_title(rows: list[dict]) -> dict[str, list[dict]]:
    """Return dataset × split → its rows."""
    found: dict[str, list[dict]] = {}
    for row in rows:
        found.setdefault(f"{row['dataset']} × {row['split']}", []).append(row)
    return found


def coverage_figures(warranties: list[dict], cards: dict[str, ModelCard], plots: Plots) -> list[dict]:
    """Return a figure per dataset × split: the share of measured effects in the intervals, beside the nominal one."""
    figures = []
    for title, rows in _by_title(warranties).items():
        shares = "; ".join(
            f"{row['model']} {row['seed'].replace('_', ' ')} {number(100 * covered['measured'])} "
            f"({interval(100 * covered['low'], 100 * covered['high'])}) of {nominal}"
            for row in rows
            for nominal, covered in row["covered"].items()
        )
        alt = f"Coverage of predictive intervals on {title}, in percent: {shares}."
        if svg := plots.svg(alt, _coverage_figure, rows, cards):
            figures.append({"svg": svg, "where": title})
    return figures


@mpl.rc_context(STYLE)
def _sureness_figure(rows: list[dict], cards: dict[str, ModelCard]) -> Figure:
    unnamed = {row["model"] for row in rows}  # a model is named once, whatever the number of its seeds
    above = 0.17 * len(unnamed) + 0.1
    figure, axes = new_axes(3.2, 2.5 + above, left=0.6, top=above)
    for row in rows:
        rows_of_model = row["perturbations"]
        promised = [one for one in rows_of_model if one.get("promised") is not None and np.isfinite(one["promised"])]
        card = cards[row["model"]]
        axes.plot(
            [one["promised"] for one in promised],
            [one["error"] for one in promised],
            card.marker,
            color=card.colour,
            markersize=4,
            alpha=0.6,
            label=card.name if card.name in unnamed else None,
        )
        unnamed.discard(card.name)
    low, high = axes.get_xlim()
    axes.plot([low, high], [low, high], color=INK, linewidth=0.8)
    axes.set_xlim(low, high)
    axes.locator_params(nbins=5)
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel("error that the model promised, log1p")
    axes.set_ylabel("error that was found, log1p")
    # Above the axes: within them, its marks would pass for perturbations.
    axes.legend(frameon=False, fontsize=7, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    return figure


def sureness_figures(warranties: list[dict], cards: dict[str, ModelCard], plots: Plots) -> list[dict]:
    """Return a figure and rows per dataset × split: errors beside those that the models' own uncertainty promised.

    A figure without room is None.
    """
    sure = [row for row in warranties if row.get("sureness", {}).get("n", 0) >= MIN_PERTURBATIONS]
    figures = []
    for title, rows in _by_title(sure).items():
        correlations = "; ".join(
            f"{row['model']}, {row['seed'].replace('_', ' ')}: rank correlation "
            f"{number(row['sureness']['rank_correlation'])} over {row['sureness']['n']} perturbations"
            for row in rows
        )
        svg = plots.svg(f"Promised and actual errors on {title}. {correlations}.", _sureness_figure, rows, cards)
        figures.append({"svg": svg, "where": title, "rows": rows})
    return figures


def _block(label: str, rows: pd.DataFrame, warranty: dict | None, card: ModelCard, plots: Plots) -> dict:
    """Return the table and the figure of one perturbation of an answer.

    Parameters
    ----------
    rows
        Of {query}.tsv.
    warranty
        The row of its model in `warranty_rows`.
    """
    rows = rows[rows["group"] == "all"]
    top = rows.sort_values("rank", kind="stable").head(GENES_OF_COUNTERFACTUAL)
    effects = "; ".join(f"{row.gene} {number(row.effect)} ({interval(row.low, row.high)})" for row in top.itertuples())
    first = rows.iloc[0]
    columns = [column for column in top if column not in FACTS_OF_ANSWER]
    return {
        "label": label,
        "known": first["known"],
        "checked": fitting(warranty, bool(first["in_other_contexts"])) if warranty else None,
        "rows": top[columns].to_dict("records"),
        "columns": columns,
        "svg": plots.svg(f"Effects of {label} with their intervals: {effects}.", _counterfactual_figure, top, card),
        "n_genes": len(rows),
    }


def _in_order(path: Path, by_label: list[tuple[str, pd.DataFrame]]) -> list[tuple[str, pd.DataFrame]]:
    """Return the perturbations of an answer, given its {query}.tsv, in the order of its ranking where there is one."""
    ranking = path.with_suffix(".ranking.tsv")
    if not ranking.is_file():
        return by_label
    place = {label: i for i, label in enumerate(read_table([ranking])["perturbation"])}
    return sorted(by_label, key=lambda item: place.get(item[0], len(place)))


def search_sentence(ranking: pd.DataFrame) -> str | None:
    """Return question and answer of a search in plain words; None without a search."""
    if (found := found_words(ranking)) is None:
        return None
    return f"Which of {len(ranking):,} perturbations makes these cells like {ranking['towards'].iloc[0]}? {found}"


def found_words(ranking: pd.DataFrame) -> str | None:
    """Return the answer of a search in plain words; None without a search.

    Parameters
    ----------
    ranking
        Of {query}.ranking.tsv: how sure the answer is comes from its chance, see `search.Direction.ranked`.
    """
    if not {"score", "towards"} <= set(ranking.columns):
        return None
    best, others = ranking.iloc[0], ranking["perturbation"].iloc[1:BEST_OF_SEARCH].tolist()
    after = f", then {' and '.join(others)}" if others else ""
    chance = f"the best of {len(ranking):,} scores as high by chance in {100 * best['chance']:.2g} % of searches"
    if best["score"] <= 0 or best["chance"] > FOUND_BELOW:
        return f"None that can be told from chance: {best['perturbation']} comes first{after}, but {chance}."
    knew = "; ".join(dict.fromkeys(ranking["known"].iloc[:BEST_OF_SEARCH]))
    return (
        f"{best['perturbation']} (it makes {100 * best['reach']:.0f} % of the change){after}; {chance}. "
        f"What training knew of them: {knew}."
    )


def _sentence(path: Path) -> str | None:
    """Return the same, given {query}.tsv; None without a ranking."""
    ranking = path.with_suffix(".ranking.tsv")
    return search_sentence(read_table([ranking])) if ranking.is_file() else None


def _grouped(blocks: list[dict]) -> dict[str, list[str]]:
    """Return what training knew → the perturbations of which it knew that."""
    known: dict[str, list[str]] = {}
    for block in blocks:
        known.setdefault(block["known"], []).append(block["label"])
    return known


def _pictures(path: Path, figures: list[Path], plots: Plots) -> list[tuple[str, str]]:
    """Return captions and pictures of an answer, given its {query}.tsv, as long as there is room."""
    found = []
    for figure in figures:
        is_of_answer = figure.parent == path.parent and figure.name.startswith(f"{path.stem}.")
        caption = CAPTIONS.get(figure.suffixes[-2][1:]) if is_of_answer else None
        if caption and (picture := plots.png(figure)) is not None:
            found.append((caption, picture))
    return found


def counterfactual_answers(
    paths: list[Path], figures: list[Path], warranties: list[dict], cards: dict[str, ModelCard], plots: Plots
) -> tuple[list[dict], int]:
    """Return the top genes of every answer, and the number of tables that are left out.

    Parameters
    ----------
    paths
        {query}.tsv files: perturbation, group, gene, effect, low, high, probability_of_sign, rank, known, and the other
        columns of the step.
    figures
        {query}.{figure}.png files; those of responders, map and heatmap are shown as long as there is room.
    warranties
        Rows of `warranty_rows`.
    """
    warranty_of = {(row["dataset"], row["split"], row["model"], row["seed"]): row for row in warranties}
    answers, n_tables, n_left_out = [], 0, 0
    for path in paths:
        dataset, split, model, seed, _ = place_of(path, 5)
        card = cards.get(model) or ModelCard(model, "learned", "", {}, COLOURS[0], MARKERS[0])
        warranty = warranty_of.get((dataset, split, model, seed))
        by_label = _in_order(path, list(read_table([path]).groupby("perturbation", sort=False)))
        shown = by_label[: COUNTERFACTUAL_TABLES - n_tables]
        n_tables += len(shown)
        n_left_out += len(by_label) - len(shown)
        blocks = [_block(label, rows, warranty, card, plots) for label, rows in shown]
        answers.append(
            {
                "query": path.stem,
                "dataset": dataset,
                "split": split,
                "model": model,
                "seed": seed,
                "path": path,
                "sentence": _sentence(path),
                "blocks": blocks,
                "known": _grouped(blocks),
                "checks": list(dict.fromkeys(block["checked"] for block in blocks if block["checked"])),
                "figures": _pictures(path, figures, plots),
            }
        )
    return answers, n_left_out
