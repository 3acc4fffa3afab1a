"""Which experiment next: the table of choices, and questions that have no answer. Its maths: test_gaussian_process."""

import importlib.util
import itertools
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
from conftest import PERTURBED, REPOSITORY, SPECS, Prepared, make_screen, prepare

from perturbflow.counterfactuals.asking import design_by_hand
from perturbflow.errors import InputError
from perturbflow.genes.symbols import CONTROL, SEPARATOR
from perturbflow.pairs import Pairs
from perturbflow.registry.config import complete
from perturbflow.registry.families import FAMILIES
from perturbflow.registry.shipped import above_shipped
from perturbflow.train import train

SET_GP, ADDITIVE = (FAMILIES[name].implementation for name in ("gaussian_process", "additive"))


def trained_on(split: Prepared, folder: Path) -> Path:
    """Return the folder of a set_gp that was trained on a copy of a split."""
    folder = folder / "results" / "mine" / "split"
    shutil.copytree(split.folder, folder)
    here, made = Prepared(folder), folder / "set_gp" / "seed_0"
    made.mkdir(parents=True)
    train(here.pairs, here.embeddings, here.audit, made / "model.npz", made / "run.json", SET_GP, {}, 0)
    return made


@pytest.fixture(scope="module")
def run(prepared: dict[str, Prepared], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a set_gp that was trained without a half of the combinations."""
    return trained_on(prepared["unseen_combination"], tmp_path_factory.mktemp("design"))


def unmeasured(run: Path) -> list[str]:
    """Return the combinations that training did not see."""
    return Pairs.open(run.parents[1] / "pairs.h5ad").roles("test").perturbations


@pytest.mark.parametrize("aim", ["rest", "target", "interactions"])
def test_a_design_lists_what_was_not_measured(aim: str, run: Path, tmp_path: Path) -> None:
    new = unmeasured(run)
    search = json.dumps({"towards": {"cells": {"perturbation": ["TF1"]}}})
    design_by_hand(run, [*new, "TF1"], tmp_path / "design.tsv", len(new), aim, search=search)
    table = pd.read_csv(tmp_path / "design.tsv", sep="\t")
    assert sorted(table["perturbation"]) == sorted(new), "all of them in the end, and TF1 was measured"
    assert table["rank"].tolist() == list(range(1, len(new) + 1))
    assert (table["gain"] >= 0).all()
    assert table["sd"].gt(0).all()
    if aim == "rest":
        assert table["left"].is_monotonic_decreasing
        assert table["left"].between(0, 1).all()


def test_contexts_are_candidates_too(prepared: dict[str, Prepared], tmp_path: Path) -> None:
    """What training measured in one batch alone is a candidate in the other, and nowhere else."""
    made = trained_on(prepared["unseen_perturbation_in_context"], tmp_path)
    cells = Pairs.open(made.parents[1] / "pairs.h5ad").fitted_on("test")
    contexts = sorted(set(cells.contexts))
    measured = {
        (label, context) for label, context in zip(cells.labels, cells.contexts, strict=True) if label != CONTROL
    }
    labels = sorted({label for label, _ in measured})
    new = {(label, context) for label in labels for context in contexts} - measured
    assert new, "every perturbation of training is measured in both batches"
    design_by_hand(made, labels, tmp_path / "design.tsv", len(new), each_context=True)
    table = pd.read_csv(tmp_path / "design.tsv", sep="\t")
    assert set(zip(table["perturbation"], table["context"], strict=True)) == new
    with pytest.raises(InputError, match="the aim interactions compares combinations over all contexts"):
        design_by_hand(made, labels, tmp_path / "design.tsv", 1, "interactions", each_context=True)


def test_one_context_leaves_nothing_to_choose_between(tmp_path: Path) -> None:
    screen = make_screen()
    here = prepare(tmp_path / "screen", screen[screen.obs["lane"] == "b1"].copy(), SPECS["unseen_combination"])
    made = trained_on(here, tmp_path)
    with pytest.raises(InputError, match=r"each_context: training knows one context, .*unite screens"):
        design_by_hand(made, unmeasured(made), tmp_path / "design.tsv", 1, each_context=True)


def test_designs_that_cannot_be_made_are_refused(run: Path, tmp_path: Path) -> None:
    new = unmeasured(run)
    with pytest.raises(InputError, match=f"budget: 50 are to be chosen, and only {len(new)} candidates"):
        design_by_hand(run, new, tmp_path / "design.tsv")
    with pytest.raises(InputError, match="only 0 combinations are not measured yet"):
        design_by_hand(run, ["TF1"], tmp_path / "design.tsv", 1, "interactions")
    with pytest.raises(InputError, match="needs a state to reach"):
        design_by_hand(run, new, tmp_path / "design.tsv", 1, "target")
    other = shutil.copytree(run, run.parent / "seed_1")
    content = json.loads((other / "run.json").read_text())
    (other / "run.json").write_text(json.dumps({**content, "implementation": ADDITIVE, "params": {}}))
    with pytest.raises(InputError, match="Train the model set_gp"):
        design_by_hand(other, new, tmp_path / "design.tsv", 1)
    assert not (tmp_path / "design.tsv").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "additive"}, "design needs a model of family gaussian_process"),
        ({"design": {"aim": "target"}}, "the aim target needs a state to reach"),
        ({"design": {"aim": "interactions", "each_context": True}}, "compares combinations over all contexts"),
        ({"perturbations": {"genes_of": "mine:0006986"}}, "'mine' is no prior of kind go; known: go"),
        ({"perturbations": {"file": "nowhere.txt"}}, "there is no file 'nowhere.txt'"),
    ],
)
def test_the_plan_refuses_what_cannot_be_asked(changes: dict, message: str) -> None:
    block = {"dataset": "renge2023", "split": "unseen_perturbation", "model": "set_gp", "perturbations": "all_single"}
    config = {
        "select": {"counterfactuals": ["mine"]},
        "counterfactuals": {"mine": {**block, "design": {"budget": 3}, **changes}},
    }
    with pytest.raises(InputError, match=message):
        complete(above_shipped(config))


def test_blocks_within_a_question_get_their_defaults() -> None:
    """A search or design without a budget once ended in a KeyError, after the training."""
    block = {"dataset": "renge2023", "split": "unseen_perturbation", "model": "set_gp", "perturbations": "all_single"}
    further = {"search": {"towards": {"signature": {"NANOG": 1}}}, "design": {}}
    config = complete(above_shipped({"counterfactuals": {"mine": {**block, **further}}}))
    asked = config["counterfactuals"]["mine"]
    assert asked["search"]["budget"] == 10
    assert asked["design"] == {"aim": "rest", "budget": 50, "targets": None, "each_context": False}


def test_designs_are_measured_backwards_for_interactions(tmp_path: Path) -> None:
    """The benchmark once read an attribute that was gone; of 28 combinations a tenth is to be found among 22."""
    path = REPOSITORY / "workflow_tests/benchmarks/design_backwards.py"
    spec = importlib.util.spec_from_file_location(path.stem, path)
    backwards = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backwards)
    pairs = [SEPARATOR.join(pair) for pair in itertools.combinations(PERTURBED, 2)]
    screen = make_screen(labels=[*PERTURBED, *pairs], n_cells=12)
    here = prepare(tmp_path, screen, SPECS["unseen_combination"])
    table = backwards.interactions(backwards.whole(here.folder), 0)
    assert table["strategy"].tolist() == ["random", "largest", "design"]
    assert table["recall"].isin([0.0, 0.5, 1.0]).all()
