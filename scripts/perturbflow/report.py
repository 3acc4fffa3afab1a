"""One self-contained page that a biologist can read: what was run, how well it did, on what, and at what cost.

Numbers are read from the files of the run, never computed a second way. What a page cannot hold is cut, and the page says so.
"""

import ast
import io
import json
import logging
import platform
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import anndata as ad
import jinja2
import matplotlib as mpl
import numpy as np
import pandas as pd
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from perturbflow import __version__
from perturbflow.errors import InputError
from perturbflow.evaluation import METRICS, N_HIGH_EXPRESSION, pearson_delta_ctrl, score_inputs
from perturbflow.files import atomic, read_json
from perturbflow.models.base import build
from perturbflow.pairs import Pairs
from perturbflow.registry import FAMILIES, Family
from perturbflow.splits import ROLES
from perturbflow.symbols import members_of

logger = logging.getLogger(__name__)

TEMPLATE = Path(__file__).with_name("report_template.html")
CORRELATION = pearson_delta_ctrl.__name__

# What a page of less than 10 MB holds, whatever was selected: bytes of figures per section, and rows and names of lists.
FIGURE_BYTES = {"leaderboard": 2_800_000, "effects": 2_000_000, "training": 800_000, "counterfactuals": 700_000}
PERTURBATION_ROWS = 4000
COUNTERFACTUAL_TABLES = 60
NAMES = 200
LEARNED_MODELS_OF_EFFECTS = 5
CURVES_PER_MODEL = 4
GENES_OF_COUNTERFACTUAL = 15
LABELLED_GENES = 5

# Okabe & Ito's palette with grey for black, which dark mode swallows, and without yellow, which white swallows. Names stand
# beside colours on every figure; a marker tells models of one colour apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
MARKERS = ("o", "s", "D", "^", "v")
INK = "#010203"  # stands for the colour of the text around the figure: the page is read in light and in dark
VECTOR_POINTS = 400  # more points than this are drawn as pixels: they would be most of the page
STYLE = {
    "axes.edgecolor": INK, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.6, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
    "font.family": ["DejaVu Sans"], "font.size": 8, "text.parse_math": False,
    "svg.fonttype": "none", "svg.hashsalt": "perturbflow",
}  # fmt: skip

REASONS = {
    "unassigned": "without an assigned perturbation",
    "subset": "outside the chosen subset",
    "qc.min_counts": "with fewer than {limit:,} counts",
    "qc.min_genes": "with fewer than {limit:,} genes",
    "qc.max_pct_mt": "with more than {limit:g} % mitochondrial counts",
    "qc.min_cells_per_gene": "seen in fewer than {limit:,} cells",
    "qc.min_cells_per_perturbation": "in perturbations of fewer than {limit:,} cells",
}
VALIDATION = re.compile(r"^(?:validation|val|valid)_")


# --- what was run ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelCard:
    """A model, as every section shows it."""

    name: str
    kind: str  # learned, baseline or ceiling
    description: str
    params: dict
    colour: str
    marker: str


def _place(path: Path, n: int) -> tuple[str, ...]:
    """Return the last n folders above a file: dataset, split, model and seed stand in the path."""
    return path.parts[-1 - n : -1]


def _read_table(paths: Iterable[Path]) -> pd.DataFrame:
    """Return tables below each other; a dataset called 2023 and a gene called NA stay words."""
    words = dict.fromkeys(("dataset", "split", "model", "perturbation", "gene", "metric"), str)
    return pd.concat([pd.read_csv(path, sep="\t", dtype=words, keep_default_na=False, na_values=[""]) for path in paths], ignore_index=True)


def _family(run: dict) -> Family:
    for family in FAMILIES.values():
        if family.implementation == run["implementation"]:
            return family
    raise InputError(f"run.json of {run['provenance']} names {run['implementation']}, which is no family of this version; train it again.")


def _kind(run: dict) -> str:
    """Return learned, baseline or ceiling; only closed forms are built here, the others would import torch."""
    if _family(run).rule != "train_closed_form":
        return "learned"
    return "ceiling" if build(run["implementation"], run["params"]).is_ceiling else "baseline"


def _description(run: dict) -> str:
    """Return the first paragraph of the docstring of a model's class, read without importing it."""
    tree = ast.parse(_family(run).source.read_text(encoding="utf-8"))
    name = run["implementation"].split(":")[1]
    documented = (ast.get_docstring(node) for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    return " ".join((next(documented, None) or "").split("\n\n")[0].split())


def model_cards(runs: dict[tuple, dict]) -> dict[str, ModelCard]:
    """Return the models in the order of the runs; learned models get their colours first, ceilings have none."""
    first = {}
    for (_, _, model, _), run in runs.items():
        first.setdefault(model, run)
    kinds = {model: _kind(run) for model, run in first.items()}
    coloured = [model for kind in ("learned", "baseline") for model in first if kinds[model] == kind]
    looks = {
        model: (COLOURS[i % len(COLOURS)], MARKERS[i // len(COLOURS) % len(MARKERS)]) for i, model in enumerate(coloured)
    }  # fmt: skip
    return {
        model: ModelCard(model, kinds[model], _description(run), run["params"], *looks.get(model, (INK, "|")))
        for model, run in first.items()
    }


# --- figures --------------------------------------------------------------------------------------------------------


@dataclass
class Drawings:
    """Turns figures into inline SVG until a section's bytes are spent.

    Attributes
    ----------
    section
        Prefix of the ids within the figures: ids are unique on a page.
    bytes_left
        What the section may still take.
    n_drawn, n_left_out
        Figures so far.
    """

    section: str
    bytes_left: int
    n_drawn: int = 0
    n_left_out: int = 0

    @mpl.rc_context(STYLE)
    def svg(self, alt: str, draw: Callable[..., Figure], *arguments: object) -> Markup | None:
        """Return what `draw` draws with its alternative text, or None, undrawn, where the section is full."""
        if self.bytes_left <= 0:
            self.n_left_out += 1
            return None
        buffer = io.StringIO()
        draw(*arguments).savefig(
            buffer, format="svg", transparent=True, dpi=144, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
        text = buffer.getvalue()
        text = text[text.index("<svg") :]  # no XML declaration and no DTD within HTML
        referred = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
        text = re.sub(r' id="([^"]*)"', lambda match: match[0] if match[1] in referred else "", text)
        for reference in (' id="', 'href="#', "url(#"):
            text = text.replace(reference, f"{reference}{self.section}-{self.n_drawn}-")
        for idle in (r"<!--.*?-->\s*", r"<style.*?</style>\s*", r' transform="rotate\(-0 [^"]*\)"', r"\s+(?=[<\n])"):
            text = re.sub(idle, "", text, flags=re.DOTALL)
        text = text.replace(INK, "currentColor")
        text = text.replace("<svg", f'<svg role="img" aria-label="{escape(alt)}"', 1)
        self.n_drawn += 1
        self.bytes_left -= len(text)
        return Markup(text)  # noqa: S704  matplotlib escapes the text that it writes


def _axes(width: float, height: float, left: float, bottom: float = 0.45, top: float = 0.12, right: float = 0.15) -> Axes:
    """Return the axes of a new figure; all in inches."""
    figure = Figure(figsize=(width, height))
    return figure.add_axes([left / width, bottom / height, 1 - (left + right) / width, 1 - (bottom + top) / height])


def _room_for(names: Iterable[str]) -> float:
    """Return the inches that the longest of the names takes at the left of the axes."""
    return 0.2 + 0.072 * max(map(len, names))


def _number(value: float | None) -> str:
    """Return three significant digits; whole above a thousand, a dash for none."""
    if value is None or not np.isfinite(value):
        return "–"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".rstrip(".")


def _interval(low: float, high: float) -> str:
    return f"{_number(low)} to {_number(high)}" if np.isfinite([low, high]).all() else "no interval"


# --- leaderboard ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """A model's mean over perturbations on one metric."""

    value: float
    low: float
    high: float
    n_perturbations: int
    is_best: bool = False

    def overlaps(self, other: "Score") -> bool:
        """Return whether the intervals overlap; an interval that is not known overlaps with all."""
        return not (self.low > other.high or self.high < other.low)


@dataclass(frozen=True)
class Leaderboard:
    """Scores of one dataset × split: model → metric → score, ceilings apart."""

    models: dict[str, dict[str, Score]]
    ceilings: dict[str, dict[str, Score]]
    metrics: list[str]
    n_perturbations: int
    findings: list[str]
    figures: list[dict]


def _is_better(metric: str, a: float, b: float) -> bool:
    return a > b if METRICS[metric].direction == "higher" else a < b


def _ranked(metric: str, scores: dict[str, Score]) -> list[str]:
    """Return the models that have a value, best first."""
    known = {model: score.value for model, score in scores.items() if np.isfinite(score.value)}
    return sorted(known, key=known.get, reverse=METRICS[metric].direction == "higher")


def _scores(rows: pd.DataFrame, cards: dict[str, ModelCard]) -> dict[str, dict[str, Score]]:
    """Return model → metric → score; the mean over seeds, and the interval that holds the intervals of all seeds."""
    means = rows.groupby(["model", "metric"], sort=False).agg(
        value=("value", "mean"), low=("ci_low", "min"), high=("ci_high", "max"), n_perturbations=("n_perturbations", "max")
    )
    is_model = np.array([cards[model].kind != "ceiling" for model in means.index.get_level_values("model")])
    best = means["value"].where(is_model).groupby("metric").agg(["min", "max"])
    table: dict[str, dict[str, Score]] = {}
    for ((model, metric), row), is_rival in zip(means.iterrows(), is_model, strict=True):
        winner = best.loc[metric, "max" if METRICS[metric].direction == "higher" else "min"]
        is_best = bool(is_rival and row["value"] == winner)
        table.setdefault(model, {})[metric] = Score(row["value"], row["low"], row["high"], int(row["n_perturbations"]), is_best)
    return table


def _listed(names: Iterable[str]) -> str:
    *most, last = list(names)
    return f"{', '.join(most)} and {last}" if most else last


def _findings(models: dict[str, dict[str, Score]], ceilings: dict[str, dict[str, Score]], cards: dict[str, ModelCard]) -> list[str]:
    """Return what the intervals allow to say, in sentences."""
    metrics = list(next(iter(models.values()))) if models else []
    alone: dict[str, list[str]] = {}
    tied: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    unranked, better, worse, blind = [], [], [], []
    for metric in metrics:
        scores = {model: by_metric[metric] for model, by_metric in models.items() if metric in by_metric}
        ranked = _ranked(metric, scores)
        if len(ranked) < 2:
            continue
        best, worst = ranked[0], ranked[-1]
        close = tuple(model for model in scores if model != best and scores[model].overlaps(scores[best]))
        if len(close) == len(ranked) - 1:
            unranked.append(metric)
        elif close:
            tied.setdefault((best, close), []).append(metric)
        else:
            alone.setdefault(best, []).append(metric)
        learned, simple = (next((model for model in ranked if cards[model].kind == kind), None) for kind in ("learned", "baseline"))
        if learned and simple and not scores[learned].overlaps(scores[simple]):
            (better if _is_better(metric, scores[learned].value, scores[simple].value) else worse).append(metric)
        if any(metric in by_metric and by_metric[metric].overlaps(scores[worst]) for by_metric in ceilings.values()):
            blind.append(metric)
    sentences = [f"By {_listed(names)}, {best} is best, its interval apart from all others." for best, names in alone.items()]
    sentences += [
        f"By {_listed(names)}, {best} has the best value, but its interval overlaps with {_listed(close)}: these cannot be ranked."
        for (best, close), names in tied.items()
    ]
    if unranked:
        sentences.append(f"By {_listed(unranked)}, all intervals overlap with that of the best value: nothing can be ranked.")
    kinds = {cards[model].kind for model in models}
    if {"learned", "baseline"} <= kinds:
        if better:
            sentences.append(f"The best learned model beats the best baseline, intervals apart, by {_listed(better)}.")
        if worse:
            sentences.append(f"The best learned model falls behind the best baseline, intervals apart, by {_listed(worse)}.")
        if not better and not worse:
            sentences.append("By no metric can the best learned model be told from the best baseline.")
    if blind:
        sentences.append(f"By {_listed(blind)}, the ceiling overlaps with the worst model: here this tells no good model from a bad one.")
    return sentences


@mpl.rc_context(STYLE)
def _leaderboard_figure(metric: str, models: dict[str, Score], ceilings: dict[str, Score], cards: dict[str, ModelCard]) -> Figure:
    axes = _axes(3.6, 0.62 + 0.24 * len(models), left=_room_for(models), top=0.17)
    for y, (model, score) in enumerate(models.items()):
        card = cards[model]
        if np.isfinite(score.low):
            axes.plot([score.low, score.high], [y, y], color=card.colour, linewidth=4, alpha=0.35, solid_capstyle="butt")
        axes.plot(score.value, y, card.marker, color=card.colour, markersize=5)
    for score in ceilings.values():
        if np.isfinite(score.low):
            axes.axvspan(score.low, score.high, color=INK, alpha=0.07, linewidth=0)
        axes.axvline(score.value, color=INK, linewidth=1, linestyle="--")
        axes.annotate("ceiling", (score.value, 1), (0, 2), xycoords=("data", "axes fraction"), textcoords="offset points",
                      ha="center", fontsize=7)  # fmt: skip
    axes.set_yticks(range(len(models)), list(models))
    axes.set_ylim(len(models) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", color="#888888", alpha=0.25, linewidth=0.5)
    axes.set_axisbelow(b=True)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"{METRICS[metric].direction} is better")
    return axes.figure


def leaderboard(rows: pd.DataFrame, cards: dict[str, ModelCard], drawings: Drawings) -> Leaderboard:
    """Return the scores of one dataset × split, drawn and put in sentences."""
    scores = _scores(rows, cards)
    models = {model: row for model, row in scores.items() if cards[model].kind != "ceiling"}
    ceilings = {model: row for model, row in scores.items() if cards[model].kind == "ceiling"}
    metrics = [metric for metric in METRICS if any(metric in row for row in scores.values())]
    figures = []
    for metric in metrics:
        shown, limits = ({model: row[metric] for model, row in some.items() if metric in row} for some in (models, ceilings))
        if not shown:
            continue
        alt = "; ".join(
            f"{model} {_number(score.value)} ({_interval(score.low, score.high)})" for model, score in {**shown, **limits}.items()
        )
        alt = f"{metric}, {METRICS[metric].direction} is better, 95 % intervals in brackets: {alt}."
        if svg := drawings.svg(alt, _leaderboard_figure, metric, shown, limits, cards):
            figures.append({"svg": svg, "metric": metric})
    n = max((score.n_perturbations for row in scores.values() for score in row.values()), default=0)
    return Leaderboard(models, ceilings, metrics, n, _findings(models, ceilings, cards), figures)


# --- predicted against measured effects -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Chosen:
    """Which perturbations and models the scatter plots of one dataset × split show."""

    reference: str
    perturbations: dict[str, str]  # → best or worst
    models: list[str]
    n_models_left_out: int


def choose(correlations: pd.DataFrame, cards: dict[str, ModelCard]) -> Chosen | None:
    """Choose the two best and two worst perturbations of the model with the best mean correlation.

    Parameters
    ----------
    correlations
        Rows of metrics.tsv of one dataset × split and of pearson_delta_ctrl.

    Returns
    -------
    None where there is no model but ceilings, or none with a score.
    """
    table = correlations.groupby(["model", "perturbation"])["value"].mean().unstack("model")
    means = table.mean().dropna()
    means = means[[cards[model].kind != "ceiling" for model in means.index]].sort_values(ascending=False, kind="stable")
    if means.empty:
        return None
    learned = [model for model in means.index if cards[model].kind == "learned"]
    baseline = [model for model in means.index if cards[model].kind == "baseline"][:1]
    reference = means.index[0]
    ranked = list(table[reference].dropna().sort_values(ascending=False, kind="stable").index)
    n_best = min(2, (len(ranked) + 1) // 2)
    n_worst = min(2, len(ranked) - n_best)
    perturbations = dict.fromkeys(ranked[:n_best], "best") | dict.fromkeys(ranked[len(ranked) - n_worst :], "worst")
    shown = learned[:LEARNED_MODELS_OF_EFFECTS]
    return Chosen(reference, perturbations, [*shown, *baseline], len(learned) - len(shown))


def _label_points(axes: Axes, x: np.ndarray, y: np.ndarray, names: list[str], labelled: list[int]) -> None:
    """Write names beside their points where they cover the fewest others; one that finds no free place is left out."""
    scale = axes.figure.dpi / 72
    box = axes.get_window_extent()
    points = axes.transData.transform(np.column_stack([x, y]))
    taken: list[tuple[float, float, float, float]] = []
    for i in labelled:
        width, height = 4.5 * scale * len(names[i]), 8 * scale
        places = []
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, 1), (1, -1), (-1, -1)):
            left = points[i, 0] + dx * 5 * scale - width * (1 - dx) / 2
            low = points[i, 1] + dy * 7 * scale - height / 2
            place = (left, low, left + width, low + height)
            is_inside = place[0] >= box.x0 and place[2] <= box.x1 and place[1] >= box.y0 and place[3] <= box.y1
            if is_inside and all(place[2] < o[0] or place[0] > o[2] or place[3] < o[1] or place[1] > o[3] for o in taken):
                covered = ((points > place[:2]) & (points < place[2:])).all(axis=1).sum()
                places.append((covered, len(places), place))
        if places:
            left, low, right, high = min(places)[2]
            taken.append((left, low, right, high))
            centre = axes.transData.inverted().transform(((left + right) / 2, (low + high) / 2))
            axes.text(*centre, names[i], ha="center", va="center", fontsize=7)


@mpl.rc_context(STYLE)
def _effect_figure(
    measured: np.ndarray, predicted: np.ndarray, genes: list[str], targets: list[str], limit: float, card: ModelCard
) -> Figure:
    axes = _axes(2.6, 2.6, left=0.55, bottom=0.45)
    axes.set_xlim(-limit, limit)
    axes.set_ylim(-limit, limit)
    for line in (axes.axhline, axes.axvline):
        line(0, color="#888888", alpha=0.5, linewidth=0.5)
    axes.plot([-limit, limit], [-limit, limit], color="#888888", linewidth=0.8, linestyle="--")
    is_target = np.isin(genes, targets)
    is_vector = len(genes) <= VECTOR_POINTS
    axes.plot(measured[~is_target], predicted[~is_target], "o", color=card.colour, alpha=0.6, markersize=3 if is_vector else 2,
              markeredgewidth=0, rasterized=not is_vector)  # fmt: skip
    # A gene that was switched off lies far beyond the genes that answer: it is drawn in its direction at the edge, its place in words.
    edge = 0.96 * limit
    reach = np.maximum(np.abs(measured), np.abs(predicted))
    is_beyond = is_target & (reach > edge)
    shrink = np.where(is_beyond, edge / np.maximum(reach, edge), 1)
    names = [f"{gene} ({x:.2g}, {y:.2g})" if far else gene for gene, x, y, far in zip(genes, measured, predicted, is_beyond, strict=True)]
    measured, predicted = measured * shrink, predicted * shrink
    axes.plot(measured[is_target], predicted[is_target], "*", color=INK, markersize=9, markeredgewidth=0)
    strongest = [i for i in np.argsort(-np.abs(measured), kind="stable") if not is_target[i]][:LABELLED_GENES]
    labelled = [*np.flatnonzero(is_target), *strongest]
    _label_points(axes, measured, predicted, names, labelled)
    axes.locator_params(nbins=5)
    axes.set_xlabel("measured effect")
    axes.set_ylabel("predicted effect")
    return axes.figure


def effect_figures(
    chosen: Chosen,
    pairs: Path,
    predictions: dict[str, Path],
    correlations: dict[tuple, float],
    cards: dict[str, ModelCard],
    drawings: Drawings,
) -> list[dict]:
    """Return scatter plots of predicted against measured effects, one list of panels per perturbation.

    Parameters
    ----------
    predictions
        Model → predictions.h5ad of the seed that is shown.
    correlations
        (model, perturbation) → pearson_delta_ctrl of that seed, from metrics.tsv.
    """
    cells = Pairs.read(pairs)
    genes = np.array(cells.genes)
    scored = {model: score_inputs(ad.read_h5ad(predictions[model]), cells) for model in chosen.models}
    shown = []
    for label, why in chosen.perturbations.items():
        targets = members_of(label)
        panels = []
        effects = {}
        for model, inputs in scored.items():
            if label in inputs.labels:  # a model may have refused it
                row = inputs.labels.index(label)
                mask = inputs.highly_expressed | np.isin(genes, targets)
                control = inputs.control[row]
                effects[model] = ((inputs.measured[row] - control)[mask], (inputs.predicted[row] - control)[mask], genes[mask].tolist())
        # One scale per perturbation, so that the models' panels can be compared by eye.
        limit = 1.12 * max(
            (np.abs(values[~np.isin(names, targets)]).max(initial=0) for *both, names in effects.values() for values in both), default=1
        )
        for model, (measured, predicted, names) in effects.items():
            r = correlations.get((model, label), float("nan"))
            alt = (
                f"Scatter plot of predicted against measured effects of {label} by {model}, {len(names)} genes, r {_number(r)}. "
                f"Perturbed genes shown: {', '.join(gene for gene in targets if gene in names) or 'none'}."
            )
            svg = drawings.svg(alt, _effect_figure, measured, predicted, names, targets, limit or 1, cards[model])
            if svg:
                panels.append({"svg": svg, "model": model, "r": r})
        if panels:
            missing = [gene for gene in targets if gene not in cells.genes]
            shown.append({"label": label, "why": why, "panels": panels, "missing": missing})
    return shown


# --- perturbations, training, data, counterfactuals -----------------------------------------------------------------


@dataclass(frozen=True)
class PerturbationTable:
    """Metrics per model × perturbation."""

    rows: list[dict]
    metrics: list[str]
    n_left_out: int


def perturbation_table(scores: pd.DataFrame, models: list[str], n_rows: int) -> PerturbationTable:
    """Return one row per model × perturbation, averaged over seeds; where there are too many, the best and worst per model."""
    keys = ["model", "perturbation", "members_seen", "n_cells"]
    table = scores.pivot_table(index=keys, columns="metric", values="value", aggfunc="mean", dropna=False, observed=True)
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
    return PerturbationTable(table.to_dict("records"), [metric for metric in METRICS if metric in table], n_all - len(table))


def _curves(history: list[dict]) -> dict[str, dict[str, list[tuple[float, float]]]]:
    """Return quantity → training or validation → points; the step is the row's `step`, else `epoch`, else its number."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for i, row in enumerate(history):
        step = row.get("step", row.get("epoch", i))
        for key, value in row.items():
            if key not in ("step", "epoch") and isinstance(value, int | float) and np.isfinite(value):
                role = "validation" if VALIDATION.match(key) else "training"
                curves.setdefault(VALIDATION.sub("", key).removeprefix("train_"), {}).setdefault(role, []).append((step, value))
    drawable = {name: by_role for name, by_role in curves.items() if any(len(points) > 1 for points in by_role.values())}
    return dict(sorted(drawable.items(), key=lambda item: ("loss" not in item[0], "validation" not in item[1])))


@mpl.rc_context(STYLE)
def _curve_figure(of_seeds: list[dict[str, list[tuple[float, float]]]], card: ModelCard) -> Figure:
    axes = _axes(3.0, 2.2, left=0.6)
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
    return axes.figure


def training_curves(histories: dict[str, list[list[dict]]], where: str, cards: dict[str, ModelCard], drawings: Drawings) -> list[dict]:
    """Return the curves of the models of one dataset × split; seeds share a panel."""
    shown = []
    for model, of_seeds in histories.items():
        curves = [_curves(history) for history in of_seeds]
        names = list(dict.fromkeys(name for by_name in curves for name in by_name))
        panels = []
        for name in names[:CURVES_PER_MODEL]:
            points = [by_name[name] for by_name in curves if name in by_name]
            ends = "; ".join(f"{role} from {_number(line[0][1])} to {_number(line[-1][1])}" for role, line in points[0].items())
            alt = f"{name} of {model} on {where} by training step: {ends}."
            if svg := drawings.svg(alt, _curve_figure, points, cards[model]):
                panels.append({"svg": svg, "name": name, "roles": list(points[0])})
        if panels:
            shown.append({"model": model, "panels": panels, "left_out": names[CURVES_PER_MODEL:], "n_seeds": len(of_seeds)})
    return shown


def _reason(reason: str, qc: dict) -> str:
    limit = qc.get(reason.removeprefix("qc."))
    return REASONS[reason].format(limit=limit) if reason in REASONS and ("{" not in REASONS[reason] or limit is not None) else reason


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
    }


@mpl.rc_context(STYLE)
def _counterfactual_figure(genes: pd.DataFrame, card: ModelCard) -> Figure:
    axes = _axes(3.6, 0.62 + 0.2 * len(genes), left=_room_for(genes["gene"]))
    rows = np.arange(len(genes))
    axes.axvline(0, color="#888888", linewidth=0.6)
    axes.hlines(rows, genes["low"], genes["high"], color=card.colour, linewidth=4, alpha=0.35)
    axes.plot(genes["effect"], rows, "o", color=card.colour, markersize=4)
    axes.set_yticks(rows, genes["gene"])
    axes.set_ylim(len(genes) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", color="#888888", alpha=0.25, linewidth=0.5)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("effect on log1p expression")
    return axes.figure


def counterfactual_answers(paths: list[Path], cards: dict[str, ModelCard], drawings: Drawings) -> tuple[list[dict], int]:
    """Return the top genes of every answer, and how many tables were left out.

    Parameters
    ----------
    paths
        {query}.tsv files: perturbation, gene, effect, low, high, probability_of_sign, rank, known, and what else the step wrote.
    """
    answers, n_tables, n_left_out = [], 0, 0
    for path in paths:
        dataset, split, model, seed, _ = _place(path, 5)
        table = _read_table([path])
        blocks = []
        for label, rows in table.groupby("perturbation", sort=False):
            if n_tables >= COUNTERFACTUAL_TABLES:
                n_left_out += 1
                continue
            n_tables += 1
            top = rows.sort_values("rank", kind="stable").head(GENES_OF_COUNTERFACTUAL)
            listed = "; ".join(f"{row.gene} {_number(row.effect)} ({_interval(row.low, row.high)})" for row in top.itertuples())
            card = cards.get(model) or ModelCard(model, "learned", "", {}, COLOURS[0], MARKERS[0])
            svg = drawings.svg(f"Effects of {label} with their intervals: {listed}.", _counterfactual_figure, top, card)
            columns = [column for column in top if column not in ("perturbation", "known")]
            known = rows["known"].iloc[0]
            blocks.append(
                {
                    "label": label,
                    "known": known,
                    "rows": top[columns].to_dict("records"),
                    "columns": columns,
                    "svg": svg,
                    "n_genes": len(rows),
                }
            )
        answers.append(
            {"query": path.stem, "dataset": dataset, "split": split, "model": model, "seed": seed, "path": path, "blocks": blocks}
        )
    return answers, n_left_out


# --- the page -------------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """All that the page says of one dataset × split."""

    dataset: str
    split: str
    spec: dict
    roles: dict[str, dict]
    n_cells: int
    n_genes: int
    checks: list[str]
    leaderboard: Leaderboard
    perturbations: PerturbationTable
    left_out: Names
    chosen: Chosen | None = None
    effects: list[dict] = field(default_factory=list)
    curves: list[dict] = field(default_factory=list)

    @property
    def title(self) -> str:
        """Dataset × split."""
        return f"{self.dataset} × {self.split}"

    @property
    def anchor(self) -> str:
        """What ids of this group end with."""
        return f"{self.dataset}-{self.split}"


def _words(name: str) -> Markup:
    """Return a name that may be broken after an underscore: long names must not widen a phone's page."""
    return Markup("_<wbr>").join(str(name).split("_"))


def _plain(value: object) -> str:
    """Return a value of a table cell."""
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return f"{value:,.0f}" if float(value).is_integer() and abs(value) < 1e15 else _number(value)
    return f"{value:,}" if isinstance(value, int | np.integer) else str(value)


def _render(**content: object) -> str:
    loader = jinja2.FileSystemLoader(TEMPLATE.parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "interval": lambda score: _interval(score.low, score.high), "words": _words, "plain": _plain}
    return environment.get_template(TEMPLATE.name).render(**content)


def _versions(runs: Iterable[dict]) -> Iterator[tuple[str, list[str]]]:
    found: dict[str, set[str]] = {"python": {platform.python_version()}, "perturbflow": {__version__}, "matplotlib": {mpl.__version__}}
    for run in runs:
        for name, version in run["versions"].items():
            found.setdefault(name, set()).add(str(version))
    yield from ((name, sorted(versions)) for name, versions in sorted(found.items()))


def report(
    benchmark: Path,
    runs: list[Path],
    metrics: list[Path],
    predictions: list[Path],
    harmonizations: list[Path],
    splits: list[Path],
    audits: list[Path],
    pairs: list[Path],
    counterfactuals: list[Path],
    report: Path,
    provenance: dict | None = None,
) -> None:
    """Write the page.

    Parameters
    ----------
    benchmark
        results/benchmark.tsv.
    runs, metrics, predictions
        run.json, metrics.tsv and predictions.h5ad of every run.
    harmonizations
        harmonization.json of every dataset.
    splits, audits, pairs
        split.json, audit.json and pairs.h5ad of every dataset × split.
    counterfactuals
        {query}.tsv of every answered what-if question.
    report
        HTML to be written: one file, nothing fetched.
    """
    facts = {_place(path, 4): read_json(path) for path in runs}
    cards = model_cards(facts)
    predicted = {_place(path, 4): path for path in predictions}
    seeds = list(dict.fromkeys(int(run["seed"]) for run in facts.values()))
    accounts = {_place(path, 1)[0]: data_account(read_json(path)) for path in harmonizations}
    roles, checked, paired = ({_place(path, 2): path for path in paths} for paths in (splits, audits, pairs))
    scores, summary = _read_table(metrics), _read_table([benchmark])
    drawings = {section: Drawings(section, n) for section, n in FIGURE_BYTES.items()}

    groups = []
    for dataset, split in dict.fromkeys((dataset, split) for dataset, split, _, _ in facts):
        here = (scores["dataset"] == dataset) & (scores["split"] == split)
        rows = summary[(summary["dataset"] == dataset) & (summary["split"] == split)]
        division = read_json(roles[dataset, split])
        of_role = {
            role: {"perturbations": Names.of(division["perturbations"][role]), "n": len(division["perturbations"][role]),
                   "controls": division["controls"][role], "cells": len(division["cells"][role])}
            for role in ROLES
        }  # fmt: skip
        shape = ad.read_h5ad(paired[dataset, split], backed="r").shape
        n_rows = PERTURBATION_ROWS // len(roles)
        group = Group(
            dataset, split, division["spec"], of_role, *shape,
            [check for check, result in read_json(checked[dataset, split])["checks"].items() if result == "passed"],
            leaderboard(rows, cards, drawings["leaderboard"]),
            perturbation_table(scores[here], [model for model in cards if model in set(rows["model"])], n_rows),
            Names.of(division["left_out"]),
        )  # fmt: skip
        histories: dict[str, list[list[dict]]] = {}
        for place, run in facts.items():
            if place[:2] == (dataset, split) and run["history"]:
                histories.setdefault(place[2], []).append(run["history"])
        group.curves = training_curves(histories, group.title, cards, drawings["training"])
        correlations = scores[here & (scores["metric"] == CORRELATION)]
        group.chosen = choose(correlations, cards)
        if group.chosen and drawings["effects"].bytes_left > 0:
            seed = f"seed_{seeds[0]}"
            of_model = {model: predicted[dataset, split, model, seed] for model in group.chosen.models}
            of_seed = correlations[correlations["seed"] == seeds[0]].set_index(["model", "perturbation"])["value"].to_dict()
            group.effects = effect_figures(group.chosen, paired[dataset, split], of_model, of_seed, cards, drawings["effects"])
        logger.info("%s: %d figures of effects, %d of training", group.title, len(group.effects), len(group.curves))
        groups.append(group)

    answers, n_tables_left_out = counterfactual_answers(counterfactuals, cards, drawings["counterfactuals"])
    page = _render(
        cards=cards,
        groups=groups,
        datasets=accounts,
        seeds=seeds,
        metrics={name: metric for name, metric in METRICS.items() if name in set(summary["metric"])},
        runs=[{"place": place, **run} for place, run in facts.items()],
        answers=answers,
        n_tables_left_out=n_tables_left_out,
        n_left_out={section: drawing.n_left_out for section, drawing in drawings.items()},
        n_high_expression=N_HIGH_EXPRESSION,
        benchmark=benchmark,
        versions=list(_versions([*facts.values(), *accounts.values()])),
        provenance=provenance or {},
        params_of=lambda card: json.dumps(card.params, ensure_ascii=False) if card.params else "",
    )
    with atomic(report) as partial:
        partial.write_text(page, encoding="utf-8")
    logger.info("%s: %.1f MB, %d figures", report, len(page.encode()) / 1e6, sum(drawing.n_drawn for drawing in drawings.values()))
