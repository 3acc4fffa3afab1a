"""Packages through the user's own pip, which knows their index and proxies."""

import subprocess
import sys
from pathlib import Path


def pip_download(requirement: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Download one package into a folder, without its dependencies and without installing it.

    Parameters
    ----------
    requirement
        A line of requirements with its hash: pip verifies this before it looks into the file.
    options
        Further options of `pip download`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pinned = folder.with_name(f"{folder.name}.requirements.txt")
    pinned.write_text(f"{requirement}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--require-hashes"]
    command += ["--no-deps", *options, "--dest", str(folder), "--requirement", str(pinned)]
    return subprocess.run(command, capture_output=True, text=True, check=False)
