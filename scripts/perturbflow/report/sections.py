"""The smaller sections: every perturbation, training curves, the account of the data, and sources of gene vectors."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from perturbflow.evaluation import METRICS
from perturbflow.report.cards import ModelCard
from perturbflow.report.learning import Points, by_heart
from perturbflow.report.plotting import INK, STYLE, Plots, new_axes, number
from perturbflow.screens.control_labels import declaration

CORRELATION = METRICS["pearson_delta_ctrl_off_target"].name

# Bounds of these sections, besides their bytes of figures.
NAMES = 200
CURVES_PER_MODEL = 16

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
    "perturbation_types": "of genes that another member perturbs by a type that comes first",
    "union": "not measured by all members, or not named",
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
    """Return the headline metrics of every model × perturbation, averaged over seeds.

    Where there are too many rows, the best and worst of every model are kept.
    """
    keys = ["model", "perturbation", "members_seen", "n_cells"]
    # pivot_table would make a row of every combination of the keys: millions for a thousand perturbations.
    table = scores.groupby([*keys, "metric"], observed=True, dropna=False)["value"].mean().unstack("metric")
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
    """Return, per run and obs column, the accuracy of classifiers on its embedding and on principal components."""
    return [
        {"place": place, "column": column, **accuracies}
        for place, run in runs.items()
        for column, accuracies in run["facts"].get("separability", {}).items()
    ]


def complaints(runs: dict[tuple, dict]) -> list[tuple[tuple, str]]:
    """Return the faults that runs found in themselves without being stopped for them."""
    found = []
    for place, run in runs.items():
        stages = [fact for fact in run["facts"].values() if isinstance(fact, dict)]
        found += [(place, fact["complaint"]) for fact in (run["facts"], *stages) if "complaint" in fact]
    return found


def _curves(history: list[dict]) -> dict[str, dict[str, Points]]:
    """Return quantity → training or validation → points; a step is `step`, else `epoch`, else the row's number."""
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
    """Return, per stage of a model's training, whether its trainings learned by heart, and the meaning of the loss."""
    notes = []
    for name in dict.fromkeys(name for by_name in curves for name in by_name if name.split(": ")[-1] == "loss"):
        stage = name.removesuffix("loss").removesuffix(": ")
        sentences = [
            by_heart(by_name[name].get("training", []), by_name[name].get("validation", []))
            for by_name in curves
            if name in by_name
        ]
        of_seeds = sentences[:1]
        if len(set(sentences)) > 1:
            of_seeds = [f"Training {i}: {sentence}" for i, sentence in enumerate(sentences, 1)]
        notes.append(
            " ".join([f"{stage.replace('_', ' ')}:" if stage else "", *of_seeds, card.losses.get(stage, "")]).strip()
        )
    return notes


def training_curves(
    histories: dict[str, list[list[dict]]], where: str, cards: dict[str, ModelCard], plots: Plots
) -> list[dict]:
    """Return the curves of the models of one dataset × split, and notes on them; seeds share a panel."""
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
    perturbations, qc, source = account["perturbations"], account["qc"], account["source"]
    return {
        **account,
        "union": account.get("union", {}),
        "sources": [source] if "sha256" in source else [*source.values()],  # one file, or several by their role
        "n_perturbations": len(perturbations["kept"]) - 1,  # control is among the kept labels
        "n_controls": perturbations["kept"].get("control", 0),
        "cells_dropped": [(_reason(reason, qc), n) for reason, n in account["cells"]["dropped"].items()],
        "genes_dropped": [(_reason(reason, qc), n) for reason, n in account["genes"]["dropped"].items()],
        "genes_renamed": Names.of(f"{before} → {after}" for before, after in account["genes"]["renamed"].items()),
        "perturbations_dropped": Names.of(f"{label} ({n:,})" for label, n in perturbations["dropped"].items()),
        "perturbations_renamed": Names.of(f"{old} → {new}" for old, new in perturbations["renamed"].items()),
        "not_measured": Names.of(perturbations["not_measured"]),
        "looks_like_control": Names.of(f"{label} ({n:,})" for label, n in perturbations["looks_like_control"].items()),
        "declare_controls": declaration(perturbations["looks_like_control"], perturbations["controls_declared"]),
        "no_gene": Names.of(f"{label} ({n:,})" for label, n in perturbations["no_gene"].items()),
        "not_split": Names.of(f"{label} ({n:,})" for label, n in perturbations["not_split"].items()),
    }


# --- sources of gene vectors ------------------------------------------------------------------------------------------


def source_rows(runs: dict[tuple, dict]) -> tuple[list[str], list[dict]]:
    """Return the sources of gene vectors, and per run of a Gaussian process their shares of the variance of effects."""
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
