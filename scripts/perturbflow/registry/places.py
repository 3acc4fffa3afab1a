"""Where the package's configuration lies: in a clone beside the scripts, in an installed package within it."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def config_folder() -> Path:
    """Return the folder with the registries and their schemas.

    An installed package has its own; a clone has config/.
    """
    own = PACKAGE / "config"
    return own if own.is_dir() else PACKAGE.parents[1] / "config"
