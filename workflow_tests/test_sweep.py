"""Sweeps: a known answer is found, no test cell is read, a killed sweep goes on, and bad trials are told."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import SPECS, Prepared, make_screen, prepare
from learned import quick, registered

from perturbflow import sweep as sweeps
from perturbflow.errors import InputError
from perturbflow.evaluation import METRICS
from perturbflow.registry.schemas import schema_of
from perturbflow.sweep import JOURNAL, Trials, sweep

OVER = {"n_components": [1, 6], "ridge": [0.05, 50.0]}
BLOCK = {
    "model": "linear", "family": "linear", "over": OVER, "by": "inner_folds", "folds": 2, "trials": 6,
    "metric": "l2_heg1000_off_target", "seed": 0,
}  # fmt: skip
RANGE = {"over": {"ridge": {"low": 0.01, "high": 10.0, "log": True}}, "trials": 4}


def run(here: Prepared, folder: Path, name: str = "linear", params: dict | None = None, **changes: object):
    """Run a sweep; return its table, its text and its configuration."""
    implementation, defaults = registered(name)
    files = here.pairs, here.embeddings, here.audit, here.split
    shown = folder / "best.yaml", folder / "trials.tsv", folder / "sweep.png"
    sweep(*files, *shown, implementation, {**defaults, **(params or {})}, {**BLOCK, **changes}, max_cells=20)
    text = shown[0].read_text()
    return SimpleNamespace(table=pd.read_csv(shown[1], sep="\t"), text=text, models=yaml.safe_load(text)["models"])


@pytest.fixture
def here(prepared: dict[str, Prepared]) -> Prepared:
    return prepared["unseen_combination"]


def test_the_better_setting_is_found_and_can_be_pasted(here, tmp_path):
    """Effects of eight genes are of full rank: one component and a heavy ridge leave most of them out."""
    found = run(here, tmp_path)
    assert found.models == {"linear_swept": {"family": "linear", "params": {"n_components": 6, "ridge": 0.05}}}
    trials = found.table.iloc[1:]
    assert len(trials) == 4  # all choices, though more trials are allowed
    assert trials.loc[trials["value"].idxmin(), ["n_components", "ridge"]].tolist() == [6, 0.05]
    assert np.allclose(trials[["fold_1", "fold_2"]].mean(axis=1), trials["value"], atol=1e-4)
    assert "No test cell was read" in found.text
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("kind", ["unseen_perturbation", "unseen_perturbation_in_context", "random_cells"])
def test_training_is_divided_in_the_way_of_the_split(kind, prepared, tmp_path):
    found = run(prepared[kind], tmp_path, over={"ridge": [0.1]})
    assert found.table["value"].notna().all()


def test_contexts_need_another_context_in_training(prepared, tmp_path):
    with pytest.raises(InputError, match=r"sweep\.by: inner_folds within training.*Or set sweep\.by to validation"):
        run(prepared["unseen_context"], tmp_path)


def spoilt(here: Prepared, folder: Path, role: str) -> Prepared:
    """Return a copy whose cells of a role, controls too, are others."""
    copy = Prepared(Path(shutil.copytree(here.folder, folder)))
    cells = ad.read_h5ad(copy.pairs)
    of_role = np.flatnonzero(cells.obs["role"] == role)
    X = cells.X.tolil()
    X[of_role] = X[of_role[::-1]] * 3
    cells.X = X.tocsr()
    copy.pairs.unlink()
    cells.write_h5ad(copy.pairs)
    return copy


@pytest.mark.parametrize("by", ["inner_folds", "validation"])
@pytest.mark.slow
def test_no_test_cell_decides(by, here, tmp_path):
    same = run(here, tmp_path / "a", by=by).table.drop(columns="seconds")
    of_others = run(spoilt(here, tmp_path / "test", "test"), tmp_path / "b", by=by).table.drop(columns="seconds")
    pd.testing.assert_frame_equal(same, of_others)
    changed = run(spoilt(here, tmp_path / "train", "train"), tmp_path / "c", by=by).table
    assert not np.allclose(changed["value"], same["value"])


def test_a_killed_sweep_goes_on_where_it_was(here, tmp_path, monkeypatch):
    whole = run(here, tmp_path / "whole", **RANGE).table.drop(columns="seconds")
    scored, score = [], Trials.score

    def until_killed(self: Trials, setting: dict) -> list[float]:
        if len(scored) == 3:
            raise KeyboardInterrupt
        scored.append(setting)
        return score(self, setting)

    monkeypatch.setattr(Trials, "score", until_killed)
    with pytest.raises(KeyboardInterrupt):
        run(here, tmp_path / "killed", **RANGE)
    assert not (tmp_path / "killed/best.yaml").exists()
    with (tmp_path / "killed" / JOURNAL).open("a") as journal:
        journal.write('{"cut off by a full')
    monkeypatch.setattr(Trials, "score", lambda self, setting: scored.append(setting) or score(self, setting))
    resumed = run(here, tmp_path / "killed", **RANGE).table.drop(columns="seconds")
    pd.testing.assert_frame_equal(whole, resumed)
    assert len(scored) == 5  # the model as it is and four trials, none of them twice

    more = run(here, tmp_path / "killed", **{**RANGE, "trials": 5}).table.drop(columns="seconds")
    pd.testing.assert_frame_equal(more.iloc[:5], whole)
    assert len(scored) == 6


def test_other_data_start_another_sweep(here, tmp_path, monkeypatch):
    run(here, tmp_path / "out", over={"ridge": [0.1]})
    scored, score = [], Trials.score
    monkeypatch.setattr(Trials, "score", lambda self, setting: scored.append(setting) or score(self, setting))
    run(spoilt(here, tmp_path / "train", "train"), tmp_path / "out", over={"ridge": [0.1]})
    assert scored == [{}, {"ridge": 0.1}]


def test_failed_trials_are_told_and_the_sweep_goes_on(here, tmp_path, monkeypatch):
    score = Trials.score

    def failing(self: Trials, setting: dict) -> list[float]:
        if setting and setting["ridge"] > 1:
            raise InputError("the loss is not finite")
        return score(self, setting)

    monkeypatch.setattr(Trials, "score", failing)
    found = run(here, tmp_path / "some")
    assert found.table["state"].tolist().count("fail") == 2
    assert found.models["linear_swept"]["params"]["ridge"] == 0.05
    with pytest.raises(InputError, match="every trial failed; the first: the loss is not finite"):
        run(here, tmp_path / "all", over={"ridge": [5.0, 9.0]})


def test_a_metric_that_is_better_higher_is_maximized(here, tmp_path):
    found = run(here, tmp_path, metric="pearson_delta_pert_off_target")
    best = found.table.iloc[1:].loc[found.table["value"].iloc[1:].idxmax()]
    assert found.models["linear_swept"]["params"] == {"n_components": best["n_components"], "ridge": best["ridge"]}


def test_headline_metrics_may_decide():
    declared = schema_of("config")["properties"]["sweep"]["properties"]["metric"]
    assert declared["enum"] == [metric.name for metric in METRICS.values() if metric.headline]
    assert {METRICS[name].direction for name in declared["enum"]} == {"higher", "lower"}


def test_small_numbers_stay_numbers_in_yaml():
    assert yaml.safe_load(sweeps._in_yaml({"a": 1e-05, "b": -2e-7, "c": 3, "d": None, "e": "x", "f": 0.5})) == {
        "a": 1e-05, "b": -2e-7, "c": 3, "d": None, "e": "x", "f": 0.5,
    }  # fmt: skip


@pytest.mark.slow
def test_a_network_is_swept_too(tmp_path):
    """A training that is killed within a trial goes on from its checkpoint: the same identity is asked for again."""
    here = prepare(tmp_path / "screen", make_screen(), SPECS["unseen_combination"])
    tiny = {**quick("scppdm"), "n_steps": 30}
    found = run(
        here, tmp_path, "scppdm", tiny, model="scppdm", family="diffusion", over={"width": [8, 16]}, by="validation"
    )
    assert found.table["value"].notna().all()
    assert found.models["scppdm_swept"]["params"]["n_steps"] == 30
    assert found.models["scppdm_swept"]["params"]["width"] in (8, 16)
    assert not (tmp_path / "checkpoints").exists()
