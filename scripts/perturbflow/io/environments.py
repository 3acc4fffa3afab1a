"""Environments of other people's software: built once per machine from a lock, and shared by all runs.

A lock is a list of pins of pip. Where conda runs the job, Python and its native libraries come from the file of conda
beside the lock, and the packages from the same lock.
"""

import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock

from perturbflow.errors import InputError
from perturbflow.io.files import content_sha256, write_json

logger = logging.getLogger(__name__)

CACHE = "PERTURBFLOW_CACHE"  # variable with the folder of all environments
READY = "perturbflow.json"  # written last: an environment without it is not whole
WITH_DEPENDENCIES = ("torch",)  # its build decides what else it needs: on a machine with a GPU, CUDA's libraries
LAST_LINES = 20
VERSIONS = (
    "import json, platform; from importlib.metadata import distributions; "
    "print(json.dumps({'python': platform.python_version(), "
    "**{found.metadata['Name']: found.version for found in distributions()}}))"
)


def cache() -> Path:
    """Return the folder of all environments: PERTURBFLOW_CACHE, or the user's cache folder."""
    of_user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get(CACHE) or Path(of_user) / "perturbflow").absolute() / "environments"


def _conda_file(lock: Path) -> Path | None:
    """Return the file of conda beside a lock where conda runs this job, else None."""
    file = lock.with_suffix(".yaml")
    return file if file.is_file() and "CONDA_PREFIX" in os.environ and shutil.which("conda") else None


def folder_of(lock: Path) -> Path:
    """Return the folder of a lock's environment: another content, Python or machine has another one."""
    made_of = [content_sha256(file)[:8] for file in (lock, _conda_file(lock)) if file]
    return cache() / "-".join([lock.stem, *made_of, f"py{platform.python_version()}", platform.machine()])


def is_ready(lock: Path) -> bool:
    """Return whether the environment of a lock is there and whole."""
    return (folder_of(lock) / READY).is_file()


def environment(lock: Path) -> Path:
    """Return the environment of a lock; build it where it is not there.

    Jobs that want the same one at the same time wait for the first of them.

    Raises
    ------
    InputError
        If it cannot be built, with the last lines of the installer.
    """
    folder = folder_of(lock)
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not is_ready(lock):
        logger.info("the environment of %s is built in %s, once on this machine: minutes", lock, folder)
    with FileLock(f"{folder}.lock"):
        if not is_ready(lock):
            shutil.rmtree(folder, ignore_errors=True)
            for words in commands(lock, folder):
                _install(words, lock)
            write_json(folder / READY, {"lock": str(lock), "versions": versions([str(folder / "bin/python")])})
    return folder


def commands(lock: Path, folder: Path) -> Iterator[list[str]]:
    """Yield the commands that build an environment."""
    if file := _conda_file(lock):
        yield ["conda", "env", "create", "--quiet", "--file", str(file), "--prefix", str(folder)]
    else:
        yield [sys.executable, "-m", "venv", str(folder)]
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet"]
    pins = [line.strip() for line in lock.read_text(encoding="utf-8").splitlines()]
    if first := [pin for pin in pins if pin.split("==")[0] in WITH_DEPENDENCIES]:
        yield [*pip, *first]
    # The lock is complete. Some authors' own bounds contradict one another, and pip would refuse them together.
    yield [*pip, "--no-deps", "--requirement", str(lock)]


def _install(words: list[str], lock: Path) -> None:
    done = subprocess.run(words, check=False, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        lines = "\n".join(done.stdout.strip().splitlines()[-LAST_LINES:])
        raise InputError(
            f"{lock}: its environment cannot be built. `{' '.join(words)}` ended with exit status {done.returncode}:\n"
            f"{lines}\nInstall it by hand, and give its folder as params.environment."
        )


def versions(python: list[str]) -> dict[str, str]:
    """Return package → version of all packages of a Python, that of Python itself among them; none if it fails."""
    try:
        done = subprocess.run([*python, "-c", VERSIONS], check=True, text=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        logger.warning("versions of %s are not known: %s", " ".join(python), error)
        return {}
    return dict(sorted(json.loads(done.stdout).items()))
