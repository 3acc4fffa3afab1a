"""Models of others: a script gets the export and nothing else, and whatever it leaves is checked."""

import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import yaml
from conftest import (
    REPOSITORY,
    SHARED_DATA,
    SPECS,
    Prepared,
    closed_forms_config,
    make_screen,
    merged,
    prepare,
    write_screen,
)

from perturbflow.errors import InputError
from perturbflow.evaluation import evaluate
from perturbflow.export import export
from perturbflow.io.environments import commands, environment, folder_of, is_ready
from perturbflow.io.files import file_digest
from perturbflow.models.base import build
from perturbflow.predict import predict
from perturbflow.registry.families import FAMILIES
from perturbflow.registry.places import config_folder, locks_folder, wrappers_folder
from perturbflow.registry.plan import Plan
from perturbflow.registry.wrappers import files_of
from perturbflow.train import train

IMPLEMENTATION = FAMILIES["external"].implementation
DEFAULTS = {
    "environment": None, "command": "python", "values": "expression", "scale": "log1p", "options": {}, "files": {},
    "unseen_genes": True,
}  # fmt: skip
MODELS = {
    name: block["params"]
    for name, block in yaml.safe_load((config_folder() / "models.yaml").read_text())["models"].items()
    if block["family"] == "external"
}
# So little training that a run takes a minute: it shows that the software works, and nothing of what it can do.
SHORT: dict[str, dict] = {
    "gears": {"epochs": 1, "hidden_size": 8},
    "cpa": {"train": {"max_epochs": 1, "batch_size": 128}, "model": {"n_latent": 8, "recon_loss": "nb"}},
    "scgen": {"train": {"max_epochs": 1, "batch_size": 128}, "model": {"n_hidden": 32, "n_latent": 8}},
    "cellflow": {
        "model": {"hidden_dims": [32], "decoder_dims": [32], "time_encoder_dims": [32], "condition_embedding_dim": 16},
        "train": {"num_iterations": 40, "batch_size": 64},
    },
    "state": {
        "overrides": {
            "model": "state_sm",
            "model.kwargs.cell_set_len": 32,
            "training.batch_size": 2,
            "training.max_steps": 4,
            "training.val_freq": 4,
            "training.ckpt_every_n_steps": 4,
        }
    },
}


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Return a screen whose combinations are held out."""
    return prepare(tmp_path_factory.mktemp("combinations"), make_screen(), SPECS["unseen_combination"])


@pytest.fixture(scope="module")
def answer(here: Prepared) -> ad.AnnData:
    """Return means as a script may leave them, with the hash of the split."""
    pairs = ad.read_h5ad(here.pairs)
    test = pairs[(pairs.obs["role"] == "test") & ~pairs.obs["is_control"]]
    table = test.to_df().groupby(test.obs["perturbation"].astype(str)).mean()
    means = ad.AnnData(table.to_numpy(), pd.DataFrame({"perturbation": table.index}), pairs.var[[]].copy())
    means.uns["perturbflow"] = {"split_sha256": file_digest(here.split)}
    return means


@pytest.fixture
def trained(here: Prepared, tmp_path: Path) -> Callable[..., dict]:
    """Return a function that trains as the rule does, and returns run.json."""

    def call(script: str, scored: str = "test", **params: object) -> dict:
        if "\n" in script:
            (tmp_path / "script.py").write_text(script)
            script = str(tmp_path / "script.py")
        train(
            here.pairs, here.embeddings, here.audit, tmp_path / "model.npz", tmp_path / "run.json", IMPLEMENTATION,
            {"script": script, **DEFAULTS, **params}, 0, "cpu", 1, scored, here.split,
        )  # fmt: skip
        return json.loads((tmp_path / "run.json").read_text())

    return call


def left(tmp_path: Path, cells: ad.AnnData) -> dict:
    """Return params of a script that leaves these cells."""
    cells.write_h5ad(tmp_path / "theirs.h5ad")
    return {"files": {"theirs": str(tmp_path / "theirs.h5ad")}}


LEAVES = """import json, shutil, sys
shutil.copy(json.load(open(sys.argv[3]))["files"]["theirs"], sys.argv[2])
"""

# --- what fits -------------------------------------------------------------------------------------------------------


def test_the_shortest_script_predicts_the_sum_of_its_members_effects(
    here: Prepared, tmp_path: Path, trained: Callable
) -> None:
    run = trained("additive.py")
    pairs = ad.read_h5ad(here.pairs)
    label = pairs.obs["perturbation"].astype(str)
    is_known, is_test = pairs.obs["role"].isin(["train", "validation"]), (pairs.obs["role"] == "test").to_numpy()

    def mean(mask: np.ndarray) -> np.ndarray:
        return pairs[mask].X.toarray().mean(axis=0)

    wanted = sorted(set(label[is_test & ~pairs.obs["is_control"]]))
    control = mean((is_known & (label == "control")).to_numpy())
    expected = [
        mean(is_test & pairs.obs["is_control"].to_numpy())
        + sum(mean((is_known & (label == member)).to_numpy()) - control for member in combination.split("+"))
        for combination in wanted
    ]
    with np.load(tmp_path / "model.npz") as artefact:
        np.testing.assert_allclose(artefact["values"], np.maximum(expected, 0), atol=1e-5)
    params = {"script": "additive.py", **DEFAULTS}
    predict(here.pairs, tmp_path / "model.npz", tmp_path / "predictions.h5ad", IMPLEMENTATION, params, 0, 1000)
    evaluate(tmp_path / "predictions.h5ad", here.pairs, here.split, tmp_path / "metrics.tsv")
    scores = pd.read_csv(tmp_path / "metrics.tsv", sep="\t")
    assert set(scores["perturbation"]) == set(wanted)
    assert scores.query("metric == 'pearson_delta_ctrl'")["value"].mean() > 0.5
    script = run["facts"]["script"]
    assert script["seconds"] > 0
    assert script["versions"]["anndata"] == version("anndata")
    assert run["peak_memory_mb"] > 50
    assert run["device"] == "cpu"
    assert not (tmp_path / "checkpoints").exists()  # the exported cells are not left behind


def test_what_a_script_and_its_own_programs_used_is_kept_apart_from_the_clock(
    tmp_path: Path, trained: Callable, answer: ad.AnnData
) -> None:
    """Its program works half a second and holds 300 MB; it sleeps half a second."""
    program = "import time\nheld = bytearray(300_000_000)\nwhile time.process_time() < 0.5: pass"
    busy = f"import subprocess, sys, time\ntime.sleep(0.5)\nsubprocess.run([sys.executable, '-c', {program!r}])\n"
    run = trained(busy + LEAVES, **left(tmp_path, answer))
    script = run["facts"]["script"]
    assert 0.5 <= script["cpu_seconds"] <= run["cpu_seconds"]
    assert script["cpu_seconds"] <= script["seconds"] - 0.4  # one thread, which slept
    assert 300 <= script["peak_memory_mb"] <= run["peak_memory_mb"]


def test_a_script_sees_the_export_and_its_settings(here: Prepared, tmp_path: Path, trained: Callable) -> None:
    seen = tmp_path / "seen.json"
    with pytest.raises(InputError, match="left no"):
        trained(
            f"""import json, os, sys
exported, predictions, settings = sys.argv[1:]
json.dump({{"files": sorted(os.listdir(exported)), "settings": json.load(open(settings)), "here": os.listdir(),
            "there": os.path.exists(predictions), "path": os.environ.get("PYTHONPATH")}}, open({str(seen)!r}, "w"))
""",
            options={"epochs": 3},
        )
    told = json.loads(seen.read_text())
    assert {"train.h5ad", "controls.h5ad", "targets.tsv", "genes.tsv", "README.md", "embeddings.tsv"} <= {
        *told["files"]
    }
    assert told["settings"] == {"seed": 0, "threads": 1, "device": "cpu", "options": {"epochs": 3}, "files": {}}
    assert (told["here"], told["there"], told["path"]) == ([], False, None)


def test_where_validation_is_scored_its_cells_are_left_out_too(here: Prepared, tmp_path: Path) -> None:
    export(here.pairs, here.split, tmp_path / "theirs", "a × b", "validation", here.embeddings)
    roles = json.loads(here.split.read_text())["perturbations"]
    for file in (tmp_path / "theirs").rglob("*.h5ad"):
        cells = ad.read_h5ad(file)
        column = next(name for name in ("perturbation", "condition", "gene") if name in cells.obs)
        held_out = {*roles["validation"], *roles["test"]}
        assert not held_out & {text.removesuffix("+ctrl") for text in cells.obs[column].astype(str)}, file
    targets = pd.read_csv(tmp_path / "theirs/targets.tsv", sep="\t")
    assert targets["perturbation"].tolist() == sorted(roles["validation"])
    vectors = pd.read_csv(tmp_path / "theirs/embeddings.tsv", sep="\t", index_col=0)
    pd.testing.assert_frame_equal(vectors, pd.read_parquet(here.embeddings), check_names=False, check_dtype=False)


def test_the_same_training_is_not_repeated_and_a_changed_script_is(
    tmp_path: Path, trained: Callable, answer: ad.AnnData
) -> None:
    params = left(tmp_path, answer)
    counting = LEAVES + f"open({str(tmp_path / 'count')!r}, 'a').write('x')\n"
    trained(counting, **params)
    before = (tmp_path / "model.npz").read_bytes()
    (tmp_path / "model.npz").unlink()
    trained(counting, **params)
    assert (tmp_path / "count").read_text() == "x"
    assert (tmp_path / "model.npz").read_bytes() == before
    trained(counting + "# another\n", **params)
    assert (tmp_path / "count").read_text() == "xx"


# --- what does not ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("print('epoch 1')\nraise ValueError('no gene')\n", "ended with exit status 1 (?s:.*)epoch 1(?s:.*)no gene"),
        ("import os\nprint('so far')\nos.kill(os.getpid(), 9)\n", "was killed by signal 9 (?s:.*)so far"),
        ("print('done')\n\n", "ended well, and left no predictions.h5ad(?s:.*)done"),
        ("import sys\nopen(sys.argv[2], 'wb').write(b'\\x89HDF' + bytes(100))\n", "cannot be read as h5ad"),
    ],
)  # fmt: skip
def test_a_script_that_fails_is_one_message(trained: Callable, tmp_path: Path, script: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        trained(script)
    assert not (tmp_path / "model.npz").exists()
    assert not (tmp_path / "run.json").exists()


def test_a_command_that_is_not_there_is_named(trained: Callable) -> None:
    with pytest.raises(InputError, match="no-such-program"):
        trained("additive.py", command="no-such-program")


def _negative(cells: ad.AnnData) -> None:
    cells.X = cells.X - 1


def _not_finite(cells: ad.AnnData) -> None:
    cells.X[0, 0] = np.nan


def _of_another_split(cells: ad.AnnData) -> None:
    cells.uns["perturbflow"] = {"split_sha256": "0" * 64}


def _of_others(cells: ad.AnnData) -> None:
    cells.obs["perturbation"] = [f"OTHER{i}" for i in range(cells.n_obs)]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_negative, "below zero"),
        (_not_finite, "no finite number"),
        (_of_another_split, "made for another split"),
        (_of_others, "predicted none of the"),
    ],
)
def test_what_it_leaves_is_checked(
    trained: Callable, tmp_path: Path, answer: ad.AnnData, change: Callable, words: str
) -> None:
    cells = answer.copy()
    change(cells)
    with pytest.raises(InputError, match=words):
        trained(LEAVES, **left(tmp_path, cells))


def test_a_model_that_learned_little_is_scored_and_named(
    trained: Callable, tmp_path: Path, answer: ad.AnnData, caplog: pytest.LogCaptureFixture
) -> None:
    cells = answer.copy()
    cells.X = np.full_like(cells.X, 1e-3)
    trained(LEAVES, **left(tmp_path, cells))
    assert "Either the model learned little, or its script left another scale" in caplog.text


def test_missing_perturbations_are_named(
    here: Prepared, trained: Callable, tmp_path: Path, answer: ad.AnnData, caplog: pytest.LogCaptureFixture
) -> None:
    params = left(tmp_path, answer[1:].copy())
    trained(LEAVES, **params)
    gone = answer.obs["perturbation"].iloc[0]
    assert f"perturbations are not predicted: {gone}" in caplog.text
    predict(
        here.pairs, tmp_path / "model.npz", tmp_path / "predictions.h5ad", IMPLEMENTATION,
        {"script": str(tmp_path / "script.py"), **DEFAULTS, **params}, 0, 100,
    )  # fmt: skip
    assert ad.read_h5ad(tmp_path / "predictions.h5ad").uns["perturbflow"]["missing"].tolist() == [gone]


def test_a_job_that_is_ended_ends_its_script(here: Prepared, tmp_path: Path) -> None:
    """The script starts a process of its own, and tells its id."""
    (tmp_path / "script.py").write_text(
        "import subprocess, sys\nchild = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
        f"open({str(tmp_path / 'id')!r}, 'w').write(str(child.pid))\nchild.wait()\n"
    )
    params = {"script": str(tmp_path / "script.py"), **DEFAULTS}
    words = [sys.executable, str(REPOSITORY / "scripts/train.py"), "--params", json.dumps(params), "--seed", "0"]
    for name in ("pairs", "embeddings", "audit", "split"):
        words += [f"--{name}", str(getattr(here, name))]
    words += ["--model", str(tmp_path / "model.npz"), "--run", str(tmp_path / "run.json")]
    with subprocess.Popen([*words, "--implementation", IMPLEMENTATION], env=os.environ) as job:
        for _ in range(600):
            if (tmp_path / "id").is_file() and (tmp_path / "id").read_text():
                break
            time.sleep(0.1)
        job.terminate()
    child = int((tmp_path / "id").read_text())
    assert job.returncode not in (0, None)
    for _ in range(50):
        state = Path(f"/proc/{child}/status")
        if not state.exists() or "State:\tZ" in state.read_text():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the script's own process is still there")


# --- the plan --------------------------------------------------------------------------------------------------------


def config_of(**params: object) -> dict:
    """Return a configuration with a model of others."""
    return closed_forms_config(models={"theirs": {"family": "external", "params": params}})


def test_files_that_are_not_there_are_named_before_any_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_screen(tmp_path)
    monkeypatch.chdir(tmp_path)

    def said(**params: object) -> str:
        config = config_of(**params)
        config["select"] = {**config["select"], "models": ["theirs"]}
        with pytest.raises(InputError) as refused:
            Plan(merged(config), [])
        return str(refused.value)

    assert "models.theirs.params.script: there is no script 'mine.py'" in said(script="mine.py")
    missing = said(script="additive.py", environment="mine")
    assert "params.environment: there is no folder and no lock 'mine'" in missing
    assert "cellflow, cpa, gears, scgen, state" in missing
    assert "params.files.go: there is no file 'go.tsv'" in said(script="additive.py", files={"go": "go.tsv"})


def test_a_model_that_needs_cells_of_a_gene_is_left_out_where_genes_are_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_screen(tmp_path)
    monkeypatch.chdir(tmp_path)
    config = config_of(script="additive.py", unseen_genes=False)
    config["select"] = {
        **config["select"], "models": ["theirs"], "splits": ["unseen_perturbation", "unseen_combination"],
    }  # fmt: skip
    plan = Plan(merged(config), [])
    assert set(plan.runs.query("model == 'theirs'")["split"]) == {"unseen_combination"}
    assert any("theirs × unseen_perturbation is left out" in sentence for sentence in plan.left_out)


def test_all_that_a_training_is_made_of_counts(tmp_path: Path) -> None:
    for name in ("script.py", "beside.py", "lock.txt", "table.tsv"):
        (tmp_path / name).write_text("")
    (tmp_path / "script.py").write_text("import json\nfrom beside import word\n")
    params = {
        "script": str(tmp_path / "script.py"), "environment": str(tmp_path / "lock.txt"),
        "files": {"table": str(tmp_path / "table.tsv")},
    }  # fmt: skip
    assert {file.name for file in files_of(params).values()} == {"script.py", "beside.py", "lock.txt", "table.tsv"}
    assert {file.name for file in build(IMPLEMENTATION, {**DEFAULTS, **params}).files} == {
        "script.py", "beside.py", "lock.txt", "table.tsv",
    }  # fmt: skip
    assert "environment" not in files_of({**params, "environment": str(tmp_path)})


@pytest.mark.slow
def test_in_the_workflow_a_changed_script_makes_its_runs_stale(tmp_path: Path, snakemake: Callable) -> None:
    write_screen(tmp_path)
    for name in ("additive.py", "contract.py"):
        shutil.copy(wrappers_folder() / name, tmp_path)
    config = config_of(script="additive.py")
    config["select"] = {**config["select"], "models": ["theirs"], "splits": ["unseen_combination"], "seeds": [0]}
    wanted = ["results/mine/unseen_combination/theirs/seed_0/predictions.h5ad"]
    assert snakemake(tmp_path, *wanted, config=config).returncode == 0
    assert snakemake(tmp_path, "--dry-run", *wanted, config=config).jobs == {}
    with (tmp_path / "contract.py").open("a") as file:
        file.write("\n# changed\n")
    stale = snakemake(tmp_path, "--dry-run", *wanted, config=config)
    assert stale.jobs == {"train_external": 1, "predict": 1}, stale.text


def test_cells_of_a_script_keep_their_mean_where_values_are_below_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(wrappers_folder()))
    nonnegative = importlib.import_module("contract").nonnegative
    cells = np.random.default_rng(0).normal([0.5, 0.1, -1.0], 1.0, (50, 3))
    kept = nonnegative(cells)
    assert kept.min() == 0
    np.testing.assert_allclose(kept.mean(axis=0), np.maximum(cells.mean(axis=0), 0))
    np.testing.assert_array_equal(nonnegative(np.abs(cells)), np.abs(cells))


# --- environments ----------------------------------------------------------------------------------------------------


def test_a_container_is_called_with_the_folders_that_it_has_to_see(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No container runs here: what would be called is tested."""
    monkeypatch.setenv("APPTAINER_BIND", "/scratch")
    monkeypatch.setenv("PYTHONPATH", "/mine")
    command = "apptainer exec --nv 'my image.sif' python"
    params = {**DEFAULTS, "script": "additive.py", "command": command, "files": {"go": "/tables/go.tsv"}}
    paths = [tmp_path / name for name in ("exported", "predictions.h5ad", "settings.json")]
    words, variables = build(IMPLEMENTATION, params)._called(paths, threads=3)
    assert words[1:] == ["exec", "--nv", "my image.sif", "python"]
    assert Path(words[0]).name == "apptainer"
    folders = sorted(["/tables", str(tmp_path), str(wrappers_folder())])
    assert variables["APPTAINER_BIND"].split(",") == ["/scratch", *folders]
    assert variables["SINGULARITY_BIND"].split(",") == folders
    assert variables["OMP_NUM_THREADS"] == "3"
    assert "PYTHONPATH" not in variables


def test_where_conda_runs_the_jobs_it_brings_python_and_pip_the_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No conda is called here: what would be called is tested."""
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    lock, folder = locks_folder() / "gears.txt", tmp_path / "gears"
    by_pip, of_pip = list(commands(lock, folder)), folder_of(lock)
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path))
    monkeypatch.setenv("PATH", str(REPOSITORY / "workflow_tests/support/conda_standin/bin"), prepend=os.pathsep)
    by_conda = list(commands(lock, folder))
    assert by_pip[0][1:] == ["-m", "venv", str(folder)]
    file = str(lock.with_suffix(".yaml"))
    assert by_conda[0] == ["conda", "env", "create", "--quiet", "--file", file, "--prefix", str(folder)]
    assert by_conda[1:] == by_pip[1:]
    assert by_pip[-1][-3:] == ["--no-deps", "--requirement", str(lock)]
    assert by_pip[1][-1].startswith("torch==")
    assert folder_of(lock) != of_pip


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a lock without pins; no package index is asked."""
    monkeypatch.setenv("PERTURBFLOW_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("CONDA_PREFIX", raising=False)
    (tmp_path / "empty.txt").write_text("# nothing\n")
    return tmp_path / "empty.txt"


@pytest.mark.slow
def test_an_environment_is_built_once_whoever_asks_and_again_if_it_is_not_whole(lock: Path) -> None:
    scripts = str(Path(__file__).parents[2] / "scripts")
    code = (
        f"import sys; sys.path.insert(0, {scripts!r}); from pathlib import Path; "
        f"from perturbflow.io.environments import environment; environment(Path({str(lock)!r}))"
    )
    both = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    ready = folder_of(lock) / "perturbflow.json"
    built = ready.stat().st_mtime_ns
    assert environment(lock) == folder_of(lock)
    assert ready.stat().st_mtime_ns == built
    assert json.loads(ready.read_text())["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    ready.unlink()  # as a killed installation leaves it
    (folder_of(lock) / "rest").touch()
    assert not is_ready(lock)
    assert not (environment(lock) / "rest").exists()


@pytest.mark.slow
def test_an_environment_that_cannot_be_built_is_one_message_and_not_ready(lock: Path) -> None:
    lock.write_text("no-such-software==1.0\n")
    with pytest.raises(InputError, match=r"cannot be built(?s:.*)no-such-software"):
        environment(lock)
    assert not is_ready(lock)


def test_a_folder_without_programs_is_no_environment(trained: Callable, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is no environment"):
        trained("additive.py", environment=str(tmp_path))


# --- what ships ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(MODELS))
def test_what_ships_has_its_script_and_a_complete_lock(name: str) -> None:
    params = {**DEFAULTS, **MODELS[name]}
    files = files_of(params)
    assert all(file.is_file() for file in files.values())
    assert {"script", "environment", "contract.py"} <= set(files)
    pins = [line for line in files["environment"].read_text().splitlines() if not line.startswith("#")]
    assert len(pins) > 50
    assert all(line.count("==") == 1 and not set(line) & set("+ @<>~;") for line in pins)
    conda = yaml.safe_load(files["environment"].with_suffix(".yaml").read_text())
    assert conda["channels"] == ["conda-forge", "nodefaults"]
    assert "python =3.11" in conda["dependencies"]


def test_every_lock_and_script_that_ships_is_used() -> None:
    assert {params["environment"] for params in MODELS.values()} == {file.stem for file in locks_folder().glob("*.txt")}
    scripts = {params["script"] for params in MODELS.values()} | {"contract.py", "additive.py"}
    assert scripts == {file.name for file in wrappers_folder().glob("*.py")}


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Return the real screen norman_k562_mini, with combinations held out."""
    path = SHARED_DATA / "norman_k562_mini/perturbench_devel_counts.h5ad"
    if not path.is_file():
        pytest.skip(f"the real screens are not beside this checkout: no {path}")
    cells = ad.read_h5ad(path)
    cells = cells[cells.obs["dataset"] == "norman19"].copy()
    cells.obs = cells.obs[["perturbation"]].astype(str).assign(lane="one")
    return prepare(tmp_path_factory.mktemp("mini"), cells, SPECS["unseen_combination"], n_hvg=100)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
def test_what_ships_predicts_real_cells(name: str, tmp_path: Path, mini: Prepared) -> None:
    lock = locks_folder() / f"{MODELS[name]['environment']}.txt"
    if not is_ready(lock):
        pytest.skip(f"the environment of {lock.name} is not built here ({folder_of(lock)})")
    files = {"gene2go": str(SHARED_DATA / "priors/human_gene2go.tsv.gz")} if name == "gears" else {}
    options = {**MODELS[name]["options"], **SHORT[name]}
    if "overrides" in options:
        options["overrides"] = {**MODELS[name]["options"]["overrides"], **SHORT[name]["overrides"]}
    params = {**DEFAULTS, **MODELS[name], "files": files, "options": options}
    model, run, predictions = (tmp_path / file for file in ("model.npz", "run.json", "predictions.h5ad"))
    train(mini.pairs, mini.embeddings, mini.audit, model, run, IMPLEMENTATION, params, 0, "cpu", split=mini.split)
    predict(mini.pairs, model, predictions, IMPLEMENTATION, params, 0, 200)
    evaluate(predictions, mini.pairs, mini.split, tmp_path / "metrics.tsv")
    scores = pd.read_csv(tmp_path / "metrics.tsv", sep="\t")
    assert scores["n_predicted"].gt(0).any()  # some combinations have a member that has no cells of its own
    assert scores.query("metric == 'mae'")["value"].mean() < 1
