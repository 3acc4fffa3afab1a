"""The whole workflow on real screens, with models trained for less long than by default."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY, merged

from perturbflow.evaluation import METRICS
from perturbflow.registry.families import REFERENCES

pytestmark = pytest.mark.slow

LEARNED = {"scppdm": "diffusion", "jepa": "jepa", "counterfactual": "counterfactual"}
QUICK = {
    "scppdm": {"n_steps": 100, "width": 16, "n_sampling_steps": 4},
    "jepa": {"n_steps": 100, "n_steps_representation": 100, "n_steps_decoder": 100},
    "counterfactual": {"n_steps": 100},
}
RENGE = Path("results/renge2023/unseen_context")


@pytest.fixture(scope="module")
def default_job(
    tmp_path_factory: pytest.TempPathFactory, snakemake: Callable, default_download: None
) -> tuple[Path, object]:
    """Run the shipped default, with shorter trainings and another what-if question."""
    folder = tmp_path_factory.mktemp("default")
    config = {
        "models": {name: {"params": params} for name, params in QUICK.items()},
        "counterfactuals": {
            "towards_sox2_loss": {"split": "unseen_perturbation"},  # not selected, so not asked
            "pou5f1_in_controls": {
                "split": "unseen_context",
                "samples_per_cell": 5,
                "perturbations": ["POU5F1", "NANOG+SOX2"],
            },
        },
    }
    return folder, snakemake(folder, config=config)


def test_default_job_ends_well_and_leaves_every_file(default_job: tuple) -> None:
    folder, outcome = default_job
    assert outcome.returncode == 0, outcome.text
    table = pd.read_csv(folder / "results/benchmark.tsv", sep="\t")
    models = {*merged({})["select"]["models"], *REFERENCES}
    assert set(table["model"]) == models
    assert set(table["metric"]) == set(METRICS)
    assert set(table["split"]) == {"unseen_context"}
    assert len(table) == len(models) * len(METRICS)
    known = table[table["ci_low"].notna()]
    assert (known["ci_low"] <= known["value"]).all()
    assert (known["value"] <= known["ci_high"]).all()
    assert set(known["metric"]) >= {name for name, metric in METRICS.items() if metric.headline}
    page = (folder / "results/report.html").read_text()
    assert all(model in page for model in models)
    for model, family in LEARNED.items():
        run = json.loads((folder / RENGE / model / "seed_0/run.json").read_text())
        assert family in run["implementation"].lower()
        assert run["params"]["n_steps"] == 100
        assert run["history"]
        assert run["provenance"]["code_version"]


def test_ceiling_is_above_every_model(default_job: tuple) -> None:
    """By how near effects are; in ranks among 23 perturbations a model may be luckier."""
    folder, _ = default_job
    table = pd.read_csv(folder / "results/benchmark.tsv", sep="\t").set_index(["metric", "model"])["value"]
    for name in ("l2_heg1000_off_target", "pearson_delta_pert_off_target", "r2_w_delta_off_target"):
        metric = METRICS[name]
        ceilings = ["perfect_mean", "technical_duplicate", "interpolated_duplicate"]
        ceiling, others = table[name]["perfect_mean"], table[name].drop(ceilings)
        assert (metric.loss(others) >= metric.loss(ceiling)).all(), name


def test_predictions_start_from_test_controls_and_open_as_they_are(default_job: tuple) -> None:
    folder, _ = default_job
    pairs = ad.read_h5ad(folder / RENGE / "pairs.h5ad")
    for model in LEARNED:
        predicted = ad.read_h5ad(folder / RENGE / model / "seed_0/predictions.h5ad")
        assert list(predicted.var_names) == list(pairs.var_names)
        assert predicted.X.dtype == np.float32
        assert predicted.X.min() >= 0
        start = pairs.obs.iloc[predicted.obs["control_index"].to_numpy()]
        assert start["is_control"].all()
        assert (start["role"] == "test").all()
        assert (start["batch"].astype(str).to_numpy() == predicted.obs["batch"].astype(str).to_numpy()).all()
        measured = pairs.obs.loc[pairs.obs["role"] == "test", "perturbation"].value_counts()
        for label, n in predicted.obs["perturbation"].value_counts().items():
            assert n == min(measured[label], 1000)


def test_what_if_questions_are_answered(default_job: tuple) -> None:
    folder, _ = default_job
    answers = folder / RENGE / "counterfactual/seed_0/counterfactuals"
    table = pd.read_csv(answers / "pou5f1_in_controls.tsv", sep="\t")
    assert set(table["perturbation"]) == {"POU5F1", "NANOG+SOX2"}
    assert table["probability_of_sign"].between(0, 1).all()
    assert (table["low"] <= table["high"]).all()
    cells = ad.read_h5ad(answers / "pou5f1_in_controls.h5ad")
    assert {"before", "q05", "q50", "q95"} <= set(cells.layers)
    assert (cells.layers["q05"] <= cells.layers["q95"]).all()
    own = table[(table["perturbation"] == "POU5F1") & (table["gene"] == "POU5F1")].iloc[0]
    effect = cells.layers["effect"][cells.obs["perturbation"] == "POU5F1"].mean(axis=0)
    np.testing.assert_allclose(own["effect"], effect[cells.var_names.get_loc("POU5F1")], atol=1e-4)
    assert "Placebo" in cells.uns["perturbflow"]["warranty"]
    for figure in ("effects", "responders", "map", "heatmap"):
        assert (answers / f"pou5f1_in_controls.{figure}.png").stat().st_size > 5_000


def test_every_learned_model_has_a_warranty(default_job: tuple) -> None:
    folder, _ = default_job
    for model in LEARNED:
        content = json.loads((folder / RENGE / model / "seed_0/warranty.json").read_text())
        assert content["identity"] < 1e-4
        assert content["placebo"]["share_called_low"] <= 0.05 <= content["placebo"]["share_called_high"] + 0.03
        n = content["coverage"][1]["n_calibration"]
        assert n == 0 if model == "scppdm" else n >= 15  # a network that owns its mean has no inner folds
    page = (folder / "results/report.html").read_text()
    assert page.count("× unseen_context</td>") >= len(LEARNED)
    assert page.count("Verdict on this model: ") >= 1
    assert ". Intervals, calibrated on" in page


def test_second_run_plans_nothing(default_job: tuple, snakemake: Callable) -> None:
    folder, _ = default_job
    for setting in ([], ["--config", "logger=csv"]):  # a logger changes no result
        again = snakemake(folder, "--dry-run", "--configfile", "mine.yaml", *setting)
        assert "Nothing to be done" in again.text, again.text


# What `snakemake --report` shows; cells, models and predictions are too large for a page.
SHOWN = (
    "*.tsv", "report.html", "*/harmonization.json", "*/quality.tsv", "*/quality.html", "*/*/split.json",
    "*/*/audit.json", "*/*/*/*/run.json", "*/*/*/*/metrics.tsv",
    "*/*/*/*/warranty.json", "*/*/*/*/counterfactuals/*.tsv", "*/*/*/*/counterfactuals/*.png",
    "*/*/*/*/counterfactuals/*.html",
)  # fmt: skip


@pytest.mark.parametrize(
    "command",
    [
        "leaderboard.py results renge2023",
        "leaderboard.py results renge2023 --brief no_change set_gp scppdm technical_duplicate",
        "leaderboard.py results renge2023 --against set_gp",
        "verdicts.py --before results --now results --now-without results",
        "best_baseline.py results renge2023 unseen_context --models scppdm jepa",
        "best_baseline.py results renge2023 unseen_context --models jepa --baseline perturbed_mean",
        "distributions.py results renge2023 unseen_context --models jepa --mean-given --figure cells.png",
        "distributions.py results renge2023 unseen_context --models set_gp jepa --mean-given --together",
        "embeddings_and_actions.py results renge2023 unseen_context --models jepa --figure monitors.png",
        "loss_curves.py results renge2023 unseen_context --models scppdm jepa --figure loss_curves.png",
        "warranties.py results renge2023/unseen_context --models jepa counterfactual",
    ],
)
def test_measurements_of_a_run_are_made_by_their_commands(default_job: tuple, command: str) -> None:
    """Their numbers stand in docs/results: a change of the package may not break what makes them again."""
    folder, _ = default_job
    script, *words = command.split()
    done = subprocess.run(
        [sys.executable, REPOSITORY / "workflow_tests/benchmarks" / script, *words],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("\n| ") > 2
    for figure in (word for word in words if word.endswith(".png")):
        assert (folder / figure).stat().st_size > 5_000


def test_the_page_of_snakemake_report_shows_every_result_with_its_caption(
    default_job: tuple, snakemake: Callable
) -> None:
    folder, _ = default_job
    done = snakemake(folder, "--configfile", "mine.yaml", "--report", "page.html")
    assert done.returncode == 0, done.text
    page = (folder / "page.html").read_text()
    assert len(page) < 20e6
    shown, categories, introduction = (
        json.loads(re.search(rf'<script id="{name}">\s+var \w+ = (.*);$', page, flags=re.MULTILINE)[1])
        for name in ("results", "categories", "workflow-desc")
    )
    assert set(shown) == {
        path.relative_to(folder).as_posix() for pattern in SHOWN for path in (folder / "results").glob(pattern)
    }
    assert set(categories) == {"Benchmark", "Data", "Runs", "What-if"}
    assert set(categories["Runs"]) == {"renge2023, unseen_context"}
    assert set(categories["What-if"]) == {"pou5f1_in_controls"}
    assert all(f"<strong>{category}</strong>" in introduction for category in categories)
    for path, result in shown.items():
        assert f"</span> {path}</tt>" in result["caption"], (
            "a caption ends with the command that makes the result again"
        )
        assert not re.search("system-message|{{|{%", result["caption"]), path
        assert {value for label, value in result["labels"].items() if label != "file"} <= set(
            re.split(r"/seed_|[/.]", path)
        ), path
    labels = [tuple(sorted(result["labels"].items())) for result in shown.values()]
    assert len(set(labels)) == len(labels), "the search of the page shows one of the results whose labels are equal"
    assert not re.search("system-message|{{|{%", introduction)


def test_a_user_screen_on_all_kinds_of_split(tmp_path: Path, snakemake: Callable, shared_data: Callable) -> None:
    path = shared_data("norman_k562_mini/perturbench_devel_counts.h5ad")
    (tmp_path / "my_split.json").write_text(json.dumps({"train": ["KLF1", "FOXO4", "HK2", "MAPK1", "IER5L", "KMT2A"],
                                                        "validation": [],
                                                        "test": ["SET+KLF1", "NIT1"]}))  # fmt: skip
    config = {
        "select": {
            "datasets": ["norman_mini"],
            "splits": ["unseen_combination", "unseen_perturbation", "frozen"],
            "models": ["no_change", "additive", "technical_duplicate"],
        },
        "datasets": {
            "norman_mini": {
                "source": {"path": str(path)},
                "subset": {"dataset": ["norman19"]},
                "perturbation": {"column": "perturbation", "control": ["control"], "separator": "+"},
                "covariates": {"cell_type": "cell_type"},
                "combinations": True,
                "qc": {"min_counts": None, "min_genes": None, "max_pct_mt": None},
            }
        },
        "splits": {"frozen": {"kind": "file", "path": "my_split.json"}},
    }
    outcome = snakemake(tmp_path, config=config)
    assert outcome.returncode == 0, outcome.text
    table = pd.read_csv(tmp_path / "results/benchmark.tsv", sep="\t")
    assert set(table["split"]) == {"unseen_combination", "unseen_perturbation", "frozen"}
    frozen = json.loads((tmp_path / "results/norman_mini/frozen/split.json").read_text())
    assert frozen["perturbations"]["test"] == ["KLF1+SET", "NIT1"]
    assert frozen["perturbations"]["validation"] == []  # as the file says


def test_a_union_of_real_lines_is_reported_with_its_matrix(
    tmp_path: Path, snakemake: Callable, shared_data: Callable
) -> None:
    """Three glioblastoma lines of one file as three screens; one of them is the new one."""
    path, lines = shared_data("norman_k562_mini/perturbench_devel_counts.h5ad"), ("A172", "T98G", "U87MG")
    line = {
        "source": {"path": str(path)},
        "perturbation": {"column": "perturbation", "control": ["control"], "separator": "+"},
        "perturbation_type": "CRISPRi",
        "combinations": False,
        "qc": {"min_counts": None, "min_genes": None, "max_pct_mt": None},
    }
    members = {
        name.lower(): {**line, "subset": {"cell_type": [name]}, "covariates": {"cell_type": {"value": name}}}
        for name in lines
    }
    config = {
        "select": {"datasets": ["glioma"], "splits": ["leave_one_line_out_t98g"], "models": ["no_change", "transfer"]},
        "datasets": {**members, "glioma": {"union": list(members)}},
    }
    outcome = snakemake(tmp_path, config=config)
    assert outcome.returncode == 0, outcome.text
    here = tmp_path / "results/glioma"
    roles = json.loads((here / "leave_one_line_out_t98g/split.json").read_text())
    assert roles["contexts"]["test"] == ["t98g"]
    assert set(ad.read_h5ad(here / "harmonized.h5ad", backed="r").obs["dataset"]) == set(members)
    page = (tmp_path / "results/report.html").read_text()
    assert "Effects in the held-out context agree with those in another at r" in page
    assert all(f">{name}<" in page for name in members), "rows and columns of the matrix"
