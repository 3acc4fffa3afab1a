"""Whatever goes wrong, nothing finished is lost, nothing partial is taken for whole, and the user reads one message.

Downloads that go wrong are in test_download.py. The long form of the kills is benchmarks/kills.py.
"""

import contextlib
import datetime
import os
import pickle
import random
import shutil
import subprocess
import tarfile
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from conftest import OFF, Outcome, Prepared, closed_forms_config, dataset_block, make_screen, merged, run_snakemake
from fault_server import Host, serving
from faults import STEPS, Running, configuration, drawn, finish, finished_files, leftovers, make_folder, screen_bytes, undergo
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from snakemake.common.configfile import load_configfile
from test_models import COMBINATION, registered

from perturbflow import harmonize, prediction
from perturbflow.annotation import canonical_labels
from perturbflow.artefacts import load_artefact, save_artefact
from perturbflow.errors import InputError
from perturbflow.files import atomic, require_writable, write_json
from perturbflow.models import batches
from perturbflow.registry import Plan
from perturbflow.sources import open_source
from perturbflow.symbols import CONTROL, members_of
from perturbflow.training import train

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
    return Path(shutil.copytree(undisturbed.folder, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*left_out)))


def assert_one_message(outcome: Outcome, *parts: str) -> None:
    """Hold a failed run to a message, told once, without a traceback."""
    assert outcome.returncode != 0
    for part in parts:
        assert outcome.text.count(part) == 1, outcome.text
    assert "Traceback" not in outcome.text, outcome.text


# --- killed ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_kills_at_every_step_leave_the_results_of_an_undisturbed_run(host: Host, undisturbed: Undisturbed, tmp_path: Path) -> None:
    n_per_step = {"download": 2, "harmonize": 1, "train": 2, "predict": 1, "evaluate": 1}
    kills = drawn(random.Random(3), undisturbed.folder, n_per_step, latest=0.4)
    ordeal = undergo(make_folder(tmp_path / "here", host), kills, undisturbed.files)
    assert len(ordeal.kills) >= 5
    assert {kill.victim for kill in ordeal.kills} >= {"all", "snakemake"}
    assert {rule for kill in ordeal.kills for rule in kill.met} >= {STEPS["download"], STEPS["train"]}
    assert not ordeal.spoilt, "partial or wrong under a final name"
    assert ordeal.jobs <= undisturbed.jobs, "a finished job was run again"
    assert finished_files(tmp_path / "here") == undisturbed.files
    assert not [name for name in leftovers(tmp_path / "here") if name.endswith((".h5ad", ".part"))]


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
    assert_one_message(run_snakemake(folder, target, "--configfile", "mine.yaml"), "It can be removed with the --unlock argument")
    assert (folder / target).read_text() == "half"
    finish(folder, target)
    assert finished_files(folder)[target] == undisturbed.files[target]


# --- two at once ----------------------------------------------------------------------------------------------------


def test_a_second_run_in_one_folder_says_so_and_harms_nothing(host: Host, undisturbed: Undisturbed, tmp_path: Path) -> None:
    folder, target = make_folder(tmp_path / "here", host), "resources/fetched/raw/manifest.json"
    first = Running(folder, target)
    first.wait_for("download")
    assert_one_message(run_snakemake(folder, target, "--configfile", "mine.yaml"), "Directory cannot be locked")
    assert first.process.wait(timeout=120) == 0, first.text
    assert finished_files(folder) == {name: content for name, content in undisturbed.files.items() if name.startswith("resources/")}


# --- no network, and files that changed -----------------------------------------------------------------------------


def test_what_was_downloaded_needs_no_network_again_and_is_not_taken_changed(undisturbed: Undisturbed, tmp_path: Path) -> None:
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
    assert_one_message(failed, f"{raw.relative_to(folder)} was changed after its download", "raw/manifest.json and run again.")
    assert not (folder / target).exists()


def test_another_file_of_the_user_is_noticed_and_its_own_results_are_made(undisturbed: Undisturbed, tmp_path: Path) -> None:
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
    done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True, check=False) if shutil.which("mount") else None
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
def test_a_full_disk_is_one_message_and_with_more_room_the_run_goes_on(host: Host, undisturbed: Undisturbed, small_disk: Path) -> None:
    remount(small_disk, "size=8m")
    folder, target = make_folder(small_disk, host), "results/fetched/unseen_combination/additive/seed_0/metrics.tsv"
    for step, room in (("download", 250_000), ("harmonize", 600_000), ("harmonize", 300_000)):
        fill(folder, room)
        outcome = run_snakemake(folder, target, "--configfile", "mine.yaml", environment={"XDG_CACHE_HOME": str(small_disk.parent)})
        (folder / "stuffing").unlink()
        assert f"Error in rule {step}:" in outcome.text, outcome.text
        assert "no space left for" in outcome.text or "the disk is full" in outcome.text, outcome.text
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
        with pytest.raises(InputError, match=r"run\.json cannot be written: (Read-only file system|Permission denied)\. Make"):
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


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_told_and_training_starts_anew(
    damage: str, prepared: dict[str, Prepared], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
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
        patched.setattr("perturbflow.training.save_artefact", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
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
def test_a_damaged_model_is_told_and_no_code_in_it_is_run(name: str, damage: str, prepared: dict[str, Prepared], tmp_path: Path) -> None:
    save_artefact(tmp_path / name, {"effects": np.random.default_rng(0).normal(size=2000)} if ".npz" in name else {"a": torch.ones(2000)})
    DAMAGES[damage](tmp_path / name)
    target = tmp_path / "predictions.h5ad"
    with pytest.raises(InputError, match=rf"{name} is damaged and cannot be loaded .*Delete it and run again"):
        prediction.predict(prepared[COMBINATION].pairs, tmp_path / name, target, *registered("additive"), 0, 10)
    assert {path.name for path in tmp_path.iterdir()} == {name}


# --- what a user hands over is not executed and leads nowhere -------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('!!python/object/apply:os.system ["touch executed"]', "not valid JSON or YAML"),
        ("!!python/object/new:os.system [touch executed]", "not valid JSON or YAML"),
        ("!!python/name:os.system", "holds more than plain YAML"),
        ("!!python/tuple [1, 2]", "holds more than plain YAML"),
    ],
)
def test_a_configuration_is_no_program(value: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"select: {value}\n")
    outcome = run_snakemake(tmp_path, "--dry-run", "--configfile", "mine.yaml")
    assert_one_message(outcome, message)
    assert not (tmp_path / "executed").exists()


def archive_with(path: Path, names: dict[str, bytes | str]) -> Path:
    """Write an archive; a member whose content is text is a link there, in a tar."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name, content in names.items():
                file.writestr(name, content)
    else:
        with tarfile.open(path, "w") as file:
            for name, content in names.items():
                info = tarfile.TarInfo(name)
                if isinstance(content, str):
                    info.type, info.linkname = tarfile.SYMTYPE, content
                    file.addfile(info)
                else:
                    (path.parent / "content").write_bytes(content)
                    info.size = len(content)
                    with (path.parent / "content").open("rb") as opened:
                        file.addfile(info, opened)
                    (path.parent / "content").unlink()
    return path


@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_no_member_of_an_archive_lands_outside(suffix: str, tmp_path: Path) -> None:
    here = tmp_path / "a" / "b"
    here.mkdir(parents=True)
    names = {"../../escaped": b"x", f"{tmp_path}/absolute": b"x", "inner/screen.h5ad": screen_bytes()}
    archive = archive_with(here / f"screens{suffix}", names)
    before = sorted(tmp_path.rglob("*"))
    source = open_source({"file": archive}, dataset_block(source={"url": ["https://example.org"], "member": "inner/screen.h5ad"}))
    assert len(source.obs) == 640
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("target", ["/etc/passwd", "../secret.h5ad", "nowhere"])
def test_a_link_in_an_archive_is_not_followed(target: str, tmp_path: Path) -> None:
    (tmp_path / "secret.h5ad").write_bytes(screen_bytes())
    (tmp_path / "in").mkdir()
    archive = archive_with(tmp_path / "in" / "screens.tar", {"screen.h5ad": target, "other.h5ad": b"x"})
    with pytest.raises(InputError, match=r"source\.member is 'screen\.h5ad', and the archive holds other\.h5ad"):
        open_source({"file": archive}, dataset_block(source={"url": ["https://example.org"], "member": "screen.h5ad"}))


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz", ".tar"])
@pytest.mark.parametrize("share", [0.3, 0.9, 0.99])
def test_a_truncated_archive_is_told(suffix: str, share: float, tmp_path: Path) -> None:
    (tmp_path / "screen.h5ad").write_bytes(screen_bytes())
    archive = tmp_path / f"screens{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
            file.write(tmp_path / "screen.h5ad", "screen.h5ad")
    else:
        with tarfile.open(archive, "w:gz" if "gz" in suffix else "w") as file:
            file.add(tmp_path / "screen.h5ad", "screen.h5ad")
    archive.write_bytes(archive.read_bytes()[: int(share * archive.stat().st_size)])
    block = dataset_block(source={"url": ["https://example.org"], "member": "screen.h5ad"})
    with contextlib.suppress(InputError):  # of a tar the end may be padding
        open_source({"file": archive}, block)
        assert suffix == ".tar"
        assert share == 0.99


# --- any input ------------------------------------------------------------------------------------------------------

# FUZZ=20 tries twenty times as much, for a night.
fuzz = settings(
    deadline=None,
    derandomize=True,
    max_examples=80 * int(os.environ.get("FUZZ", "1")),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


def tiny() -> ad.AnnData:
    """Return a very small screen with columns of several kinds."""
    screen = make_screen(n_genes=30, n_controls=6, n_cells=4)
    del screen.uns["effects"]
    screen.obs["lane"] = screen.obs["lane"].astype("category")
    screen.obs = screen.obs.assign(n=range(len(screen)), share=0.5)
    screen.var["gene_id"] = [f"ENSG{i:011d}" for i in range(screen.n_vars)]
    return screen


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    """Return the bytes of a screen stored in several ways."""
    path, screen, stored = tmp_path_factory.mktemp("forms") / "screen.h5ad", tiny(), []
    for X in (screen.X.copy(), screen.X.toarray(), screen.X.tocsc()):
        for compression in (None, "gzip"):
            screen.X = X
            screen.write_h5ad(path, compression=compression)
            stored.append(path.read_bytes())
    return stored


def fresh(folder: Path) -> Path:
    """Return the path of a screen that was never there: an earlier one may still be open."""
    return Path(tempfile.mkdtemp(dir=folder)) / "screen.h5ad"


def harmonized(path: Path, qc: dict = OFF, **changes: object) -> bool:
    """Return whether a screen could be harmonized; anything but InputError is a fault."""
    target = path.with_name("harmonized.h5ad")
    target.unlink(missing_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            harmonize.harmonize(path, target, path.with_name("account.json"), "mine", dataset_block(**changes), qc)
        except InputError as error:
            assert str(path) in str(error), "the message names the file"
            assert not target.exists()
            return False
    ad.read_h5ad(target)
    return True


edits = st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.sampled_from([1, 2**4, 2**7, 255])), max_size=12)


@fuzz
@given(form=st.integers(0, 5), edits=edits, is_head=st.booleans(), share=st.just(1.0) | st.floats(0, 1))
def test_any_bytes_are_a_screen_or_one_message(
    form: int, edits: list, is_head: bool, share: float, forms: list[bytes], tmp_path: Path
) -> None:
    content = bytearray(forms[form][: int(share * len(forms[form]))])
    for place, flip in edits if content else ():
        # What leads to everything else stands at the beginning.
        content[int(place * (min(len(content), 6000) if is_head else len(content)))] ^= flip
    path = fresh(tmp_path)
    path.write_bytes(content)
    harmonized(path)


@fuzz
@given(form=st.integers(0, 5), share=st.floats(0, 0.999))
def test_a_truncated_screen_is_one_message(form: int, share: float, forms: list[bytes], tmp_path: Path) -> None:
    path = fresh(tmp_path)
    path.write_bytes(forms[form][: int(share * len(forms[form]))])
    assert not harmonized(path)


OTHER_THINGS = [
    3, "text", np.zeros(0), np.arange(5), np.full(5, np.nan), np.array([b"a", b"b"]), np.zeros((3, 3)), np.array([1 + 2j]), np.array([True]),
    np.array([b"\xff\xfe"] * 116), np.arange(116), np.full(116, np.nan), np.zeros((124, 30)) - 1, np.zeros((124, 30), "S3"),
    np.array([10**12, 5]), "csc_matrix", "array", "dataframe", "categorical",
]  # fmt: skip
OTHER_VALUES = [np.nan, -1, np.inf, 1e30, 0.5, 0, 100, 2**31 - 1]


def altered(file: h5py.File, place: int, act: str, other: object, value: float) -> None:
    """Do something to one of the objects in a file that leaves it an HDF5 file."""
    names: list[str] = []
    file.visit(names.append)
    name = names[place % len(names)]
    attributes = list(file[name].attrs)
    if act in ("remove", "replace", "empty"):
        del file[name]
        if act == "replace":
            file[name] = other
        elif act == "empty":
            file.create_group(name)
    elif act == "attribute" and attributes:
        file[name].attrs[attributes[place % len(attributes)]] = other
    elif act == "no attribute" and attributes:
        del file[name].attrs[attributes[place % len(attributes)]]
    elif act == "value" and isinstance(file[name], h5py.Dataset) and file[name].dtype.kind in "iuf" and file[name].size:
        values = file[name][()]
        np.atleast_1d(values).reshape(-1)[place % values.size] = np.array(value).astype(values.dtype)
        file[name][...] = values


acts = st.sampled_from(["remove", "replace", "replace", "empty", "attribute", "no attribute", "value", "value"])
alterations = st.tuples(st.integers(0, 10**6), acts, st.sampled_from(OTHER_THINGS), st.sampled_from(OTHER_VALUES))


@fuzz
@given(form=st.integers(0, 5), alterations=st.lists(alterations, min_size=1, max_size=3))
def test_any_hdf5_file_is_a_screen_or_one_message(form: int, alterations: list, forms: list[bytes], tmp_path: Path) -> None:
    path = fresh(tmp_path)
    path.write_bytes(forms[form])
    with h5py.File(path, "r+") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of casts
        for alteration in alterations:
            altered(file, *alteration)
    harmonized(path)


words = st.sampled_from(
    ["control", "TF1", "TF2", "TF1+TF2", "nan", "", "*", " ", "+", "control+TF1", "Ω", "a/b", "1-Mar", "-", "TF1@3", None]
)
numbers = st.sampled_from([0, 1, -5, 0.5, np.nan, np.inf, 2**53, True])
columns = st.one_of(
    st.lists(words, min_size=1, max_size=8),
    st.lists(numbers, min_size=1, max_size=8),
    st.lists(words.filter(lambda word: word is not None), min_size=1, max_size=8).map(pd.Categorical),
    st.lists(st.sampled_from([1, None]), min_size=1, max_size=8).map(lambda values: pd.array(values, "Int64")),
    st.lists(st.sampled_from([True, None]), min_size=1, max_size=8).map(lambda values: pd.array(values, "boolean")),
    st.lists(st.sampled_from([b"a", b"\xff"]), min_size=1, max_size=8),
)
NAMES = ["perturbation", "perturbation", "lane", "total_counts", "is_control", "batch", "_index", "a b", "Ω", "", "dataset", "source_batch"]
BLOCKS = [
    {}, {}, {}, {"covariates": {"batch": ["lane", "n"]}}, {"covariates": {"batch": "share", "cell_type": "perturbation"}},
    {"subset": {"n": [1, 2, 3]}}, {"subset": {"share": [0.5]}}, {"perturbation": {"dose": "share"}}, {"perturbation": {"dose": "lane"}},
    {"perturbation": {"separator": None}}, {"perturbation": {"pattern": "(.)"}}, {"covariates": {"dataset": "lane"}},
    {"exclude": {"lane": "b"}}, {"gene_pattern": "T"}, {"perturbation_type": "drug"}, {"organism": "mouse"}, {"shape": [3, 3]},
]  # fmt: skip
LIMITS = {**OFF, "min_cells_per_gene": 1, "min_counts": 1, "max_pct_mt": 50, "min_cells_per_perturbation": 2}


@fuzz
@given(
    of_cells=st.dictionaries(st.sampled_from(NAMES), columns, max_size=2),
    of_genes=st.dictionaries(st.sampled_from(["gene_id", "gene_name", "symbol", "original_name"]), columns, max_size=1),
    genes=st.none() | st.lists(st.sampled_from(["a", "b", "", "nan", "TF1", "MT-X", "ENSG00000000001"]), min_size=1, max_size=30),
    shape=st.sampled_from([(124, 30)] * 4 + [(0, 30), (1, 30), (124, 0), (124, 1)]),
    block=st.sampled_from(BLOCKS),
    qc=st.sampled_from([OFF, LIMITS]),
)
def test_any_table_of_cells_and_genes_is_a_screen_or_one_message(
    of_cells: dict, of_genes: dict, genes: list | None, shape: tuple, block: dict, qc: dict, tmp_path: Path
) -> None:
    screen = tiny()[: shape[0], : shape[1]].copy()
    for table, chosen in ((screen.obs, of_cells), (screen.var, of_genes)):
        for name, values in chosen.items():
            table[name] = pd.Series(values).take(np.arange(len(table)) % len(values)).array
    if genes is not None:
        screen.var_names = [genes[i % len(genes)] for i in range(screen.n_vars)]
    path = fresh(tmp_path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            screen.write_h5ad(path)
    except (ValueError, TypeError):
        return  # nothing that anndata would save
    harmonized(path, qc, **block)


@fuzz
@given(
    labels=st.lists(st.text(max_size=12) | words.filter(bool), min_size=1, max_size=5),
    separator=st.sampled_from(["+", "_", ";", None]),
    organism=st.sampled_from(["human", "mouse"]),
)
def test_any_label_is_made_canonical_for_good_or_one_message(labels: list[str], separator: str | None, organism: str) -> None:
    genes = pd.DataFrame({"original_name": ["TF1", "TF2"], "gene_name": ["TF1", "TF2"]})

    def canonical(labels: list[str], separator: str | None) -> list[str | None]:
        block = dataset_block(perturbation={"separator": separator}, organism=organism, perturbation_type="CRISPRi")
        found = canonical_labels(pd.DataFrame({"perturbation": ["control", *labels]}), block, genes, Path("screen.h5ad"))
        return [None if pd.isna(label) else label for label in found]

    try:
        once = canonical(labels, separator)
    except InputError as error:
        assert "screen.h5ad: the label" in str(error)
        return
    for label in filter(None, once):
        assert label == CONTROL or sorted(set(members_of(label))) == members_of(label)
        assert label == label.strip()
    assert canonical([label for label in once if label], "+")[1:] == [label for label in once if label]


JUNK = [
    None, 0, -1, 1.5, float("nan"), float("inf"), 10**30, "", "x", "../../etc", [], [None], {}, {"a": 1}, True, "a\0b", [[]], {1: 2}, "(",
    ["mine", "mine"], datetime.date(2020, 1, 1), {"file": "x"}, {"path": "/"}, "nan", "mine", ["x"], [{}], {"kind": "file"}, "*" * 5000, b"x",
]  # fmt: skip
KEYS = ["a", "kind", "path", "seed", "../x", "params", "latent", 1, "folds", "held_out"]


def places(node: object, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every node of a configuration but its root."""
    if path:
        yield path
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, child in children:
        yield from places(child, (*path, key))


@pytest.fixture(scope="module")
def full_config() -> dict:
    """Return a merged configuration with a bit of everything, and few of the registered screens."""
    mine = closed_forms_config(
        splits={"genes": {"kind": "unseen_perturbation", "folds": 3}},
        counterfactuals={"q": {"dataset": "mine", "split": "unseen_combination", "model": "additive", "perturbations": ["TF1"]}},
        embeddings={"sources": ["coexpression", "go"]},
    )
    mine["select"] = {
        "datasets": ["mine", "renge2023"], "splits": ["unseen_combination", "unseen_context", "genes"],
        "models": ["additive", "jepa", "scppdm", "stacked"], "seeds": [0], "counterfactuals": ["q"],
    }  # fmt: skip
    config = merged(mine)
    config["datasets"] = {name: config["datasets"][name] for name in ("mine", "renge2023", "norman2019")}
    return config


changes = st.tuples(
    st.integers(0, 10**6), st.sampled_from(["replace", "replace", "remove", "add"]), st.sampled_from(JUNK), st.sampled_from(KEYS)
)


@fuzz
@given(top=st.data(), changes=st.lists(changes, min_size=1, max_size=3))
def test_any_configuration_is_a_plan_or_one_message(
    top: st.DataObject, changes: list, full_config: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("screen.h5ad").write_text("a screen")
    config = yaml.safe_load(yaml.safe_dump(full_config))
    for place, act, junk, key in changes:
        section = top.draw(st.sampled_from(sorted(config, key=str)))
        paths = list(places(config[section], (section,)))
        *above, last = paths[place % len(paths)]
        parent = config
        for step in above:
            parent = parent[step]
        if act == "replace":
            parent[last] = deepcopy(junk)
        elif act == "remove":
            del parent[last]
        elif isinstance(parent[last], dict):
            parent[last][key] = deepcopy(junk)
        if not config:
            return
    Path("mine.yaml").write_text(yaml.safe_dump(config))
    try:
        plan = Plan(load_configfile("mine.yaml"), ["mine.yaml"])
    except InputError:
        return
    assert plan.lineage("report")
    assert all(".." not in Path(folder).parts and not Path(folder).is_absolute() for folder in plan.folders())
