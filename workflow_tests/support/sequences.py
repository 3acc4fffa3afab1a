"""Random sequences of actions on a folder of results, and checks for stale results and repeated trainings."""

import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import h5py
import numpy as np
import yaml
from conftest import COMBINATIONS, PERTURBED, Outcome, closed_forms_config, copy_repository, run_snakemake, write_screen
from faults import finished_files

from perturbflow.train import KEPT

NETWORK = {"n_steps": 40, "batch_size": 32, "n_latent": 8, "width": 16, "n_sampling_steps": 2}
LEARNED = "results/mine/frozen/scppdm/seed_0"
LOG = Path("logs/train/mine.frozen.scppdm.seed_0.log")
ROLES = [
    {"train": PERTURBED[:7] + COMBINATIONS[:3], "validation": [], "test": [PERTURBED[7], *COMBINATIONS[3:]]},
    {"train": PERTURBED[:6] + COMBINATIONS[:3], "validation": [], "test": [*PERTURBED[6:], *COMBINATIONS[3:]]},
]
# What of the configuration is changed: name → values, the first of which every sequence starts with.
CONFIG = {
    "n_hvg": (40, 30),
    "n_steps": (40, 50),
    "ridge": (0.1, 0.5),
    "max_cells": (1000, 12),
    "min_counts": (None, 900),
    "reference": ("", "doi:10.1/x"),
}
# Code: name → file of the package, text there, and what takes its place. `words` are edits that change no number.
CODE = {
    "a message": ("io/files.py", "is not valid JSON", "cannot be read as JSON"),
    "a log line": ("pairs.py", "logger.info(", "logger.debug("),
    "a new family": (
        "models/closed_form/baselines.py",
        "class Additive(",
        "class Another:\n    level = 3\n\n\nclass Additive(",
    ),
    "a comment": ("models/scppdm.py", "class Diffusion(", "# a remark\nclass Diffusion("),
    "the metrics": ("evaluation/inputs.py", "N_COMPONENTS = 50", "N_COMPONENTS = 9"),
    "the pairing": ("pairs.py", "CONTROLS_PER_CELL = 8", "CONTROLS_PER_CELL = 3"),
    "the baselines": ("models/closed_form/baselines.py", "1e-10 * s[0]", "1e-3 * s[0]"),
}
NUMBERS = ("the metrics", "the pairing", "the baselines")


def is_moment(name: str) -> bool:
    """Return whether a file says when and how long, besides what."""
    return name.endswith(("run.json", "report.html", "report.json"))


@dataclass
class Place:
    """A folder with a screen, a configuration and a copy of the repository, and what was done there.

    `state` says all that results may depend on; a run from nothing in the same state has to give the same files.
    """

    folder: Path
    python: str = sys.executable
    state: dict = field(
        default_factory=lambda: {
            "screen": 0,
            "roles": 0,
            "code": [],
            **{name: values[0] for name, values in CONFIG.items()},
        }
    )
    trained: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    needless: list[str] = field(default_factory=list)
    excused: bool = False  # what was kept of trainings is gone

    @property
    def repository(self) -> Path:
        """The copy that runs."""
        return self.folder / "repository"

    def write(self) -> None:
        """Write screen, split file, configuration and code as the state says."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self.repository.exists():
            copy_repository(self.repository)
        write_if_other(self.folder / "screen.h5ad", screen(self.state["screen"]))
        write_if_other(self.folder / "roles.json", json.dumps(ROLES[self.state["roles"]]).encode())
        package = self.repository / "scripts/perturbflow"
        original = Path(__file__).parents[2] / "scripts/perturbflow"
        for name in {file for file, _, _ in CODE.values()}:
            text = (original / name).read_text()
            for edit in self.state["code"]:
                file, before, after = CODE[edit]
                if file == name:
                    assert before in text, edit
                    text = text.replace(before, after, 1)
            write_if_other(package / name, text.encode())

    def config(self) -> dict:
        """Return the user's configuration in this state."""
        state = self.state
        config = closed_forms_config(
            splits={"frozen": {"kind": "file", "path": "roles.json"}},
            models={
                "scppdm": {"params": {**NETWORK, "n_steps": state["n_steps"]}},
                "linear": {"params": {"ridge": state["ridge"]}},
            },
            predict={"max_cells": state["max_cells"]},
            device="cpu",
        )
        config["select"] |= {"splits": ["frozen"], "models": ["linear", "scppdm"]}
        config["genes"]["n_hvg"] = state["n_hvg"]
        config["datasets"]["mine"]["qc"]["min_counts"] = state["min_counts"]
        config["datasets"]["mine"]["reference"] = state["reference"]
        return config

    def trains_on(self) -> str:
        """Return all that the training of the network depends on."""
        state = self.state
        names = ("screen", "roles", "n_hvg", "n_steps", "min_counts")
        return json.dumps([[state[name] for name in names], sorted(set(state["code"]) & {"the pairing"})])

    def run(self, *arguments: str) -> Outcome:
        """Run the workflow to its end, and note a training that was there already."""
        self.write()
        before = self._log_stamp()
        outcome = run_snakemake(
            self.folder, *arguments, config=self.config(), repository=self.repository, python=self.python
        )
        self._note_training(before)
        return outcome

    def interrupted(self, dice: random.Random) -> None:
        """Start a run and end it after some seconds: gently, or with kill -9."""
        self.write()
        before = self._log_stamp()
        (self.folder / "mine.yaml").write_text(yaml.safe_dump(self.config()))
        command = [
            self.python,
            "-m",
            "snakemake",
            "--snakefile",
            str(self.repository / "Snakefile"),
            "--cores",
            "2",
            "--configfile",
            "mine.yaml",
        ]
        rule = dice.choice(("train_diffusion", "pair", ""))
        command += ["--forcerun", rule] if rule else []
        variables = {**os.environ, "XDG_CACHE_HOME": str(self.folder / ".cache")}
        with (self.folder / "output.txt").open("w") as file:
            process = subprocess.Popen(
                command, cwd=self.folder, stdout=file, stderr=file, env=variables, start_new_session=True
            )
            time.sleep(dice.uniform(3, 20))
            if process.poll() is None:
                os.killpg(process.pid, dice.choice((signal.SIGINT, signal.SIGTERM, signal.SIGKILL)))
            process.wait(120)
        time.sleep(0.5)
        run_snakemake(self.folder, "--unlock", config=self.config(), repository=self.repository, python=self.python)
        self._note_training(before)

    def _log_stamp(self) -> int:
        log = self.folder / LOG
        return log.stat().st_mtime_ns if log.exists() else 0

    def _note_training(self, before: int) -> None:
        if self._log_stamp() == before or " trained in " not in (self.folder / LOG).read_text():
            return
        what = self.trains_on()
        if what in self.trained[-KEPT:] and not self.excused:
            self.needless.append(self.done[-1] if self.done else "first run")
        self.excused = False
        self.trained = [other for other in self.trained if other != what] + [what]

    def files(self) -> dict[str, str]:
        """Return what lies under final names, by digests, but for what says when and how long."""
        return {name: content for name, content in finished_files(self.folder).items() if not is_moment(name)}

    def results(self) -> list[Path]:
        """Return the result files that are there."""
        return sorted(
            path for path in (self.folder / "results").rglob("*") if path.is_file() and ".made" not in path.parts
        )


def write_if_other(path: Path, content: bytes) -> None:
    """Write a file only where it holds another content, as an editor does."""
    if not path.exists() or path.read_bytes() != content:
        path.write_bytes(content)


@cache
def screen(seed: int) -> bytes:
    """Return the bytes of a small screen."""
    with tempfile.TemporaryDirectory() as folder:
        return write_screen(Path(folder), seed).read_bytes()


# --- what people do -------------------------------------------------------------------------------------------------


def edit_configuration(place: Place, dice: random.Random) -> str:
    """Change one key, or change it back."""
    name = dice.choice(list(CONFIG))
    place.state[name] = next(value for value in CONFIG[name] if value != place.state[name])
    return f"{name} = {place.state[name]}"


def edit_code(place: Place, dice: random.Random) -> str:
    """Edit a module, or undo that."""
    name = dice.choice(list(CODE))
    place.state["code"] = sorted(set(place.state["code"]) ^ {name})
    return f"{name} {'edited' if name in place.state['code'] else 'undone'}"


def edit_data(place: Place, dice: random.Random) -> str:
    """Put another screen or split file where the old one was."""
    name = dice.choice(("screen", "roles"))
    place.state[name] = 1 - place.state[name]
    return f"another {name}"


def delete(place: Place, dice: random.Random) -> str:
    """Delete some results."""
    chosen = dice.sample(place.results(), k=min(len(place.results()), dice.choice((1, 1, 2, 5))))
    for path in chosen:
        path.unlink()
    return f"deleted {', '.join(path.name for path in chosen)}"


def damage(place: Place, dice: random.Random) -> str:
    """Change the content of a result behind the workflow's back; with or without another time stamp."""
    path = dice.choice(place.results())
    stamp = path.stat()
    if path.name == "pairs.h5ad" or (path.suffix == ".h5ad" and dice.random() < 0.5):
        with h5py.File(path, "r+") as file:
            values = file["X/data"] if "X/data" in file else file["X"]
            values[...] = np.asarray(values) * 2
    else:
        content = bytearray(path.read_bytes())
        content = content[: len(content) // 2] if dice.random() < 0.3 else content
        if content:
            content[dice.randrange(len(content))] ^= 1
        path.write_bytes(bytes(content))
    if dice.random() < 0.5:
        os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    return f"damaged {path.name}"


def touch(place: Place, dice: random.Random) -> str:
    """Touch everything, in any order."""
    paths = [
        *place.results(),
        place.folder / "screen.h5ad",
        place.folder / "roles.json",
        *place.repository.rglob("*.py"),
    ]
    dice.shuffle(paths)
    now = time.time_ns() - 10**9
    for i, path in enumerate(paths):
        os.utime(path, ns=(now + i * 1000, now + i * 1000))
    return "touched everything"


def copy(place: Place, dice: random.Random) -> str:
    """Go on in a copy of the folder: with or without .snakemake/ and time stamps."""
    with_stamps, with_state = dice.random() < 0.5, dice.random() < 0.5
    there = place.folder.with_name(f"{place.folder.name}c")
    ignored = shutil.ignore_patterns(*([] if with_state else [".snakemake"]), ".cache")
    shutil.copytree(place.folder, there, ignore=ignored, copy_function=shutil.copy2 if with_stamps else shutil.copyfile)
    shutil.rmtree(place.folder)
    place.folder = there
    return (
        f"copied {'with' if with_state else 'without'} .snakemake/, {'with' if with_stamps else 'without'} time stamps"
    )


def ask_single(place: Place, dice: random.Random) -> str:
    """Ask for one file alone, or force it."""
    path = dice.choice(place.results()).relative_to(place.folder)
    how = dice.choice(([], ["--force"], ["--dry-run"]))
    place.run(*how, str(path))
    return f"asked for {path.name} alone {' '.join(how)}"


def force_rule(place: Place, dice: random.Random) -> str:
    """Force all jobs of a rule."""
    rule = dice.choice(("harmonize", "pair", "train_closed_form", "train_diffusion", "predict", "benchmark"))
    place.run("--forcerun", rule)
    return f"--forcerun {rule}"


def interrupt(place: Place, dice: random.Random) -> str:
    """Start a run and end it."""
    place.interrupted(dice)
    return "interrupted"


def go_on(place: Place, dice: random.Random) -> str:
    """Run to the end in the midst of it."""
    place.run()
    return "ran"


def forget(place: Place, dice: random.Random) -> str:
    """Delete what Snakemake knows, or what the workflow remembers."""
    if dice.random() < 0.5:
        shutil.rmtree(place.folder / ".snakemake")
        return "deleted .snakemake/"
    victims = [path for path in (place.folder / "results").rglob("*.json") if path.parent.name == ".made"]
    for path in dice.sample(victims, k=min(3, len(victims))):
        path.unlink()
    return "deleted records"


ACTIONS: dict[Callable[[Place, random.Random], str], int] = {
    edit_configuration: 4, edit_code: 3, edit_data: 2, delete: 3, damage: 4, touch: 2, copy: 3, ask_single: 2,
    force_rule: 1, interrupt: 2, go_on: 2,
    forget: 1,
}  # fmt: skip


@dataclass
class Verdict:
    """What came of a sequence."""

    done: list[str]
    stale: list[str]
    needless: list[str]
    repeated: list[str]
    messages: int = 0

    @property
    def is_good(self) -> bool:
        """Whether nothing was stale, no training was repeated, and a further run had nothing to do."""
        return not (self.stale or self.needless or self.repeated)


def finish(place: Place) -> tuple[Outcome, int]:
    """Run to the end; a file that changed between plan and job ends in one message, and the next run makes it anew."""
    for attempt in range(3):
        outcome = place.run()
        if outcome.returncode == 0:
            return outcome, attempt
        if "Run again, and it is made anew" not in outcome.text and "Delete it and run again" not in outcome.text:
            break
    raise AssertionError(outcome.text[-6000:])


class References:
    """Runs from nothing, one for every state that a sequence ends in, with a copy of the same repository."""

    def __init__(self, folder: Path, start: Place) -> None:
        self.folder, self.start = folder, start
        folder.mkdir(parents=True, exist_ok=True)

    def files(self, state: dict) -> dict[str, str]:
        """Return the files of a run from nothing in this state."""
        state = {name: value for name, value in state.items() if name != "reference"}
        state["code"] = [name for name in state["code"] if name in NUMBERS]
        key = hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()[:12]
        kept = self.folder / f"{key}.json"
        if kept.exists():
            return json.loads(kept.read_text())
        place = Place(self.folder / key, self.start.python, {**state, "reference": ""})
        shutil.rmtree(place.folder, ignore_errors=True)
        shutil.copytree(self.start.repository, place.repository)  # with what is compiled
        finish(place)
        kept.write_text(json.dumps(place.files()))
        shutil.rmtree(place.folder)
        return json.loads(kept.read_text())


def undergo(
    seed: int, start: Place, folder: Path, references: References, n_actions: int, back: float = 0.6
) -> Verdict:
    """Do a random sequence to a copy of a finished folder, run to the end, and compare with a run from nothing.

    `back` of them undo all edits first.
    """
    dice = random.Random(seed)
    shutil.copytree(start.folder, folder, ignore=shutil.ignore_patterns(".cache"))
    place = Place(folder, start.python, deepcopy(start.state), list(start.trained))
    for action in dice.choices(list(ACTIONS), weights=list(ACTIONS.values()), k=n_actions):
        place.done.append(action.__name__)
        if action in (delete, damage, ask_single) and not place.results():
            continue
        place.done[-1] = action(place, dice)
        kept = place.folder / LEARNED / ".made/finished"
        place.excused |= not kept.exists() or any("deleted records" in done for done in place.done[-1:])
    if dice.random() < back:  # back to where it began: nothing may be left of what was there in between
        place.state = deepcopy(start.state)
        place.done.append("undid all edits")
    place.done.append("ran to the end")
    _, messages = finish(place)
    mine, right = place.files(), references.files(place.state)
    stale = sorted(name for name in {*mine, *right} if mine.get(name) != right.get(name))
    again = place.run("--dry-run")
    repeated = sorted(again.jobs) if again.jobs or "Nothing to be done" not in again.text else []
    verdict = Verdict(place.done, stale, place.needless, repeated, messages)
    if verdict.is_good:
        shutil.rmtree(place.folder, ignore_errors=True)
    return verdict


def summary(verdicts: list[Verdict]) -> str:
    """Return the table of what was done and what came of it, in Markdown."""
    kinds = Counter(re.sub(r"[ =].*", "", done) for verdict in verdicts for done in verdict.done)
    lines = [
        "| sequences | actions | stale results | needless trainings | something to do after the end | messages |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    counts = [
        len(verdicts),
        kinds.total(),
        *(sum(map(bool, (getattr(v, name) for v in verdicts))) for name in ("stale", "needless", "repeated")),
    ]
    lines.append(f"| {' | '.join(map(str, counts))} | {sum(verdict.messages for verdict in verdicts)} |")
    return "\n".join(lines)
