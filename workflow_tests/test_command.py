"""The command `perturbflow`: its verbs do what the steps do, and bad input ends in one message."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import yaml
from click.testing import CliRunner, Result
from conftest import REPOSITORY, SPECS, Prepared

from perturbflow import __version__, api
from perturbflow.command import perturbflow
from perturbflow.evaluation import METRICS, evaluate
from perturbflow.predict import predict
from perturbflow.registry.families import FAMILIES
from perturbflow.train import train

VERBS = {"list", "score", "export", "audit", "split", "ask"}


def call(*arguments: object) -> Result:
    """Call the command in this process; what is a bug is raised."""
    return CliRunner().invoke(perturbflow, [*map(str, arguments)], catch_exceptions=False)


def refused(*arguments: object) -> str:
    """Call the command, which must end in one message and exit status 1; return the message."""
    done = call(*arguments)
    assert done.exit_code == 1, done.output
    assert done.stdout == ""
    said = "".join(
        line for line in done.stderr.splitlines(keepends=True) if not re.match(r"\d\d:\d\d:\d\d ", line)
    )  # without progress
    assert said.startswith("Error: ")
    return said


@pytest.fixture
def results(prepared: dict[str, Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return results/mine/unseen_combination as the workflow leaves it, before any model; work beside it."""
    monkeypatch.chdir(tmp_path)
    here = prepared["unseen_combination"]
    folder = tmp_path / "results" / "mine" / "unseen_combination"
    folder.mkdir(parents=True)
    shutil.copy(here.harmonized, folder.parent)
    for file in (here.split, here.pairs, here.embeddings):
        shutil.copy(file, folder)
    return folder


@pytest.fixture
def predictions(results: Path, tmp_path: Path) -> Path:
    """Return predictions of the sum of single effects, made by hand."""
    file = tmp_path / "theirs.h5ad"
    api.baseline("additive", results / "pairs.h5ad").write_h5ad(file)
    return file


# --- what it says of itself -----------------------------------------------------------------------------------------


def test_help_names_every_verb_in_a_sentence() -> None:
    shown = call("--help").output
    assert set(perturbflow.commands) >= VERBS
    for name, verb in perturbflow.commands.items():
        assert re.search(rf"^  {name} +\S.*\.$", shown, flags=re.MULTILINE), (
            f"{name} has no sentence of its own in --help"
        )
        help_of_verb = call(name, "--help").output
        assert all(parameter.help or parameter.param_type_name == "argument" for parameter in verb.params)
        assert help_of_verb.startswith(f"Usage: perturbflow {name}")
    assert call("--version").output == f"perturbflow {__version__}\n"


def test_help_is_light() -> None:
    command = "import sys, perturbflow.command; print({'torch', 'anndata', 'scanpy', 'pandas'} & set(sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "scripts")}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- list -----------------------------------------------------------------------------------------------------------


def test_list_shows_all_that_exists() -> None:
    shown = json.loads(call("list", "--json").stdout)
    names = {kind: [row["name"] for row in rows] for kind, rows in shown.items()}
    for kind in ("datasets", "splits", "models"):
        assert names[kind] == list(yaml.safe_load((REPOSITORY / "config" / f"{kind}.yaml").read_text())[kind])
    assert names["metrics"] == list(METRICS)
    assert {row["kind"] for row in shown["models"]} == {family.kind for family in FAMILIES.values()}
    table = call("list", "models", "metrics").stdout
    assert all(re.search(rf"^ *{name} ", table, flags=re.MULTILINE) for name in names["models"] + names["metrics"])
    assert "norman2019" not in table


def test_list_shows_what_a_configuration_adds(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("models: {linear_30: {family: linear}}\nsplits: {genes: {kind: unseen_perturbation, folds: 3}}\n")
    shown = json.loads(call("list", "splits", "models", "--configfile", mine, "--json").stdout)
    assert "linear_30" in [row["name"] for row in shown["models"]]
    assert {"genes_fold_0", "genes_fold_1", "genes_fold_2"} < {row["name"] for row in shown["splits"]}
    mine.write_text("models: {linear_30: {famly: linear}}\n")
    assert "mine.yaml" in refused("list", "--configfile", mine)
    assert "there is no configuration file" in refused("list", "--configfile", tmp_path / "none.yaml")


# --- score ----------------------------------------------------------------------------------------------------------


def test_score_says_the_verdict_and_headline_metrics_and_where_all_are(
    results: Path, predictions: Path, tmp_path: Path
) -> None:
    done = call("score", predictions, "--against", results)
    assert done.exit_code == 0, done.output
    written = pd.read_csv(tmp_path / "theirs.metrics.tsv", sep="\t")
    assert (written[["dataset", "split", "model"]] == ["mine", "unseen_combination", "theirs"]).all(axis=None)
    expected = api.score(predictions, results / "pairs.h5ad")
    pd.testing.assert_series_equal(written["value"], expected["value"], rtol=1e-5)
    means = expected.groupby("metric")["value"].mean()
    headlines = [name for name, metric in METRICS.items() if metric.headline]
    assert [METRICS[name].family for name in headlines[:2]] == ["error", "effect"]
    heading, verdict, *table, last = [line for line in done.stdout.splitlines() if line]
    assert heading.endswith(f": {expected['perturbation'].nunique()} perturbations")
    assert verdict.startswith("No verdict: ")
    assert len(table) == 1 + len(headlines)
    for line, name in zip(table[1:], headlines, strict=True):
        metric, number = METRICS[name], "–" if np.isnan(means[name]) else f"{means[name]:.4f}"
        assert line.split() == [*metric.family.split("_"), name, metric.direction, number]
    assert last == f"All {len(means)} metrics of every perturbation: theirs.metrics.tsv"
    assert len(means) > len(headlines)


def test_score_stands_between_floor_and_ceiling_of_the_same_perturbations(results: Path, predictions: Path) -> None:
    floor = api.score(api.baseline("no_change", results / "pairs.h5ad"), results / "pairs.h5ad")
    for seed in (0, 1):
        folder = results / "no_change" / f"seed_{seed}"
        folder.mkdir(parents=True)
        floor.to_csv(folder / "metrics.tsv", sep="\t", index=False)
    one = floor["perturbation"].iloc[0]
    few = ad.read_h5ad(predictions)
    few[few.obs["perturbation"] == one].write_h5ad(predictions)
    shown = call("score", predictions, "--against", results).stdout
    name = "l2_heg1000_off_target"
    value = floor.loc[(floor["metric"] == name) & (floor["perturbation"] == one), "value"].item()
    assert "1 perturbations" in shown
    assert re.search(rf"^ *error +{name} +lower +[\d.]+ +{value:.4f}$", shown, flags=re.MULTILINE)


def test_score_takes_a_file_of_any_form_and_says_the_verdict(
    results: Path, predictions: Path, prepared: dict[str, Prepared], tmp_path: Path
) -> None:
    here, alone = prepared["unseen_combination"], call("score", predictions, "--against", results)
    assert "No verdict: no model of the workflow is scored in" in alone.stdout
    for name in ("no_change", "perturbed_mean", "additive", "technical_duplicate", "perfect_mean"):
        run = results / name / "seed_0"
        told = (FAMILIES[name].implementation, {}, 0)
        train(here.pairs, here.embeddings, here.audit, run / "model.npz", run / "run.json", *told)
        predict(here.pairs, run / "model.npz", run / "predictions.h5ad", *told, 1000)
        evaluate(run / "predictions.h5ad", here.pairs, here.split, run / "metrics.tsv")
    cells = ad.read_h5ad(predictions)
    means = cells.to_df().groupby(cells.obs["perturbation"].astype(str)).mean()
    table = tmp_path / "means.tsv"
    means.iloc[1:, ::-1].to_csv(table, sep="\t")
    done = call("score", table, "--against", results, "--output", tmp_path / "metrics.tsv")
    assert done.exit_code == 0, done.output
    assert "\nVerdict on means: This screen cannot rank models: 2 perturbations are too few. " in done.stdout
    assert f"Mind: It rests on {len(means)} held-out perturbations" in done.stdout
    assert f"Its file lacks 1 of the perturbations, which are scored as no change: {means.index[0]}." in done.stdout
    written = pd.read_csv(tmp_path / "metrics.tsv", sep="\t")
    assert set(written["perturbation"]) == set(means.index), "the missing one is scored"
    own = pd.read_csv(results / "additive" / "seed_0" / "metrics.tsv", sep="\t")
    mae = [of[of["metric"] == "mae"].set_index("perturbation")["value"][means.index[1:]] for of in (written, own)]
    np.testing.assert_allclose(*mae, rtol=0.05)
    (means * 0.5).to_csv(table, sep="\t")
    assert "its values are no log1p on the scale of this screen" in refused("score", table, "--against", results)
    assert "effects" in refused("score", table, "--against", results, "--values", "effect", "--scale", "counts")


def test_score_refuses_in_words(results: Path, predictions: Path, tmp_path: Path) -> None:
    assert "there is no such folder" in refused("score", predictions, "--against", tmp_path / "results" / "none")
    assert "there is no pairs.h5ad in it" in refused("score", predictions, "--against", results.parent)
    assert "there is no file" in refused("score", tmp_path / "none.h5ad", "--against", results)
    cells = ad.read_h5ad(predictions)
    cells[:, 1:].write_h5ad(predictions)
    assert "1 missing (TF1)" in refused("score", predictions, "--against", results)


# --- export ---------------------------------------------------------------------------------------------------------


def test_export_holds_all_of_training_and_no_perturbed_test_cell(results: Path, tmp_path: Path) -> None:
    """A test cell with values of its own is planted, and looked for in all files."""
    pairs, target = ad.read_h5ad(results / "pairs.h5ad"), tmp_path / "theirs"
    test = np.flatnonzero((pairs.obs["role"] == "test") & ~pairs.obs["is_control"])
    planted = test[0]
    for X in (pairs.X, pairs.layers["counts"]):
        X.data[X.indptr[planted] : X.indptr[planted + 1]] = 4242.0
    pairs.write_h5ad(results / "pairs.h5ad")
    done = call("export", results, target)
    assert done.exit_code == 0, done.output
    written = sorted(path.relative_to(target).as_posix() for path in target.rglob("*") if path.is_file())
    assert written == [
        "README.md", "cell_load/unknown.h5ad", "controls.h5ad", "embeddings.tsv", "gears/split.json",
        "gears/train.h5ad",
        "genes.tsv", "split.json", "targets.tsv", "train.h5ad",
    ]  # fmt: skip
    hidden, held_out = set(pairs.obs_names[test]), set(pairs.obs["perturbation"].iloc[test])
    for file in target.rglob("*.h5ad"):
        cells = ad.read_h5ad(file)
        assert not hidden & set(cells.obs_names)
        assert max(cells.X.max(), cells.layers["counts"].max()) < 4242
        assert not held_out & {str(value) for column in cells.obs for value in cells.obs[column].unique()}
        assert cells.uns["perturbflow"]["split_sha256"] == pairs.uns["perturbflow"]["split_sha256"]
    train = ad.read_h5ad(target / "train.h5ad")
    expected = pairs[pairs.obs["role"] != "test"]
    assert train.obs_names.tolist() == expected.obs_names.tolist()
    assert (train.X != expected.X).nnz == (train.layers["counts"] != expected.layers["counts"]).nnz == 0
    assert set(train.obs["role"]) == {"train", "validation"}
    controls = ad.read_h5ad(target / "controls.h5ad")
    assert controls.obs["is_control"].all()
    assert controls.n_obs == ((pairs.obs["role"] == "test") & pairs.obs["is_control"]).sum()
    targets = pd.read_csv(target / "targets.tsv", sep="\t")
    assert set(targets["perturbation"]) == held_out
    assert targets["n_cells"].sum() == len(test)
    assert pd.read_csv(target / "genes.tsv", sep="\t")["gene_name"].tolist() == pairs.var_names.tolist()


def test_export_has_the_layouts_of_gears_and_cell_load(results: Path, tmp_path: Path) -> None:
    target = tmp_path / "theirs"
    call("export", results, target)
    gears, cell_load = ad.read_h5ad(target / "gears/train.h5ad"), ad.read_h5ad(target / "cell_load/unknown.h5ad")
    assert {"ctrl", "TF1+ctrl"} < set(gears.obs["condition"])
    assert "gene_name" in gears.var
    conditions = json.loads((target / "gears/split.json").read_text())
    assert set(gears.obs["condition"]) - {"ctrl"} == {*conditions["train"], *conditions["val"]}
    assert {"non-targeting", "TF1"} < set(cell_load.obs["gene"])
    assert set(cell_load.obs["gem_group"]) == {"b1", "b2"}
    assert cell_load.n_obs == ad.read_h5ad(target / "train.h5ad").n_obs + ad.read_h5ad(target / "controls.h5ad").n_obs


def test_a_prediction_from_an_export_comes_back(results: Path, tmp_path: Path) -> None:
    """The five minutes of an outsider: the mean of training, for every target."""
    call("export", results, tmp_path / "theirs")
    train = ad.read_h5ad(tmp_path / "theirs/train.h5ad")
    targets = pd.read_csv(tmp_path / "theirs/targets.tsv", sep="\t")
    perturbed = train[~train.obs["is_control"].to_numpy(bool)]
    drawn = perturbed[np.resize(np.arange(perturbed.n_obs), 30 * len(targets))].copy()
    drawn.obs["perturbation"] = np.repeat(targets["perturbation"].to_numpy(), 30)
    drawn.obs_names_make_unique()
    drawn[:, ::-1].write_h5ad(tmp_path / "back.h5ad")
    done = call("score", tmp_path / "back.h5ad", "--against", results)
    assert done.exit_code == 0, done.output
    assert "cells are measured cells of training, of TF1, " in done.stderr
    drawn.uns["perturbflow"]["split_sha256"] = "0" * 64
    drawn.write_h5ad(tmp_path / "other.h5ad")
    assert "it was made for another split" in refused("score", tmp_path / "other.h5ad", "--against", results)
    (tmp_path / "means.txt").write_text("perturbation\tTF1\n")
    assert "predictions are h5ad, tsv, csv or parquet" in refused("score", tmp_path / "means.txt", "--against", results)


def test_export_refuses_in_words(results: Path, tmp_path: Path) -> None:
    assert "there is no such folder" in refused("export", tmp_path / "none", tmp_path / "theirs")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    assert "holds other files" in refused("export", results, tmp_path / "mine")
    (results / "split.json").write_text("{}")
    assert "was made from another split" in refused("export", results, tmp_path / "theirs")


# --- audit, split, ask ----------------------------------------------------------------------------------------------


def test_audit_names_every_check_or_the_leak(results: Path, prepared: dict[str, Prepared]) -> None:
    done = call("audit", results)
    assert done.exit_code == 0, done.output
    checks = json.loads(prepared["unseen_combination"].audit.read_text())["checks"]
    assert sorted(done.stdout.splitlines()) == sorted(f"passed  {name}" for name in checks)
    cells = ad.read_h5ad(results / "pairs.h5ad")
    cells.obs["test_labels"] = cells.obs["perturbation"]
    cells.write_h5ad(results / "pairs.h5ad")
    assert "nothing_else_is_carried" in refused("audit", results)
    (results / "split.json").unlink()
    (results / "embeddings.parquet").unlink()
    assert "there is no split.json and no embeddings.parquet in it" in refused("audit", results)


def test_split_of_cells_and_of_labels(results: Path, tmp_path: Path) -> None:
    options = ["--kind", "unseen_combination", "--test-fraction", 0.3, "--validation-fraction", 0.15]
    expected = json.loads((results / "split.json").read_text())
    done = call("split", results.parent / "harmonized.h5ad", *options, "--output", tmp_path / "split.json")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "split.json").read_text())["cells"] == expected["cells"]
    labels = tmp_path / "labels.txt"
    labels.write_text(
        "\n".join([name for role in expected["perturbations"].values() for name in role] + ["control", ""])
    )
    assert call("split", labels, *options, "--output", tmp_path / "roles.json").exit_code == 0
    assert json.loads((tmp_path / "roles.json").read_text()) == expected["perturbations"]
    assert SPECS["unseen_combination"]["test_fraction"] == 0.3
    assert "there is no file" in refused("split", tmp_path / "none.txt", *options, "--output", tmp_path / "none.json")
    assert "'unseen' is not possible" in refused(
        "split", labels, "--kind", "unseen", "--output", tmp_path / "none.json"
    )
    assert not (tmp_path / "none.json").exists()


def test_ask_answers_and_names_what_is_missing(results: Path, prepared: dict[str, Prepared], tmp_path: Path) -> None:
    run = results / "additive" / "seed_0"
    about = (FAMILIES["additive"].implementation, {}, 0)
    train(
        results / "pairs.h5ad",
        results / "embeddings.parquet",
        prepared["unseen_combination"].audit,
        run / "model.npz",
        run / "run.json",
        *about,
    )
    options = ["--output", tmp_path / "answers" / "mine", "--samples-per-cell", 2]
    done = call("ask", run, "TF1", "TF4+TF3", *options, "--cells", '{"batch": ["b1"]}')
    assert done.exit_code == 0, done.output
    cells = ad.read_h5ad(tmp_path / "answers" / "mine.h5ad")
    assert set(cells.obs["perturbation"]) == {"TF1", "TF3+TF4"}
    assert set(cells.obs["batch"]) == {"b1"}
    assert "this is no JSON" in refused("ask", run, "TF1", *options, "--cells", "b1")
    assert "there is no model.ckpt or model.npz in it" in refused("ask", results, "TF1", *options)


def test_what_is_not_installed_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def without_torch(*_: object, **__: object) -> None:
        raise ModuleNotFoundError("No module named 'torch'", name="torch")

    monkeypatch.setattr("perturbflow.counterfactuals.asking.ask", without_torch)
    assert "pip install 'perturbflow[models]'" in refused("ask", tmp_path, "TF1", "--output", tmp_path / "a")
