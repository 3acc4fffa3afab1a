"""Rules run by `--sdm conda`: the environment files as they are, a channel on this machine, a stand-in for conda.

The channel holds what the other tests run with, under conda's names; what conda-forge holds is not tested.
"""

import ast
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY, Outcome, closed_forms_config, copy_repository, make_screen
from local_channel import SITE_PACKAGES, NoChannelError, make_channel
from software import (
    DISTRIBUTIONS,
    PYPI_NAMES,
    conda_pins,
    environment_files,
    files_of,
    imports,
    needed_by,
    normalized,
    rules,
)

pytestmark = pytest.mark.slow

STAND_IN = REPOSITORY / "workflow_tests" / "support" / "conda_standin" / "bin"
CONFIG = closed_forms_config(models={"counterfactual": {"params": {"n_steps": 20, "batch_size": 16, "n_latent": 8}}})
CONFIG["select"]["models"] = ["linear", "counterfactual"]

# Snakemake lets a script import from Snakemake's own environment what its environment lacks; this writes down what
# does.
WITNESS = """
import atexit, json, sys

@atexit.register
def note():
    files = {name: getattr(module, "__file__", None) for name, module in sys.modules.items() if "." not in name}
    elsewhere = [name for name, file in files.items() if file and not file.startswith(sys.prefix)]
    with open(f"{sys.prefix}/witnessed", "a") as file:
        file.write(json.dumps([sys.argv[0], elsewhere]) + "\\n")
"""
IMPORT_ALL = """
import json, sys

scripts, statements = json.load(sys.stdin)
sys.path.insert(0, scripts)
for rule, statement in statements:
    try:
        exec(statement, {})
    except ImportError as error:
        print(f"rule {rule}: {statement}: {error}")
"""

each_environment = pytest.mark.parametrize("file", environment_files(), ids=lambda file: file.stem)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Return where the workflow runs with conda; gigabytes, which pytest would keep."""
    folder = tmp_path_factory.mktemp("with_conda")
    make_screen().write_h5ad(folder / "screen.h5ad")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def variables(folder: Path) -> dict[str, str]:
    """Return variables by which Snakemake finds the stand-in, and the stand-in a channel with all pins."""
    pins = {
        PYPI_NAMES.get(name, name): version
        for file in environment_files()
        for name, version in conda_pins(file).items()
    }
    del pins["python"]
    try:
        make_channel(folder / "channels" / "conda-forge", pins, {pypi: conda for conda, pypi in PYPI_NAMES.items()})
    except NoChannelError as error:
        pytest.skip(str(error))
    return {
        "PATH": os.pathsep.join([str(STAND_IN), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "CONDA_CHANNEL_ALIAS": (folder / "channels").as_uri(),
        "CONDA_PKGS_DIRS": str(folder / "packages"),
    }


@pytest.fixture(scope="module")
def environments(folder: Path, variables: dict[str, str], snakemake: Callable[..., Outcome]) -> dict[Path, Path]:
    """Return where Snakemake made the environment of each file, a witness in each."""
    made = snakemake(folder, "--sdm", "conda", "--conda-create-envs-only", config=CONFIG, environment=variables)
    assert made.returncode == 0, made.text
    prefixes = {file.read_bytes(): file.with_suffix("") for file in (folder / ".snakemake" / "conda").glob("*.yaml")}
    found = {file: prefixes[file.read_bytes()] for file in environment_files()}
    for prefix in found.values():
        (prefix / SITE_PACKAGES / "sitecustomize.py").write_text(WITNESS)
    return found


@pytest.fixture(scope="module")
def finished(
    folder: Path, environments: dict[Path, Path], variables: dict[str, str], snakemake: Callable[..., Outcome]
) -> Outcome:
    """Run the workflow, each rule in its environment."""
    outcome = snakemake(folder, "--sdm", "conda", config=CONFIG, environment=variables)
    assert outcome.returncode == 0, outcome.text
    return outcome


def failures(prefix: Path, statements: list[tuple[str, str]]) -> list[str]:
    """Return which import statements of rules fail in an environment, with our modules and nothing else beside it."""
    done = subprocess.run(
        [prefix / "bin" / "python", "-I", "-c", IMPORT_ALL],
        input=json.dumps([str(REPOSITORY / "scripts"), statements]), capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.splitlines()


@each_environment
def test_all_imports_of_an_environments_rules_are_in_it(file: Path, environments: dict[Path, Path]) -> None:
    statements = {
        (rule, ast.unparse(node))
        for rule, fields in rules().items()
        if Path(fields["conda"]) == file
        for source, is_lazy_wanted in files_of(rule).items()
        for node in imports(source, is_lazy_wanted)
    }
    assert len(statements) > 100
    assert not failures(environments[file], sorted(statements))


def test_an_import_that_an_environment_lacks_is_found(environments: dict[Path, Path]) -> None:
    data = environments[REPOSITORY / "envs" / "data.yaml"]
    assert failures(data, [("audit", "import numpy, torch")]) == [
        "rule audit: import numpy, torch: No module named 'torch'"
    ]


@each_environment
def test_an_environment_has_what_its_packages_require(file: Path, environments: dict[Path, Path]) -> None:
    done = subprocess.run(
        [environments[file] / "bin" / "python", "-I", "-m", "pip", "check"], capture_output=True, text=True, check=False
    )
    assert "No broken requirements found" in done.stdout, done.stdout + done.stderr


@each_environment
def test_scripts_ran_in_their_environment_and_imported_from_it(
    file: Path, finished: Outcome, environments: dict[Path, Path]
) -> None:
    expected = {
        rule: Path(rules()[rule]["script"]).name
        for rule in finished.jobs
        if rule in rules() and Path(rules()[rule]["conda"]) == file
    }
    witnessed = [json.loads(line) for line in (environments[file] / "witnessed").read_text().splitlines()]
    # A job's script is a copy, tmp0123.train.py.
    scripts = [
        (name.partition(".")[2], elsewhere)
        for name, elsewhere in ((Path(path).name, found) for path, found in witnessed)
    ]
    for rule, script in expected.items():
        found = [elsewhere for name, elsewhere in scripts if name == script]
        assert len(found) >= finished.jobs[rule], f"{rule} ran elsewhere"
        leaked = {normalized(DISTRIBUTIONS.get(module, module)) for elsewhere in found for module in elsewhere}
        assert "snakemake" in leaked, "the witness sees what comes from elsewhere"
        assert not leaked & needed_by(rule)


def test_scores_are_those_of_a_run_without_conda(
    finished: Outcome, folder: Path, tmp_path: Path, snakemake: Callable[..., Outcome]
) -> None:
    shutil.copy(folder / "screen.h5ad", tmp_path)
    outcome = snakemake(tmp_path, "evaluated", config=CONFIG)
    assert outcome.returncode == 0, outcome.text
    for model in CONFIG["select"]["models"]:
        scores = f"results/mine/unseen_combination/{model}/seed_0/metrics.tsv"
        assert (folder / scores).read_bytes() == (tmp_path / scores).read_bytes(), model


def test_a_pin_that_cannot_be_had_is_named_with_its_file(
    tmp_path: Path, variables: dict[str, str], snakemake: Callable[..., Outcome]
) -> None:
    edited = copy_repository(tmp_path / "edited")
    file = edited / "envs" / "data.yaml"
    file.write_text(file.read_text().replace("pandas =2.3.3", "pandas =2.3.99"))
    make_screen().write_h5ad(tmp_path / "screen.h5ad")
    outcome = snakemake(
        tmp_path,
        "pairs",
        "--sdm",
        "conda",
        "--conda-create-envs-only",
        config=CONFIG,
        environment=variables,
        repository=edited,
    )
    assert outcome.returncode != 0
    assert "envs/data.yaml" in outcome.text
    assert "No candidates were found for pandas 2.3.99.*" in outcome.text
