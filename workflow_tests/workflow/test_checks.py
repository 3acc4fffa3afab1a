"""The static checks of code: each finds nothing in the repository, and a planted fault of its kind in a copy."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import REPOSITORY, copy_repository

CONFIG = yaml.safe_load((REPOSITORY / ".pre-commit-config.yaml").read_text())
HOOKS = {hook["id"]: hook for repository in CONFIG["repos"] for hook in repository["hooks"]}
each_hook = pytest.mark.parametrize(
    "hook", [pytest.param(hook, marks=pytest.mark.slow) if hook == "mypy" else hook for hook in HOOKS]
)

# Hook → the file of a fault, text there and what takes its place, and what the message says of it.
FAULTS = {
    "ruff-check": ("scripts/perturbflow/errors.py", '"""\n', '"""\n\nimport os\n', "F401"),
    "ruff-format": ("scripts/perturbflow/colours.py", " = ", "  =  ", "colours.py"),
    "snakefmt": ("rules/split.smk", "    input:\n", "    input :\n", "would be changed"),
    "mypy": ("scripts/perturbflow/io/files.py", ".hexdigest()", ".digest()", "[return-value]"),
}


def done(hook: str, folder: Path) -> subprocess.CompletedProcess:
    """Run a hook's command in a folder, with the tools of this environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = shlex.split(HOOKS[hook]["entry"])
    return subprocess.run(
        command, cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of all that is checked; every test leaves it as it was."""
    folder = copy_repository(tmp_path_factory.mktemp("copy") / "repository")
    shutil.copy(REPOSITORY / "pyproject.toml", folder)
    for name in ("workflow_tests", "leaderboard"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@each_hook
def test_a_check_finds_nothing(hook: str, copy: Path) -> None:
    found = done(hook, copy)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]


@each_hook
def test_a_check_finds_a_planted_fault(hook: str, copy: Path) -> None:
    name, right, wrong, said = FAULTS[hook]
    file = copy / name
    text = file.read_text()
    assert right in text
    try:
        file.write_text(text.replace(right, wrong, 1))
        found = done(hook, copy)
    finally:
        file.write_text(text)
    assert found.returncode != 0
    assert said in found.stdout + found.stderr


def test_hooks_have_the_versions_of_the_tests() -> None:
    """They are of the tests' environment, so a version of their own would be a second place for it."""
    pinned = set(
        re.findall(r"^([\w.-]+)==", (REPOSITORY / "envs" / "requirements-test.txt").read_text(), flags=re.MULTILINE)
    )
    assert {repository["repo"] for repository in CONFIG["repos"]} == {"local"}
    for hook in HOOKS.values():
        assert hook["language"] == "system"
        assert "additional_dependencies" not in hook
        assert shlex.split(hook["entry"])[0] in pinned


def test_every_exception_from_types_has_its_reason() -> None:
    lines = [
        line
        for file in (REPOSITORY / "scripts").rglob("*.py")
        for line in file.read_text().splitlines()
        if "type: ignore" in line
    ]
    without = [line for line in lines if not re.search(r"# type: ignore\[[a-z-]+\]  # \w", line)]
    assert not without
