"""How the learned families are trained: resuming, batches drawn ahead, devices; each against the plain training."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import REPOSITORY
from encoders import exported
from learned import COMBINATION, QUICK, make_pairs_of_cells, registered, trained

from perturbflow.embeddings import Embeddings
from perturbflow.errors import InputError
from perturbflow.models import counterfactual
from perturbflow.models.base import Run, build
from perturbflow.models.gaussian_process import set_gp
from perturbflow.models.training import batches, devices, loop
from perturbflow.models.training.learner import Learner, Optimization
from perturbflow.pairs import Pairs
from perturbflow.registry.families import CounterfactualParams

FOLDERS = {
    "autoencoder": "autoencoder",
    "jepa stage_a": "stage_a",
    "jepa stage_c": "stage_c",
}  # of checkpoints, by what is trained first


# --- resuming -------------------------------------------------------------------------------------------------------


@pytest.fixture
def short_epochs(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(batches, "STEPS_PER_EPOCH", 5)
    return


@pytest.mark.slow
@pytest.mark.usefixtures("short_epochs")
@pytest.mark.parametrize(
    ("name", "stage"), [("scppdm", "autoencoder"), ("scppdm", "diffusion"), ("scppdm_hybrid", "diffusion"),
                        ("jepa", "jepa stage_a"),
                        ("jepa", "jepa stage_c"), ("jepa", "jepa"), ("counterfactual", "counterfactual"),
                        ("external", "autoencoder")],
)  # fmt: skip
def test_resumed_training_equals_uninterrupted(
    name: str, stage: str, screen: tuple[Pairs, Embeddings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"n_steps": 30, "batch_size": 16, "n_latent": 8}
    if name == "external":
        name, short["latent"] = "scppdm", {"file": str(exported(tmp_path / "encoder.pt2", screen[0].genes))}
    if name == "jepa":
        short |= {"n_steps_representation": 30, "n_steps_decoder": 30, "when_broken": "report"}
        monkeypatch.setattr(set_gp, "LEAST_HELD_OUT", 2)
    _, whole, run = trained(name, *screen, tmp_path / "whole", **short)

    class Cut(Exception):
        pass

    def cut(self: loop._History, trainer: object, pl_module: object) -> None:
        if self.name == stage and trainer.global_step == 15:
            raise Cut

    with monkeypatch.context() as patched:
        patched.setattr(loop._History, "on_train_epoch_start", cut, raising=False)
        with pytest.raises(Cut):
            trained(name, *screen, tmp_path / "cut", **short)
    folder = tmp_path / "cut" / "checkpoints" / FOLDERS.get(stage, "")
    assert (folder / "test" / "last.ckpt").exists()
    _, resumed, resumed_run = trained(name, *screen, tmp_path / "cut", **short)
    for part in ("latent", "state"):
        for key, value in whole[part].items():
            torch.testing.assert_close(resumed[part][key], value, rtol=0, atol=0, msg=key)
    assert resumed_run.history == run.history
    assert resumed_run.facts == run.facts


# --- steps -----------------------------------------------------------------------------------------------------------


def test_batches_are_drawn_ahead_in_their_order_and_no_thread_is_left() -> None:
    class Numbers:
        drawn: ClassVar[list[int]] = []

        def batch(self, size: int, seed: tuple[int, ...]) -> int:
            if seed[0] == 3:
                raise ValueError("no fourth")
            self.drawn.append(seed[0])
            return size * seed[0]

    before = threading.active_count()
    assert list(batches.sampled_ahead(Numbers(), 10, [])) == []
    assert list(batches.sampled_ahead(Numbers(), 10, [(2,), (0,), (1,)])) == [20, 0, 10]
    assert threading.active_count() == before
    broken = batches.sampled_ahead(Numbers(), 10, [(1,), (3,), (2,)])
    assert next(broken) == 10
    with pytest.raises(ValueError, match="no fourth"):
        next(broken)
    Numbers.drawn.clear()
    cut = batches.sampled_ahead(Numbers(), 10, ((i,) for i in (0, 1, 2, 4, 5, 6)))
    next(cut)
    cut.close()
    assert Numbers.drawn == [0, 1]
    assert threading.active_count() == before


def test_brief_trainings_take_the_same_steps(screen: tuple[Pairs, Embeddings], tmp_path: Path) -> None:
    cells, _, conditions = make_pairs_of_cells(screen, cells_together=8)
    identity = np.eye(cells.z.shape[1])
    latent = counterfactual.StateSpace(
        np.zeros(len(identity)), identity, np.ones(len(identity)), identity, np.full(len(identity), 0.5)
    )

    def learner() -> Learner:
        torch.manual_seed(0)
        net = counterfactual.Velocity(
            latent, conditions, CounterfactualParams(width=16, n_layers=1, dropout=0.1, bridge_noise=0.1)
        )
        return Learner(net, 3, 30, Optimization(0.01, 0.01, 0.9))

    whole = learner()
    whole.optimize(batches.Batches(cells, None, 32, 3), Run(seed=3, checkpoints=tmp_path, identity="test"), "whole")
    brief = learner().optimize_briefly(cells, 32)
    for name, value in whole.average.module.state_dict().items():
        torch.testing.assert_close(brief.state_dict()[name], value, atol=1e-6, rtol=1e-4, msg=name)


def test_a_prediction_needs_no_lightning() -> None:
    """Its import takes longer than most predictions."""
    code = (
        "import sys, perturbflow.predict, perturbflow.counterfactuals.warranty; "
        "from perturbflow.models import counterfactual, jepa, scppdm; print('pytorch_lightning' in sys.modules)"
    )
    env = {**os.environ, "PYTHONPATH": str(REPOSITORY / "scripts")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("has_accelerator", [False, True])
def test_a_step_is_seeded_as_torch_would_without_a_word_to_devices_that_are_not_there(
    has_accelerator: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", told.append)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: has_accelerator)
    Learner(torch.nn.Linear(1, 1), 3, 100, Optimization(0.01, 0.01, 0.9)).before_step(30)
    drawn, seed = torch.rand(5), 3 * 1_000_003 + 30
    assert told == [seed] * has_accelerator
    torch.manual_seed(seed)
    assert torch.equal(torch.rand(5), drawn)


# --- jobs that end early ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_training_in_a_batch_job_does_not_put_the_job_into_the_queue_again(
    screen: tuple[Pairs, Embeddings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lightning would, at SIGUSR1: beside Snakemake, which has its own idea of what a job's end means."""
    for name, value in {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NAME": "wrap",
        "SLURM_NTASKS": "1",
        "SLURM_PROCID": "0",
    }.items():
        monkeypatch.setenv(name, value)
    handled, register = set(), signal.signal

    def registered_and_noted(number: int, handler: object) -> object:
        if callable(handler):
            handled.add(number)
        return register(number, handler)

    monkeypatch.setattr(signal, "signal", registered_and_noted)
    trained("counterfactual", *screen, tmp_path, **{**QUICK, "n_steps": 10})
    assert signal.SIGTERM in handled
    assert signal.SIGUSR1 not in handled


@pytest.mark.slow
def test_a_cancelled_training_resumes_where_it_was(prepared_copy: Callable, tmp_path: Path) -> None:
    """One that was killed: workflow/test_faults.py."""
    files = prepared_copy(COMBINATION)
    implementation, params = registered("counterfactual", n_steps=300, batch_size=32, n_latent=8)
    outputs = ["--model", str(tmp_path / "model.ckpt"), "--run", str(tmp_path / "run.json")]
    (tmp_path / "audit.json").write_text('{"split_sha256": ""}')
    command = [
        sys.executable, str(REPOSITORY / "scripts/train.py"), "--pairs", str(files.pairs), "--embeddings",
        str(files.embeddings),
        "--audit", str(tmp_path / "audit.json"), *outputs, "--implementation", implementation,
        "--params", json.dumps(params), "--seed", "0", "--device", "cpu",
    ]  # fmt: skip
    job = subprocess.Popen(command, stderr=subprocess.PIPE, start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("last.ckpt")):
        assert time.monotonic() < deadline, "no checkpoint in two minutes"
        assert job.poll() is None, job.stderr.read().decode()
        time.sleep(0.05)
    os.killpg(job.pid, signal.SIGTERM)
    said = job.communicate()[1].decode()
    assert job.returncode
    assert "the next attempt resumes from the last checkpoint" in said
    assert "Traceback" not in said
    assert not (tmp_path / "model.ckpt").exists()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr
    history = json.loads((tmp_path / "run.json").read_text())["history"]
    assert [row["step"] for row in history] == [100, 200, 300]
    assert not list(tmp_path.rglob("last.ckpt"))


# --- devices ---------------------------------------------------------------------------


def test_a_logger_gets_the_history_and_one_that_is_not_installed_is_named(
    screen: tuple[Pairs, Embeddings], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    implementation, params = registered("counterfactual", **{**QUICK, "n_steps": 20})
    cells = screen[0].roles("train", "validation")
    run = Run(0, checkpoints=tmp_path / "checkpoints", identity="test", logger="csv")
    build(implementation, params).fit(cells, screen[1], run)
    (file,) = (tmp_path / "logger").rglob("metrics.csv")
    logged = pd.read_csv(file)
    assert list(logged["step"]) == [row["step"] for row in run.history]
    np.testing.assert_allclose(logged["loss"], [row["loss"] for row in run.history])

    class Absent:
        def __init__(self, **places: object) -> None:
            raise ModuleNotFoundError("no tensorboard")

    monkeypatch.setitem(loop.LOGGERS, "tensorboard", Absent)
    with pytest.raises(InputError, match=r"logger: tensorboard needs .*pip install tensorboard"):
        build(implementation, params).fit(cells, screen[1], Run(0, checkpoints=tmp_path / "c", logger="tensorboard"))


def test_a_device_that_is_not_there_is_named() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match="device: 'cuda' is configured but not available"):
        devices.accelerator("cuda")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")
def test_training_on_a_gpu_gives_a_model_that_predicts_on_cpu(screen: tuple[Pairs, Embeddings], tmp_path: Path) -> None:
    implementation, params = registered("scppdm", n_steps=100, batch_size=16, n_latent=8)
    model = build(implementation, params)
    run = Run(seed=0, device="cuda", checkpoints=tmp_path, identity="gpu")
    model.fit(screen[0].roles("train", "validation"), screen[1], run)
    assert run.facts["device"].startswith("cuda")
    assert np.isfinite(model.predict(screen[0].X[:5].toarray(), ["TF1"], 5, 0)).all()
