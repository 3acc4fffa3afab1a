"""Two runs of the workflow on a cluster: one is interrupted and goes on, and in one everything goes wrong."""

import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml
from conftest import REPOSITORY, Outcome, closed_forms_config, write_screen
from slurm import Cluster, Job, wait_for

from perturbflow.registry.families import REFERENCES

PROFILE = REPOSITORY / "config" / "profiles" / "slurm"
# What this cluster needs besides: it has no accounting database, and here it is waited for.
ON_THIS_CLUSTER = {"slurm-status-command": "squeue", "slurm-init-seconds-before-status-checks": 2}

CLOSED = ["additive", "linear"]
N_CLOSED = len(CLOSED) + len(REFERENCES)
FINISHED_BEFORE = (
    5 + 3 * N_CLOSED
)  # harmonize, split, pair, embeddings, audit; training, prediction and scores of closed forms
LEARNED = "results/mine/unseen_combination/scppdm/seed_0"
TARGET = "evaluated"


class Running:
    """Snakemake that has been started, with its jobs on a cluster.

    Parameters
    ----------
    profile
        Folder of the workflow profile.
    """

    def __init__(self, folder: Path, cluster: Cluster, *arguments: str, profile: Path = PROFILE) -> None:
        self.file = folder / "output.txt"
        settings = [f"--{key}={value}" for key, value in ON_THIS_CLUSTER.items()]
        # Where the tests run in a shell's background, SIGINT is ignored by all that they start.
        command = [
            "env",
            "--default-signal=INT",
            sys.executable,
            "-m",
            "snakemake",
            "--snakefile",
            str(REPOSITORY / "Snakefile"),
        ]
        command += ["--workflow-profile", str(profile), "--nocolor", "--configfile", "mine.yaml", *settings, *arguments]
        variables = {**os.environ, **cluster.environment, "XDG_CACHE_HOME": str(folder / ".cache")}
        with self.file.open("w") as output:
            self.process = subprocess.Popen(command, cwd=folder, env=variables, stdout=output, stderr=subprocess.STDOUT)

    @property
    def text(self) -> str:
        """What it has said so far."""
        return self.file.read_text()

    def outcome(self) -> Outcome:
        """Wait for its end."""
        return Outcome(self.process.wait(timeout=600), self.text, "")


# --- interrupted ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Interruption:
    """A run that was interrupted in the middle of a training, and the next one."""

    folder: Path
    interrupted: Outcome
    resumed: Outcome
    jobs: list[Job]


def interrupt(folder: Path, cluster: Cluster) -> Interruption:
    """Press Ctrl-C when all is done but a training, and run again: sixteen jobs, with the profile as it is."""
    write_screen(folder)
    config = closed_forms_config(models={"scppdm": {"params": {"n_steps": 600, "width": 16, "n_sampling_steps": 4}}})
    config["select"]["models"] = [*CLOSED, "scppdm"]
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))

    first = Running(folder, cluster, TARGET)
    wait_for(lambda: first.process.poll() is not None or [*folder.rglob("last.ckpt")], "a checkpoint", 600)
    if training := cluster.running_job("train_diffusion"):
        cluster.freeze(training)  # until the others are done; it does not depend on this machine then who is first
        wait_for(lambda: first.text.count("Finished jobid") == FINISHED_BEFORE, "the end of the closed forms", 400)
    first.process.send_signal(signal.SIGINT)
    interrupted = first.outcome()
    wait_for(lambda: not cluster.queue(), "the end of every job")
    resumed = Running(folder, cluster, TARGET).outcome()
    return Interruption(folder, interrupted, resumed, cluster.jobs(folder))


# --- failing --------------------------------------------------------------------------------------------------------

FATES = ("starved", "hung", "lost", "misplaced")
RESOURCES = (
    "harmonize:mem_mb=(300 if wildcards.dataset == 'starved' else 4000) * 2 ** (attempt - 1)",
    "harmonize:runtime=1 if wildcards.dataset == 'hung' else 60",
    "harmonize:slurm_partition={'hung': 'gpu', 'misplaced': 'nopart'}.get(wildcards.dataset, 'cpu')",
)


@dataclass(frozen=True)
class Failures:
    """A run of four screens: without memory, hung beyond its run time, on a lost node, and sent to no partition."""

    folder: Path
    outcome: Outcome
    jobs: list[Job]

    def of(self, fate: str) -> list[Job]:
        """Return the attempts of one screen."""
        return [job for job in self.jobs if job.name.endswith(fate)]


def fail(folder: Path, cluster: Cluster) -> Failures:
    """Harmonize four screens, each with its fate: six or seven jobs, by a copy of the profile that names an account."""
    write_screen(folder)
    config = closed_forms_config()
    mine = config["datasets"].pop("mine")
    config["datasets"] = dict.fromkeys(FATES, mine)
    config["select"]["datasets"] = [*FATES]
    (folder / "mine.yaml").write_text(yaml.safe_dump(config))

    profile = shutil.copytree(PROFILE, folder / "my_cluster")
    settings = yaml.safe_load((profile / "profile.yaml").read_text())
    settings["default-resources"]["slurm_account"] = "mylab"
    (profile / "profile.yaml").write_text(yaml.safe_dump(settings))

    run = Running(
        folder,
        cluster,
        "--set-resources",
        *RESOURCES,
        "--",
        *[f"results/{fate}/harmonized.h5ad" for fate in FATES],
        profile=profile,
    )
    cluster.freeze(wait_for(lambda: cluster.running_job("hung"), "the job that is to hang"))
    lost = wait_for(lambda: cluster.running_job("lost"), "the job whose node is to be lost")
    cluster.freeze(lost)  # or it may be done before
    cluster.lose(lost.node)
    outcome = run.outcome()
    cluster.revive(lost.node)
    return Failures(folder, outcome, cluster.jobs(folder))
