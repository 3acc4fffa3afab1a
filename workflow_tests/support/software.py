"""The rules, the files that each runs, and the software that these import; the pins of conda and of pip."""

import ast
import re
import sys
from functools import cache
from pathlib import Path

import yaml
from closures import source_files

from perturbflow.registry.families import FAMILIES

REPOSITORY = Path(__file__).resolve().parents[2]
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
