"""Models of others: a script in an environment of its own learns from the exported folder and leaves predictions.h5ad.

The script is called as `COMMAND SCRIPT EXPORTED PREDICTIONS SETTINGS`, in an empty folder:

* EXPORTED is the folder that `perturbflow export` writes, with no perturbed cell of the scored role in it.
* PREDICTIONS is the h5ad that it has to leave, see the README.md in that folder.
* SETTINGS is JSON with seed, threads, device (auto, cpu or cuda), options and files, as the params have them.

The file then goes the way of any predictions that were made elsewhere. It is the trained model: the artefact holds it.
"""

import contextlib
import json
import logging
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from perturbflow.embeddings import Embeddings
from perturbflow.errors import InputError
from perturbflow.export import export
from perturbflow.io.environments import LAST_LINES, environment, versions
from perturbflow.io.files import write_json
from perturbflow.models.base import Artefact, Run
from perturbflow.models.from_file import GivenFile
from perturbflow.models.predictions_file import PredictionsFile, Terms, listed
from perturbflow.pairs import Pairs
from perturbflow.registry.families import ExternalParams, PredictionsParams
from perturbflow.registry.wrappers import environment_of, files_of, script_of

logger = logging.getLogger(__name__)

PREDICTIONS = "predictions.h5ad"
# Of this process: they would lead the other Python to packages of this one.
PYTHONS_OWN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
BINDS = ("APPTAINER_BIND", "SINGULARITY_BIND")  # folders that a container sees, at the same place


class External(GivenFile):
    """A model that a script trains in an environment of its own: it gets the exported split and leaves predictions."""

    params: ExternalParams
    on_terms = True
    keeps_trainings = True

    def __init__(self, params: ExternalParams) -> None:
        super().__init__(params)
        self.files = tuple(files_of(vars(params)).values())
        self.declared = PredictionsParams(
            file=PREDICTIONS, values=params.values, scale=params.scale, target_sum=None, label="perturbation",
            separator="+",
        )  # fmt: skip
        self._folder: tempfile.TemporaryDirectory | None = None

    def fit(self, pairs: Pairs, embeddings: Embeddings, run: Run) -> Artefact:
        """Export the split, run the script, and check what it left."""
        if not {"pairs", "split"} <= set(run.sources):
            raise InputError("a model of family external needs split.json beside the pairs (train.py --split).")
        scratch = run.checkpoints.absolute() / "external"
        shutil.rmtree(scratch, ignore_errors=True)
        work, exported, self.path = scratch / "work", scratch / "exported", scratch / PREDICTIONS
        work.mkdir(parents=True)
        export(run.sources["pairs"], run.sources["split"], exported, run.place, run.scored, run.sources["embeddings"])
        settings = write_settings(scratch / "settings.json", self.params, run)
        run.facts |= self._run([exported, self.path, settings], work, run)
        self._check_there(Terms.of(pairs), exported)
        artefact = super().fit(pairs, embeddings, run)
        run.facts["file"].pop("path")
        return {**artefact, "content": np.fromfile(self.path, np.uint8)}

    def restore(self, artefact: Artefact) -> None:
        """Take over what was found, and lay the file into a folder that goes with this object."""
        super().restore(artefact)
        if "content" in artefact:
            self._folder = tempfile.TemporaryDirectory()
            self.path = Path(self._folder.name) / PREDICTIONS
            artefact["content"].tofile(self.path)

    # --- the script ---

    def _run(self, paths: list[Path], work: Path, run: Run) -> dict[str, Any]:
        """Run the script in a folder; return its entries of run.json.

        Raises
        ------
        InputError
            If it ends with an error, with the last lines of its log, or leaves no file.
        """
        script, (command, variables) = script_of(vars(self.params)).absolute(), self._called(paths, run.threads)
        words = [*command, str(script), *map(str, paths)]
        logger.info("runs %s", " ".join(words))
        started, last = time.perf_counter(), deque[str](maxlen=LAST_LINES)
        code, used = _followed(words, work, variables, last)
        seconds = time.perf_counter() - started
        if code:
            end = f"was killed by signal {-code}" if code < 0 else f"ended with exit status {code}"
            raise InputError(f"{script} {end} after {seconds:.0f} s. The last lines of its log:\n" + "\n".join(last))
        if not paths[1].is_file():
            raise InputError(
                f"{script} ended well, and left no {PREDICTIONS}: it has to write to its second argument. "
                "The last lines of its log:\n" + "\n".join(last)
            )
        is_python = bool(command) and Path(command[-1]).name.startswith("python")
        return {
            "device": run.device,
            "peak_memory_mb": used["peak_memory_mb"],
            "script": {
                "command": self.params.command,
                "seconds": round(seconds, 2),
                **used,
                "last_lines": list(last),
                "versions": versions(command) if is_python else {},
            },
        }

    def _called(self, paths: list[Path], threads: int) -> tuple[list[str], dict[str, str]]:
        """Return the words before the script, and the variables that they run with.

        A container of Apptainer or Singularity sees the folders of the script, of these paths and of the files.
        """
        command, shown = shlex.split(self.params.command), [script_of(vars(self.params)), *paths]
        shown += map(Path, self.params.files.values())
        folders = sorted({str(path.absolute().parent) for path in shown})
        variables = {name: value for name, value in os.environ.items() if name not in PYTHONS_OWN}
        variables |= {
            "PATH": os.pathsep.join([str(self._bin_folder()), os.environ.get("PATH", "")]),
            "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1", "TQDM_DISABLE": "1",
        }  # fmt: skip
        for name in BINDS:
            variables[name] = ",".join([*filter(None, [os.environ.get(name)]), *folders])
        if command and (found := shutil.which(command[0], path=variables["PATH"])):
            command[0] = found
        return command, variables

    def _bin_folder(self) -> Path:
        """Return the folder of the environment's programs."""
        place = environment_of(vars(self.params))
        if place is None:
            return Path(sys.executable).parent
        folder = place if place.is_dir() else environment(place)
        if not (folder / "bin").is_dir():
            raise InputError(f"{folder} is no environment: it has no folder bin. See params.environment.")
        return folder.absolute() / "bin"

    def _check_there(self, terms: Terms, exported: Path) -> None:
        """Refuse a file without any of the wanted perturbations; name those that are missing."""
        wanted = pd.read_csv(exported / "targets.tsv", sep="\t", dtype=str)["perturbation"].tolist()
        given = set(PredictionsFile(self.path, self.declared, terms).labels(wanted))
        missing = [label for label in wanted if label not in given]
        if len(missing) == len(wanted):
            raise InputError(
                f"{script_of(vars(self.params))} predicted none of the {len(wanted)} perturbations of targets.tsv: "
                f"{listed(wanted)}. It wrote: {listed(sorted(given))}."
            )
        if missing:
            logger.warning("%d of %d perturbations are not predicted: %s", len(missing), len(wanted), listed(missing))


def write_settings(path: Path, params: ExternalParams, run: Run) -> Path:
    """Write what a script is told beside the data, see the module."""
    files = {name: str(Path(file).absolute()) for name, file in params.files.items()}
    told = {"seed": run.seed, "threads": run.threads, "device": run.device, "options": params.options, "files": files}
    write_json(path, told)
    return path


def _followed(words: list[str], work: Path, variables: dict[str, str], last: deque[str]) -> tuple[int, dict]:
    """Run a program, log its lines and note the last ones; return its exit status, CPU seconds and peak memory in MB.

    CPU seconds are of all its processes that ended before it. The peak is that of the largest one, and at least that
    of this process when it began.
    """
    try:
        process = subprocess.Popen(
            words, cwd=work, env=variables, text=True, errors="replace", bufsize=1, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        raise InputError(
            f"`{json.dumps(words[:2])[1:-1]}` cannot be run: {error.strerror}. See params.command."
        ) from error
    # Where this job is ended, the script and all that it started end with it.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.strip():
                logger.info("| %s", line.rstrip())
                last.append(line.rstrip())
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        signal.signal(signal.SIGTERM, before)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if process.returncode is None:
            process.wait()
    return process.returncode, {
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_memory_mb": round(usage.ru_maxrss / 1024),
    }
