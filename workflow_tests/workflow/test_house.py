"""House rules: imports follow the data, scripts are thin, and each runs outside Snakemake, too."""

import ast
import inspect
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from closures import source_files
from conftest import REPOSITORY, Prepared
from house import MODULES, stage

from perturbflow import cli

SCRIPTS = sorted((REPOSITORY / "scripts").glob("*.py"))


def imported(path: Path) -> set[str]:
    """Return the dotted names that a file imports, wherever in the file."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def modules_of(names: set[str]) -> set[str]:
    """Return which of these names are modules of the package."""
    dotted = {name.removeprefix("perturbflow.").replace(".", "/") for name in names if name.startswith("perturbflow.")}
    return {name for name in dotted if name in MODULES}


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_backwards_along_the_data(module: str) -> None:
    here = stage(module)
    wrong = [other for other in modules_of(imported(MODULES[module])) if stage(other) > here]
    assert not wrong, f"{module} comes before {wrong}"


MOST_LINES = 50


@pytest.mark.parametrize("module", sorted(MODULES))
def test_functions_are_short(module: str) -> None:
    """At most 50 lines without the docstring; ruff counts the branches."""
    tall = []
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.FunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body and body[-1].end_lineno - body[0].lineno + 1 > MOST_LINES:
                tall.append(node.name)
    assert not tall, f"{module}: {', '.join(tall)}"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_the_package_knows_nothing_of_snakemake(module: str) -> None:
    assert not {name for name in imported(MODULES[module]) if name.split(".")[0].startswith("snakemake")}


def test_what_the_snakefile_imports_is_light() -> None:
    allowed = {*sys.stdlib_module_names, "perturbflow", "pandas", "yaml", "jsonschema", "referencing"}
    text = (REPOSITORY / "rules" / "common.smk").read_text()
    named = re.findall(r"^from perturbflow\.([\w.]+) import (\w+)", text, flags=re.MULTILINE)
    names = {f"{module}.{name}" for module, name in named} | {module for module, _ in named}
    files = source_files(*(MODULES[name] for name in (n.replace(".", "/") for n in names) if name in MODULES))
    assert {path.name for path in files} >= {
        "plan.py",
        "config.py",
        "families.py",
        "records.py",
        "code_version.py",
        "errors.py",
    }
    assert {name.split(".")[0] for path in files for name in imported(path)} <= allowed


def test_closed_forms_need_no_torch() -> None:
    """The environment of the data rules has none."""
    command = (
        "import sys, perturbflow.train, perturbflow.models.closed_form.baselines, "
        "perturbflow.models.closed_form.ceilings; print('torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "scripts")}
    done = subprocess.run([sys.executable, "-c", command], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --- scripts --------------------------------------------------------------------------------------------------------


def function_of(script: Path) -> tuple[object, str]:
    """Return the function that a script runs, and its name, without running it."""
    names = runpy.run_path(str(script), run_name="looked_at")
    call = next(
        node
        for node in ast.walk(ast.parse(script.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "run"
    )
    name = call.args[0].id
    return names[name], name


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_thin(script: Path) -> None:
    text = script.read_text()
    assert len(text.splitlines()) <= 15
    assert ast.get_docstring(ast.parse(text))
    assert 'if __name__ == "__main__":\n' in text


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_imported_without_side_effects(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "run", lambda *_, **__: pytest.fail("the script ran"))
    function, name = function_of(script)
    assert list(tmp_path.iterdir()) == []
    assert capfd.readouterr().out == ""
    assert name == script.stem, "rule, script and function have one name"
    assert inspect.getdoc(function)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_explains_itself_outside_snakemake(
    script: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    function, _ = function_of(script)
    function = runpy.run_path(str(script), run_name="looked_at").get(
        "ask", function
    )  # what people call, where that is another
    monkeypatch.setattr(cli, "_configure_logging", lambda _: None)
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for parameter in inspect.signature(function).parameters:
        assert f"--{parameter.replace('_', '-')}" in shown
    assert inspect.getdoc(function).splitlines()[0] in shown


def run_script(name: str, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script from the command line."""
    command = [sys.executable, str(REPOSITORY / "scripts" / f"{name}.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_script_does_its_work_from_the_command_line(prepared: dict[str, Prepared], tmp_path: Path) -> None:
    here = prepared["unseen_combination"]
    spec = json.loads(here.split.read_text())["spec"]
    inputs = ["--harmonized", here.harmonized, "--harmonization", here.harmonization, "--name", "mine"]
    done = run_script("split", *inputs, "--split", tmp_path / "split.json", "--spec", json.dumps(spec))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "split.json").read_text() == here.split.read_text()

    few = {**spec, "kind": "file", "path": str(tmp_path / "roles.json")}
    (tmp_path / "roles.json").write_text('{"train": ["TF99"], "test": ["TF1"]}')
    failed = run_script("split", *inputs, "--split", tmp_path / "failed.json", "--spec", json.dumps(few))
    assert failed.returncode == 1
    assert "no such perturbation: 'TF99' in train" in failed.stderr
    assert "Traceback" not in failed.stderr
    assert not (tmp_path / "failed.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    "script", sorted((REPOSITORY / "workflow_tests/benchmarks").glob("*.py")), ids=lambda path: path.stem
)
def test_every_benchmark_starts(script: Path, python: str) -> None:
    done = subprocess.run([python, str(script), "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_a_job_hands_over_paths_also_where_they_may_be_left_out() -> None:
    """Snakemake has a string for one file and a list for several; a function asks for paths."""
    got = {}

    def step(one: Path | None, some: list[Path] | None, single: list[Path] | None, none: list[Path] | None) -> None:
        got.update(one=one, some=some, single=single, none=none)

    inputs = {"one": "a", "some": ["b", "c"], "single": "d", "none": []}
    cli.run(step, SimpleNamespace(input=inputs, output={}, params={}, log=[]))
    assert got == {"one": Path("a"), "some": [Path("b"), Path("c")], "single": [Path("d")], "none": []}
