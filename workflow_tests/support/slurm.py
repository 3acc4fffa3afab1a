"""A real SLURM on this machine: a controller, virtual nodes and fake GPUs, in a folder of its own.

Needs slurmctld, slurmd and munge (Debian's packages), nothing that runs already, and nothing in /etc.
"""

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

DAEMONS = ("munged", "slurmctld", "slurmd")
PATH = f"{os.environ['PATH']}:/usr/sbin"
CPU_NODES, GPU_NODE = ("n1", "n2"), "n3"
NODES = (*CPU_NODES, GPU_NODE)
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "OUT_OF_MEMORY", "NODE_FAIL", "PREEMPTED"}

# config_overrides lets nodes claim more than the machine has. Memory is watched once a second, since there may be no
# cgroups to limit it. A node that does not answer is lost after 20 s: less would call a busy machine lost. Finished
# jobs are remembered for an hour: the plugin asks squeue, as there is no accounting, and so do the tests.
CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=100000,bf_interval=5
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
MinJobAge=3600
SlurmdTimeout=20
KillWait=2
ReturnToService=2
SlurmdParameters=config_overrides
GresTypes=gpu
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=16000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=16000
NodeName=n3 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[3]} CPUs=4 RealMemory=16000 Gres=gpu:2
PartitionName=cpu Nodes=n1,n2 Default=YES LLN=YES
PartitionName=gpu Nodes=n3
"""
# A fake GPU has to be a character device.
FAKE_GPUS = """\
NodeName=n3 Name=gpu File=/dev/null
NodeName=n3 Name=gpu File=/dev/zero
"""
# The plugin's job steps drop SLURM_CONF before they call srun, which then looks into /etc/slurm: right on every cluster
# but this one.
SRUN = """\
#!/bin/sh
SLURM_CONF={folder}/slurm.conf exec {srun} "$@"
"""


@dataclass(frozen=True)
class Job:
    """A job as SLURM tells of it.

    Attributes
    ----------
    name
        What Snakemake calls it: rule_train_jepa_wildcards_...
    node, memory_mb
        Where it ran, and what it was given there; for a job that waits nothing, and what it asked for.
    gpus
        GPUs that it asked for.
    folder
        Where Snakemake was started.
    """

    id: str
    name: str
    state: str
    node: str
    partition: str
    account: str
    memory_mb: int
    cpus: int
    gpus: int
    time_limit: str
    folder: Path

    @property
    def rule(self) -> str:
        """The rule; for a group of jobs that were submitted as one, its name and its rules."""
        return self.name.removeprefix("rule_").split("_wildcards_")[0]

    @property
    def is_over(self) -> bool:
        """Whether it has ended, well or not."""
        return self.state in ENDED

    @classmethod
    def parsed(cls, line: str) -> "Job":
        """Return the job of one line of `scontrol --oneliner show jobs`."""
        fields = dict(field.split("=", 1) for field in line.split() if "=" in field)
        wanted = dict(part.split("=", 1) for part in fields.get("TRES", "").split(",") if "=" in part)
        return cls(
            id=fields["JobId"],
            name=fields.get("Comment", ""),
            state=fields["JobState"],
            node=fields.get("NodeList", "").replace("(null)", ""),
            partition=fields["Partition"],
            account=fields.get("Account", ""),
            memory_mb=_megabytes(wanted.get("mem", "0M")),
            cpus=int(fields["NumCPUs"]),
            gpus=int(fields.get("TresPerJob", "0").rpartition(":")[2]),
            time_limit=fields["TimeLimit"],
            folder=Path(fields["WorkDir"]),
        )


def _megabytes(text: str) -> int:
    """Return SLURM's amount of memory, 4000M or 1.50G, in MB."""
    number, unit = re.fullmatch(r"([\d.]+)([MGT]?)", text).groups()
    return round(float(number) * 1024 ** " MGT".index(unit or "M") / 1024)


def obstacle() -> str | None:
    """Return why no cluster can be started here, or None."""
    absent = [name for name in (*DAEMONS, "srun", "sbatch") if shutil.which(name, path=PATH) is None]
    if absent:
        return (
            f"no {', '.join(absent)} here; apt-get install --no-install-recommends slurmctld slurmd slurm-client munge"
        )
    return None


def wait_for(condition: Callable[[], object], what: str, seconds: float = 60) -> object:
    """Return the first true value of a condition; TimeoutError names what did not come."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if value := condition():
            return value
        time.sleep(0.1)
    raise TimeoutError(f"{what} did not come within {seconds:g} s")


class Cluster:
    """A running cluster: nodes n1 and n2 in partition cpu, the default, and n3 with two GPUs in partition gpu.

    Parameters
    ----------
    folder
        For configuration, state and logs. Its path must be short: a socket's may have 107 characters.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        (folder / "state").mkdir()
        fields = {
            "folder": folder,
            "host": socket.gethostname().split(".")[0],
            "user": getpass.getuser(),
            "ports": _free_ports(1 + len(NODES)),
        }
        (folder / "slurm.conf").write_text(CONFIGURATION.format(**fields))
        (folder / "gres.conf").write_text(FAKE_GPUS)
        wrapper = folder / "bin" / "srun"
        wrapper.write_text(SRUN.format(folder=folder, srun=shutil.which("srun", path=PATH)))
        wrapper.chmod(0o755)
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to find this cluster."""
        return {"SLURM_CONF": f"{self.folder}/slurm.conf", "PATH": f"{self.folder}/bin:{PATH}"}

    def call(self, *command: str) -> str:
        """Return what one of SLURM's commands prints."""
        done = subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True, timeout=30, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    # --- life -------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start all daemons; return when all nodes are idle."""
        here = self.folder
        files = [f"--{name}={here}/munge{suffix}" for name, suffix in
                 {"key-file": ".key", "socket": ".socket", "pid-file": "d.pid", "log-file": "d.log",
                  "seed-file": ".seed"}.items()]  # fmt: skip
        self.call("munged", "--force", *files)
        self.call("slurmctld", "-c")
        for node in NODES:
            self.revive(node)
        try:
            wait_for(lambda: self.node_states() == dict.fromkeys(NODES, "idle"), "the nodes")
        except (RuntimeError, TimeoutError) as error:
            said = "\n".join(f"{log.name}: {log.read_text()[-1000:]}" for log in self.folder.glob("*.log"))
            raise RuntimeError(f"SLURM does not start here: {error}\n{said}") from None

    def stop(self) -> None:
        """End every job and every daemon, whatever state they are in."""
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired, TimeoutError):
            self.call("scancel", "--user", getpass.getuser())
            wait_for(lambda: not self.queue(), "the end of the jobs", 10)
        # Nodes before the controller before munge, whom all need to speak to one another.
        for file in (
            *(self.folder / f"{node}.pid" for node in NODES),
            self.folder / "slurmctld.pid",
            self.folder / "munged.pid",
        ):
            _end(file)
        for process in self.processes():
            _kill(process, signal.SIGKILL)

    def revive(self, node: str) -> None:
        """Start a node."""
        (self.folder / f"spool-{node}").mkdir(exist_ok=True)
        self.call("slurmd", "-N", node)

    def lose(self, node: str) -> None:
        """Let a node disappear with all that runs on it, as when its power fails."""
        _kill(int((self.folder / f"{node}.pid").read_text()), signal.SIGKILL)
        on_node = self.processes(f"SLURMD_NODENAME={node}")
        for process in {
            *on_node,
            *(parent for process in on_node if "slurmstepd" in _program(parent := _parent(process))),
        }:
            _kill(process, signal.SIGKILL)

    # --- what there is ----------------------------------------------------------------------------------------------

    def node_states(self) -> dict[str, str]:
        """Return idle, mixed, allocated, down ... of every node."""
        return dict(line.split() for line in self.call("sinfo", "--noheader", "--Node", "--format=%N %T").splitlines())

    def jobs(self, folder: Path | None = None) -> list[Job]:
        """Return all jobs since the start, or those from one folder, in the order of submission."""
        lines = self.call("scontrol", "--oneliner", "show", "jobs").splitlines()
        jobs = sorted((Job.parsed(line) for line in lines if line.startswith("JobId=")), key=lambda job: int(job.id))
        return [job for job in jobs if folder in (None, job.folder)]

    def queue(self) -> list[Job]:
        """Return the jobs that have not ended."""
        return [job for job in self.jobs() if not job.is_over]

    def running_job(self, name: str) -> Job | None:
        """Return a job whose name has this in it and whose processes are there, or None."""
        return next(
            (job for job in self.queue() if name in job.name and self.processes(f"SLURM_JOB_ID={job.id}")), None
        )

    def processes(self, *variables: str) -> list[int]:
        """Return the processes of jobs of this cluster that have all of these environment variables (NAME=value)."""
        wanted = {f"SLURM_CONF={self.folder}/slurm.conf".encode(), *(variable.encode() for variable in variables)}
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if wanted <= {*(folder / "environ").read_bytes().split(b"\0")}:
                    found.append(int(folder.name))
        return found

    def freeze(self, job: Job) -> None:
        """Let a job hang, as when the file system does."""
        for process in self.processes(f"SLURM_JOB_ID={job.id}"):
            _kill(process, signal.SIGSTOP)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Cluster]:
    """Yield a cluster that was started, and stop it whatever happens."""
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def table(jobs: list[Job]) -> str:
    """Return jobs as a table in Markdown."""
    lines = ["| job | rule | partition | node | CPUs | GPUs | memory (MB) | time limit | state |", "| --- " * 9 + "|"]
    for job in jobs:
        cells = job.id, job.rule, job.partition, job.node, job.cpus, job.gpus, job.memory_mb, job.time_limit, job.state
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


# --- processes and ports --------------------------------------------------------------------------------------------


def _free_ports(n: int) -> list[int]:
    """Return ports that nobody listens on; held open together, so that they differ."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(n)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _status(process: int) -> dict[str, str]:
    """Return what the kernel says of a process; empty if it is gone."""
    try:
        return dict(
            line.split(":\t", 1) for line in Path(f"/proc/{process}/status").read_text().splitlines() if ":\t" in line
        )
    except OSError:
        return {}


def _parent(process: int) -> int:
    return int(_status(process).get("PPid", 0))


def _program(process: int) -> str:
    return _status(process).get("Name", "")


def _is_alive(process: int) -> bool:
    """Whether a process runs; one that nobody collects, a zombie, does not."""
    return _status(process).get("State", "Z").strip()[0] != "Z"


def _kill(process: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(process, number)


def _end(pid_file: Path) -> None:
    """End the daemon of a pid file, by force if it does not go."""
    if not pid_file.exists():
        return
    process = int(pid_file.read_text())
    _kill(process, signal.SIGTERM)
    try:
        wait_for(lambda: not _is_alive(process), "its end", 10)
    except TimeoutError:
        _kill(process, signal.SIGKILL)
