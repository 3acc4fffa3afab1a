"""The environments: pins are exact, conda and pip mean the same software, and every rule has its imports."""

import re
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from software import (
    ENVS,
    PACKAGE,
    PYPI_NAMES,
    REPOSITORY,
    conda_pins,
    environment_files,
    locked,
    needed_by,
    normalized,
    rules,
    third_party,
)


def test_every_rule_with_a_script_was_found():
    text = "".join(file.read_text() for file in (REPOSITORY / "rules").glob("*.smk"))
    assert len(rules()) == text.count("    script:\n") + text.count("use rule ")


def test_every_environment_exists_and_is_used():
    assert {Path(rule["conda"]) for rule in rules().values()} == set(environment_files())


@pytest.mark.parametrize("file", environment_files(), ids=lambda file: file.stem)
def test_environments_are_pinned_exactly(file):
    environment = yaml.safe_load(file.read_text())
    assert set(environment) == {"channels", "dependencies"}
    assert environment["channels"] == ["conda-forge", "nodefaults"]
    for dependency in environment["dependencies"]:
        pattern = r"python =3\.11" if dependency.startswith("python ") else r"[a-z0-9-]+ =\d+(\.\d+)+"
        assert re.fullmatch(pattern, dependency), f"{file.name}: '{dependency}' is no exact pin (name =1.2.3)"


@pytest.mark.parametrize("file", environment_files(), ids=lambda file: file.stem)
def test_conda_and_pip_have_the_same_versions(file):
    lock = locked("requirements.txt")
    pins = {
        PYPI_NAMES.get(name, name): version
        for name, version in conda_pins(file).items()
        if name not in ("python", "pip")
    }
    assert pins == {name: lock.get(name) for name in pins}


@pytest.mark.parametrize("rule", sorted(rules()))
@pytest.mark.slow
def test_a_rules_environment_has_what_the_rule_imports(rule):
    file = Path(rules()[rule]["conda"])
    provided = {PYPI_NAMES.get(name, name) for name in conda_pins(file)}
    assert needed_by(rule) <= provided, f"rule {rule}: envs/{file.name} lacks {sorted(needed_by(rule) - provided)}"


@pytest.mark.slow
@pytest.mark.parametrize("file", environment_files(), ids=lambda file: file.stem)
def test_environments_hold_nothing_that_no_rule_imports(file):
    needed = set().union(*(needed_by(rule) for rule in rules() if Path(rules()[rule]["conda"]) == file))
    # pip fetches source distributions for the download rule.
    idle = {PYPI_NAMES.get(name, name) for name in conda_pins(file)} - needed - {"python", "pip"}
    assert not idle


LOCKS = ("requirements.txt", "requirements-docs.txt", "requirements-test.txt")


@pytest.mark.parametrize("file", LOCKS)
def test_lock_is_exact_and_names_no_machine(file):
    lines = [
        line.strip() for line in (ENVS / file).read_text().splitlines() if line.strip() and not line.startswith("#")
    ]
    for line in lines:
        is_inclusion = file == "requirements-test.txt" and line in {f"-r {lock}" for lock in LOCKS[:2]}
        assert is_inclusion or re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!]*", line), (
            f"{file}: '{line}' is no plain pin name==version"
        )
    names = [normalized(line.split("==")[0]) for line in lines]
    assert len(names) == len(set(names))


def test_test_lock_includes_the_other_locks():
    assert {f"-r {lock}" for lock in LOCKS[:2]} <= set((ENVS / "requirements-test.txt").read_text().splitlines())
    names = [name for lock in LOCKS for name in locked(lock)]
    assert len(names) == len(set(names))


def test_lock_has_what_the_tests_and_the_snakefile_import():
    files = [*(REPOSITORY / "workflow_tests").rglob("*.py"), *(PACKAGE / "registry").glob("*.py")]
    local = {file.stem for file in files} | {"conftest"}
    needed = set().union(*(third_party(file, is_lazy_wanted=True) for file in files)) - {
        normalized(name) for name in local
    }
    # What single benchmarks compare with: their tests skip without it.
    benchmarks = set().union(*(locked(file) for file in (REPOSITORY / "workflow_tests" / "benchmarks").glob("*.txt")))
    assert needed <= set(locked("requirements.txt")) | set(locked("requirements-test.txt")) | benchmarks


def test_running_versions_are_those_of_the_lock():
    """In the environment of the README's test command; elsewhere the lock is not what is being tested."""
    if "venv-test" not in sys.prefix:
        pytest.skip("not in .venv-test")
    pins = {name: version for lock in LOCKS for name, version in locked(lock).items()}
    assert {name: metadata.version(name).split("+")[0] for name in pins} == pins
