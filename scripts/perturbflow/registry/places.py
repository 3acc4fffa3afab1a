"""Where the package's own files lie: in a clone beside the package, in an installed package within it."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def config_folder() -> Path:
    """Return the folder with the registries and their schemas.

    An installed package has its own; a clone has config/.
    """
    return _folder("config", "config")


def own_or_shipped(path: str) -> str:
    """Return the path of a file, or of the package's own one where there is none and the path is below config/."""
    shipped = config_folder().parent / path
    return str(shipped) if path.startswith("config/") and not Path(path).is_file() and shipped.is_file() else path


def wrappers_folder() -> Path:
    """Return the folder with the scripts that train models of others."""
    return _folder("external", "scripts/external")


def locks_folder() -> Path:
    """Return the folder with the environments of these scripts."""
    return _folder("environments", "envs/external")


def _folder(installed: str, cloned: str) -> Path:
    own = PACKAGE / installed
    return own if own.is_dir() else PACKAGE.parents[1] / cloned
