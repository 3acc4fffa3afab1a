"""The environments: what is pinned, that conda and pip mean the same software, and that every rule has what it imports."""

import ast
import re
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from closures import source_files

from perturbflow.registry.families import FAMILIES

REPOSITORY = Path(__file__).resolve().parents[1]
ENVS = REPOSITORY / "envs"
PACKAGE = REPOSITORY / "scripts" / "perturbflow"

# conda's name → PyPI's, where they differ.
PYPI_NAMES = {"pytorch": "torch", "matplotlib-base": "matplotlib", "python-isal": "isal"}
# Import name → PyPI's name, where they differ.
DISTRIBUTIONS = {
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
    "pytorch_lightning": "pytorch-lightning",
    "rattler": "py-rattler",
}
# What is imported behind a call: pandas' parquet engine.
BEHIND_CALLS = {"read_parquet": "pyarrow", "to_parquet": "pyarrow"}


def normalized(name: str) -> str:
    """Return a distribution's name as PyPI compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def locked(file: str) -> dict[str, str]:
    """Return the pins of a requirements file, without those of the files that it includes."""
    lines = [line.split("#")[0].strip() for line in (ENVS / file).read_text().splitlines()]
    return {normalized(line.split("==")[0]): line.split("==")[1] for line in lines if line and not line.startswith("-")}


def conda_pins(file: Path) -> dict[str, str]:
    """Return conda's names and versions of an environment file."""
    return dict(dependency.split(" =") for dependency in yaml.safe_load(file.read_text())["dependencies"])


@cache
def rules() -> dict[str, dict[str, str]]:
    """Return conda and script of every rule that has a script; a rule made by `use rule` has those of the other."""
    found: dict[str, dict[str, str]] = {}
    for file in sorted((REPOSITORY / "rules").glob("*.smk")):
        text = file.read_text()
        for name, body in re.findall(r"^rule (\w+):\n(.*?)(?=^\S|\Z)", text, flags=re.MULTILINE | re.DOTALL):
            fields = {
                key: re.search(rf'^    {key}:\n\s+"([^"]+)"', body, flags=re.MULTILINE) for key in ("conda", "script")
            }
            if fields["script"]:
                assert fields["conda"], f"rule {name} has a script and no conda environment"
                found[name] = {key: str((file.parent / match[1]).resolve()) for key, match in fields.items()}
        for base, name in re.findall(r"^use rule (\w+) as (\w+) with:", text, flags=re.MULTILINE):
            found[name] = found[base]
    return found


def imports(file: Path, is_lazy_wanted: bool) -> list[ast.Import | ast.ImportFrom]:
    """Return the statements by which a file imports when it is imported itself, or also inside its functions."""
    tree = ast.parse(file.read_text())
    nodes = ast.walk(tree) if is_lazy_wanted else _outside_functions(tree)
    return [node for node in nodes if isinstance(node, ast.Import | ast.ImportFrom)]


def third_party(file: Path, is_lazy_wanted: bool) -> set[str]:
    """Return the distributions that a file imports; see `imports`."""
    modules = set()
    for node in imports(file, is_lazy_wanted):
        if isinstance(node, ast.Import):
            modules.update(alias.name.split(".")[0] for alias in node.names)
        elif node.level == 0:
            modules.add(node.module.split(".")[0])
    attributes = (node.attr for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Attribute))
    behind = {BEHIND_CALLS[name] for name in attributes if name in BEHIND_CALLS}
    external = modules - set(sys.stdlib_module_names) - {"perturbflow", "snakemake"}
    return {normalized(DISTRIBUTIONS.get(module, module)) for module in external} | behind


def _outside_functions(node: ast.AST) -> list[ast.AST]:
    inner = [
        child
        for child in ast.iter_child_nodes(node)
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
    ]
    return [node, *(found for child in inner for found in _outside_functions(child))]


def roots_of(rule: str) -> list[Path]:
    """Return a rule's script and the classes of the families that it trains or runs: those are imported by name."""
    script = Path(rules()[rule]["script"])
    if script.stem == "train":
        families = [family for family in FAMILIES.values() if family.rule == rule]
    elif script.stem in ("predict", "counterfactual"):
        families = list(FAMILIES.values())
    else:
        families = []
    return [
        script,
        *sorted(
            {PACKAGE / "models" / f"{family.implementation.split(':')[0].replace('.', '/')}.py" for family in families}
        ),
    ]


def files_of(rule: str) -> dict[Path, bool]:
    """Return the files that a rule runs, and whether the rule needs what they import inside functions.

    An import inside a function counts in the step's own module and in the families; elsewhere it is there because not
    every rule needs it (torch in `artefacts`, scanpy in `pairs`).
    """
    roots = roots_of(rule)
    own = {file for root in roots for file in (root, *_named_imports(root))}
    files = source_files(*roots)
    # Python runs a package's __init__ before any module within it.
    while packages := {
        folder / "__init__.py" for file in files for folder in file.parents if PACKAGE in (folder, *folder.parents)
    } - {*files}:
        files = source_files(*files, *packages)
    return {file: file in own for file in files}


def needed_by(rule: str) -> set[str]:
    """Return the distributions that a rule imports."""
    return set().union(*(third_party(file, is_lazy_wanted) for file, is_lazy_wanted in files_of(rule).items()))


def _named_imports(script: Path) -> list[Path]:
    if script.parent.name != "scripts":
        return []
    modules = [
        node.module
        for node in ast.walk(ast.parse(script.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module
    ]
    places = [PACKAGE.parent.joinpath(*module.split(".")) for module in modules if module.startswith("perturbflow.")]
    return [
        file
        for place in places
        for file in (sorted(place.glob("*.py")) if place.is_dir() else [place.with_suffix(".py")])
    ]


def environment_files() -> list[Path]:
    return sorted(ENVS.glob("*.yaml"))


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
def test_a_rules_environment_has_what_the_rule_imports(rule):
    file = Path(rules()[rule]["conda"])
    provided = {PYPI_NAMES.get(name, name) for name in conda_pins(file)}
    assert needed_by(rule) <= provided, f"rule {rule}: envs/{file.name} lacks {sorted(needed_by(rule) - provided)}"


@pytest.mark.parametrize("file", environment_files(), ids=lambda file: file.stem)
def test_environments_hold_nothing_that_no_rule_imports(file):
    needed = set().union(*(needed_by(rule) for rule in rules() if Path(rules()[rule]["conda"]) == file))
    # pip fetches source distributions for the download rule.
    idle = {PYPI_NAMES.get(name, name) for name in conda_pins(file)} - needed - {"python", "pip"}
    assert not idle


@pytest.mark.parametrize("file", ["requirements.txt", "requirements-test.txt"])
def test_lock_is_exact_and_names_no_machine(file):
    lines = [
        line.strip() for line in (ENVS / file).read_text().splitlines() if line.strip() and not line.startswith("#")
    ]
    for line in lines:
        is_inclusion = file == "requirements-test.txt" and line == "-r requirements.txt"
        assert is_inclusion or re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.!]*", line), (
            f"{file}: '{line}' is no plain pin name==version"
        )
    names = [normalized(line.split("==")[0]) for line in lines]
    assert len(names) == len(set(names))


def test_test_lock_includes_the_runtime_lock():
    assert "-r requirements.txt" in (ENVS / "requirements-test.txt").read_text().splitlines()
    assert not set(locked("requirements-test.txt")) & set(locked("requirements.txt"))


def test_lock_has_what_the_tests_and_the_snakefile_import():
    files = [*Path(__file__).parent.rglob("*.py"), *(PACKAGE / "registry").glob("*.py")]
    local = {file.stem for file in files} | {"conftest"}
    needed = set().union(*(third_party(file, is_lazy_wanted=True) for file in files)) - {
        normalized(name) for name in local
    }
    # What single benchmarks compare with: their tests skip without it.
    benchmarks = set().union(*(locked(file) for file in (Path(__file__).parent / "benchmarks").glob("*.txt")))
    assert needed <= set(locked("requirements.txt")) | set(locked("requirements-test.txt")) | benchmarks


def test_running_versions_are_those_of_the_lock():
    """In the environment of the README's test command; elsewhere the lock is not what is being tested."""
    if "venv-test" not in sys.prefix:
        pytest.skip("not in .venv-test")
    pins = {**locked("requirements.txt"), **locked("requirements-test.txt")}
    assert {name: metadata.version(name).split("+")[0] for name in pins} == pins
