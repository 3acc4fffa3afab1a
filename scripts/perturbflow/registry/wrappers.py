"""The files of a model that a script trains: the script, its environment, and what else its params name."""

import ast
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perturbflow.errors import InputError
from perturbflow.registry.places import locks_folder, wrappers_folder


def script_of(params: Mapping[str, Any]) -> Path:
    """Return the script: the user's own, or one that ships."""
    own = Path(params["script"])
    return own if own.is_file() else wrappers_folder() / own


def environment_of(params: Mapping[str, Any]) -> Path | None:
    """Return the environment: a folder that is there, a lock of pip, or None for the workflow's own."""
    name = params["environment"]
    if name is None:
        return None
    own = Path(name)
    return own if own.is_dir() or own.suffix == ".txt" else locks_folder() / f"{name}.txt"


def files_of(params: Mapping[str, Any]) -> dict[str, Path]:
    """Return role → file that a training is made from.

    Of an environment it has the lock. An environment that is there already counts by its path alone.
    """
    script, environment = script_of(params), environment_of(params)
    files = {"script": script, **{f"files.{name}": Path(path) for name, path in params["files"].items()}}
    if environment is not None and not environment.is_dir():
        files["environment"] = environment
    return files | {file.name: file for file in _imported(script)}


def _imported(script: Path) -> list[Path]:
    """Return the Python files beside a script that it imports."""
    if script.suffix != ".py" or not script.is_file():
        return []
    try:
        nodes = list(ast.walk(ast.parse(script.read_bytes())))
    except SyntaxError as error:
        raise InputError(f"{script} is no Python: {error}.") from error
    modules = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    modules += [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    beside = [script.with_name(f"{module.split('.')[0]}.py") for module in dict.fromkeys(modules)]
    return [file for file in beside if file.is_file() and file != script]


def problem_of_files(params: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return key and sentence of a file of the params that is not there, or None."""
    for role, file in files_of(params).items():
        if file.is_file():
            continue
        key, shown = role, params["script"]
        if role == "environment":
            ships = sorted(lock.stem for lock in locks_folder().glob("*.txt"))
            return key, (
                f"there is no folder and no lock '{params['environment']}' (looked for {file.absolute()}). It takes a "
                f"lock of pip (.txt), the folder of an environment, or one that ships: {', '.join(ships)}"
            )
        if role == "script":
            ships = sorted(script.name for script in wrappers_folder().glob("*.py"))
            return (
                key,
                f"there is no script '{shown}' (looked for {Path(shown).absolute()}). These ship: {', '.join(ships)}",
            )
        return key, f"there is no file '{file}' (looked for {file.absolute()})"
    return None
