"""Several devices: two processes that share every batch train what one trains, and only the first of them writes."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, Prepared
from test_models import registered

from perturbflow.errors import InputError
from perturbflow.models.base import Run
from perturbflow.models.latents.vae import Cells
from perturbflow.models.training import devices
from perturbflow.models.training.batches import Batch
from perturbflow.models.training.devices import placement

COMBINATION = "unseen_combination"
# Of a validation loss, on this small screen: each process draws noise of its own.
TOLERANCE = 0.15


def environment(**variables: object) -> dict[str, str]:
    """Return the environment of a process that nothing else has started for several devices."""
    foreign = ("SLURM", "LOCAL_RANK", "MASTER_", "NODE_RANK", "WORLD_SIZE")
    own = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    path = f"{REPOSITORY / 'scripts'}{os.pathsep}{REPOSITORY / 'workflow_tests'}"
    return {
        **own,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": "1",
        **{name: str(value) for name, value in variables.items()},
    }


def command_of_training(files: Prepared, folder: Path, model: str, n_devices: int, **params: object) -> list[str]:
    """Return the command that trains one model by hand."""
    folder.mkdir(exist_ok=True)
    (folder / "audit.json").write_text('{"split_sha256": ""}')
    implementation, all_params = registered(model, batch_size=64, n_latent=8, **params)
    return [
        sys.executable, str(REPOSITORY / "scripts/train.py"), "--pairs", str(files.pairs), "--embeddings", str(files.embeddings),
        "--audit", str(folder / "audit.json"), "--model", str(folder / "model.ckpt"), "--run", str(folder / "run.json"),
        "--implementation", implementation, "--params", json.dumps(all_params), "--seed", "0", "--device", "cpu",
        "--devices", str(n_devices), "--scored", "validation",
    ]  # fmt: skip


def trained(files: Prepared, folder: Path, model: str, n_devices: int, **params: object) -> tuple[dict, str]:
    """Return run.json of a training by hand, and what it said."""
    command = command_of_training(files, folder, model, n_devices, **params)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "run.json").read_text()), done.stderr


# --- one batch, shared ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3])
def test_parts_of_a_batch_are_the_batch(n: int) -> None:
    torch.manual_seed(0)
    batch = Batch(torch.randn(8, 3), torch.randn(8, 3), torch.randint(0, 5, (8, 2)), torch.arange(8))
    cells = Cells(torch.randn(8, 3), torch.randn(8, 3), torch.randn(8, 1))
    for whole, names in ((batch, ("start", "target", "genes", "group")), (cells, ("x", "k", "unit"))):
        parts = [whole.part(i, n) for i in range(n)]
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
        for name in names:
            torch.testing.assert_close(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))


# The launcher starts a script again for every further device, so this one is a file.
REGRESSION = '''
import sys
from pathlib import Path

import torch
from torch import nn

from perturbflow.models.base import Run
from perturbflow.models.training.batches import Batch, Batches
from perturbflow.models.training.loop import Learner, Optimization, optimize


class Cells:
    """A linear response without noise."""

    def batch(self, size, seed):
        start = torch.randn(size, 4, generator=torch.Generator().manual_seed(hash(seed) % 2**32))
        return Batch(start, start @ torch.arange(16.0).reshape(4, 4), torch.zeros(size, 2, dtype=int), torch.zeros(size, dtype=int))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)
        self.noise = []

    def losses(self, batch):
        self.noise.append(torch.rand(()).item())
        return {"loss": (self.layer(batch.start) - batch.target).square().mean()}


folder, n_devices, n_steps = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch.manual_seed(0)
network = Network()
learner = Learner(network, 0, n_steps, Optimization(0.01, 0.0, 0.9))
run = Run(seed=0, devices=n_devices, checkpoints=folder / "checkpoints", identity="regression")
optimize(learner, Batches(Cells(), Cells(), 32, 0), run, "regression")
rank = learner.global_rank
torch.save({"weight": network.layer.weight, "average": learner.average.module.layer.weight, "noise": network.noise[0],
            "history": run.history, "is_first_process": run.is_first_process}, folder / f"of_{rank}.pt")
'''  # fmt: skip


def regressions(folder: Path, n_devices: int, n_steps: int = 200) -> list[dict]:
    """Return what every process of a regression without noise has in the end."""
    folder.mkdir()
    (folder / "regression.py").write_text(REGRESSION)
    command = [sys.executable, str(folder / "regression.py"), str(folder), str(n_devices), str(n_steps)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=environment(PYTHONHASHSEED=0), check=False
    )
    assert done.returncode == 0, done.stderr
    paths = [folder / f"of_{rank}.pt" for rank in range(n_devices)]
    deadline = time.monotonic() + 30
    while not all(path.exists() for path in paths):  # the first process does not wait for the others
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(0.5)
    return [torch.load(path, weights_only=True) for path in paths]


def test_two_processes_take_the_steps_of_one(tmp_path: Path) -> None:
    (alone,) = regressions(tmp_path / "alone", 1)
    first, second = regressions(tmp_path / "together", 2)
    for name in ("weight", "average"):
        torch.testing.assert_close(first[name], second[name], atol=0, rtol=0)
        torch.testing.assert_close(first[name], alone[name], atol=1e-5, rtol=1e-5)
    for row, other in zip(first["history"], alone["history"], strict=True):
        assert row == pytest.approx(other, rel=1e-4)
    assert first["noise"] == alone["noise"]
    assert first["noise"] != second["noise"]
    assert [first["is_first_process"], second["is_first_process"]] == [True, False]


# --- whole models ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_same_seed_gives_the_same_validation_curve_within_the_tolerance(
    prepared: dict[str, Prepared], tmp_path: Path
) -> None:
    files = prepared[COMBINATION]
    alone, _ = trained(files, tmp_path / "alone", "scppdm", 1, n_steps=300)
    together, said = trained(files, tmp_path / "together", "scppdm", 2, n_steps=300)
    assert (alone["n_devices"], together["n_devices"]) == (1, 2)
    curves = [np.array([row["validation_loss"] for row in run["history"]]) for run in (alone, together)]
    np.testing.assert_allclose(curves[1], curves[0], rtol=TOLERANCE)
    assert curves[1][-1] < curves[1][0]
    assert said.count("diffusion: step 300 of 300") == 1
    assert sorted(path.name for path in (tmp_path / "together").iterdir()) == [
        ".made",
        "audit.json",
        "model.ckpt",
        "run.json",
    ]


@pytest.mark.slow
def test_all_stages_of_a_jepa_are_shared(prepared: dict[str, Prepared], tmp_path: Path) -> None:
    steps = dict.fromkeys(("n_steps", "n_steps_representation", "n_steps_decoder"), 100)
    run, said = trained(prepared[COMBINATION], tmp_path / "jepa", "jepa", 2, **steps, when_broken="report")
    assert run["n_devices"] == 2
    for stage in ("jepa stage_a", "jepa stage_c", "jepa"):
        assert said.count(f"{stage}: step 100 of 100") == 1


@pytest.mark.slow
def test_a_killed_training_leaves_no_process_behind_and_goes_on(prepared: dict[str, Prepared], tmp_path: Path) -> None:
    command = command_of_training(prepared[COMBINATION], tmp_path, "counterfactual", 2, n_steps=400)
    job = subprocess.Popen(command, stderr=subprocess.PIPE, env=environment(), start_new_session=True)
    deadline = time.monotonic() + 120
    while not list(tmp_path.rglob("last.ckpt")):
        assert time.monotonic() < deadline, "no checkpoint in two minutes"
        assert job.poll() is None, job.stderr.read().decode()
        time.sleep(0.05)
    job.send_signal(signal.SIGKILL)  # the first process alone: the second is to notice
    job.wait()
    while running(str(tmp_path)):
        assert time.monotonic() < deadline, "the second process is still there"
        time.sleep(0.2)
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert "resuming from" in done.stderr
    assert [row["step"] for row in json.loads((tmp_path / "run.json").read_text())["history"]] == [100, 200, 300, 400]


def running(argument: str) -> list[str]:
    """Return the numbers of processes that have this in an argument and are no zombies."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments, status = (process / "cmdline").read_text(), (process / "status").read_text()
        except OSError:  # gone meanwhile
            continue
        if argument in arguments and "State:\tZ" not in status:
            found.append(process.name)
    return found


# --- what a job was given -------------------------------------------------------------------------------------------


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_two_tasks_of_a_job_step_train_together(tmp_path: Path) -> None:
    """As `srun --nodes 2 --ntasks-per-node 1` starts them."""
    (tmp_path / "regression.py").write_text(REGRESSION)
    step = {"SLURM_JOB_ID": 7, "SLURM_STEP_NUM_TASKS": 2, "SLURM_STEP_NUM_NODES": 2, "SLURM_NTASKS": 2, "SLURM_NTASKS_PER_NODE": 1, "SLURM_NNODES": 2,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "PYTHONHASHSEED": 0}  # fmt: skip
    command = [sys.executable, str(tmp_path / "regression.py"), str(tmp_path), "1", "100"]
    tasks = [
        subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**step, SLURM_PROCID=rank, SLURM_NODEID=rank, SLURM_LOCALID=0),
        )
        for rank in range(2)
    ]
    for task in tasks:
        _, said = task.communicate(timeout=300)
        assert task.returncode == 0, said
    first, second = (torch.load(tmp_path / f"of_{rank}.pt", weights_only=True) for rank in range(2))
    torch.testing.assert_close(first["weight"], second["weight"], atol=0, rtol=0)
    assert first["noise"] != second["noise"]


def test_a_job_with_one_task_on_slurm_starts_its_own_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_NTASKS", "1")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")
    where, environment = placement(Run(seed=0, devices=2))
    assert (where["devices"], where["num_nodes"]) == (2, 1)
    assert not environment.creates_processes_externally


def test_gpus_that_are_not_there_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(devices.torch.cuda, "device_count", lambda: 1)
    assert placement(Run(seed=0, device="auto", devices=1))[0]["accelerator"] == "cuda"
    with pytest.raises(InputError, match=r"2 GPUs are asked for \(resource gpu\), and 1 can be seen here"):
        placement(Run(seed=0, device="cuda", devices=2))
