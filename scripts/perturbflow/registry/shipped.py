"""The configuration of the package, and a user's own on top."""

from collections.abc import Sequence
from functools import reduce
from pathlib import Path

import yaml

from perturbflow.errors import InputError
from perturbflow.registry.config import REGISTRIES, complete
from perturbflow.registry.places import config_folder
from perturbflow.registry.schemas import read_yaml


def merged(below: dict, above: dict) -> dict:
    """Return two configurations as one, as Snakemake does it: mappings are merged, all else is replaced."""
    both = dict(below)
    for key, value in above.items():
        both[key] = merged(both[key], value) if isinstance(value, dict) and isinstance(both.get(key), dict) else value
    return both


def shipped_files() -> list[Path]:
    """Return the configuration files of the package, in order."""
    return [config_folder() / f"{name}.yaml" for name in ("config", *REGISTRIES)]


def above_shipped(config: dict) -> dict:
    """Return a configuration laid over that of the package."""
    return reduce(merged, [*map(_read, shipped_files()), config])


def _read(file: Path) -> dict:
    try:
        content = read_yaml(file) or {}
    except FileNotFoundError as error:
        raise InputError(f"there is no configuration file {file}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: a configuration is a mapping, found a {type(content).__name__}.")
    return content


def shipped(files: Sequence[Path] = (), mine: dict | None = None) -> dict:
    """Return the configuration, checked and completed.

    Parameters
    ----------
    files
        A user's configuration files, in order: the last one wins.
    mine
        Blocks that are laid over all files.

    Raises
    ------
    InputError
        With one line per mistake: file, key, value and the possible values.
    """
    own = reduce(merged, [*map(_read, files), mine or {}])
    return complete(above_shipped(own), [*shipped_files(), *files])
