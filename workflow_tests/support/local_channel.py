"""A conda channel in a folder, made of the Python and the distributions that run the tests.

Its packages have conda's names, the installed versions, and the requirements that the distributions declare. A package
that is pinned to another version than the installed one comes from the package index.
"""

import asyncio
import io
import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import Distribution, distributions
from pathlib import Path

import pyarrow
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rattler import Subdir
from rattler.index import index_fs

PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
SITE_PACKAGES = f"lib/{PYTHON}/site-packages"
BUILD = "local_0"
# Tests and headers are half of all files; no rule needs them.
NOT_PACKED = {"..", "tests", "include"}
# So are these of the standard library.
LEFT_OUT = (
    "__pycache__",
    "test",
    "tests",
    "idlelib",
    "tkinter",
    "turtledemo",
    "ensurepip",
    "config-*",
    "site-packages",
    "dist-packages",
)


class NoChannelError(Exception):
    """A channel cannot be made on this machine; the message says why."""


@dataclass(frozen=True)
class Package:
    """What goes into one package; `files` are place within an environment → file on this machine."""

    name: str
    version: str
    depends: list[str]
    files: dict[str, Path]

    @property
    def size(self) -> int:
        """Bytes when unpacked."""
        return sum(file.lstat().st_size for file in self.files.values())

    def write(self, folder: Path) -> None:
        """Write a .conda file: a zip of two archives, the files and what is said of them."""
        index = {"name": self.name, "version": self.version, "build": BUILD, "build_number": 0, "depends": self.depends}
        paths = [
            {"_path": place, "path_type": "softlink" if file.is_symlink() else "hardlink"}
            for place, file in self.files.items()
        ]
        about = {"index.json": {**index, "subdir": folder.name}, "paths.json": {"paths": paths, "paths_version": 1}}
        stem = f"{self.name}-{self.version}-{BUILD}"
        with zipfile.ZipFile(folder / f"{stem}.conda", "w") as package:
            package.writestr("metadata.json", json.dumps({"conda_pkg_format_version": 2}))
            with _archive_within(package, f"pkg-{stem}.tar.zst") as archive:
                for place, file in self.files.items():
                    archive.add(file, place, recursive=False)
            with _archive_within(package, f"info-{stem}.tar.zst") as archive:
                for name, content in about.items():
                    text = json.dumps(content).encode()
                    member = tarfile.TarInfo(f"info/{name}")
                    member.size = len(text)
                    archive.addfile(member, io.BytesIO(text))


@contextmanager
def _archive_within(package: zipfile.ZipFile, name: str) -> Iterator[tarfile.TarFile]:
    with (
        package.open(name, "w", force_zip64=True) as raw,
        pyarrow.CompressedOutputStream(pyarrow.PythonFile(raw), "zstd") as stream,
        tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT, copybufsize=2**20) as archive,
    ):
        yield archive


def make_channel(folder: Path, pins: dict[str, str], conda_names: dict[str, str]) -> None:
    """Write a channel of this Python, of pinned distributions and of all that they require.

    Parameters
    ----------
    pins
        PyPI's name → version.
    conda_names
        PyPI's name → conda's, where they differ.
    """
    work, packed = folder / "work", folder / str(Subdir.current())
    for place in (work, packed, folder / "noarch"):
        place.mkdir(parents=True)
    packages = [_python(work / "python"), *_distributions(pins, _installed(pins, work / "fetched"), conda_names)]
    # Packed, and unpacked once: environments are hard links to what was unpacked.
    needed, free = 2 * sum(package.size for package in packages), shutil.disk_usage(folder).free
    if needed > free:
        raise NoChannelError(
            f"the environments take {needed / 1e9:.1f} GB of disk for a while, and {free / 1e9:.1f} GB are free"
        )
    for package in packages:
        package.write(packed)
    shutil.rmtree(work)
    asyncio.run(index_fs(folder, write_zst=False, write_shards=False))


# --- distributions --------------------------------------------------------------------------------------------------


def _installed(pins: dict[str, str], fetched: Path) -> dict[str, Distribution]:
    """Return all distributions by name, pinned ones in the pinned version."""
    installed = {canonicalize_name(one.name): one for one in reversed([*distributions()])}  # the first on the path wins
    other = [
        f"{name}=={version}"
        for name, version in pins.items()
        if name not in installed or _version(installed[name]) != version
    ]
    if other:
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            "--target",
            str(fetched),
        ]
        done = subprocess.run([*command, *other], capture_output=True, text=True, check=False)
        if done.returncode:
            raise NoChannelError(f"pip could not fetch {', '.join(other)}: {done.stderr.strip()}")
        installed |= {canonicalize_name(one.name): one for one in distributions(path=[str(fetched)])}
    return installed


def _version(distribution: Distribution) -> str:
    """Return a version without the suffix that names a build, as in torch's +cpu."""
    return distribution.version.split("+")[0]


def _distributions(
    pins: dict[str, str], installed: dict[str, Distribution], conda_names: dict[str, str]
) -> Iterator[Package]:
    """Yield a package for every pinned distribution and for all that they require."""
    waiting, seen = sorted(pins), set(pins)
    while waiting:
        name = waiting.pop()
        distribution = installed[name]
        requirements = {canonicalize_name(one.name): one for one in _requirements(distribution, installed)}
        depends = [
            f"{conda_names.get(other, other)} {one.specifier}".strip() for other, one in sorted(requirements.items())
        ]
        # Commands, outside site-packages, begin with the path of the Python that pip installed them for.
        wanted = [
            file
            for file in distribution.files
            if not NOT_PACKED & {*file.parts} and Path(distribution.locate_file(file)).exists()
        ]
        files = {f"{SITE_PACKAGES}/{file}": Path(distribution.locate_file(file)) for file in wanted}
        yield Package(
            conda_names.get(name, name),
            _version(distribution),
            [f"python {PYTHON.removeprefix('python')}.*", *depends],
            files,
        )
        waiting += sorted(set(requirements) - seen)
        seen |= set(requirements)


def _requirements(
    distribution: Distribution, installed: dict[str, Distribution], extras: frozenset[str] = frozenset()
) -> Iterator[Requirement]:
    """Yield what a distribution requires here; conda has no extras, so what an extra requires is required at once."""
    for text in distribution.requires or []:
        one = Requirement(text)
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield one
            if one.extras:
                yield from _requirements(installed[canonicalize_name(one.name)], installed, frozenset(one.extras))


# --- Python ---------------------------------------------------------------------------------------------------------


def _python(folder: Path) -> Package:
    """Copy this Python, without what is installed into it, and see that the copy runs where it is."""
    program = Path(sys.base_prefix, "bin", PYTHON)
    standard_library = Path(sysconfig.get_path("stdlib"))
    libraries = Path(sysconfig.get_config_var("LIBDIR"))
    if not program.exists() or sys.platform != "linux":
        raise NoChannelError(f"only on Linux, with a {program}, can a copy of this Python be made")
    shutil.copytree(standard_library, folder / "lib" / PYTHON, symlinks=True, ignore=shutil.ignore_patterns(*LEFT_OUT))
    (folder / "bin").mkdir()
    content = program.read_bytes()
    if sysconfig.get_config_var("Py_ENABLE_SHARED"):
        for library in libraries.glob("libpython*.so*"):
            shutil.copy2(library, folder / "lib", follow_symlinks=False)
        # The program knows where its library is; like conda, write another place over it, filled up to its length.
        known, beside = f"{libraries}\0".encode(), b"$ORIGIN/../lib\0"
        content = content.replace(known, beside.ljust(len(known), b"\0"))
    (folder / "bin" / PYTHON).write_bytes(content)
    (folder / "bin" / PYTHON).chmod(0o755)
    for alias in ("python", "python3"):
        (folder / "bin" / alias).symlink_to(PYTHON)
    look = "import ctypes, ssl, bz2, lzma, zlib, site; print(site.getsitepackages()[0])"
    done = subprocess.run([folder / "bin" / PYTHON, "-I", "-c", look], capture_output=True, text=True, check=False)
    if done.stdout.strip() != str(folder / SITE_PACKAGES):
        raise NoChannelError(
            f"a copy of {sys.base_prefix} does not run elsewhere: {done.stderr.strip() or done.stdout.strip()}"
        )
    files = {
        str(file.relative_to(folder)): file
        for file in sorted(folder.rglob("*"))
        if not file.is_dir() or file.is_symlink()
    }
    return Package("python", sysconfig.get_config_var("py_version"), [], files)
