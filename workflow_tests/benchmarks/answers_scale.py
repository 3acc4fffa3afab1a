"""How long answers take: 1,000 cells × 50 samples × 2,000 genes, sampled and summarized as rule counterfactual does.

    python workflow_tests/benchmarks/answers_scale.py

A made screen; the model is trained for a few steps, as the time of sampling does not depend on them. One process on the
threads it is given.
"""

import argparse
import logging
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "workflow_tests"), str(ROOT / "workflow_tests/support")]

import h5py  # noqa: E402
from conftest import SPECS, make_screen, prepare  # noqa: E402
from learned import registered  # noqa: E402

from perturbflow.counterfactuals.answers import CELLS_PER_BLOCK, Question, Writer, answered  # noqa: E402
from perturbflow.counterfactuals.novelty import Novelty  # noqa: E402
from perturbflow.embeddings import Embeddings  # noqa: E402
from perturbflow.models.base import Run, build  # noqa: E402
from perturbflow.pairs import Pairs  # noqa: E402
from perturbflow.progress import Progress  # noqa: E402


def main() -> None:
    """Print seconds and memory per model."""
    logging.disable(logging.INFO)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--samples", type=int, default=50)
    parser.add_argument("--genes", type=int, default=2000)
    parser.add_argument("--models", nargs="+", default=["counterfactual"])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        files = prepare(
            Path(folder),
            make_screen(n_genes=arguments.genes, n_controls=600),
            SPECS["unseen_combination"],
            n_hvg=arguments.genes,
        )
        pairs, embeddings = Pairs.read(files.pairs), Embeddings.read(files.embeddings)
        controls = np.flatnonzero(pairs.is_control)
        rows = controls[np.arange(arguments.cells) % len(controls)]
        start, context = pairs.X[rows].toarray(), pairs.context_of(rows)
        for name in arguments.models:
            implementation, params = registered(name)
            steps = {key: 20 for key in params if key.startswith("n_steps")}
            model = build(implementation, {**params, **steps})
            model.fit(
                pairs.roles("train", "validation"),
                embeddings,
                Run(seed=0, checkpoints=Path(folder) / name, identity="benchmark"),
            )
            model.counterfactual(start[:2], ["TF1"], 2, 0)  # compiled once per machine
            started = time.perf_counter()
            with h5py.File(Path(folder) / "answer.h5ad", "w") as file:
                writer = Writer(file, len(start), pairs.genes, None)
                question = Question(model, start, context, arguments.samples, seed=0)
                progress = Progress("blocks of cells", -(-len(start) // CELLS_PER_BLOCK))
                answered(question, "TF1", Novelty("measured", "measured", 0.0), writer, 0, progress)
            seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(
                f"{name}: {len(start):,} cells × {arguments.samples} samples × {len(pairs.genes):,} genes: "
                f"{seconds:.1f} s, peak {peak:.1f} GiB"
            )


if __name__ == "__main__":
    main()
