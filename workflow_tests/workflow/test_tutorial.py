"""The tutorial, from first to last command, in a fresh copy of the repository: every quoted output is compared."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import REPOSITORY, copy_repository

TUTORIAL = REPOSITORY / "docs" / "tutorial.md"
# A marker stands above every block: a command (one that fails, too), a piece of Python, a file, or what the block
# before it says.
MARKED = re.compile(r"^<!-- (?P<marker>.+?) -->\n```\w+\n(?P<text>.*?)^```$", flags=re.MULTILINE | re.DOTALL)
DECIMAL = re.compile(r"-?\d+\.\d+")


def blocks() -> Iterator[tuple[str, str]]:
    """Yield marker and text of every block, in order."""
    for match in MARKED.finditer(TUTORIAL.read_text()):
        yield match["marker"], match["text"]


def lines_of(text: str) -> list[str]:
    """Return the lines that say something, with single spaces and without the time of day that log lines begin with."""
    return [re.sub(r"^\d\d:\d\d:\d\d ", "", " ".join(line.split())) for line in text.splitlines() if line.strip()]


def agrees(shown: str, said: str) -> bool:
    """Return whether two lines are equal; decimals may differ by one unit of the last digit that is shown."""
    if DECIMAL.sub("#", shown) != DECIMAL.sub("#", said):
        return False
    pairs = zip(DECIMAL.findall(shown), DECIMAL.findall(said), strict=True)
    return all(abs(float(a) - float(b)) <= 1.01 * 10.0 ** -len(a.split(".")[1]) for a, b in pairs)


def run(command: list[str], folder: Path, fails: bool, commands: Path) -> str:
    """Run a block as a reader would, with the environment of the tests activated; return what it says."""
    variables = {
        **os.environ,
        "PATH": os.pathsep.join([str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]),
        "XDG_CACHE_HOME": str(folder / ".cache"),
    }
    done = subprocess.run(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=variables, check=False
    )
    assert (done.returncode != 0) == fails, f"{command[-1]}\n{done.stdout[-5000:]}"
    return done.stdout


def test_every_block_of_the_tutorial_has_a_marker() -> None:
    markers = [marker for marker, _ in blocks()]
    assert len(markers) == len(re.findall(r"^```\w+$", TUTORIAL.read_text(), flags=re.MULTILINE))
    assert set(markers) == {"command", "command that fails", "python", "output", "example: mine.yaml"}
    assert [markers[i - 1] for i, marker in enumerate(markers) if marker == "output"].count("example: mine.yaml") == 0


@pytest.mark.parametrize(
    ("shown", "said", "equal"),
    [
        ("stacked 0.73", "stacked 0.7276", True),
        ("stacked 0.73", "stacked 0.75", False),
        ("stacked -0.01", "stacked 0.00", True),
        ("stacked 0.73", "linear 0.73", False),
        ("total 26", "total 27", False),
        ("0.73 0.1", "0.73", False),
    ],
)
def test_lines_are_compared_to_the_digits_shown(shown: str, said: str, equal: bool) -> None:
    assert agrees(shown, said) is equal


@pytest.fixture
def commands(python: str, tmp_path: Path) -> Path:
    """Return a folder with a `snakemake` that starts in a tenth of the time, as do the jobs that it starts."""
    folder = tmp_path / "commands"
    folder.mkdir()
    (folder / "snakemake").write_text(f'#!/bin/sh\nexec {python} -m snakemake "$@"\n')
    (folder / "snakemake").chmod(0o755)
    return folder


@pytest.mark.slow
def test_the_tutorial_says_what_happens(default_download: None, commands: Path, tmp_path: Path) -> None:
    folder = copy_repository(tmp_path / "repository")
    said: list[str] = []
    kind = ""
    for marker, text in blocks():
        if marker == "output":
            shown = lines_of(text)
            if kind == "python":
                assert len(shown) == len(said), "\n".join(said)
                wrong = [pair for pair in zip(shown, said, strict=True) if not agrees(*pair)]
            else:  # Snakemake says more than is quoted
                wrong = [line for line in shown if not any(agrees(line, other) for other in said)]
            assert not wrong, f"{wrong}\nnot in\n" + "\n".join(said)
            continue
        kind = marker
        if marker.startswith("example: "):
            (folder / marker.removeprefix("example: ")).write_text(text)
        elif marker == "python":
            said = lines_of(run([sys.executable, "-c", text], folder, False, commands))
        else:
            said = lines_of(run(["bash", "-c", text], folder, "fails" in marker, commands))
    assert (folder / "results/report.html").is_file()
    assert (folder / "page.html").is_file()
