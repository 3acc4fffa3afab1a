"""Contexts: perturbations measured in other contexts alone, controls of other batches, and questions without answer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from conftest import Prepared, ask, make_screen, prepare
from hypothesis import given, settings
from hypothesis import strategies as st

from perturbflow.audit.caveats import TOLD, caveats_of, matched_across_batches
from perturbflow.benchmark.verdicts import judge
from perturbflow.controls import match_controls
from perturbflow.counterfactuals.asking import ask as ask_by_hand
from perturbflow.counterfactuals.contexts import MeasuredContexts
from perturbflow.counterfactuals.novelty import TrainingKnowledge
from perturbflow.counterfactuals.warranty import fitting
from perturbflow.embeddings import Embeddings
from perturbflow.errors import InputError
from perturbflow.genes.symbols import members_of
from perturbflow.pairs import CONTROLS_PER_CELL, Pairs
from perturbflow.registry.families import FAMILIES
from perturbflow.train import train

SPEC = {"kind": "unseen_perturbation", "held_out": ["TF5", "TF7"], "validation_fraction": 0.15, "seed": 0}
ADDITIVE, NO_CHANGE = (FAMILIES[name].implementation for name in ("additive", "no_change"))


def trained(here: Prepared, folder: Path, implementation: str = ADDITIVE) -> Path:
    """Train a closed form; return its file."""
    train(here.pairs, here.embeddings, here.audit, folder / "model.npz", folder / "run.json", implementation, {}, 0)
    return folder / "model.npz"


# --- measured in other contexts -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_line(tmp_path_factory: pytest.TempPathFactory) -> tuple[Prepared, Path]:
    """Return a split in which TF1 is measured in b1 alone, while controls of b1 and b2 are in training; and a model."""
    screen = make_screen()
    only_b1 = screen.obs["perturbation"].str.contains("TF1") & (screen.obs["lane"] == "b2")
    here = prepare(tmp_path_factory.mktemp("one_line"), screen[~only_b1].copy(), SPEC)
    assert "TF1" in json.loads(here.split.read_text())["perturbations"]["train"]
    return here, trained(here, here.folder)


@pytest.mark.parametrize(
    ("batch", "known", "verdict", "warranty"),
    [
        ("b1", "measured", "unknown: 4 test perturbations, and fewer than 6 are too few", "Unknown: 4 test"),
        (
            "b2",
            "measured in other contexts",
            "unknown: the model was not checked on such perturbations",
            "None: training measured this",
        ),
    ],
)
def test_controls_alone_measure_nothing(
    batch: str, known: str, verdict: str, warranty: str, one_line: tuple[Prepared, Path], tmp_path: Path
) -> None:
    here, model = one_line
    answer = ask(here, model, tmp_path, ADDITIVE, {}, perturbations=["TF1"], cells={"batch": [batch]})
    table, cells = pd.read_csv(f"{answer}.tsv", sep="\t"), ad.read_h5ad(f"{answer}.h5ad")
    assert set(table["known"]) == set(cells.obs["known"]) == {known}
    assert table["low"].isna().all() == (batch == "b2")
    assert set(table["in_other_contexts"]) == {batch == "b2"}
    assert cells.uns["perturbflow"]["warranty"].startswith(warranty)
    assert set(table["verdict"]) == {cells.uns["perturbflow"]["verdict"]} == {verdict}
    assert Path(f"{answer}.tsv").read_text().splitlines()[1].startswith(f"TF1\t{verdict}\t")
    assert pd.read_csv(f"{answer}.ranking.tsv", sep="\t")["known"].tolist() == [known]


def test_every_group_of_cells_is_told_of_its_own_context(one_line: tuple[Prepared, Path], tmp_path: Path) -> None:
    here, model = one_line
    answer = ask(here, model, tmp_path, ADDITIVE, {}, perturbations=["TF1", "TF2", "TF1+TF2"], groups="batch")
    table = (
        pd.read_csv(f"{answer}.tsv", sep="\t")
        .drop_duplicates(["perturbation", "group"])
        .set_index(["perturbation", "group"])
    )
    assert table.loc[("TF1", "b1"), "known"] == "measured"
    assert table.loc[("TF1", "b2"), "known"] == "measured in other contexts"
    assert table.loc[("TF1+TF2", "b2"), "known"].endswith("in other contexts")
    assert table.loc["TF2", "known"].tolist() == ["measured"] * 3
    cells = ad.read_h5ad(f"{answer}.h5ad").obs.query("perturbation == 'TF1'")
    assert (cells["known"].eq("measured") == cells["batch"].eq("b1")).all()


def test_a_model_that_was_checked_in_other_contexts_has_its_warranty(
    prepared: dict[str, Prepared], tmp_path: Path
) -> None:
    here = prepared["unseen_context"]
    answer = ask(here, trained(here, tmp_path), tmp_path, ADDITIVE, {}, perturbations=["TF1"])
    assert ". Intervals, calibrated on" in ad.read_h5ad(f"{answer}.h5ad").uns["perturbflow"]["warranty"]
    assert pd.read_csv(f"{answer}.tsv", sep="\t")["low"].notna().all()
    content = json.loads((tmp_path / "warranty.json").read_text())
    assert all(row["in_other_contexts"] for row in content["perturbations"])
    assert fitting(content, False)[1].startswith("None: ")


def test_a_kind_of_cells_that_lacks_a_perturbation_is_counted(one_line: tuple[Prepared, Path]) -> None:
    cells = Pairs.open(one_line[0].pairs).roles("train")
    places = MeasuredContexts(cells)
    asked = {("mine", "b1", "unknown"), ("mine", "b1", "T cell")}
    assert places.words("TF1", asked) == " in 1 of the 2 kinds of cells that are asked"
    assert places.words("TF1", {("mine", "b3", "unknown")}) == " in other contexts"
    assert (
        places.words("TF1", {("mine", "b1", "unknown"), ("mine", "b2", "unknown")})
        == " in 1 of the 2 batches that are asked"
    )
    assert places.words("TF2", {("mine", "b1", "unknown"), ("mine", "b2", "unknown")}) == ""
    assert not places.is_elsewhere("GENE1", {("mine", "b2", "unknown")}), (
        "genes never perturbed rest on all of training"
    )
    assert places.is_elsewhere("GENE1", {("other", "b2", "unknown")})


def test_another_dose_rests_on_the_contexts_of_its_compound() -> None:
    obs = pd.DataFrame(
        {"perturbation": ["TF1@1", "TF2@1"], "dataset": "mine", "batch": ["b1", "b2"], "cell_type": "T cell"}
    )
    places = MeasuredContexts(SimpleNamespace(obs=obs, is_control=np.zeros(2, bool)))
    assert places.is_elsewhere("TF1@5", {("mine", "b2", "T cell")})
    assert not places.is_elsewhere("TF1@5", {("mine", "b1", "T cell")})
    assert places.is_elsewhere("TF1@5+TF2@1", {("mine", "b2", "T cell")})


# --- controls of other batches --------------------------------------------------------------------------------------


def test_controls_in_one_lane_are_in_the_audit(tmp_path: Path) -> None:
    screen = make_screen()
    in_b2 = (screen.obs["lane"] == "b2").to_numpy()
    is_control = (screen.obs["perturbation"] == "control").to_numpy()
    here = prepare(tmp_path, screen[~(in_b2 & is_control)].copy(), SPEC)
    content = json.loads(here.audit.read_text())
    matched = content["matched_across_batches"]
    n = int((in_b2 & ~is_control).sum())
    assert (matched["cells"], matched["share"], matched["batches"]) == (n, 0.5, {"b2": n})
    assert sum(matched["roles"].values()) == n
    assert len(content["caveats"]) == 1
    assert f"{n:,} perturbed cells (50 %) have no control in their own batch" in content["caveats"][0]
    assert "batch b2" in content["caveats"][0]
    assert set(content["checks"].values()) == {"passed"}, "it is no leak"


def test_where_every_batch_has_controls_nothing_is_said(prepared: dict[str, Prepared]) -> None:
    content = json.loads(prepared["unseen_perturbation"].audit.read_text())
    assert content["matched_across_batches"] == {"cells": 0, "share": 0.0, "batches": {}, "roles": {}}
    assert content["caveats"] == []


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 6)), min_size=1, max_size=5))
def test_the_cells_that_are_counted_are_those_that_the_matching_relaxed(batches: list[tuple[int, int]]) -> None:
    rows = [
        (f"b{i}", label) for i, (n_controls, n) in enumerate(batches) for label in ["control"] * n_controls + ["A"] * n
    ]
    obs = pd.DataFrame([*rows, ("b9", "control")], columns=["batch", "perturbation"])
    obs = obs.assign(cell_type="t", role="train", is_control=obs["perturbation"] == "control")
    index, n_relaxed = match_controls(obs, CONTROLS_PER_CELL, 0)
    matched = matched_across_batches(obs, index)
    assert matched["cells"] == n_relaxed == sum(n for n_controls, n in batches if not n_controls)
    assert bool(caveats_of(obs, matched)) == (matched["share"] >= TOLD)


def test_a_verdict_carries_its_caveats() -> None:
    summary = pd.DataFrame(
        [
            {
                "dataset": "d",
                "split": "s",
                "model": "m",
                "family": "f",
                "kind": "learned",
                "metric": "mse",
                "value": 1.0,
                "seed": 0,
                "n_perturbations": 9,
            }
        ]
    )
    comparisons = pd.DataFrame(
        columns=[
            "headline",
            "model",
            "metric",
            "verdict",
            "is_best_baseline",
            "baseline_family",
            "baseline_kind",
            "baseline",
            "n_perturbations",
        ]
    )
    comparisons = comparisons.astype({"headline": bool, "is_best_baseline": bool})
    calibration = pd.DataFrame(columns=["verdict", "metric", "positive"])
    (row,) = judge(summary, calibration, comparisons, 0.02, ["Lanes differ."]).itertuples()
    assert row.caveats.endswith(" Lanes differ.")
    baseline = summary.assign(kind="baseline")
    assert judge(baseline, calibration, comparisons, 0.02)["caveats"].tolist() == [""]


@pytest.mark.parametrize(
    ("batches", "said"),
    [(["b1", "b1"], "one batch (b1)"), (["unknown", "unknown"], "as no batch is declared"), (["b1", "b2"], "")],
)
def test_scored_cells_of_one_batch_are_a_caveat(batches: list[str], said: str) -> None:
    rows = [*[("A", "test", batch) for batch in batches], ("control", "test", "b3"), ("B", "train", "b4")]
    obs = pd.DataFrame(rows, columns=["perturbation", "role", "batch"]).assign(cell_type="t")
    obs["is_control"] = obs["perturbation"] == "control"
    nothing = {"share": 0.0, "cells": 0, "batches": {}}
    assert [said in caveat for caveat in caveats_of(obs, nothing)] == [True] * bool(said)


# --- questions that nobody can answer -------------------------------------------------------------------------------


@pytest.fixture
def run(prepared: dict[str, Prepared], tmp_path: Path) -> Callable[[str], Path]:
    """Return a function that trains a model where the workflow leaves one."""

    def make(implementation: str) -> Path:
        folder = tmp_path / "results" / "mine" / "split"
        shutil.copytree(prepared["unseen_perturbation"].folder, folder)
        (folder / "model" / "seed_0").mkdir(parents=True)
        model = trained(Prepared(folder), folder / "model" / "seed_0", implementation)
        content = json.loads(model.with_name("run.json").read_text())
        model.with_name("run.json").write_text(
            json.dumps({**content, "implementation": implementation, "params": {}, "seed": 0})
        )
        return model.parent

    return make


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (["tf1"], r"'tf1' \(did you mean TF1"),
        (["TF1+XYZ99"], "'XYZ99'"),
        (["TF1", "TF22", "tf3"], r"'TF22' \(did.*'tf3' \(did you mean TF3"),
    ],
)
def test_a_typo_is_asked_back_before_anything_is_computed(
    asked: list[str], message: str, run: Callable, tmp_path: Path
) -> None:
    folder = run(ADDITIVE)
    with pytest.raises(InputError, match=message):
        ask_by_hand(folder, asked, tmp_path / "answer")
    assert not (folder / "warranty.json").exists()
    assert not list(tmp_path.glob("answer*"))


def test_no_change_is_no_answer_for_a_gene_that_was_never_perturbed(
    prepared: dict[str, Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = prepared["unseen_perturbation"]
    measured = next(gene for gene in Pairs.open(here.pairs).genes if gene.startswith("GENE"))
    for name in ("silent", "speaks"):
        (tmp_path / name).mkdir()
    silent, speaks = trained(here, tmp_path / "silent", NO_CHANGE), trained(here, tmp_path / "speaks")
    with pytest.raises(InputError, match=f"'{measured}' cannot be answered by this model: it never saw it perturbed"):
        ask(here, silent, tmp_path / "silent", NO_CHANGE, {}, perturbations=[measured])
    with monkeypatch.context() as patched:
        patched.setattr("perturbflow.counterfactuals.answers.MOST_DRAWN", 1)
        with pytest.raises(InputError, match=f"'{measured}' cannot be answered by this model"):
            ask(here, silent, tmp_path / "silent", NO_CHANGE, {}, perturbations=["TF1", measured])
        ranked = ask(here, speaks, tmp_path / "speaks", ADDITIVE, {}, perturbations=["control", measured], drawn=1)
        sizes = pd.read_csv(f"{ranked}.ranking.tsv", sep="\t").set_index("perturbation")["size"]
        assert sizes["control"] == 0 < sizes[measured], "control among many changes nothing"
    answer = ask(here, speaks, tmp_path / "speaks", ADDITIVE, {}, perturbations=[measured])
    assert np.abs(pd.read_csv(f"{answer}.tsv", sep="\t")["effect"]).max() > 0.01


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"cells": {"batch": ["B1"]}}, r"cells: obs column 'batch' does not hold 'B1' \(did you mean b1"),
        (
            {"search": {"towards": {"cells": {"perturbation": ["tf1"]}}, "budget": 3}},
            r"search.towards.cells.*'tf1' \(did you mean TF1",
        ),
    ],
)
def test_a_value_that_no_cell_has_is_asked_back(
    query: dict, message: str, one_line: tuple[Prepared, Path], tmp_path: Path
) -> None:
    here, model = one_line
    with pytest.raises(InputError, match=message):
        ask(here, model, tmp_path, ADDITIVE, {}, perturbations=["TF1"], **query)


def test_a_gene_of_combinations_alone_was_not_measured_at_other_doses(screen: tuple[Pairs, Embeddings]) -> None:
    """Its words once were those of a compound at another dose."""
    pairs, vectors = screen
    training = pairs.roles("train").select(pairs.roles("train").labels != "TF1")
    knowledge = TrainingKnowledge(training, vectors, pairs.roles("test"))
    assert any("TF1" in members_of(label) for label in training.perturbations)
    assert knowledge.of("TF1").words == "known from combinations alone"
    assert knowledge.of("TF2").words == "measured"
