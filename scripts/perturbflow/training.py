"""Train one model and leave behind what prediction and readers of the run need."""

import inspect
import logging
import platform
import resource
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np

from perturbflow import __version__
from perturbflow.artefacts import save_artefact
from perturbflow.embeddings import Embeddings
from perturbflow.files import file_digest, read_json, write_json
from perturbflow.lineage import code_digest, digest
from perturbflow.models.base import Ceiling, Run, build
from perturbflow.pairs import Pairs

logger = logging.getLogger(__name__)


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
    devices: int = 1,
    threads: int = 1,
    provenance: dict | None = None,
) -> None:
    """Train one model.

    Parameters
    ----------
    pairs, embeddings
        The pairs and gene vectors of one split. A model gets training and validation cells; a ceiling gets all.
    audit
        The leak audit of this split, which must have passed.
    model, run
        To be written: the artefact, and JSON with params, seed, digests, versions, device, time, memory and training history.
    implementation, params
        "module:Class" below perturbflow.models, and what it is built from.
    seed
        Governs all that is random in training.
    device, devices
        auto, cpu, cuda or mps; and how many of them a network's training is to be shared among.
    """
    family = build(implementation, params)
    cells = Pairs.open(pairs) if family.reads_blocks else Pairs.read(pairs)
    inputs = {path.name: file_digest(path) for path in (pairs, embeddings)} | {
        f"params/{path.name}": file_digest(path) for path in family.files
    }
    circumstances = Run(
        seed=seed,
        device=device,
        devices=devices,
        threads=threads,
        checkpoints=model.parent / "checkpoints",
        identity=digest(implementation, params, seed, inputs, code_digest(Path(inspect.getfile(type(family))))),
    )
    started = time.perf_counter()
    cells = cells if isinstance(family, Ceiling) else cells.roles("train", "validation")
    artefact = family.fit(cells, Embeddings.read(embeddings), circumstances)
    seconds = time.perf_counter() - started
    if not circumstances.is_first_process:
        return
    save_artefact(model, artefact)
    n_parameters = circumstances.facts.pop("n_parameters", None)
    if n_parameters is None:
        n_parameters = int(sum(np.size(value) for value in artefact.values() if isinstance(value, np.ndarray) and value.dtype.kind == "f"))
    write_json(
        run,
        {
            "implementation": implementation,
            "params": params,
            "seed": seed,
            "provenance": provenance or {},
            "inputs_sha256": {**inputs, "audit.json": file_digest(audit)},
            "split_sha256": read_json(audit)["split_sha256"],
            "versions": {"python": platform.python_version(), "perturbflow": __version__, "numpy": np.__version__, "anndata": version("anndata"),
                         **circumstances.facts.pop("versions", {})},
            "device": circumstances.facts.pop("device", "cpu"),
            "n_devices": circumstances.facts.pop("n_devices", 1),
            "threads": threads,
            "seconds": round(seconds, 2),
            "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "n_parameters": n_parameters,
            "facts": circumstances.facts,
            "history": circumstances.history,
        },
    )  # fmt: skip
    # Only now is the state of the training of no more use.
    shutil.rmtree(circumstances.checkpoints, ignore_errors=True)
    logger.info("trained in %.1f s, %s parameters", seconds, f"{n_parameters:,}")
