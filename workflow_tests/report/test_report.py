"""The page: self-contained, and every number on it is the number of a file."""

import base64
import html
import json
import re
import shutil
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import OFF, REPOSITORY, SPECS, dataset_block, make_screen
from matplotlib.figure import Figure

from perturbflow import embeddings, pairs
from perturbflow.audit import audit
from perturbflow.audit.audit import CHECKS
from perturbflow.benchmark import benchmark
from perturbflow.benchmark.verdicts import distinguishing
from perturbflow.evaluation import METRICS, evaluate, score_inputs
from perturbflow.io.files import read_json, write_json
from perturbflow.predict import predict
from perturbflow.quality import quality
from perturbflow.registry.families import FAMILIES, Family
from perturbflow.report import heatmap, leaderboard, report, scatter_plots, summary
from perturbflow.report.boards import VerdictTable
from perturbflow.report.cards import ModelCard
from perturbflow.report.learning import by_heart
from perturbflow.report.page import FIGURE_BYTES
from perturbflow.report.plotting import NamedPoints, Plots, new_axes, number, signed
from perturbflow.report.scatter_plots import Chosen, scored_of
from perturbflow.report.sections import perturbation_table
from perturbflow.report.what_if import search_sentence
from perturbflow.screens import harmonize
from perturbflow.splits import split as splits
from perturbflow.train import train

# Gene and label at once, as a screen might bring it: it must end up as text.
HOSTILE = "<i>TF9</i>&\"'$x_1$"
IMPLEMENTATIONS = {
    "no_change": ("closed_form.baselines:NoChange", {}),
    "additive": ("closed_form.baselines:Additive", {}),
    "perturbed_mean": ("closed_form.baselines:PerturbedMean", {}),
    "technical_duplicate": ("closed_form.ceilings:TechnicalDuplicate", {}),
    "perfect_mean": ("closed_form.ceilings:PerfectMean", {}),
}
TABLES = ("benchmark", "calibration", "comparisons", "strata", "verdicts", "contexts")
MODELS = {**{name: name for name in IMPLEMENTATIONS}, "learned": "learned"}
SPLITS = {name: spec for name, spec in SPECS.items() if name != "unseen_dose"}  # the screen has no doses
HEADLINES = [name for name, metric in METRICS.items() if metric.headline]
ON_TARGET = [name for name, metric in METRICS.items() if metric.family == "on_target"]
CEILINGS = ["technical_duplicate", "perfect_mean"]
STAGE = [{"step": step, "effective_rank": 5.0 + step} for step in (1, 2, 3)]
SEPARABILITY = {
    "batch": {
        "n_labels": 2,
        "n_cells": 321,
        "chance": 0.5,
        "embedding_linear": 0.617,
        "embedding_knn": 0.52,
        "pca_linear": 0.6,
        "pca_knn": 0.5,
    }
}
NUMBERS = {name: {"mean": mean, "low": mean - 0.1, "high": mean + 0.1} for name, mean in
           (("model", 0.41), ("no_change", 0.0), ("perturbed_mean", 0.22), ("ceiling", 0.77))}  # fmt: skip
WARRANTY = {
    "verdict": "no better than the mean effect of training", "identity": 0.0,
    "placebo": {"share_called": 0.043, "nominal": 0.05, "repeats": 20, "repeats_with_discoveries": 1},
    "coverage": [
        {"nominal": nominal, "measured": nominal + 0.01, "low": 0.7, "high": 0.95, "n_test": 9, "n_calibration": 17,
         "n_calibration_perturbations": 11, "floors": {"no_change": {"mean": 0.88, "low": 0.8, "high": 0.9}},
         "width": {name: {"mean": width}
                   for name, width in (("model", 0.3), ("no_change", 0.4), ("perturbed_mean", 0.5), ("ceiling", 0.1))},
         "relative_width": {"no_change": {"mean": 0.75, "low": 0.7, "high": 0.8}}}
        for nominal in (0.8, 0.9)
    ],
    "agreement": {"whole": NUMBERS, "specific": {**NUMBERS, "model": {"mean": 0.3, "low": 0.1, "high": 0.5}}},
    "on_target": {"n": 0}, "perturbations": [],
}  # fmt: skip
HISTORY = [
    {"step": step, "loss": 1 / step, "validation_loss": 1.5 / step, "rate": float("nan")} for step in (10, 20, 30, 40)
]
OVERFITTED = [
    {"step": step, "loss": 10 / step, "validation_loss": 1 / step + step / 1e3} for step in range(10, 100, 10)
]


@dataclass(frozen=True)
class Tree:
    """A results folder with one screen, both splits, baselines, a ceiling and a learned model."""

    folder: Path

    def arguments(self) -> dict:
        """Return what the rule hands over."""
        runs = [
            self.folder / "mine" / split / model / "seed_0" / "run.json"
            for split in SPLITS
            for model in [*IMPLEMENTATIONS, "learned"]
        ]  # fmt: skip
        of_splits = {name: [self.folder / "mine" / split / file for split in SPLITS]
                     for name, file in (("splits", "split.json"), ("audits", "audit.json"),
                                        ("pairs", "pairs.h5ad"))}  # fmt: skip
        return {
            **{name: self.folder / f"{name}.tsv" for name in TABLES},
            "runs": runs,
            "metrics": [path.with_name("metrics.tsv") for path in runs],
            "predictions": [path.with_name("predictions.h5ad") for path in runs],
            "harmonizations": [self.folder / "mine" / "harmonization.json"],
            "qualities": [self.folder / "mine" / "quality.json"],
            **of_splits,
            "counterfactuals": [],
            "figures": [],
            "warranties": [],
            "report": self.folder / "report.html",
            "report_numbers": self.folder / "report.json",
            "provenance": {"code_version": "0123456789abcdef"},
        }

    def table(self, name: str) -> pd.DataFrame:
        """Return a table of the benchmark."""
        return pd.read_csv(self.folder / f"{name}.tsv", sep="\t")

    def page(self, **changes: object) -> str:
        """Write the page and return it."""
        arguments = {**self.arguments(), **changes}
        report(**arguments)
        return arguments["report"].read_text(encoding="utf-8")


def run_models(here: Path, split: str) -> None:
    """Train, predict and score; the learned model is the additive one under another name, with a history."""
    for model, (implementation, params) in IMPLEMENTATIONS.items():
        folder = here / model / "seed_0"
        provenance = {"dataset": "mine", "split": split, "model": model, "seed": "0", "code_version": f"of-{model}"}
        paths = [here / name for name in ("pairs.h5ad", "embeddings.parquet", "audit.json")]
        train(*paths, folder / "model.npz", folder / "run.json", implementation, params, seed=0, provenance=provenance)
        predict(
            here / "pairs.h5ad",
            folder / "model.npz",
            folder / "predictions.h5ad",
            implementation,
            params,
            seed=0,
            max_cells=20,
        )
        evaluate(
            folder / "predictions.h5ad", here / "pairs.h5ad", here / "split.json", folder / "metrics.tsv", provenance
        )
    folder = Path(shutil.copytree(here / "additive", here / "learned")) / "seed_0"
    run = read_json(folder / "run.json")
    run["provenance"]["model"] = "learned"
    facts = {
        "stage_a": {"history": STAGE, "complaint": "the embedding has collapsed: so it says."},
        "separability": SEPARABILITY,
    }
    write_json(
        folder / "run.json",
        {**run, "implementation": "base:Model", "history": HISTORY, "n_parameters": 7654321, "facts": facts},
    )
    scores = pd.read_csv(folder / "metrics.tsv", sep="\t")
    scores["model"] = "learned"
    towards = np.sign(
        [METRICS[metric].perfect - value for metric, value in zip(scores["metric"], scores["value"], strict=True)]
    )
    scores.assign(value=scores["value"] + 0.01 * towards).to_csv(folder / "metrics.tsv", sep="\t", index=False)


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tree]:
    """Return a results folder made by the package's own steps."""
    folder = tmp_path_factory.mktemp("report") / "results"
    mine = folder / "mine"
    mine.mkdir(parents=True)
    screen = make_screen(n_genes=60)
    screen.var_names = [HOSTILE if name == "TF5" else name for name in screen.var_names]
    labels = screen.obs["perturbation"].astype(str).str.replace("TF5", HOSTILE)
    labels.iloc[np.flatnonzero(labels == "TF8")[:13]] = "nan"
    labels.iloc[np.flatnonzero(labels == "TF6+TF7")[:35]] = "TF7"
    screen.obs["perturbation"] = labels
    screen.write_h5ad(mine / "screen.h5ad")
    qc = {**OFF, "min_cells_per_perturbation": 10}
    harmonize.harmonize(
        mine / "screen.h5ad", mine / "harmonized.h5ad", mine / "harmonization.json", "mine", dataset_block(), qc
    )
    quality(
        *[
            mine / name
            for name in ("harmonized.h5ad", "harmonization.json", "quality.tsv", "quality.json", "quality.html")
        ]
    )
    families = pytest.MonkeyPatch()
    families.setitem(FAMILIES, "learned", Family("base:Model", "learned", "train_learned"))
    for split, spec in SPLITS.items():
        here = mine / split
        here.mkdir()
        files = {name: here / name for name in ("split.json", "pairs.h5ad", "embeddings.parquet", "audit.json")}
        splits.split(mine / "harmonized.h5ad", mine / "harmonization.json", files["split.json"], split, spec)
        write_json(
            files["split.json"], {**read_json(files["split.json"]), "generalization": f"What {split} says of itself."}
        )
        pairs.pair(mine / "harmonized.h5ad", files["split.json"], files["pairs.h5ad"], 40)
        embeddings.embeddings(files["pairs.h5ad"], files["embeddings.parquet"], ["coexpression"])
        audit.audit(mine / "harmonized.h5ad", *files.values())
        run_models(here, split)
    of_tree = Tree(folder)
    tables = {name: folder / f"{name}.tsv" for name in TABLES}
    benchmark(
        of_tree.arguments()["metrics"],
        MODELS,
        **tables,
        qualities=[mine / "quality.tsv"],
        audits=[],
        harmonizations=[],
        least_difference=0.02,
    )
    yield of_tree
    families.undo()


@pytest.fixture(scope="module")
def page(tree: Tree) -> str:
    """Return the page of the whole tree."""
    return tree.page()


@pytest.fixture
def few_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the time of most figures."""
    few = {**dict.fromkeys(FIGURE_BYTES, 1), "counterfactuals": 100_000}
    monkeypatch.setattr("perturbflow.report.page.FIGURE_BYTES", few)


class Elements(HTMLParser):
    """All start tags of a page with their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(page)

    @property
    def figures(self) -> list[dict[str, str]]:
        """Attributes of the figures; markers of models beside their names are none."""
        return [attributes for tag, attributes in self.tags if tag == "svg" and attributes.get("class") != "dot"]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.text += data


def leaderboard_row(page: str, split: str, model: str) -> str:
    """Return the cells of a model in the leaderboard of a split: headline metrics, then the others."""
    board = page[page.index(f'<h3 id="leaderboard-mine-{split}">') :]
    board = board[: board.index("</section>")]
    return "".join(
        re.findall(rf'<tr><th scope="row">(?:<svg class="dot".*?</svg>)?{model}\b.*?</tr>', board, re.DOTALL)
    )


# --- what stands on the page ----------------------------------------------------------------------------------------


def test_nothing_is_fetched(page: str) -> None:
    for tag, attributes in Elements(page).tags:
        for name in ("src", "href", "xlink:href", "action", "data"):
            if (target := attributes.get(name)) is not None:
                assert target.startswith(("#", "data:")), (tag, name, target)
        assert "http" not in attributes.get("style", "")
    assert "@import" not in page
    assert not re.search(r"url\((?!#)", page)


def test_leaderboard_has_the_values_and_intervals_of_the_benchmark(page: str, tree: Tree) -> None:
    table = tree.table("benchmark")
    assert len(table) == len(SPLITS) * len(MODELS) * len(METRICS)
    for row in table.itertuples():
        cells = leaderboard_row(page, row.split, row.model)
        assert f'<data value="{row.value}">{number(row.value)}</data>' in cells
        assert f"{number(row.ci_low)} to {number(row.ci_high)}" in cells
    for n in table.groupby("split")["n_perturbations"].max():  # of a metric that is defined for all
        assert f"{n} held-out perturbations" in page


def test_best_value_is_bold_where_the_metric_can_tell_and_no_ceiling_is(page: str, tree: Tree) -> None:
    table = tree.table("benchmark")
    mute = {
        split: {name for name, tells in distinguishing(rows).items() if not tells}
        for split, rows in tree.table("calibration").groupby("split")
    }
    assert any(mute.values())
    for (split, metric), rows in table[~table["model"].isin(CEILINGS)].groupby(["split", "metric"]):
        best = rows["value"][METRICS[metric].loss(rows["value"]).idxmin()]
        position = [*HEADLINES, *ON_TARGET, *[name for name in METRICS if name not in (*HEADLINES, *ON_TARGET)]].index(
            metric
        )
        for row in rows.itertuples():
            cell = re.findall(r"<td>.*?</td>", leaderboard_row(page, split, row.model), re.DOTALL)[position]
            assert ("<strong>" in cell) == (row.value == best and metric not in mute[split]), (split, metric, row.model)
        head = re.search(
            rf"<th scope=.col.[^>]*>{metric.replace('_', '_<wbr>')}&nbsp;.*?</th>",
            page[page.index(f'aria-label="Leaderboard of mine × {split}"') :],
        )
        assert ("cannot tell" in head[0]) == (metric in mute[split])
    assert "<strong>" not in leaderboard_row(page, "unseen_combination", "technical_duplicate")


def test_ceiling_stands_apart_and_is_explained(page: str) -> None:
    board = page[page.index('id="leaderboard-mine-unseen_combination"') :]
    ceiling = board[board.index('<tbody class="ceiling">') : board.index("</table>")]
    assert "technical_duplicate" in ceiling
    assert "no_change" not in ceiling
    assert "<em>technical_duplicate</em> is a ceiling" in board


def test_metrics_are_defined_and_say_which_way_is_better(page: str) -> None:
    text = " ".join(Elements(page).text.split())
    for metric in METRICS.values():
        assert metric.formula in text
        assert f"({metric.reading}" in text


def run_cards(page: str) -> dict[str, str]:
    """Return model → its run card."""
    cards = re.findall(
        r'<details class="card">\n<summary>(?:<svg class="dot".*?</svg>)?(\w+) (.*?)</details>', page, re.DOTALL
    )
    return dict(cards)


def test_kinds_of_models_come_from_their_families(page: str) -> None:
    kinds = {model: re.search(r'<span class="note">(\w+)</span>', card)[1] for model, card in run_cards(page).items()}
    assert kinds == {**dict.fromkeys(("no_change", "additive", "perturbed_mean"), "baseline"),
                     **dict.fromkeys(CEILINGS, "ceiling"),
                     "learned": "learned"}  # fmt: skip


def test_every_model_has_a_card_that_names_its_files(page: str) -> None:
    for model, card in run_cards(page).items():
        assert "2 runs, each" in card
        assert re.search(rf"<code>results/mine/\w+/{model}/seed_0/run.json</code>", card)


def test_what_was_dropped_is_shown(page: str, tree: Tree) -> None:
    account = read_json(tree.folder / "mine" / "harmonization.json")
    assert account["cells"]["dropped"] == {"unassigned": 13, "qc.min_cells_per_perturbation": 5}
    assert "13 without an assigned perturbation" in page
    assert "5 in perturbations of fewer than 10 cells" in page
    assert "TF6+TF7 (5)" in page
    assert f"{len(CHECKS)} checks for leaks" in page
    roles = read_json(tree.folder / "mine" / "unseen_combination" / "split.json")
    assert f"<td>{roles['controls']['test']}</td>" in page


def test_every_held_out_perturbation_is_listed_with_members_seen(page: str, tree: Tree) -> None:
    scores = pd.read_csv(tree.folder / "mine" / "unseen_combination" / "additive" / "seed_0" / "metrics.tsv", sep="\t")
    table = page[page.index('aria-label="Scores of every perturbation of mine × unseen_combination"') :]
    table = html.unescape(table[: table.index("</table>")])
    for label, rows in scores.groupby("perturbation"):
        first = rows.iloc[0]
        start = (
            f'<tr><th scope="row">{label}</th><td>additive</td><td>{first["members_seen"]}</td><td><data '
            f'value="{first["n_cells"]}">'
        )
        assert start in table
        by_metric = rows.set_index("metric")["value"]
        shown = [metric for metric in METRICS if metric in (*HEADLINES, *ON_TARGET, "pearson_delta_ctrl_off_target")]
        cells = "".join(f"<td>{number(by_metric[metric])}</td>" for metric in shown)
        assert cells in table


def test_training_and_cost_of_the_learned_model(page: str) -> None:
    assert (
        "loss of learned on mine × unseen_combination by training step: training from 0.100 to 0.0250; validation from"
        in page
    )
    assert '<data value="7654321">7,654,321</data>' in page


def test_no_curve_is_drawn_of_closed_forms(tree: Tree, tmp_path: Path, few_figures: None) -> None:
    arguments = tree.arguments()
    baselines = {
        name: [path for path in arguments[name] if "learned" not in path.parts]
        for name in ("runs", "metrics", "predictions")
    }
    tables = {name: tmp_path / f"{name}.tsv" for name in TABLES}
    benchmark(baselines["metrics"], MODELS, **tables, qualities=[], audits=[], harmonizations=[], least_difference=0.02)
    page = tree.page(**baselines, **tables, report=tmp_path / "report.html")
    assert "No model of this run was trained in steps" in page
    assert "one of the best" in page  # the best baseline is drawn all the same


def test_the_report_says_what_learned_by_heart_and_what_losses_mean(
    tree: Tree, page: str, tmp_path: Path, few_figures: None
) -> None:
    assert "Whether it learned by heart is unknown: 4 points of validation loss were logged." in page
    changed = []
    for path in tree.arguments()["runs"]:
        if path.parts[-3] == "learned":
            run = read_json(path)
            stage = {**run["facts"]["stage_a"], "history": [{"step": step, "loss": step} for step in (1, 2, 3)]}
            path = tmp_path.joinpath(*path.parts[-5:])
            write_json(
                path,
                {
                    **run,
                    "implementation": "jepa:Jepa",
                    "history": OVERFITTED,
                    "facts": {**run["facts"], "stage_a": stage},
                },
            )
        changed.append(path)
    again = tree.page(runs=changed, report=tmp_path / "report.html")
    assert again.count(
        "It learned by heart: its validation loss is lowest about step 40 (0.06417) and ends at 0.09681, while its "
        "training loss"
    ) == len(SPLITS)
    assert "Fewer steps may predict better. Loss: error of the mean effects" in again
    assert (
        "stage a: Whether it learned by heart is unknown: no points of validation loss were logged. Loss: squared "
        "error of the target"
    ) in again


def curve(values: np.ndarray) -> list[tuple[float, float]]:
    """Return a value every hundred steps."""
    return [(100.0 * i, float(value)) for i, value in enumerate(values, 1)]


@pytest.mark.parametrize("n", [8, 10, 20, 60])
def test_a_flat_noisy_curve_is_not_learning_by_heart(n: int) -> None:
    rng = np.random.default_rng(0)
    falling = curve(1 / np.arange(1, n + 1))
    told = [by_heart(falling, curve(1 + 0.1 * rng.normal(size=n))) for _ in range(300)]
    assert sum(sentence.startswith("It learned by heart") for sentence in told) <= 3
    course = 1 / np.arange(1, n + 1)
    told = [by_heart(falling, curve(course + 0.05 * rng.normal(size=n))) for _ in range(300)]
    assert sum(sentence.startswith("It learned by heart") for sentence in told) <= 3


@pytest.mark.parametrize("n", [10, 20, 60])
def test_a_validation_loss_that_rises_while_training_falls_is(n: int) -> None:
    rng, course = np.random.default_rng(0), np.linspace(0, 1, n)
    falling, rising = curve(1 - 0.5 * course), (course - 0.3) ** 2
    told = [by_heart(falling, curve(rising + 0.02 * rng.normal(size=n))) for _ in range(100)]
    assert all(sentence.startswith("It learned by heart") for sentence in told)
    assert "did not learn by heart, as its training loss does not fall" in by_heart(curve(1 + course), curve(rising))
    assert by_heart(falling, curve(1 - course)).startswith("No sign of learning by heart")


def test_stages_of_a_training_are_drawn_and_its_embedding_and_complaints_are_told(page: str) -> None:
    elements = Elements(page)
    labels = [figure["aria-label"] for figure in elements.figures]
    assert any(
        label.startswith("stage_a: effective_rank of learned") and "from 6.00 to 8.00" in label for label in labels
    )
    assert "the embedding has collapsed: so it says." in elements.text
    assert "0.617" in elements.text
    assert "321" in elements.text


def test_special_characters_of_labels_are_text(page: str) -> None:
    assert HOSTILE in Elements(page).text
    assert "<i>TF9" not in page
    assert "&lt;i&gt;TF9&lt;/i&gt;&amp;" in page


def test_every_figure_has_an_alternative_text_and_ids_are_unique(page: str) -> None:
    tags, figures = Elements(page).tags, Elements(page).figures
    assert len(figures) > 12
    assert all(figure["role"] == "img" and len(figure["aria-label"]) > 30 for figure in figures)
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    referred = {attributes["href"][1:] for _, attributes in tags if attributes.get("href", "").startswith("#")}
    referred |= {
        attributes["xlink:href"][1:] for _, attributes in tags if attributes.get("xlink:href", "").startswith("#")
    }
    assert referred <= set(ids)


def test_tables_scroll_in_a_region_of_their_own(page: str) -> None:
    tags = Elements(page).tags
    for i, (tag, _) in enumerate(tags):
        if tag == "table":
            container = tags[i - 1][1]
            assert container["class"] == "scroll"
            assert container["tabindex"] == "0"
            assert container["aria-label"]


def test_provenance_names_code_and_command(page: str) -> None:
    assert "<code>0123456789abcdef</code>" in page
    assert "<code>of-additive</code>" in page
    assert "snakemake --cores 2" in page


def test_the_page_is_the_same_when_written_again(tree: Tree, tmp_path: Path, few_figures: None) -> None:
    first, again = (tree.page(report=tmp_path / name) for name in ("first.html", "again.html"))
    assert first == again


# --- effects --------------------------------------------------------------------------------------------------------


def test_best_and_worst_perturbations_of_the_best_model_are_shown(page: str, tree: Tree) -> None:
    scores = pd.concat([pd.read_csv(path, sep="\t") for path in tree.arguments()["metrics"]])
    scores = scores[(scores["split"] == "unseen_perturbation") & (scores["metric"] == "pearson_delta_ctrl_off_target")]
    means = scores[~scores["model"].isin(CEILINGS)].groupby("model")["value"].mean()
    ranked = scores[scores["model"] == means.idxmax()].sort_values("value", ascending=False)
    section = page[page.index('id="effects-mine-unseen_perturbation"') :]
    section = Elements(section[: section.index("</section>")]).text
    found = re.findall(r"^(\S.*), one of the (best|worst)$", section, re.MULTILINE)
    n = len(ranked)
    assert n >= 4
    assert found == [
        *[(label, "best") for label in ranked["perturbation"][:2]],
        *[(label, "worst") for label in ranked["perturbation"][-2:]],
    ]
    value = ranked["value"].iloc[0]
    assert f"{ranked['perturbation'].iloc[0]}, {means.idxmax()}: r = {number(value)}" in " ".join(section.split())


# --- verdicts, calibration, strata ----------------------------------------------------------------------------------


def region(page: str, label: str) -> str:
    """Return a table by the label of its region."""
    start = page.index(f'aria-label="{label}"')
    return page[start : page.index("</table>", start)]


def test_the_overview_has_every_learned_model_and_counts_its_metrics(page: str, tree: Tree) -> None:
    overview = region(page, "Overview")
    verdicts = tree.table("verdicts").fillna("").set_index(["model", "split"])
    row = next(
        row for row in re.findall(r"<tr>.*?</tr>", overview, re.DOTALL) if ">learned<" in row.replace("</span>", ">")
    )
    for cell, split in zip(re.findall(r"<td>(.*?)</td>", row, re.DOTALL), SPLITS, strict=True):
        told = verdicts.loc["learned", split]
        names = ("wins", "losses", "level", "undecided")
        n_won, n_lost, n_level, n_open = (len(told[name].split(",")) if told[name] else 0 for name in names)
        is_ranked = told["n_telling"] >= 2
        assert (f"{told['verdict']}<" in cell.replace("</span>", "<")) == is_ranked
        assert (f"▲ {n_won} ▼ {n_lost} = {n_level} ? {n_open}" in cell) == is_ranked
        assert ("this screen cannot rank models" in cell) != is_ranked
        on_target = tree.table("benchmark").query(
            "model == 'learned' and metric == 'mae_on_target' and split == @split"
        )
        scaled = on_target["scaled_no_change_perfect_mean"].item()
        assert (f"on target {number(scaled)}" in cell) == np.isfinite(scaled)
        assert ("with caveats" in cell) == bool(told["caveats"])
    for split in SPLITS:
        assert f'href="#verdicts-mine-{split}"' in overview
        assert f'id="verdicts-mine-{split}"' in page
    assert "1 dataset; 2 splits; 6 models (1 learned, 3 baselines, 2 ceilings); 1 seed; 12 runs in all." in page


def test_the_first_sentence_follows_from_the_verdicts(page: str, tree: Tree) -> None:
    verdicts = tree.table("verdicts")
    for split in SPLITS:
        of_split = verdicts[verdicts["split"] == split]
        section = page[page.index(f'id="overview-mine-{split}"') :]
        sentence = re.search(r"<strong>(.*?)</strong>", section)[1]
        assert ("cannot rank models" in sentence) == (of_split["n_telling"] < 2).any()
        if "cannot rank" not in sentence:
            (verdict,) = of_split.loc[of_split["model"] == "learned", "verdict"]
            assert ("No learned model is better" in sentence) == (verdict != "better")
            assert "learned" in sentence


def test_a_summary_names_who_is_better_worse_or_undecided() -> None:
    def board(*verdicts: tuple[str, str], n_telling: int = 3) -> SimpleNamespace:
        learned = [{"model": model, "verdict": verdict, "n_telling": n_telling} for model, verdict in verdicts]
        scores = SimpleNamespace(headlines=["mae", "mse"], n_perturbations=6, best_baselines={"linear": ["error"]})
        return SimpleNamespace(
            verdicts=VerdictTable([], learned, learned),
            leaderboard=scores,
            calibration=SimpleNamespace(uninformative=["mse"]),
        )

    assert summary.sentence(board(("a", "better"), ("b", "worse"), ("c", "undecided"))) == (
        "a is better than the best baseline; b is worse than the best baseline; "
        "c cannot be told apart from the best baseline. The best baseline is linear."
    )
    assert summary.sentence(board(("a", "level"), ("b", "level"))) == (
        "No learned model is better than the best baseline: a and b are level with the best baseline. "
        "The best baseline is linear."
    )
    assert summary.sentence(board(("a", "undecided"), n_telling=1)) == (
        "These data cannot rank models: 1 of 2 headline metrics tell good from bad, with 6 held-out perturbations."
    )
    assert summary.sentence(board()) == "No learned model was run. The best baseline is linear."


def test_the_picture_shows_scaled_scores_and_the_band_of_what_is_equal() -> None:
    scores = {
        "a": leaderboard.Score(1, 0, 2, 9, scaled=0.5, scaled_low=0.4, scaled_high=0.6),
        "far": leaderboard.Score(9, 8, 10, 9, scaled=-7.0, scaled_low=-8.0, scaled_high=-6.0),
    }
    (axes,) = summary._panel_figure(scores, "a", 0.02, cards(a="baseline", far="learned")).axes
    assert axes.get_xlim() == pytest.approx((summary.LOWEST, 1.1))
    points = {float(line.get_ydata()[0]): line for line in axes.lines if len(line.get_xdata()) == 1}
    assert points[0.0].get_xdata()[0] == pytest.approx(0.5)
    assert sum(len(line.get_xdata()) == 1 for line in axes.lines) == 2, "no interval is cut that is whole"
    assert (points[1.0].get_xdata()[0], points[1.0].get_marker()) == (summary.LOWEST, "<"), "beyond the scale"
    (band,) = axes.patches
    assert (band.get_x(), band.get_width()) == pytest.approx((0.48, 0.04))


def test_an_interval_that_is_cut_ends_in_an_arrow() -> None:
    score = leaderboard.Score(1, 0, 2, 9, scaled=0.5, scaled_low=-0.2, scaled_high=2.0)
    (axes,) = summary._panel_figure({"a": score}, None, 0.02, cards(a="learned")).axes
    markers = {line.get_marker(): line.get_xdata()[0] for line in axes.lines if len(line.get_xdata()) == 1}
    assert markers == {">": summary.HIGHEST, "o": 0.5}


def test_the_picture_always_holds_the_closed_form_to_beat() -> None:
    all_cards = cards(a="learned", linear="baseline", other="baseline", gp="baseline")
    all_cards["gp"] = replace(all_cards["gp"], is_to_beat=True)
    scores = SimpleNamespace(models=list(all_cards), best_baselines={"linear": ["error"]})
    assert summary._shown(SimpleNamespace(leaderboard=scores), all_cards) == ["a", "gp", "linear"]


def test_all_numbers_are_in_a_file_for_programs(page: str, tree: Tree) -> None:
    content = json.loads((tree.folder / "report.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    table = tree.table("benchmark").query("model == 'additive' and metric == 'mae'").set_index("split")["value"]
    boards = {board["split"]: board for board in content["boards"]}
    assert {split: board["leaderboard"]["models"]["additive"]["mae"]["value"] for split, board in boards.items()} == (
        table.to_dict()
    )
    assert [one["sentence"] for one in content["summaries"]] == re.findall(r"<p><strong>(.*?)</strong>", page)[
        : len(boards)
    ]
    assert "<svg" not in (tree.folder / "report.json").read_text()
    assert len(content["screens"][0]["rows"]) == len(pd.read_csv(tree.folder / "mine/quality.tsv", sep="\t"))


def test_the_heatmap_shows_measured_effects_beside_predicted_ones() -> None:
    rng = np.random.default_rng(0)
    labels, genes = ["G0", "G1", "G2"], [f"G{i}" for i in range(12)]
    measured = rng.normal(size=(3, 12))
    measured[:, 0] = 50.0  # a perturbed gene
    scored = {
        "a": SimpleNamespace(labels=labels, measured=measured, predicted=0.5 * measured, control=np.zeros((3, 12)))
    }
    chosen = Chosen("a", dict.fromkeys(labels, ""), ["a"], 0, [], 0)
    shown: list = []
    plots = SimpleNamespace(svg=lambda alt, plot, *content: shown.extend([alt, *content]))
    heatmap.effect_heatmap(chosen, scored, genes, "mine", plots)
    alt, panels, rows, columns = shown
    assert "a: r 1.00" in alt
    assert sorted(rows) == labels
    assert not set(columns) & set(labels), "perturbed genes are left out"
    i, j = labels.index(rows[0]), genes.index(columns[0])
    assert panels["measured"][0, 0] == measured[i, j]
    assert panels["a"][0, 0] == pytest.approx(0.5 * measured[i, j])


def test_every_check_of_the_audit_is_explained(page: str) -> None:
    for split in SPLITS:
        audited = region(page, f"Audit of mine × {split}")
        for check in CHECKS:
            name = re.escape(check.__name__.replace("_", " "))
            assert re.search(rf"<th scope=\"row\">{name}</th><td[^>]*>[^<]{{20,}}</td><td>passed</td>", audited)


def test_every_held_out_perturbation_has_a_figure_while_there_is_room(page: str, tree: Tree) -> None:
    for split in SPLITS:
        held_out = {
            label
            for label in read_json(tree.folder / "mine" / split / "split.json")["perturbations"]["test"]
            if label != HOSTILE
        }
        drawn = re.findall(r'aria-label="Scatter plot of predicted against measured effects of (\S+) by', page)
        assert held_out <= set(drawn)


def test_of_many_held_out_perturbations_a_sample_is_plotted_and_the_page_says_so(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scatter_plots, "MOST_OTHERS", 0)
    page = tree.page(report=tmp_path / "report.html")
    n = len(read_json(tree.folder / "mine" / "unseen_perturbation" / "split.json")["perturbations"]["test"])
    section = page[page.index('id="effects-mine-unseen_perturbation"') :]
    section = section[: section.index("</section>")]
    assert n > 4
    assert f"{n - 4} perturbations are in no plot: the others were drawn at random." in section
    drawn = re.findall(r'aria-label="Scatter plot of predicted against measured effects of (\S+) by', section)
    assert len(set(drawn)) == 4


def test_the_page_takes_no_pairs_into_memory(
    tree: Tree, tmp_path: Path, few_figures: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, opened = ad.read_h5ad, []

    def watched(path: Path, **options: object) -> ad.AnnData:
        opened.append(Path(path).name)
        return read(path, **options)

    monkeypatch.setattr(ad, "read_h5ad", watched)
    tree.page(report=tmp_path / "report.html")
    assert "pairs.h5ad" not in opened, "backed or not, it reads the layer of counts"


def test_a_table_of_many_perturbations_has_their_rows_alone() -> None:
    n = 400
    labels = pd.DataFrame({"perturbation": [f"G{i}" for i in range(n)], "members_seen": 0, "n_cells": range(n)})
    metrics = ("pearson_delta_ctrl_off_target", "mae", "auprc")
    scores = pd.concat([labels.assign(model=m, metric=k, value=0.5) for m in "ab" for k in metrics])
    tracemalloc.start()
    table = perturbation_table(scores, ["a", "b"], 4000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(table.rows) == 2 * n
    assert peak < 8e6, "every combination of label and number of cells takes three times that"


def test_plotted_means_are_those_that_are_scored(tree: Tree) -> None:
    here = tree.folder / "mine" / "unseen_combination"
    files = {model: here / model / "seed_0" / "predictions.h5ad" for model in ("additive", "technical_duplicate")}
    labels = read_json(here / "split.json")["perturbations"]["test"]
    chosen = Chosen("additive", {labels[0]: "best", labels[-1]: "worst"}, [*files], 0, [], 0)
    shown = scored_of(chosen, here / "pairs.h5ad", files)
    for model, path in files.items():
        whole = score_inputs(ad.read_h5ad(path), pairs.Pairs.read(here / "pairs.h5ad"))
        assert shown[model].labels == [labels[0], labels[-1]]
        for name in ("measured", "predicted", "control"):
            np.testing.assert_allclose(
                getattr(shown[model], name), getattr(whole, name)[[0, len(labels) - 1]], rtol=0, atol=1e-12
            )
        assert np.array_equal(shown[model].highly_expressed, whole.highly_expressed)


def test_where_every_number_comes_from_names_a_rule_that_exists(page: str) -> None:
    traces = region(page, "Files")
    rules = set(
        re.findall(
            r"^rule (\w+):", "".join(path.read_text() for path in (REPOSITORY / "rules").glob("*.smk")), re.MULTILINE
        )
    )
    named = set(re.findall(r"<td><code>([\w…]+)</code></td></tr>", traces))
    assert {"benchmark", "audit", "warranty", "counterfactual"} <= named
    assert named - {"train_…"} <= rules


def test_sections_stand_in_the_order_of_reading(page: str) -> None:
    headings = re.findall(r'<h2 id="(\w+)"', page)
    shown = ["overview", "screens"]
    folded = ["verdicts", "leaderboard", "calibration", "strata", "effects", "perturbations", "training", "run", "data"]
    assert headings == [*shown, *folded, "provenance"]
    assert re.findall(r'<summary><h2 id="(\w+)"', page) == [*folded, "provenance"]


def test_every_verdict_stands_on_the_page(page: str, tree: Tree) -> None:
    text = " ".join(Elements(page).text.split())
    for row in tree.table("verdicts").fillna("").itertuples():
        found = re.search((rf'<tr><th scope="row">[^\n]*{row.model}<small>{row.kind}</small></th><td><span '
                           rf'class="[^"]*">{row.verdict}</span>'),
                          region(page, f"Verdicts of mine × {row.split}"))  # fmt: skip
        assert found, row
        if row.kind == "learned":
            assert f"{row.sentence} Caveat: {row.caveats}" in text
            assert "one seed" in row.caveats
    assert "technical_duplicate<small>" not in region(page, "Verdicts of mine × unseen_combination")


def test_differences_to_the_best_baseline_are_those_of_the_table(page: str, tree: Tree) -> None:
    table = tree.table("comparisons").merge(
        tree.table("verdicts")[["split", "model", "cannot_tell"]].fillna(""), on=["split", "model"]
    )
    rows = table[table["is_best_baseline"] & table["headline"] & (table["kind"] != "ceiling")]
    assert len(rows) == len(SPLITS) * 4 * len(HEADLINES)
    for row in rows.itertuples():
        cells = region(page, f"Verdicts of mine × {row.split}")
        value, unit = (row.share, " %") if np.isfinite(row.share) else (row.difference, "")
        shown = f'<data value="{value}">{signed(100 * value if unit else value)}{unit}</data>'
        assert (row.metric in row.cannot_tell.split(",")) or shown in cells


def test_calibration_says_what_cannot_tell(page: str, tree: Tree) -> None:
    for split, rows in tree.table("calibration").groupby("split"):
        cells = region(page, f"Calibration of mine × {split}")
        for row in rows.itertuples():
            assert f'<data value="{row.drf}">range {number(row.drf)}</data>' in cells
        assert cells.count("<tr>") == 1 + rows["metric"].nunique()
    assert "Cannot tell here" in page or "All metrics distinguish" in page


def test_without_a_ceiling_nothing_is_calibrated_and_the_page_says_so(
    tree: Tree, tmp_path: Path, few_figures: None
) -> None:
    some = {
        name: [path for path in tree.arguments()[name] if "technical_duplicate" not in path.parts]
        for name in ("runs", "metrics", "predictions")
    }
    tables = {name: tmp_path / f"{name}.tsv" for name in TABLES}
    benchmark(some["metrics"], MODELS, **tables, qualities=[], audits=[], harmonizations=[], least_difference=0.02)
    page = tree.page(**some, **tables, report=tmp_path / "report.html")
    assert page.count("Nothing was calibrated") == len(SPLITS)


def test_contexts_that_are_held_out_in_turn_have_one_table(tree: Tree, tmp_path: Path, few_figures: None) -> None:
    tables = {name: tmp_path / f"{name}.tsv" for name in TABLES}
    others = {"qualities": [], "audits": [], "harmonizations": [], "least_difference": 0.02}
    benchmark(tree.arguments()["metrics"], MODELS, **tables, **others, context_folds=dict.fromkeys(SPLITS, "in_turn"))
    page = tree.page(**tables, report=tmp_path / "report.html")
    shown = page[page.index(f"<h4>All {len(SPLITS)} contexts of in") :]
    assert "do not trust them" in shown
    contexts = pd.read_csv(tables["contexts"], sep="\t").query("headline")
    assert {"learned", "no_change"} <= set(contexts["model"])
    rows = shown[: shown.index("</table>")]
    assert rows.count('<tr><th scope="row">') == contexts["model"].nunique()
    for row in contexts[contexts["model"] == "learned"].itertuples():
        assert f'<data value="{row.value}">' in rows


def test_the_generalization_of_a_split_is_said_with_its_verdicts(page: str) -> None:
    verdicts = page[page.index('id="verdicts"') : page.index('id="leaderboard"')]
    assert all(f"What {split} says of itself." in verdicts for split in SPLITS)


def test_strata_have_a_table_per_kind_and_a_row_per_bin(tree: Tree, tmp_path: Path, few_figures: None) -> None:
    metrics = []
    for path in tree.arguments()["metrics"]:
        table = pd.read_csv(path, sep="\t")
        metrics.append(tmp_path / path.parent.relative_to(tree.folder) / "metrics.tsv")
        metrics[-1].parent.mkdir(parents=True)
        table = pd.concat([table.assign(perturbation=table["perturbation"] + f"-{i}") for i in range(4)])  # six or more
        order = table["perturbation"].rank(method="dense")
        table.assign(reliability=order / 100, effect_size=order).to_csv(metrics[-1], sep="\t", index=False)
    tables = {name: tmp_path / f"{name}.tsv" for name in TABLES}
    benchmark(metrics, MODELS, **tables, qualities=[], audits=[], harmonizations=[], least_difference=0.02)
    page = tree.page(metrics=metrics, **tables, report=tmp_path / "report.html")
    strata = pd.read_csv(tables["strata"], sep="\t").query("split == 'unseen_combination' and stratum == 'reliability'")
    assert len(strata) > 0
    cells = region(
        page, "Scores of mine × unseen_combination by how well two halves of a perturbation&#39;s cells agree"
    )
    for row in strata[strata["model"] == "learned"].itertuples():
        assert f'<data value="{row.value}">{number(row.value)}</data>' in cells
    assert cells.count("<tr>") == 1 + strata[["metric", "bin"]].drop_duplicates().shape[0]


def test_folds_are_folded_below_what_pools_them(tree: Tree, tmp_path: Path, few_figures: None) -> None:
    arguments = tree.arguments()
    renamed = dict(zip(SPLITS, ("genes_fold_0", "genes_fold_1"), strict=True))
    for split, fold in renamed.items():
        shutil.copytree(tree.folder / "mine" / split, tmp_path / "mine" / fold)
        for path in (tmp_path / "mine" / fold).glob("*/*/metrics.tsv"):
            table = pd.read_csv(path, sep="\t").assign(split=fold)
            table.to_csv(path, sep="\t", index=False)
    moved = {}
    for name in ("runs", "metrics", "predictions", "splits", "audits", "pairs"):
        parts = [path.relative_to(tree.folder).parts for path in arguments[name]]
        moved[name] = [tmp_path.joinpath(dataset, renamed[split], *rest) for dataset, split, *rest in parts]
    tables = {name: tmp_path / f"{name}.tsv" for name in TABLES}
    benchmark(moved["metrics"], MODELS, **tables, qualities=[], audits=[], harmonizations=[], least_difference=0.02)
    page = tree.page(**moved, **tables, report=tmp_path / "report.html")
    for section in ("verdicts", "leaderboard", "calibration", "strata"):
        places = [page.index(f'<h3 id="{section}-mine-{name}">') for name in ("genes", "genes_fold_0", "genes_fold_1")]
        assert places == sorted(places)
        assert page[: places[1]].rstrip().endswith(f'<section aria-labelledby="{section}-mine-genes_fold_0">')
    assert page.count("(2 folds pooled)") == 4
    assert page.count("<summary>mine × genes_fold_0</summary>") == 4


# --- scores ---------------------------------------------------------------------------------------------------------


def cards(**kinds: str) -> dict[str, ModelCard]:
    return {model: ModelCard(model, kind, "", {}, "#0072B2", "o") for model, kind in kinds.items()}


def test_seeds_are_averaged_and_their_intervals_held_together() -> None:
    rows = pd.DataFrame(
        [
            ("a", 0, "mae", 1.0, 0.5, 1.5, 4, 0.2, 0.1, 0.3),
            ("a", 1, "mae", 2.0, 1.5, 2.5, 4, 0.4, 0.2, 0.5),
            ("top", 0, "mae", 0.1, 0.0, 0.2, 4, 1.0, 1.0, 1.0),
        ],
        columns=[
            *("model", "seed", "metric", "value", "ci_low", "ci_high", "n_perturbations", leaderboard.SCALED),
            *("scaled_ci_low", "scaled_ci_high"),
        ],
    )
    scores = leaderboard._scores(rows, cards(a="learned", top="ceiling"))
    assert scores["a"]["mae"] == leaderboard.Score(
        1.5, 0.5, 2.5, 4, is_best=True, scaled=pytest.approx(0.3), scaled_low=0.1, scaled_high=0.5
    )
    assert not scores["top"]["mae"].is_best


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0622152, "0.0622"),
        (1.0, "1.00"),
        (100.4, "100"),
        (12345.6, "12,346"),
        (-0.02717, "-0.0272"),
        (float("nan"), "–"),
        (None, "–"),
        (1.17e-9, "0"),
        (-1.17e-9, "0"),
        (2e-6, "2.00e-06"),
    ],
)
def test_numbers_have_three_digits(value: float | None, text: str) -> None:
    assert number(value) == text


# --- counterfactuals ------------------------------------------------------------------------------------------------


def test_no_section_without_counterfactuals(page: str) -> None:
    assert 'id="counterfactuals"' not in page
    assert "What if" not in page


def test_doubtful_labels_and_controls_of_other_batches_are_shown(tree: Tree, tmp_path: Path, few_figures: None) -> None:
    (account,), audits = tree.arguments()["harmonizations"], tree.arguments()["audits"]
    content = read_json(account)
    content["perturbations"] |= {
        "looks_like_control": {"NT-12": 40, HOSTILE: 3},
        "not_split": {"TF1|TF2": 40},
        "no_gene": {"rubbish": 1886},
    }
    harmonization = tmp_path / "mine" / "harmonization.json"
    write_json(harmonization, content)
    changed = []
    for path in audits:
        changed.append(tmp_path / "mine" / path.parent.name / "audit.json")
        changed[-1].parent.mkdir()
        write_json(
            changed[-1],
            {
                **read_json(path),
                "matched_across_batches": {"cells": 700, "share": 0.5, "batches": {"b2": 700}, "roles": {"train": 700}},
            },
        )
    verdicts = tree.table("verdicts").assign(caveats="Lanes differ.")
    verdicts.to_csv(tmp_path / "verdicts.tsv", sep="\t", index=False)
    page = tree.page(
        harmonizations=[harmonization],
        audits=changed,
        verdicts=tmp_path / "verdicts.tsv",
        report=tmp_path / "report.html",
    )
    text = html.unescape(page)
    assert re.search(r'perturbation\.control: \["control", .*"NT-12"\]', text)
    assert "NT-12 (40)" in text
    assert "TF1|TF2 (40)" in text
    assert "rubbish (1,886). If such cells have no known perturbation, name the labels in perturbation.drop" in re.sub(
        "</?code>", "", text
    )
    assert HOSTILE not in page
    assert "700 (50 % of the perturbed cells); by batch: b2 (700)" in text
    assert page.count("<strong>Caveat</strong>: Lanes differ.") == len(SPLITS)


def test_counterfactual_answers_show_the_first_genes_and_an_interval_plot(
    tree: Tree, tmp_path: Path, few_figures: None
) -> None:
    path = tmp_path / "results/mine/unseen_combination/learned/seed_0/counterfactuals/my_question.tsv"
    path.parent.mkdir(parents=True)
    rows = [
        {
            "perturbation": label,
            "group": group,
            "gene": f"G{i}",
            "effect": -i / 7,
            "low": -i / 7 - 0.1,
            "high": -i / 7 + 0.1,
            "probability_of_sign": 0.9,
            "rank": 21 - i,
            "is_perturbed_gene": i == 20,
            "known": "measured",
            "in_other_contexts": label != "TF1",
        }
        for label in ("TF1", HOSTILE)
        for group in ("all", "T cell")
        for i in range(1, 21)
    ]
    pd.DataFrame(rows).to_csv(path, sep="\t", index=False)
    picture = path.with_name("my_question.map.png")
    picture.write_bytes(b"\x89PNG what was drawn")
    shown = path.parents[1] / "warranty.json"
    write_json(shown, WARRANTY)
    page = tree.page(counterfactuals=[path], figures=[picture], warranties=[shown], report=tmp_path / "report.html")
    section = page[page.index('id="counterfactuals"') : page.index("</main>")]
    genes = re.findall(r'<th scope="row">(G\d+)</th>', section)
    assert genes == [f"G{i}" for i in range(20, 5, -1)] * 2
    assert "Verdict on TF1: no better than the mean effect of training." in section
    assert re.search(r"Verdict on &lt;i&gt;TF9\S+: unknown: the model was not checked on such perturbations.", section)
    assert "Warranty: None: training measured this in other contexts alone" in section
    assert "in other contexts</th>" not in section, "the column is said in words"
    assert section[: section.index('<h2 id="verdicts">')].count("<svg role") == 2
    alt = re.search(r'aria-label="(Coverage of predictive intervals on mine × unseen_combination[^"]*)"', section)[1]
    assert "learned seed 0 81.0 (70.0 to 95.0) of 80; learned seed 0 91.0 (70.0 to 95.0) of 90" in alt
    assert "my_<wbr>question" in section
    assert "TF1: the first 15 of 20 genes" in section
    assert re.search(r"What training knew of TF1, &lt;i&gt;TF9\S+: measured\.", section), "said once"
    assert section.count("<td>yes</td>") == 2
    assert f'src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"' in section
    assert (
        "Warranty: No better than the mean effect of training. Agreement of whole effects 0.41: no change 0, the "
        "mean effect of training 0.22, "
        "ceiling 0.77. Beyond that mean 0.30: both floors 0, ceiling 0.77. Intervals, calibrated on 17 held-out "
        "measurements of 11 perturbations, "
        "hold 81 % (nominal 80, no change 88) and 91 % (nominal 90, no change 88) of 9 test perturbations' effects. "
        "At 90 % they are 0.75 times "
        "as wide as those of no change; the truth's would be 0.25 times as wide." in html.unescape(section)
    )
    assert "Told that nothing is perturbed, the model changes nothing" in section
    table = section[section.index('aria-label="Warranties"') :]
    assert re.search(
        r"<td>17</td><td>0\.810* \(0\.70* to 0\.950*\)</td><td>0\.910* \(0\.70* to 0\.950*\)</td>"
        r"<td>0\.880* \(0\.80* to 0\.90*\)</td><td>0\.750* \(0\.70* to 0\.80*\)</td><td>0\.250*</td>",
        table,
    )
    assert re.search(
        (
            r'<td class="long">no better than the mean effect of training</td><td>0\.410* \(0\.310* to '
            r"0\.510*\)</td><td>0\.220* \(0\.120* to 0\.320*\)</td>"
        ),
        table,
    )


def test_what_sources_of_gene_vectors_were_worth(tree: Tree, page: str, tmp_path: Path, few_figures: None) -> None:
    assert 'id="sources"' not in page, "no Gaussian process ran"
    changed = []
    for path in tree.arguments()["runs"]:
        changed.append(tmp_path / "results" / path.relative_to(tree.folder))
        run = read_json(path)
        if path.parts[-3] in ("additive", "learned") and path.parts[-4] == "unseen_perturbation":
            run["facts"]["mean"] = {
                "own": 0.5,
                "ppi near": 0.25,
                "ppi linear": 0.05,
                "coexpression near": 0.2,
                "member": 1.0,
            }
        write_json(changed[-1], run)
    text = tree.page(runs=changed, report=tmp_path / "report.html")
    table = region(text, "Sources of gene vectors")
    heads = re.findall(r'<th scope="col">([^<]*)</th>', table)
    assert [html.unescape(head) for head in heads][-3:] == ["a gene's own", "coexpression", "ppi"]
    assert table.count("<tr>") == 2, "models with the same mean share a row"
    assert "additive, learned" in table
    assert re.findall(r"<td>([\d.]+) %</td>", table) == ["50.0", "20.0", "30.0"]


def test_promised_errors_are_drawn_beside_actual_ones(tree: Tree, tmp_path: Path, few_figures: None) -> None:
    shown = tmp_path / "results/mine/unseen_combination/learned/seed_0/warranty.json"
    half = {"error": {"mean": 0.12}, "agreement": {"mean": 0.41}}
    told = {
        "n": 9,
        "rank_correlation": 0.55,
        "error_per_promise": 1.1,
        "surest": half,
        "others": {**half, "error": {"mean": 0.34}},
    }
    points = [{"perturbation": f"TF{i}", "promised": i / 10, "error": i / 9} for i in range(1, 10)]
    points.append({"perturbation": "TF10", "promised": float("nan"), "error": 0.1})
    write_json(shown, {**WARRANTY, "sureness": told, "perturbations": points})
    page = html.unescape(tree.page(warranties=[shown], report=tmp_path / "report.html"))
    section = page[page.index('id="sureness"') : page.index('<h2 id="training"')]
    assert section.count("<svg role") == 1
    assert "learned, seed 0: rank correlation 0.550 over 9 perturbations." in section
    cells = re.findall(r"<td>(.*?)</td>", region(section, "Promised and actual errors"))
    assert [re.sub("<[^>]*>", "", cell) for cell in cells[1:]] == [
        "0",
        "9",
        "0.550",
        "0.120",
        "0.340",
        "0.410",
        "0.410",
    ]
    write_json(shown, {**WARRANTY, "sureness": {"n": 2}, "perturbations": points[:2]})
    assert 'id="sureness"' not in tree.page(warranties=[shown], report=tmp_path / "few.html"), "too few to say anything"


# --- bounds ---------------------------------------------------------------------------------------------------------


def test_figures_beyond_the_budget_are_left_out_and_the_page_says_so(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perturbflow.report.page.FIGURE_BYTES", {**dict.fromkeys(FIGURE_BYTES, 0), "leaderboard": 1})
    page = tree.page(report=tmp_path / "report.html")
    assert page.count("<svg role") == 1
    assert f"{2 * len(HEADLINES) - 1} figures are left out here" in page
    assert "mine × unseen_combination is left out here" in page


def test_the_section_on_a_screen_says_what_its_file_says(tree: Tree, page: str) -> None:
    section = html.unescape(page[page.index('<h2 id="screens">') : page.index('<h2 id="verdicts">')])
    told = read_json(tree.folder / "mine" / "quality.json")
    assert all(finding["text"] in section for finding in told["findings"])
    table = pd.read_csv(tree.folder / "mine" / "quality.tsv", sep="\t")
    assert section.count('<tr><th scope="row">') == len(told["findings"]) + len(table)
    assert section.count("<svg role") == 6


def test_long_tables_keep_the_best_and_the_worst() -> None:
    rows = [
        {"model": model, "perturbation": f"P{i}", "members_seen": 0, "n_cells": 9, "metric": metric, "value": i / 100}
        for model in ("a", "b")
        for i in range(50)
        for metric in ("mae", "pearson_delta_ctrl_off_target")
    ]
    table = perturbation_table(pd.DataFrame(rows), ["a", "b"], n_rows=8)
    assert [row["perturbation"] for row in table.rows] == ["P49", "P48", "P1", "P0"] * 2
    assert table.n_left_out == 92


@pytest.mark.slow
def test_a_page_of_25_datasets_and_15_models_stays_below_10_mb(
    tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Figures are bounded by their bytes, which the page is granted here without drawing them."""
    budget = sum(FIGURE_BYTES.values())
    monkeypatch.setattr("perturbflow.report.page.FIGURE_BYTES", dict.fromkeys(FIGURE_BYTES, 0))
    names = [f"model_{i}" for i in range(15)]
    origin = tree.folder / "mine" / "unseen_combination"
    scores = pd.read_csv(origin / "additive" / "seed_0" / "metrics.tsv", sep="\t")
    scores = pd.concat(
        [
            scores.assign(dataset="THE_DATASET", model="THE_MODEL", perturbation=scores["perturbation"] + f"-{i}")
            for i in range(40)
        ]
    )
    order = scores["perturbation"].rank(method="dense")
    scores = scores.assign(reliability=order, effect_size=order, n_cells=order.astype(int)).to_csv(
        sep="\t", index=False
    )
    run = read_json(origin / "additive" / "seed_0" / "run.json")
    account = read_json(tree.folder / "mine" / "harmonization.json")
    account["perturbations"]["dropped"] = {f"DROPPED{i}": 3 for i in range(5000)}
    described = read_json(tree.folder / "mine" / "quality.json")
    many = pd.concat([pd.read_csv(tree.folder / "mine" / "quality.tsv", sep="\t")] * 400)
    arguments: dict[str, list[Path]] = {
        name: []
        for name in ("runs", "metrics", "predictions", "harmonizations", "qualities", "splits", "audits", "pairs")
    }
    for dataset in [f"screen_number_{i}" for i in range(25)]:
        here = tmp_path / dataset / "unseen_combination"
        here.mkdir(parents=True)
        write_json(here.parent / "harmonization.json", account)
        arguments["harmonizations"].append(here.parent / "harmonization.json")
        write_json(here.parent / "quality.json", {**described, "dataset": dataset})
        many.to_csv(here.parent / "quality.tsv", sep="\t", index=False)
        arguments["qualities"].append(here.parent / "quality.json")
        for name, file in (("splits", "split.json"), ("audits", "audit.json"), ("pairs", "pairs.h5ad")):
            (here / file).symlink_to(origin / file)
            arguments[name].append(here / file)
        for model in names:
            folder = here / model / "seed_0"
            folder.mkdir(parents=True)
            write_json(folder / "run.json", run)
            (folder / "metrics.tsv").write_text(scores.replace("THE_DATASET", dataset).replace("THE_MODEL", model))
            for name, file in (("runs", "run.json"), ("metrics", "metrics.tsv"), ("predictions", "predictions.h5ad")):
                arguments[name].append(folder / file)
    tables = {name: tmp_path / f"{name}.tsv" for name in TABLES}
    families = {
        **dict.fromkeys(names, "additive"),
        "model_0": "no_change",
        "model_1": "perturbed_mean",
        "model_2": "technical_duplicate",
    }
    benchmark(
        arguments["metrics"][: len(names)],
        families,
        **tables,
        qualities=[],
        audits=[],
        harmonizations=[],
        least_difference=0.02,
    )
    for path in tables.values():
        table = pd.read_csv(path, sep="\t")
        pd.concat([table.assign(dataset=f"screen_number_{i}") for i in range(25)]).to_csv(path, sep="\t", index=False)
    page = tree.page(**arguments, **tables, report=tmp_path / "report.html")
    assert budget + len(page.encode()) < 9_500_000
    assert "rows in the middle are left out" in page
    assert "4,800 more" in page


# --- in a browser ---------------------------------------------------------------------------------------------------

PROBE = """
<script>
addEventListener("load", () => {
  const folded = document.documentElement.scrollHeight;
  const part = document.getElementById("leaderboard").closest("details");
  const wasOpen = part.open;
  location.hash = "#leaderboard-mine-unseen_combination";
  dispatchEvent(new Event("hashchange"));
  const unfolded = !wasOpen && part.open;
  document.querySelectorAll("details").forEach(details => { details.open = true; });
  const width = innerWidth, page = document.documentElement.scrollWidth;
  const figures = [...document.querySelectorAll("svg:not(.dot)")].map(svg => {
    const box = svg.getBoundingClientRect();
    return [box.width, box.height, svg.querySelectorAll("path, image, use, text").length];
  });
  const table = document.querySelector("table.leaderboard");
  const button = table.tHead.rows[0].cells[1].querySelector("button");
  button.click();
  const input = table.closest(".scroll").previousElementSibling.querySelector("input");
  const shown = words => {
    input.value = words;
    input.dispatchEvent(new Event("input"));
    return [...table.rows].filter(row => row.cells[0].scope === "row" && row.offsetHeight)
                          .map(row => row.cells[0].textContent.trim());
  };
  const filtered = { baseline: shown("baseline"), without: shown("-baseline -ceiling"), both: shown("BASELINE add"),
                     all: shown("").length };
  const nameless = [...document.querySelectorAll("a, button, input, summary")]
    .filter(it => !(it.textContent.trim() || it.getAttribute("aria-label"))).length;
  const order = [...table.tBodies[0].rows].map(row => Number(row.cells[1].querySelector("data").value));
  const sort = table.tHead.rows[0].cells[1].getAttribute("aria-sort");
  const dark = getComputedStyle(document.body).backgroundColor;
  document.body.innerHTML = "";
  const found = { folded, unfolded, width, page, figures, order, sort, dark, filtered, nameless };
  document.body.textContent = "PROBE" + JSON.stringify(found) + "EBORP";
});
</script>
"""


@pytest.fixture
def browser(page: str, tmp_path: Path) -> Callable[..., dict]:
    """Return a function that loads the page in Chromium and measures it; skips where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    program = next((found for name in names if (found := shutil.which(name))), None)
    if program is None:
        pytest.skip(f"no browser to look at the page with; looked for {', '.join(names)}")

    def look(*arguments: str) -> dict:
        path = tmp_path / "page.html"
        path.write_text(page.replace("</body>", PROBE + "</body>"), encoding="utf-8")
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
                   "--virtual-time-budget=3000",
                   f"--user-data-dir={tmp_path / 'profile'}", *arguments, "--dump-dom", path.as_uri()]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        probed = re.search(r"PROBE(.*?)EBORP</body>", done.stdout, re.DOTALL)
        assert probed, done.stderr[-3000:]
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        return {**json.loads(probed[1]), "console": console}

    return look


def test_browser_draws_every_figure_without_errors_and_sorts(browser: Callable[..., dict]) -> None:
    seen = browser("--window-size=1280,900")
    assert seen["console"] == []
    assert len(seen["figures"]) > 12
    wrong = [figure for figure in seen["figures"] if not (figure[0] > 150 and figure[1] > 80 and figure[2] > 10)]
    assert not wrong, "width, height, marks"
    assert seen["sort"] == "ascending"  # mae: the lower the better
    assert seen["order"] == sorted(seen["order"])
    assert seen["nameless"] == 0


def test_the_answers_come_first_and_a_link_opens_what_is_folded(browser: Callable[..., dict]) -> None:
    seen = browser("--window-size=1400,900")
    assert 500 < seen["folded"] < 6000, "pixels"
    assert seen["unfolded"]


def test_rows_are_filtered_by_words(browser: Callable[..., dict]) -> None:
    filtered = browser("--window-size=1280,900")["filtered"]
    assert {name.removesuffix("baseline") for name in filtered["baseline"]} == {
        "no_change",
        "additive",
        "perturbed_mean",
    }
    assert filtered["without"] == ["learnedlearned"]
    assert filtered["both"] == ["additivebaseline"]
    assert filtered["all"] == len(MODELS)


def test_a_phone_in_dark_mode_scrolls_tables_not_the_page(browser: Callable[..., dict]) -> None:
    seen = browser("--window-size=400,800", "--force-dark-mode")
    assert seen["console"] == []
    assert seen["page"] <= seen["width"]
    assert seen["dark"] == "rgb(20, 23, 26)"


def test_points_tell_their_names() -> None:
    def plot(is_pixels: bool) -> Figure:
        figure, axes = new_axes(2, 2, left=0.5)
        x, y = np.array([0.0, 1.0]), np.array([1.0, 0.0])
        axes.plot(x, x, "o")
        axes.add_line(NamedPoints(x, y, ["A<B", "C"], marker="o", rasterized=is_pixels))
        return figure

    svg = Plots("here", 10**6).svg("points", plot, False)
    assert re.findall("<title>(.*?)</title>", svg) == ["A&lt;B", "C"]
    assert svg == Plots("here", 10**6).svg("points", plot, False), "the same page twice"
    assert "<title>" not in Plots("here", 10**6).svg("points", plot, True), "pixels have no names"


def test_an_answer_shows_its_best_perturbations_and_folds_the_others(
    tree: Tree, tmp_path: Path, few_figures: None
) -> None:
    path = tmp_path / "results/mine/unseen_combination/learned/seed_0/counterfactuals/search.tsv"
    path.parent.mkdir(parents=True)
    labels = [f"TF{i}" for i in range(1, 6)]
    row = {"group": "all", "effect": 0.5, "low": 0.1, "high": 0.9, "rank": 1, "known": "measured"}
    facts = {"is_perturbed_gene": False, "in_other_contexts": False, "probability_of_sign": 0.9}
    rows = [{"perturbation": label, "gene": "G1", **row, **facts} for label in labels]
    pd.DataFrame(rows).to_csv(path, sep="\t", index=False)
    found = {
        "score": 0.8,
        "reach": 0.4,
        "chance": 0.002,
        "towards": "90 cells of perturbation TF9",
        "known": "measured",
    }
    pd.DataFrame({"perturbation": labels[::-1], **found}).to_csv(
        path.with_suffix(".ranking.tsv"), sep="\t", index=False
    )
    page = tree.page(counterfactuals=[path], figures=[], warranties=[], report=tmp_path / "report.html")
    section = page[page.index('id="counterfactuals"') : page.index('<h2 id="verdicts">')]
    assert re.findall(r"<figcaption>(TF\d): mean effect", section) == labels[::-1], "in the order of the ranking"
    assert section.index("TF3: mean effect") < section.index("2 other perturbations") < section.index("TF2: mean")
    said = (
        "Which of 5 perturbations makes these cells like 90 cells of perturbation TF9? TF5 (it makes 40 % of the "
        "change), then TF4 and TF3; the best of 5 scores as high by chance in 0.2 % of searches. What training knew of "
        "them: measured."
    )
    assert section.index(said) < section.index("TF5: mean effect"), "the answer in words stands above its figures"
    answers = json.loads((tree.folder / "report.json").read_text())["answers"]
    assert answers[0]["sentence"] == said
    chance = pd.DataFrame({"perturbation": labels, **found | {"chance": 0.3}})
    assert "None that can be told from chance: TF1 comes first" in search_sentence(chance)
    assert search_sentence(pd.DataFrame({"perturbation": labels})) is None
