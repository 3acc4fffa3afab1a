"""The smaller sections: every perturbation, training curves, what was dropped of the data, answered what-if questions."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from perturbflow.colours import COLOURS, MARKERS
from perturbflow.counterfactuals.warranty import fitting
from perturbflow.evaluation import METRICS
from perturbflow.evaluation.bootstrap import MIN_PERTURBATIONS
from perturbflow.io.files import read_json
from perturbflow.report.cards import ModelCard, place_of, read_table
from perturbflow.report.learning import Points, by_heart
from perturbflow.report.plotting import INK, STYLE, Plots, interval, name_rows, new_axes, number, room_for
from perturbflow.screens.control_labels import declaration

CORRELATION = METRICS["pearson_delta_ctrl_off_target"].name

# What the page holds of these sections, besides their bytes of figures.
COUNTERFACTUAL_TABLES = 60
CAPTIONS = {  # of the figures of an answer
    "responders": "Who responds, and in which genes",
    "map": "Cells before and after, where their own expected effect takes them",
    "heatmap": "All perturbations of the question beside one another",
}
NAMES = 200
CURVES_PER_MODEL = 16
GENES_OF_COUNTERFACTUAL = 15

REASONS = {
    "unassigned": "without an assigned perturbation",
    "subset": "outside the chosen subset",
    "qc.min_counts": "with fewer than {limit:,} counts",
    "qc.min_genes": "with fewer than {limit:,} genes",
    "qc.max_pct_mt": "with more than {limit:g} % mitochondrial counts",
    "qc.min_cells_per_gene": "seen in fewer than {limit:,} cells",
    "qc.min_efficacy": "of perturbations that changed their own gene by a share below {limit:g}",
    "qc.min_cell_efficacy": "whose own gene differs by a share below {limit:g}",
    "other_genome": "of the other genome",
    "qc.min_cells_per_perturbation": "in perturbations of fewer than {limit:,} cells",
}
VALIDATION = re.compile(r"^(?:validation|val|valid)_")


# --- every perturbation ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PerturbationTable:
    """Metrics per model × perturbation."""

    rows: list[dict]
    metrics: list[str]
    n_left_out: int


def perturbation_table(scores: pd.DataFrame, models: list[str], n_rows: int) -> PerturbationTable:
    """Return the headline metrics of every model × perturbation, averaged over seeds; where there are too many, the best and worst."""
    keys = ["model", "perturbation", "members_seen", "n_cells"]
    table = scores.pivot_table(
        index=keys, columns="metric", values="value", aggfunc="mean", dropna=False, observed=True
    )
    table = table.loc[scores.drop_duplicates(keys).set_index(keys).index].reset_index()
    n_all = len(table)
    share = max(2, n_rows // max(1, len(models)))
    kept = []
    for model in models:
        rows = table[table["model"] == model]
        if len(rows) > share:
            rows = rows.sort_values(CORRELATION, ascending=False, kind="stable")
            rows = pd.concat([rows.head(share - share // 2), rows.tail(share // 2)])
        kept.append(rows)
    table = pd.concat(kept)
    return PerturbationTable(
        table.to_dict("records"),
        [
            name
            for name, metric in METRICS.items()
            if name in table and (metric.headline or metric.family == "on_target" or name == CORRELATION)
        ],
        n_all - len(table),
    )


# --- training -------------------------------------------------------------------------------------------------------


def history_of(run: dict) -> list[dict]:
    """Return the logged rows of a run: of its training and, under the names of the stages before it, of those."""
    rows = list(run["history"])
    for stage, fact in run["facts"].items():
        if isinstance(fact, dict) and "history" in fact:
            rows += [
                {name if name == "step" else f"{stage}: {name}": value for name, value in row.items()}
                for row in fact["history"]
            ]
    return rows


def separability_rows(runs: dict[tuple, dict]) -> list[dict]:
    """Return, per run and obs column, what classifiers tell from its embedding and from principal components."""
    return [
        {"place": place, "column": column, **told}
        for place, run in runs.items()
        for column, told in run["facts"].get("separability", {}).items()
    ]


def complaints(runs: dict[tuple, dict]) -> list[tuple[tuple, str]]:
    """Return what runs found wrong with themselves without being stopped for it."""
    found = []
    for place, run in runs.items():
        stages = [fact for fact in run["facts"].values() if isinstance(fact, dict)]
        found += [(place, fact["complaint"]) for fact in (run["facts"], *stages) if "complaint" in fact]
    return found


def _curves(history: list[dict]) -> dict[str, dict[str, Points]]:
    """Return quantity → training or validation → points; the step is the row's `step`, else `epoch`, else its number."""
    curves: dict[str, dict[str, Points]] = {}
    for i, row in enumerate(history):
        step = row.get("step", row.get("epoch", i))
        for key, value in row.items():
            if key not in ("step", "epoch") and isinstance(value, int | float) and np.isfinite(value):
                role = "validation" if VALIDATION.match(key) else "training"
                curves.setdefault(VALIDATION.sub("", key).removeprefix("train_"), {}).setdefault(role, []).append(
                    (step, value)
                )
    drawable = {
        name: by_role for name, by_role in curves.items() if any(len(points) > 1 for points in by_role.values())
    }
    return dict(
        sorted(drawable.items(), key=lambda item: (":" in item[0], "loss" not in item[0], "validation" not in item[1]))
    )


@mpl.rc_context(STYLE)
def _curve_figure(of_seeds: list[dict[str, Points]], card: ModelCard) -> Figure:
    figure, axes = new_axes(3.0, 2.2, left=0.6)
    values = [value for by_role in of_seeds for points in by_role.values() for _, value in points]
    for by_role in of_seeds:
        for role, points in by_role.items():
            dashes, shade = ("--", INK) if role == "validation" else ("-", card.colour)
            axes.plot(*np.transpose(points), dashes, color=shade, linewidth=1.4)
    if min(values) > 0 and max(values) > 30 * min(values):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.locator_params(axis="y", nbins=5)
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel("step")
    return figure


def _notes(curves: list[dict[str, dict[str, Points]]], card: ModelCard) -> list[str]:
    """Return, per stage of a model's training, whether its trainings learned by heart and what the loss means."""
    notes = []
    for name in dict.fromkeys(name for by_name in curves for name in by_name if name.split(": ")[-1] == "loss"):
        stage = name.removesuffix("loss").removesuffix(": ")
        told = [
            by_heart(by_name[name].get("training", []), by_name[name].get("validation", []))
            for by_name in curves
            if name in by_name
        ]
        told = told if len(set(told)) > 1 else told[:1]
        of_seed = [f"Training {i}: {sentence}" for i, sentence in enumerate(told, 1)] if len(told) > 1 else told
        notes.append(
            " ".join([f"{stage.replace('_', ' ')}:" if stage else "", *of_seed, card.losses.get(stage, "")]).strip()
        )
    return notes


def training_curves(
    histories: dict[str, list[list[dict]]], where: str, cards: dict[str, ModelCard], plots: Plots
) -> list[dict]:
    """Return the curves of the models of one dataset × split, and what they tell; seeds share a panel."""
    shown = []
    for model, of_seeds in histories.items():
        curves = [_curves(history) for history in of_seeds]
        names = list(dict.fromkeys(name for by_name in curves for name in by_name))
        panels = []
        for name in names[:CURVES_PER_MODEL]:
            points = [by_name[name] for by_name in curves if name in by_name]
            ends = "; ".join(
                f"{role} from {number(line[0][1])} to {number(line[-1][1])}" for role, line in points[0].items()
            )
            alt = f"{name} of {model} on {where} by training step: {ends}."
            if svg := plots.svg(alt, _curve_figure, points, cards[model]):
                panels.append({"svg": svg, "name": name, "roles": list(points[0])})
        notes = _notes(curves, cards[model])
        if panels or notes:
            shown.append({"model": model, "panels": panels, "left_out": names[CURVES_PER_MODEL:], "notes": notes})
    return shown


# --- data -----------------------------------------------------------------------------------------------------------


def _reason(reason: str, qc: dict) -> str:
    limit = qc.get(reason.removeprefix("qc."))
    return (
        REASONS[reason].format(limit=limit)
        if reason in REASONS and ("{" not in REASONS[reason] or limit is not None)
        else reason
    )


@dataclass(frozen=True)
class Names:
    """A list of names that may be too long to show."""

    shown: list[str]
    n_left_out: int

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """Keep the first NAMES."""
        names = list(names)
        return cls(names[:NAMES], max(0, len(names) - NAMES))


def data_account(account: dict) -> dict:
    """Return harmonization.json in the words of the page."""
    perturbations, qc = account["perturbations"], account["qc"]
    return {
        **account,
        "n_perturbations": len(perturbations["kept"]) - 1,  # control is among the kept labels
        "n_controls": perturbations["kept"].get("control", 0),
        "cells_dropped": [(_reason(reason, qc), n) for reason, n in account["cells"]["dropped"].items()],
        "genes_dropped": [(_reason(reason, qc), n) for reason, n in account["genes"]["dropped"].items()],
        "genes_renamed": Names.of(f"{before} → {after}" for before, after in account["genes"]["renamed"].items()),
        "perturbations_dropped": Names.of(f"{label} ({n:,})" for label, n in perturbations["dropped"].items()),
        "perturbations_renamed": Names.of(f"{before} → {after}" for before, after in perturbations["renamed"].items()),
        "not_measured": Names.of(perturbations["not_measured"]),
        "looks_like_control": Names.of(f"{label} ({n:,})" for label, n in perturbations["looks_like_control"].items()),
        "declare_controls": declaration(perturbations["looks_like_control"], perturbations["controls_declared"]),
        "no_gene": Names.of(f"{label} ({n:,})" for label, n in perturbations["no_gene"].items()),
        "not_split": Names.of(f"{label} ({n:,})" for label, n in perturbations["not_split"].items()),
    }


# --- counterfactuals ------------------------------------------------------------------------------------------------


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
        for shift, (nominal, covered) in zip((-0.15, 0.15), sorted(row["covered"].items()), strict=True):
            axes.plot(
                [100 * covered["low"], 100 * covered["high"]],
                [y + shift] * 2,
                color=card.colour,
                linewidth=4,
                alpha=0.35,
                solid_capstyle="butt",
            )
            axes.plot(100 * covered["measured"], y + shift, card.marker, color=card.colour, markersize=5)
            axes.plot([nominal] * 2, [y + shift - 0.14, y + shift + 0.14], color=INK, linewidth=1.4)
    name_rows(axes, names)
    axes.set_xlabel("% of measured effects in 80 and 90 % intervals")
    return figure


def coverage_figures(warranties: list[dict], cards: dict[str, ModelCard], plots: Plots) -> list[dict]:
    """Return a figure per dataset × split: what share of measured effects lay in the intervals, beside what was promised."""
    places: dict[tuple[str, str], list[dict]] = {}
    for row in warranties:
        places.setdefault((row["dataset"], row["split"]), []).append(row)
    figures = []
    for (dataset, split), rows in places.items():
        where = f"{dataset} × {split}"
        said = "; ".join(
            f"{row['model']} {row['seed'].replace('_', ' ')} {number(100 * covered['measured'])} ({interval(100 * covered['low'], 100 * covered['high'])}) of {nominal}"
            for row in rows
            for nominal, covered in row["covered"].items()
        )
        if svg := plots.svg(
            f"Coverage of predictive intervals on {where}, in percent: {said}.", _coverage_figure, rows, cards
        ):
            figures.append({"svg": svg, "where": where})
    return figures


@mpl.rc_context(STYLE)
def _sureness_figure(rows: list[dict], cards: dict[str, ModelCard]) -> Figure:
    unnamed = {row["model"] for row in rows}  # a model is named once, whatever the number of its seeds
    above = 0.17 * len(unnamed) + 0.1
    figure, axes = new_axes(3.2, 2.5 + above, left=0.6, top=above)
    for row in rows:
        told = [one for one in row["perturbations"] if one.get("promised") is not None and np.isfinite(one["promised"])]
        card = cards[row["model"]]
        axes.plot(
            [one["promised"] for one in told],
            [one["error"] for one in told],
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
    """Return a figure and rows per dataset × split: whether errors are as great as the models' own uncertainty promised; None for a figure without room."""
    places: dict[tuple[str, str], list[dict]] = {}
    for row in warranties:
        if row.get("sureness", {}).get("n", 0) >= MIN_PERTURBATIONS:
            places.setdefault((row["dataset"], row["split"]), []).append(row)
    figures = []
    for (dataset, split), rows in places.items():
        where = f"{dataset} × {split}"
        said = "; ".join(
            f"{row['model']}, {row['seed'].replace('_', ' ')}: rank correlation {number(row['sureness']['rank_correlation'])} over "
            f"{row['sureness']['n']} perturbations"
            for row in rows
        )
        svg = plots.svg(f"Promised and actual errors on {where}. {said}.", _sureness_figure, rows, cards)
        figures.append({"svg": svg, "where": where, "rows": rows})
    return figures


def source_rows(runs: dict[tuple, dict]) -> tuple[list[str], list[dict]]:
    """Return the sources of gene vectors, and per run of a Gaussian process what each was worth: its share of the variance of a gene's effect."""
    rows: list[dict] = []
    for place, run in runs.items():
        weights = run["facts"].get("mean")
        if not isinstance(weights, dict) or "own" not in weights:
            continue
        of_source: dict[str, float] = {}
        for name, weight in weights.items():
            if name.endswith((" near", " linear")):
                source = name.rsplit(" ", 1)[0]
                of_source[source] = of_source.get(source, 0.0) + weight
        parts = {
            "a gene's own": weights["own"],
            **({"its dose": weights["dose"]} if "dose" in weights else {}),
            **of_source,
        }
        shares = {name: weight / sum(parts.values()) for name, weight in parts.items()}
        row = {"dataset": place[0], "split": place[1], "seed": place[3], "shares": shares}
        same = next((other for other in rows if {**other, "models": 0} == {**row, "models": 0}), None)
        if same:
            same["models"].append(place[2])
        else:
            rows.append({**row, "models": [place[2]]})
    return list(dict.fromkeys(source for row in rows for source in row["shares"])), rows


def counterfactual_answers(
    paths: list[Path], figures: list[Path], warranties: list[dict], cards: dict[str, ModelCard], plots: Plots
) -> tuple[list[dict], int]:
    """Return the top genes of every answer, and how many tables were left out.

    Parameters
    ----------
    paths
        {query}.tsv files: perturbation, group, gene, effect, low, high, probability_of_sign, rank, known, and what else
        the step wrote.
    figures
        {query}.{figure}.png files; those of responders, map and heatmap are shown as long as there is room.
    warranties
        Rows of `warranty_rows`.
    """
    warranty_of = {(row["dataset"], row["split"], row["model"], row["seed"]): row for row in warranties}
    answers, n_tables, n_left_out = [], 0, 0
    for path in paths:
        dataset, split, model, seed, _ = place_of(path, 5)
        table = read_table([path])
        blocks = []
        checked = warranty_of.get((dataset, split, model, seed))
        for label, rows in table.groupby("perturbation", sort=False):
            if n_tables >= COUNTERFACTUAL_TABLES:
                n_left_out += 1
                continue
            n_tables += 1
            rows = rows[rows["group"] == "all"]
            top = rows.sort_values("rank", kind="stable").head(GENES_OF_COUNTERFACTUAL)
            listed = "; ".join(
                f"{row.gene} {number(row.effect)} ({interval(row.low, row.high)})" for row in top.itertuples()
            )
            card = cards.get(model) or ModelCard(model, "learned", "", {}, COLOURS[0], MARKERS[0])
            svg = plots.svg(f"Effects of {label} with their intervals: {listed}.", _counterfactual_figure, top, card)
            columns = [
                column
                for column in top
                if column not in ("perturbation", "verdict", "known", "group", "in_other_contexts")
            ]
            known = rows["known"].iloc[0]
            blocks.append(
                {
                    "label": label,
                    "known": known,
                    "checked": fitting(checked, bool(rows["in_other_contexts"].iloc[0])) if checked else None,
                    "rows": top[columns].to_dict("records"),
                    "columns": columns,
                    "svg": svg,
                    "n_genes": len(rows),
                }
            )
        shown = [
            figure for figure in figures if figure.parent == path.parent and figure.name.startswith(f"{path.stem}.")
        ]
        answers.append(
            {
                "query": path.stem,
                "dataset": dataset,
                "split": split,
                "model": model,
                "seed": seed,
                "path": path,
                "blocks": blocks,
                "checks": list(dict.fromkeys(block["checked"] for block in blocks if block["checked"])),
                "figures": [
                    (CAPTIONS[kind], picture)
                    for figure in shown
                    if (kind := figure.suffixes[-2][1:]) in CAPTIONS and (picture := plots.png(figure)) is not None
                ],
            }
        )
    return answers, n_left_out
