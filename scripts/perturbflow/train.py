"""Train one model: write its artefact for prediction, and run.json for readers of the run."""

import logging
import os
import platform
import resource
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from perturbflow import __version__
from perturbflow.embeddings import Embeddings
from perturbflow.io.artefacts import save_artefact
from perturbflow.io.files import atomic, read_json, write_json
from perturbflow.models.base import Ceiling, Run, build
from perturbflow.pairs import Pairs
from perturbflow.provenance.code_version import code_version
from perturbflow.provenance.records import FOLDER, content_digest, digest, read_record, write_records

log = logging.getLogger(__name__)

# So many finished trainings of a network stay beside its checkpoint: going back to a configuration repeats none.
KEPT = 3


class Finished:
    """The finished trainings of one network, by the digest of all inputs.

    A job runs again when its inputs were made again, even with the same content. A training takes minutes to days, so
    the same training is not repeated. To repeat it nevertheless, delete the folder of the run.
    """

    def __init__(self, model: Path, identity: str) -> None:
        self.model = model
        self.folder = model.parent / FOLDER / "finished" / identity

    def restore(self) -> dict | None:
        """Bring the checkpoint back and return its run.json; None where either is missing or damaged."""
        files = self.folder / self.model.name, self.folder / "run.json"
        for file in files:
            record = read_record(file)
            if record is None or not file.is_file() or content_digest(file) != record["content"]:
                return None
        with atomic(self.model) as partial:
            shutil.copyfile(files[0], partial)
        self.folder.touch()
        return read_json(files[1])

    def keep(self, content: dict) -> None:
        """Keep the checkpoint and the content of its run.json; delete the oldest of more than KEPT."""
        with atomic(self.folder / self.model.name) as partial:
            shutil.copyfile(self.model, partial)
        write_json(self.folder / "run.json", content)
        write_records([self.folder / self.model.name, self.folder / "run.json"], {}, {})
        others = sorted(self.folder.parent.iterdir(), key=lambda folder: folder.stat().st_mtime_ns, reverse=True)
        for folder in others[KEPT:]:
            shutil.rmtree(folder, ignore_errors=True)


def train(
    pairs: Path,
    embeddings: Path,
    audit: Path,
    model: Path,
    run: Path,
    implementation: str,
    params: dict,
    seed: int,
    device: str = "auto",
    threads: int = 1,
    scored: str = "test",
    split: Path | None = None,
    logger: str | None = None,
    provenance: dict | None = None,
) -> None:
    """Train one model.

    Parameters
    ----------
    pairs, embeddings
        The pairs and gene vectors of one split. A ceiling gets all cells.
    audit
        The leak audit of this split, which must have passed.
    model, run
        To be written: the artefact; and JSON with params, seed, digests, versions, device, time, memory and history.
    implementation, params
        "module:Class" below perturbflow.models, and its params.
    seed
        Governs all that is random in training.
    device
        auto, cpu, cuda or mps.
    scored
        Role that predictions are scored on. For test a model learns from training and validation cells, for validation
        from training cells alone.
    split
        split.json, for a model that is trained elsewhere.
    logger
        csv, tensorboard or wandb: where losses of networks go, besides run.json. It changes no result.
    """
    family = build(implementation, params)
    digests = {path.name: content_digest(path) for path in (pairs, embeddings)} | {
        f"params/{path.name}": content_digest(path) for path in family.files
    }
    code = code_version("perturbflow.train:train", f"perturbflow.models.{implementation}")
    circumstances = Run(
        seed=seed,
        device=device,
        threads=threads,
        checkpoints=model.parent / "checkpoints",
        identity=digest(implementation, params, seed, scored, digests, code),
        scored=scored,
        sources={"pairs": pairs, "embeddings": embeddings, **({"split": split} if split else {})},
        place=" × ".join(model.absolute().parts[-5:-3]),
        logger=logger,
    )
    about = {
        "provenance": provenance or {},
        "inputs_sha256": {**digests, "audit.json": content_digest(audit)},
        "split_sha256": read_json(audit)["split_sha256"],
    }
    finished = Finished(model, digest(circumstances.identity, device)) if family.keeps_trainings else None
    if finished and (content := finished.restore()):
        write_json(run, {**content, **about})
        log.info("the same training was finished before and is not repeated; to repeat it, delete %s", model.parent)
        return
    started, cpu = time.perf_counter(), _cpu_seconds()
    cells = Pairs.open(pairs) if family.reads_blocks else Pairs.load(pairs)
    cells = cells if isinstance(family, Ceiling) else cells.fitted_on(scored)
    artefact = family.fit(cells, Embeddings.read(embeddings), circumstances)
    spent = {"seconds": round(time.perf_counter() - started, 2), "cpu_seconds": round(_cpu_seconds() - cpu, 2)}
    save_artefact(model, artefact)
    content = {
        "implementation": implementation,
        "params": params,
        "seed": seed,
        "scored": scored,
        **about,
        **_account(circumstances, artefact, spent),
    }
    write_json(run, content)
    if finished:
        finished.keep(content)
    # From here on the state of the training is not needed.
    shutil.rmtree(circumstances.checkpoints, ignore_errors=True)
    log.info("trained in %.1f s, %s parameters", spent["seconds"], f"{content['n_parameters']:,}")


def _cpu_seconds() -> float:
    """Return the CPU seconds of this process so far, and of all programs that it started and that ended."""
    return sum(os.times()[:4])


def _account(circumstances: Run, artefact: dict, spent: dict[str, float]) -> dict:
    """Return the entries of run.json about the course of a training."""
    facts = dict(circumstances.facts)
    n_parameters = facts.pop("n_parameters", None)
    if n_parameters is None:
        arrays = [value for value in artefact.values() if isinstance(value, np.ndarray)]
        n_parameters = int(sum(array.size for array in arrays if array.dtype.kind == "f"))
    own_peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    versions = {"perturbflow": __version__, "numpy": np.__version__, "anndata": version("anndata")}
    return {
        "versions": {"python": platform.python_version(), **versions, **facts.pop("versions", {})},
        "device": facts.pop("device", "cpu"),
        "threads": circumstances.threads,
        **spent,
        "peak_memory_mb": max(own_peak, facts.pop("peak_memory_mb", 0)),
        "n_parameters": n_parameters,
        "facts": facts,
        "history": circumstances.history,
    }
