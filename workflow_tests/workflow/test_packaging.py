"""The package from outside: wheel, requirements, version, the forge's workflow, the image, the entry in the catalog."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, copy_repository
from packaging.requirements import Requirement
from software import conda_pins, environment_files, locked, normalized, third_party

from perturbflow import __version__
from perturbflow.registry.places import PACKAGE, config_folder, locks_folder, wrappers_folder
from perturbflow.registry.shipped import shipped_files

PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
DOCKERFILE = REPOSITORY / "envs" / "Dockerfile"
# What only these import may be left to an extra.
EXTRAS = {"models": {"torch", "pytorch-lightning", "optuna"}}


# --- the version ----------------------------------------------------------------------------------------------------


def test_version_citation_and_changelog_agree() -> None:
    released = re.findall(r"^## (\d[\w.]*)", (REPOSITORY / "CHANGELOG.md").read_text(), flags=re.MULTILINE)
    assert released[0] == __version__
    assert yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())["version"] == __version__
    assert "version" in PROJECT["dynamic"]
    images = re.findall(r"perturbflow:(\d[\w.]*)", (REPOSITORY / "docs" / "how-to" / "cluster.md").read_text())
    assert set(images) == {__version__}


def test_changelog_is_short_and_begins_with_what_changed_for_results() -> None:
    text = (REPOSITORY / "CHANGELOG.md").read_text()
    assert len(text.split()) <= 1300
    assert re.findall(r"^##+ (.*)$", text, flags=re.MULTILINE)[:2] == [__version__, "What changed for results"]


# --- what is required -----------------------------------------------------------------------------------------------


def declared(extra: str | None = None) -> dict[str, Requirement]:
    """Return name → requirement of the package, or of an extra."""
    lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    return {normalized(one.name): one for one in map(Requirement, lines)}


def test_requirements_are_what_the_package_imports() -> None:
    imported = set().union(*(third_party(file, is_lazy_wanted=True) for file in PACKAGE.rglob("*.py")))
    assert imported - EXTRAS["models"] == set(declared())
    assert set(declared("models")) == EXTRAS["models"]
    assert imported >= EXTRAS["models"]


@pytest.mark.parametrize("extra", [None, *PROJECT["optional-dependencies"]])
def test_every_requirement_has_a_lower_bound_and_admits_the_pin(extra: str | None) -> None:
    pins = locked("requirements.txt")
    for name, requirement in declared(extra).items():
        assert any(bound.operator == ">=" for bound in requirement.specifier), f"{requirement} has no lower bound"
        assert pins[name] in requirement.specifier, (
            f"{requirement} does not admit {pins[name]} of envs/requirements.txt"
        )


# --- the wheel ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a wheel of this checkout, built without a network from a copy."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = copy_repository(folder / "repository")
    for name in ("pyproject.toml", "README.md", "LICENSE", "CITATION.cff", "CHANGELOG.md", ".gitignore"):
        shutil.copy(REPOSITORY / name, copy)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        str(copy),
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "-w",
        str(folder),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_wheel_holds_the_package_its_tables_and_the_registries(wheel: Path) -> None:
    assert wheel.name == f"perturbflow-{__version__}-py3-none-any.whl"
    files = zipfile.ZipFile(wheel).namelist()
    held = {name for name in files if name.startswith("perturbflow/")}
    own = {path for path in PACKAGE.rglob("*") if path.is_file() and path.parent.name != "__pycache__"}
    expected = {f"perturbflow/{path.relative_to(PACKAGE).as_posix()}" for path in own}
    lists = (config_folder() / "splits").glob("*.json")
    registries = [*shipped_files(), *(config_folder() / "schemas").glob("*.yaml"), *lists]
    expected |= {f"perturbflow/config/{path.relative_to(config_folder()).as_posix()}" for path in registries}
    expected |= {f"perturbflow/external/{file.name}" for file in wrappers_folder().glob("*.py")}
    expected |= {f"perturbflow/environments/{file.name}" for file in locks_folder().iterdir()}
    assert held == expected


def test_installed_command_works_without_the_clone(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    command = [sys.executable, "-m", "pip", "install", str(wheel), "--no-deps", "--no-index", "--target", str(target)]
    subprocess.run(command, capture_output=True, check=True)
    environment = {**os.environ, "PYTHONPATH": str(target)}

    def printed(*words: object) -> str:
        done = subprocess.run(
            [*map(str, words)], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    script = target / "bin" / "perturbflow"
    assert printed(script, "--version") == f"perturbflow {__version__}\n"
    assert "renge2023" in printed(script, "list")
    found = printed(
        sys.executable,
        "-c",
        (
            "from perturbflow.genes import symbols; from perturbflow.registry import places; "
            "print(places.config_folder(), symbols.TABLE)"
        ),
    )
    assert found.split() == [
        str(target / "perturbflow" / "config"),
        str(target / "perturbflow" / "genes" / "hgnc.tsv.gz"),
    ]


# --- the forge ------------------------------------------------------------------------------------------------------


def steps(file: Path) -> list[dict]:
    """Return the steps of all jobs of a workflow of the forge."""
    return [step for job in yaml.safe_load(file.read_text())["jobs"].values() for step in job["steps"]]


def commands(file: Path) -> list[list[str]]:
    """Return the commands of all steps, as words, without what they are piped to."""
    lines = [line for step in steps(file) if "run" in step for line in step["run"].splitlines()]
    return [shlex.split(line.split("|")[0].split(">>")[0]) for line in lines]


def test_there_is_a_workflow_of_the_forge() -> None:
    assert WORKFLOWS


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda path: path.name)
def test_forge_runs_what_exists_and_nothing_of_its_own(file: Path) -> None:
    hooks = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())["repos"]
    contributing = (REPOSITORY / "CONTRIBUTING.md").read_text()
    ran = commands(file)
    for words in ran:
        if words[0] == ".ci/run":
            assert os.access(REPOSITORY / words[0], os.X_OK)
            assert len(words) == 1
        elif words[0] == "pre-commit":
            assert hooks
            assert shlex.join(words) in contributing
        elif words[:2] == ["pip", "install"]:
            assert (REPOSITORY / words[words.index("-r") + 1]).is_file()
            assert all(word in contributing for word in words[2:] if "==" in word)
        elif words[0] == "snakemake":
            assert words == ["snakemake", "-n"] or (REPOSITORY / words[words.index("--configfile") + 1]).is_file()
        elif words[0] == "python":
            assert (REPOSITORY / words[1]).is_file()
        else:
            assert words[0] in ("echo", "tail", "git"), f"{file.name} runs {shlex.join(words)}, which is tested nowhere"
    assert "snakemake" in {words[0] for words in ran}
    assert file.name != "tests.yml" or {words[0] for words in ran} >= {".ci/run", "pre-commit"}
    for step in steps(file):
        if "run" in step:
            subprocess.run(["bash", "-n", "-c", step["run"]], check=True)


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda path: path.name)
def test_forge_pins_actions_and_python_and_ends_older_runs(file: Path) -> None:
    content = yaml.safe_load(file.read_text())
    used = [step for step in steps(file) if "uses" in step]
    assert used
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}", step["uses"]) for step in used)
    assert len(re.findall(r"uses: \S+@[0-9a-f]{40}  # v\d+\.\d+\.\d+$", file.read_text(), flags=re.MULTILINE)) == len(
        used
    )
    versions = {step["with"]["python-version"] for step in used if "setup-python" in step["uses"]}
    assert versions == {"3.11"}
    assert content["concurrency"]["cancel-in-progress"] is True
    assert content["permissions"] == {"contents": "read"}
    assert content["defaults"]["run"]["shell"] == "bash", (
        "only bash named as such fails where the first command of a pipe does"
    )
    for job in content["jobs"].values():
        assert any("GITHUB_STEP_SUMMARY" in step.get("run", "") for step in job["steps"])
        assert job["timeout-minutes"]


# --- the image ------------------------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """Return the instructions of the Dockerfile with their arguments."""
    text = re.sub(r"\\\n", " ", DOCKERFILE.read_text())
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def test_image_is_made_of_the_lock_by_the_command_of_the_readme() -> None:
    found = instructions()
    assert {word for word, _ in found} <= {"FROM", "WORKDIR", "COPY", "RUN", "ENV"}
    assert found[0][0] == "FROM"
    copies = dict(shlex.split(rest) for word, rest in found if word == "COPY")
    assert all((DOCKERFILE.parent / source).is_file() for source in copies)  # the folder is the context
    (command,) = (rest for word, rest in found if word == "RUN")
    readme = re.search(
        r"<!-- command: run -->\n```bash\n.*?&& \.venv/bin/(pip install .*?)\n", (REPOSITORY / "README.md").read_text()
    )
    assert readme
    assert command.replace(" --no-cache-dir", "") == readme[1]
    assert set(copies.values()) == {"envs/requirements.txt"}


def test_image_has_the_python_of_the_environments() -> None:
    versions = {conda_pins(file)["python"] for file in environment_files()}
    base = next(rest for word, rest in instructions() if word == "FROM")
    assert {re.fullmatch(r"python:(\d+\.\d+)-slim-\w+", base)[1]} == versions


# --- the catalog ----------------------------------------------------------------------------------------------------


def test_catalog_promises_what_there_is() -> None:
    usage = yaml.safe_load((REPOSITORY / ".snakemake-workflow-catalog.yml").read_text())["usage"]
    assert set(usage) == {"mandatory-flags", "software-stack-deployment", "report"}
    rules = (
        "".join(file.read_text() for file in (REPOSITORY / "rules").glob("*.smk"))
        + (REPOSITORY / "Snakefile").read_text()
    )
    deployment = usage["software-stack-deployment"]
    assert deployment["conda"] == ("    conda:\n" in rules)
    assert deployment["apptainer"] == deployment["apptainer+conda"] == bool(re.search(r"\bcontainer(ized)?:", rules))
    assert usage["report"] == ("report(" in rules)
    # What the catalog asks of the standardized usage; with it, the comment in the file is out of date.
    assert not (REPOSITORY / "workflow" / "Snakefile").exists()
