"""Runs of the workflow that are killed at random moments, and what tells whether anything was lost or spoilt."""

import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import psutil
import yaml
from conftest import REPOSITORY, Outcome, closed_forms_config, run_snakemake, write_screen
from fault_outcomes import declared
from fault_server import Host

# Step → the rule whose job is waited for.
STEPS = {name: name for name in ("download", "harmonize", "train", "predict", "evaluate")} | {
    "train": "train_counterfactual"
}
MODELS = ["additive", "counterfactual"]
RUN = "results/fetched/unseen_combination/{model}/seed_0"
TARGETS = ["results/mine/harmonized.h5ad", *[f"{RUN.format(model=model)}/metrics.tsv" for model in MODELS]]
# What of a file says when and how it came to be, and not what it is.
OF_THE_MOMENT = {
    "manifest.json": ("retrieved", "source"),
    "checksums.json": ("retrieved", "source"),
    "run.json": ("seconds", "cpu_seconds", "peak_memory_mb"),
}
VICTIMS = {"all": "Snakemake and its jobs", "jobs": "its jobs alone", "snakemake": "Snakemake alone"}


def screen_bytes() -> bytes:
    """Return the h5ad of the small screen."""
    with tempfile.TemporaryDirectory() as folder:
        return write_screen(Path(folder)).read_bytes()


def configuration(url: str, content: bytes) -> dict:
    """Return a configuration of a user's own screen and a downloaded one, with a baseline and a short training."""
    config = closed_forms_config()
    fetched = {**config["datasets"]["mine"], "source": {"url": [url]}, **declared(content)}
    config["datasets"]["fetched"] = fetched
    config["select"] |= {"datasets": ["mine", "fetched"], "models": MODELS}
    config["models"] = {"counterfactual": {"params": {"n_steps": 300, "batch_size": 32, "n_latent": 8}}}
    return config


def make_folder(folder: Path, host: Host, fault: str = "slow") -> Path:
    """Make a working folder with the user's screen and configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "screen.h5ad").write_bytes(host.content)
    config = configuration(f"{host.address}/{fault}/screen.h5ad", host.content)
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))
    return folder


# --- what lies in a folder ------------------------------------------------------------------------------------------


def fingerprint(path: Path) -> str:
    """Return a digest of a file's content without dates, run times, and the time stamps in a zip."""
    if path.name in OF_THE_MOMENT:
        ignored = OF_THE_MOMENT[path.name]
        content = json.loads(
            path.read_text(), object_hook=lambda found: {k: v for k, v in found.items() if k not in ignored}
        )
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            return hashlib.sha256(
                b"".join(name.encode() + arrays[name].tobytes() for name in sorted(arrays))
            ).hexdigest()
    return hashlib.sha256(path.read_bytes()).hexdigest()


def finished_files(folder: Path) -> dict[str, str]:
    """Return path → fingerprint of all final files in results and resources; the state of trainings aside."""
    found = {}
    for path in sorted([*folder.glob("results/**/*"), *folder.glob("resources/**/*")]):
        name = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") or part == "checkpoints" for part in name.parts):
            found[str(name)] = fingerprint(path)
    return found


def leftovers(folder: Path) -> list[str]:
    """Return the hidden files in results and resources, locks aside."""
    return [
        str(path.relative_to(folder))
        for place in ("results", "resources")
        for path in folder.glob(f"{place}/**/.*.part*")
    ]


# --- runs -----------------------------------------------------------------------------------------------------------


class Running:
    """The workflow in a process group of its own, to be killed."""

    def __init__(self, folder: Path, *targets: str) -> None:
        self.folder = folder
        self.output = folder / "output.txt"
        command = [
            sys.executable,
            "-m",
            "snakemake",
            *(targets or TARGETS),
            "--snakefile",
            str(REPOSITORY / "Snakefile"),
            "--cores",
            "2",
        ]
        command += ["--nocolor", "--configfile", "mine.yaml"]
        variables = {**os.environ, "XDG_CACHE_HOME": str(folder / ".cache")}
        with self.output.open("w") as file:
            self.process = subprocess.Popen(
                command, cwd=folder, stdout=file, stderr=file, env=variables, start_new_session=True
            )

    @property
    def text(self) -> str:
        """What it said so far."""
        return self.output.read_text()

    def wait_for(self, rule: str, timeout: float = 600) -> None:
        """Wait until a job of the rule has started, or until the end; of any rule where this one is not to be run."""
        end = time.monotonic() + timeout
        while self.process.poll() is None:
            assert time.monotonic() < end, self.text
            is_planned = re.search(rf"^{rule} +\d+$", self.text, flags=re.MULTILINE)
            if re.search(rf"^(local)?rule {rule if is_planned else '.*'}:$", self.text, flags=re.MULTILINE):
                break
            time.sleep(0.02)

    @property
    def finished(self) -> Counter:
        """Jobs per rule that have finished."""
        return Counter(re.findall(r"^Finished jobid: \d+ \(Rule: (\w+)\)$", self.text, flags=re.MULTILINE))

    @property
    def under_way(self) -> list[str]:
        """Rules of the jobs that have started and not finished."""
        return sorted(
            set(Counter(re.findall(r"^(?:local)?rule (\w+):$", self.text, flags=re.MULTILINE)) - self.finished)
        )

    def kill(self, victim: str) -> list[psutil.Process]:
        """Kill -9 Snakemake, its jobs, or both, and return the jobs that live on when Snakemake has ended."""
        jobs = psutil.Process(self.process.pid).children(recursive=True)
        if victim != "jobs" or not jobs:
            self.process.kill()
        for job in jobs if victim != "snakemake" else ():
            with contextlib.suppress(psutil.NoSuchProcess):
                job.kill()
        if victim == "all":  # also what was started while the jobs were counted
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(timeout=300)
        return jobs if victim == "snakemake" else []


def finish(folder: Path, *targets: str) -> Counter:
    """Run to the end, in the way that the README says after a kill, and return the jobs per rule that it took."""
    run_snakemake(folder, "--unlock")
    running = Running(folder, *targets)
    running.process.wait(timeout=900)
    assert running.process.returncode == 0, running.text
    return running.finished


def assert_one_message(outcome: Outcome, *parts: str) -> None:
    """Hold a failed run to a message, told once, without a traceback."""
    assert outcome.returncode != 0
    for part in parts:
        assert outcome.text.count(part) == 1, outcome.text
    assert "Traceback" not in outcome.text, outcome.text


# --- kills that follow one another ----------------------------------------------------------------------------------


@dataclass
class Kill:
    """One kill.

    Attributes
    ----------
    step
        The one that it was meant for.
    victim
        Key of VICTIMS.
    moment
        Seconds after the start of the step's job.
    met
        Rules of the jobs that were under way.
    """

    step: str
    victim: str
    moment: float
    met: list[str] = field(default_factory=list)


@dataclass
class Ordeal:
    """What became of a folder in which runs were killed one after the other.

    Attributes
    ----------
    kills
        Those that met a job.
    jobs
        How often a job of each rule was finished, in all runs together.
    spoilt
        Files that, after some kill, lay under a final name and were not what an undisturbed run leaves.
    """

    kills: list[Kill] = field(default_factory=list)
    jobs: Counter = field(default_factory=Counter)
    spoilt: set[str] = field(default_factory=set)


def undergo(folder: Path, kills: list[Kill], reference: dict[str, str]) -> Ordeal:
    """Start the workflow again and again in one folder and kill it each time; at last let it finish.

    A kill whose step is done by then meets another.
    Where only Snakemake was killed, its jobs go on beside those of the next run.
    """
    ordeal = Ordeal()
    orphans: list[psutil.Process] = []

    def look() -> None:
        psutil.wait_procs(orphans, timeout=300)
        ordeal.spoilt |= {name for name, content in finished_files(folder).items() if reference.get(name) != content}

    for kill in kills:
        running = Running(folder)
        running.wait_for(STEPS[kill.step])
        try:
            running.process.wait(timeout=kill.moment)
        except subprocess.TimeoutExpired:
            kill.met = running.under_way
            still_running = running.kill(kill.victim)
            ordeal.kills += [kill] if kill.met else []
            look()
            orphans = still_running
        ordeal.jobs += running.finished
        run_snakemake(folder, "--unlock")
    ordeal.jobs += finish(folder)
    look()
    return ordeal


def drawn(dice: random.Random, folder: Path, n_per_step: dict[str, int], latest: float) -> list[Kill]:
    """Return kills at random moments, step by step.

    Parameters
    ----------
    folder
        Of an undisturbed run, which tells how long each step takes.
    latest
        Of the moments, as a share of that time.
    """
    kills = []
    for step, n in n_per_step.items():
        tables = (folder / "benchmarks" / step).glob("*.tsv")
        seconds = max(float(table.read_text().splitlines()[1].split()[0]) for table in tables)
        kills += [
            Kill(step, dice.choice(["all", "all", "all", "jobs", "snakemake"]), dice.uniform(0, latest * seconds))
            for _ in range(n)
        ]
    return kills
