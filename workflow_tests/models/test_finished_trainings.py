"""A finished training of a network is not repeated when its job runs again; other inputs make another training."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Prepared

from perturbflow import train as training
from perturbflow.models.counterfactual import Counterfactual
from perturbflow.train import KEPT, train

NETWORK = "counterfactual:Counterfactual"


@pytest.fixture
def trained(prepared: dict[str, Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that trains a stand-in for a network in one folder, and counts the trainings so far."""
    here = prepared["unseen_combination"]
    count = [0]

    def fit(self: Counterfactual, pairs: object, embeddings: object, run: training.Run) -> dict:
        count[0] += 1
        return {"state": torch.tensor([float(count[0])])}

    monkeypatch.setattr(Counterfactual, "fit", fit)
    monkeypatch.setattr(Counterfactual, "__init__", lambda self, params: None)
    monkeypatch.setattr(Counterfactual, "files", ())

    def run(params: dict | None = None, seed: int = 0, files: Prepared = here, **more: object) -> int:
        outputs = tmp_path / "run/model.ckpt", tmp_path / "run/run.json"
        for path in outputs:
            path.unlink(missing_ok=True)  # as Snakemake does before a job
        train(files.pairs, files.embeddings, files.audit, *outputs, NETWORK, params or {}, seed, **more)
        return count[0]

    return run


def state(tmp_path: Path) -> float:
    """Return what the model's file holds."""
    return float(torch.load(tmp_path / "run/model.ckpt", weights_only=True)["state"])


def test_the_same_training_is_not_repeated(trained: Callable[..., int], tmp_path: Path) -> None:
    assert trained(provenance={"seed": "0", "code_version": "a"}) == 1
    first = json.loads((tmp_path / "run/run.json").read_text())
    assert trained(provenance={"seed": "0", "code_version": "a"}) == 1
    assert json.loads((tmp_path / "run/run.json").read_text()) == first
    assert state(tmp_path) == 1


@pytest.mark.parametrize("other", [{"params": {"n_steps": 3}}, {"seed": 1}, {"device": "cpu"}])
def test_another_training_is_made_and_the_first_comes_back(
    other: dict, trained: Callable[..., int], tmp_path: Path
) -> None:
    assert [trained(), trained(**other), trained()] == [1, 2, 2]
    assert state(tmp_path) == 1


def test_other_content_of_the_pairs_is_another_training(
    trained: Callable[..., int], prepared_copy: Callable[[str], Prepared], monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = prepared_copy("unseen_combination")
    assert [trained(), trained(files=copy)] == [1, 1], "the same bytes elsewhere"
    with copy.embeddings.open("ab") as file:
        file.write(b"more")
    monkeypatch.setattr(training.Embeddings, "read", lambda path: None)
    assert trained(files=copy) == 2


def test_another_version_of_the_code_is_another_training(
    trained: Callable[..., int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert trained() == 1
    monkeypatch.setattr(training, "code_version", lambda *roots: "another")
    assert trained() == 2


@pytest.mark.parametrize("name", ["model.ckpt", "run.json"])
def test_what_was_damaged_is_not_brought_back(name: str, trained: Callable[..., int], tmp_path: Path) -> None:
    assert trained() == 1
    (kept,) = (tmp_path / "run/.made/finished").glob(f"*/{name}")
    kept.write_bytes(kept.read_bytes()[:-1])
    assert trained() == 2


def test_the_oldest_go(trained: Callable[..., int], tmp_path: Path) -> None:
    assert [trained(seed=seed) for seed in range(KEPT + 1)] == [*range(1, KEPT + 2)]
    assert len(list((tmp_path / "run/.made/finished").iterdir())) == KEPT
    assert trained(seed=KEPT) == KEPT + 1
    assert trained(seed=0) == KEPT + 2


def test_a_deleted_folder_trains_anew(trained: Callable[..., int], tmp_path: Path) -> None:
    assert trained() == 1
    shutil.rmtree(tmp_path / "run")
    assert trained() == 2


def test_closed_forms_keep_nothing(prepared: dict[str, Prepared], tmp_path: Path) -> None:
    here = prepared["unseen_combination"]
    train(
        here.pairs,
        here.embeddings,
        here.audit,
        tmp_path / "model.npz",
        tmp_path / "run.json",
        "closed_form.baselines:Additive",
        {},
        0,
    )
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "unseen_combination") == [
        "model.npz",
        "run.json",
    ]
