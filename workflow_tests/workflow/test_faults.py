"""Whatever goes wrong, nothing finished is lost, nothing partial is taken for whole, and the user reads one message.

Downloads that go wrong are in download/test_download.py, input that is none in screens/test_any_input.py. The long
form of the kills is benchmarks/kills.py.
"""

import contextlib
import os
import pickle
import random
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import Prepared, run_snakemake
from fault_server import Host, serving
from faults import (
    STEPS,
    Running,
    assert_one_message,
    configuration,
    drawn,
    finish,
    finished_files,
    leftovers,
    make_folder,
    screen_bytes,
    undergo,
)
from learned import COMBINATION, registered

from perturbflow import predict as prediction
from perturbflow.errors import InputError
from perturbflow.io.artefacts import load_artefact, save_artefact
from perturbflow.io.files import atomic, require_writable, write_json
from perturbflow.models.training import batches
from perturbflow.train import train

PAIRS = "results/mine/unseen_combination/pairs.h5ad"


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    """Yield a host that serves the small screen slowly enough to be interrupted."""
    with serving(screen_bytes()) as running:
        running.pace = 0.03
        yield running


@dataclass(frozen=True)
class Undisturbed:
    """A run to which nothing happened."""

    folder: Path
    files: dict[str, str]
    jobs: Counter


@pytest.fixture(scope="module")
def undisturbed(host: Host, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    """Return an undisturbed run of a baseline and a training."""
    folder = make_folder(tmp_path_factory.mktemp("undisturbed"), host)
    jobs = finish(folder)
    return Undisturbed(folder, finished_files(folder), jobs)


def copied(undisturbed: Undisturbed, folder: Path, *left_out: str) -> Path:
    """Return a copy of the undisturbed run without some of its folders."""
    return Path(
        shutil.copytree(undisturbed.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*left_out))
    )


# --- killed ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kills_at_every_step_leave_the_results_of_an_undisturbed_run(
    host: Host, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    n_per_step = {"download": 1, "harmonize": 1, "train": 2, "predict": 1, "evaluate": 1}
    kills = drawn(random.Random(3), undisturbed.folder, n_per_step, latest=0.4)
    ordeal = undergo(make_folder(tmp_path / "here", host), kills, undisturbed.files)
    assert len(ordeal.kills) >= 5
    assert {kill.victim for kill in ordeal.kills} >= {"all", "snakemake"}
    assert {rule for kill in ordeal.kills for rule in kill.met} >= {STEPS["download"], STEPS["train"]}
    assert not ordeal.spoilt, "partial or wrong under a final name"
    assert ordeal.jobs <= undisturbed.jobs, "a finished job was run again"
    assert finished_files(tmp_path / "here") == undisturbed.files
    assert not [name for name in leftovers(tmp_path / "here") if name.endswith((".h5ad", ".part"))]


@pytest.mark.slow
def test_after_a_kill_one_message_leads_on(host: Host, undisturbed: Undisturbed, tmp_path: Path) -> None:
    folder, target = make_folder(tmp_path / "here", host), "results/mine/harmonized.h5ad"
    running = Running(folder, target)
    while not [*folder.glob(".snakemake/incomplete/*")]:
        assert running.process.poll() is None, running.text
        time.sleep(0.02)
    running.kill("all")
    # As if it had been killed between two outputs of one job.
    (folder / target).parent.mkdir(parents=True, exist_ok=True)
    (folder / target).write_text("half")
    assert_one_message(
        run_snakemake(folder, target, "--configfile", "mine.yaml"), "It can be removed with the --unlock argument"
    )
    assert (folder / target).read_text() == "half"
    finish(folder, target)
    assert finished_files(folder)[target] == undisturbed.files[target]


# --- two at once ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_run_in_one_folder_says_so_and_harms_nothing(
    host: Host, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    folder, target = make_folder(tmp_path / "here", host), "resources/fetched/raw/manifest.json"
    pace, host.pace = host.pace, 5  # the first run is under way for as long as the second one takes to start
    first = Running(folder, target)
    first.wait_for("download")
    second = run_snakemake(folder, target, "--configfile", "mine.yaml")
    host.pace = pace
    assert_one_message(second, "Directory cannot be locked")
    assert first.process.wait(timeout=120) == 0, first.text
    assert finished_files(folder) == {
        name: content for name, content in undisturbed.files.items() if name.startswith("resources/")
    }


# --- no network, and files that changed -----------------------------------------------------------------------------


@pytest.mark.slow
def test_what_was_downloaded_needs_no_network_again_and_is_not_taken_changed(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    folder, target = copied(undisturbed, tmp_path / "here", "results"), "results/fetched/harmonized.h5ad"
    config = configuration("http://127.0.0.1:9/screen.h5ad", (folder / "screen.h5ad").read_bytes())
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    done = run_snakemake(folder, target, "--configfile", "mine.yaml")
    assert done.returncode == 0, done.text
    assert done.jobs == {"harmonize": 1}
    assert finished_files(folder)[target] == undisturbed.files[target]

    raw = folder / "resources/fetched/raw/screen.h5ad"
    (folder / target).unlink()
    with h5py.File(raw, "r+") as file:
        file["X/data"][0] += 1
    failed = run_snakemake(folder, target, "--configfile", "mine.yaml")
    assert_one_message(
        failed, f"{raw.relative_to(folder)} was changed after its download", "raw/manifest.json and run again."
    )
    assert not (folder / target).exists()


def test_another_file_of_the_user_is_noticed_and_its_own_results_are_made(
    undisturbed: Undisturbed, tmp_path: Path
) -> None:
    folder, target = copied(undisturbed, tmp_path / "here"), "results/mine/harmonized.h5ad"
    with h5py.File(folder / "screen.h5ad", "r+") as file:
        file["X/data"][0] += 1
    outcome = run_snakemake(folder, target, "--configfile", "mine.yaml")
    assert outcome.returncode == 0, outcome.text
    assert outcome.jobs == {"harmonize": 1}
    expected = ad.read_h5ad(undisturbed.folder / target).X.sum() + 1
    assert ad.read_h5ad(folder / target).X.sum() == expected


# --- full disks and folders that cannot be written to ---------------------------------------------------------------


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[None]:
    """Mount something over a folder; skip where one may not."""
    folder.mkdir(parents=True, exist_ok=True)
    done = (
        subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False)
        if shutil.which("mount")
        else None
    )
    if done is None or done.returncode:
        pytest.skip("mounting needs root and its capabilities")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    """Change what a mounted folder is like."""
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def fill(folder: Path, room: int) -> None:
    """Leave so many bytes on a disk."""
    (folder / "stuffing").write_bytes(bytes(shutil.disk_usage(folder).free - room))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a folder on a disk of half a megabyte."""
    with mounted(tmp_path / "disk", "-t", "tmpfs", "-o", "size=512k", "tmpfs"):
        yield tmp_path / "disk"


@pytest.mark.slow
def test_a_full_disk_is_one_message_and_with_more_room_the_run_goes_on(
    host: Host, undisturbed: Undisturbed, small_disk: Path
) -> None:
    remount(small_disk, "size=8m")
    folder, target = make_folder(small_disk, host), "results/fetched/unseen_combination/additive/seed_0/metrics.tsv"
    for step, room in (("download", 250_000), ("harmonize", 600_000), ("harmonize", 300_000)):
        fill(folder, room)
        outcome = run_snakemake(
            folder, target, "--configfile", "mine.yaml", environment={"XDG_CACHE_HOME": str(small_disk.parent)}
        )
        (folder / "stuffing").unlink()
        assert f"Error in rule {step}:" in outcome.text, outcome.text
        told = ("no space left for", "the disk is full", "will take about")
        assert any(words in outcome.text for words in told), outcome.text
        assert "Traceback" not in outcome.text, outcome.text
        found = finished_files(folder)
        assert found == {name: undisturbed.files[name] for name in found}
    finish(folder, target)
    found = finished_files(folder)
    assert found == {name: undisturbed.files[name] for name in found}


def write_npz(path: Path) -> None:
    save_artefact(path, {"a": np.random.default_rng(0).normal(size=60_000)})


def write_h5ad(path: Path) -> None:
    X = np.random.default_rng(0).normal(size=(300, 200)).astype(np.float32)
    with atomic(path) as partial:
        ad.AnnData(X).write_h5ad(partial)


def write_parquet(path: Path) -> None:
    with atomic(path) as partial:
        pd.DataFrame({"a": np.random.default_rng(0).normal(size=60_000)}).to_parquet(partial)


WRITERS = {
    "model.npz": write_npz,
    "model.ckpt": lambda path: save_artefact(path, {"a": torch.zeros(60_000)}),
    "pairs.h5ad": write_h5ad,
    "embeddings.parquet": write_parquet,
    "run.json": lambda path: write_json(path, {"a": ["text"] * 30_000}),
}


@pytest.mark.parametrize("room", [0, 4096, 100_000])
@pytest.mark.parametrize("name", WRITERS)
def test_what_does_not_fit_is_named_and_leaves_nothing(name: str, room: int, small_disk: Path) -> None:
    fill(small_disk, room)
    with pytest.raises(InputError, match=rf"no space left for {name} \([\d,]+ bytes are free\)\. Free some"):
        WRITERS[name](small_disk / name)
    assert [path.name for path in small_disk.iterdir()] == ["stuffing"]
    remount(small_disk, "size=8m")
    WRITERS[name](small_disk / name)
    assert (small_disk / name).is_file()


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Make a folder one that cannot be written to, even by root."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid():
        folder.chmod(0o555)
        try:
            yield
        finally:
            folder.chmod(0o755)
    else:
        with mounted(folder, "--bind", str(folder)):
            remount(folder, "ro,bind")
            yield


@pytest.mark.parametrize("place", [".", "results", "results/mine/unseen_combination", "logs", "resources"])
def test_a_read_only_folder_is_one_message(place: str, host: Host, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "here", host)
    (folder / place).mkdir(parents=True, exist_ok=True)
    with read_only(folder / place):
        outcome = run_snakemake(folder, "--configfile", "mine.yaml", environment={"XDG_CACHE_HOME": str(tmp_path)})
    assert_one_message(outcome, f"{(folder / place).resolve()} cannot be written to. Make it writable")
    assert not finished_files(folder)


def test_an_output_in_a_read_only_folder_is_named(tmp_path: Path) -> None:
    with read_only(tmp_path / "results"):
        with pytest.raises(
            InputError, match=r"run\.json cannot be written: (Read-only file system|Permission denied)\. Make"
        ):
            write_json(tmp_path / "results" / "mine" / "run.json", {})
        with pytest.raises(InputError, match="results cannot be written to"):
            require_writable([tmp_path, tmp_path / "results" / "mine"])


# --- damaged checkpoints and models ---------------------------------------------------------------------------------


class Payload:
    """Runs a command where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for place in np.linspace(0.1, 0.9, 40) * len(content):
        content[int(place)] ^= 16
    path.write_bytes(content)


def malicious(path: Path) -> None:
    torch.save({"state_dict": Payload(path.with_name("executed"))}, path)


DAMAGES = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "last bytes missing": lambda path: path.write_bytes(path.read_bytes()[:-10]),
    "bits flipped": flipped,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("a web page, say"),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Payload(path.with_name("executed")))),
    "a payload in a checkpoint": malicious,
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_told_and_training_starts_anew(
    damage: str,
    prepared: dict[str, Prepared],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(batches, "STEPS_PER_EPOCH", 5)
    files, params = prepared[COMBINATION], {"n_steps": 20, "batch_size": 16, "n_latent": 8}
    implementation, params = registered("counterfactual", **params)

    def trained(folder: Path) -> dict:
        outputs = folder / "model.ckpt", folder / "run.json"
        train(files.pairs, files.embeddings, files.audit, *outputs, implementation, params, 0, "cpu")
        return load_artefact(outputs[0])["state"]

    whole = trained(tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr("perturbflow.train.save_artefact", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "cut")
    (last,) = (tmp_path / "cut").rglob("last.ckpt")
    DAMAGES[damage](last)
    anew = trained(tmp_path / "cut")
    assert f"{last} is damaged (" in caplog.text
    assert not list(tmp_path.rglob("executed"))
    for name, value in whole.items():
        torch.testing.assert_close(anew[name], value, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.npz", "model.ckpt"])
def test_a_damaged_model_is_told_and_no_code_in_it_is_run(
    name: str, damage: str, prepared: dict[str, Prepared], tmp_path: Path
) -> None:
    save_artefact(
        tmp_path / name,
        {"effects": np.random.default_rng(0).normal(size=2000)} if ".npz" in name else {"a": torch.ones(2000)},
    )
    DAMAGES[damage](tmp_path / name)
    target = tmp_path / "predictions.h5ad"
    with pytest.raises(InputError, match=rf"{name} is damaged and cannot be loaded .*Delete it and run again"):
        prediction.predict(prepared[COMBINATION].pairs, tmp_path / name, target, *registered("additive"), 0, 10)
    assert {path.name for path in tmp_path.iterdir()} == {name}
