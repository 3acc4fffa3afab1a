"""The same numbers twice: from the same seed, on other numbers of cores, and from what run.json says of a run."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import REPOSITORY, Outcome, closed_forms_config, run_snakemake, write_screen

from perturbflow.io.files import file_digest

pytestmark = pytest.mark.slow

MODELS = ["random_forest", "scppdm"]
QUICK = {"n_steps": 150, "batch_size": 32, "n_latent": 8, "width": 16, "n_sampling_steps": 4}
SPLIT = Path("results/mine/unseen_combination")
# Of every mean score, where a network trained on another number of threads. Sums of another order differ in their last
# digits, and 150 steps of a network make the most of it; the scores of closed forms are the same.
TOLERANCE_ON_OTHER_THREADS = 1e-3


def run_in(folder: Path, *arguments: str) -> Outcome:
    """Run a forest and a network on the small screen."""
    folder.mkdir()
    write_screen(folder)
    config = closed_forms_config(models={"scppdm": {"params": QUICK}}, device="cpu")
    config["select"]["models"] = MODELS
    outcome = run_snakemake(folder, "evaluated", *arguments, config=config)
    assert outcome.returncode == 0, outcome.text
    return outcome


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a finished run on two cores."""
    folder = tmp_path_factory.mktemp("repeatable") / "once"
    run_in(folder)
    return folder


def metrics(folder: Path, model: str) -> bytes:
    """Return the scores of a model, as they were written."""
    return (folder / SPLIT / model / "seed_0/metrics.tsv").read_bytes()


def test_the_same_seed_gives_the_same_metrics_on_one_core_and_on_two(once: Path, tmp_path: Path) -> None:
    run_in(tmp_path / "again", "--cores", "1")
    for model in MODELS:
        assert metrics(tmp_path / "again", model) == metrics(once, model), model
    for name in ("split.json", "audit.json"):
        assert file_digest(tmp_path / "again" / SPLIT / name) == file_digest(once / SPLIT / name)


def test_more_threads_per_job_change_no_score_by_more_than_the_tolerance(once: Path, tmp_path: Path) -> None:
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    for model in MODELS:
        shutil.rmtree(tmp_path / SPLIT / model)
    rules = ("train_closed_form", "train_diffusion", "predict", "evaluate")
    outcome = run_snakemake(
        tmp_path, "evaluated", "--configfile", "mine.yaml", "--set-threads", *[f"{rule}=2" for rule in rules]
    )
    assert outcome.returncode == 0, outcome.text
    assert "pair" not in outcome.jobs
    run = json.loads((tmp_path / SPLIT / "scppdm/seed_0/run.json").read_text())
    assert run["threads"] == 2
    for model in MODELS:
        tables = [pd.read_csv(folder / SPLIT / model / "seed_0/metrics.tsv", sep="\t") for folder in (once, tmp_path)]
        means = [table.groupby("metric")["value"].mean() for table in tables]
        np.testing.assert_allclose(
            means[1], means[0], rtol=TOLERANCE_ON_OTHER_THREADS, atol=TOLERANCE_ON_OTHER_THREADS, err_msg=model
        )


def test_run_json_has_all_it_takes_to_repeat_a_run(once: Path, tmp_path: Path) -> None:
    run = json.loads((once / SPLIT / "scppdm/seed_0/run.json").read_text())
    origin = run["provenance"]
    split = once / "results" / origin["dataset"] / origin["split"]
    inputs = {path: split / path for path in run["inputs_sha256"]}
    assert {name: file_digest(path) for name, path in inputs.items()} == run["inputs_sha256"]
    command = [
        sys.executable, str(REPOSITORY / "scripts/train.py"),
        "--pairs", str(inputs["pairs.h5ad"]), "--embeddings", str(inputs["embeddings.parquet"]), "--audit",
        str(inputs["audit.json"]),
        "--model", str(tmp_path / "model.ckpt"), "--run", str(tmp_path / "run.json"),
        "--implementation", run["implementation"], "--params", json.dumps(run["params"]), "--seed", str(run["seed"]),
        "--device", run["device"], "--threads", str(run["threads"]),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": str(run["threads"])}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "run.json").read_text())
    assert again["history"] == run["history"]
    circumstances = ("seconds", "cpu_seconds", "peak_memory_mb", "provenance")
    assert {key: value for key, value in again.items() if key not in circumstances} == {
        key: value for key, value in run.items() if key not in circumstances
    }
