"""How long a ranking of many genes takes: mean effects, trust and intervals of each, as rule counterfactual has them.

    python workflow_tests/benchmarks/ranking_scale.py results/DATASET/SPLIT/MODEL/seed_0 ... --genes 17000 --cells 500

Needs the folder of a trained model with its warranty, and gene_vectors.parquet of the split. Genes are drawn among all
with a vector. One process on the threads it is given; cells are drawn for none.
"""

import argparse
import logging
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from perturbflow.counterfactuals import answers  # noqa: E402
from perturbflow.counterfactuals.effects_file import effects_file  # noqa: E402
from perturbflow.counterfactuals.novelty import TrainingKnowledge  # noqa: E402
from perturbflow.embeddings import Embeddings  # noqa: E402
from perturbflow.io.artefacts import load_artefact  # noqa: E402
from perturbflow.io.files import read_json  # noqa: E402
from perturbflow.models.base import build  # noqa: E402
from perturbflow.pairs import Pairs  # noqa: E402


def ranked(run: Path, n_genes: int, n_cells: int) -> str:
    """Rank genes by one model, and return the time and memory of it in words."""
    split, trained = run.parents[1], read_json(run / "run.json")
    cells, own = Pairs.open(split / "pairs.h5ad"), Embeddings.read(split / "embeddings.parquet")
    everyone = Embeddings.read(split / "gene_vectors.parquet")
    names, rng = everyone.table.index.tolist(), np.random.default_rng(0)
    labels = rng.choice(names, min(len(names), n_genes), replace=False).tolist()
    chosen, training = answers.selected_cells(cells, "control"), cells.fitted_on("test")
    model = build(trained["implementation"], trained["params"])
    model.restore(load_artefact(next(file for file in run.glob("model.*"))))
    checks = answers.Checks.read(run / "warranty.json", run / "calibration.npz")
    started = time.perf_counter()
    vectors = answers._with_asked_genes(model, training, own, everyone, labels, 0)
    knowledge = TrainingKnowledge(training.roles("train"), vectors, chosen)
    answers.LEAST_CELLS = n_cells
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "effects.h5ad"
        with effects_file(path, len(labels), chosen.genes) as file:
            table = answers.ranked_by_means(model, labels, chosen, knowledge, checks, None, None, 0, file)
            file.finish(table, {})
        size = path.stat().st_size / 2**20
    seconds, peak = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    asked = min(n_cells, len(chosen.rows))
    return (
        f"{run.parent.name}, {len(labels):,} genes × {asked} cells × {len(chosen.genes):,} measured genes: "
        f"{seconds:.0f} s, peak {peak:.1f} GiB, effects.h5ad {size:.0f} MiB"
    )


def main() -> None:
    """Print a line per model, each in a process of its own."""
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--genes", type=int, default=17_000)
    parser.add_argument("--cells", type=int, default=500)
    options = parser.parse_args()
    if len(options.runs) == 1:
        print(ranked(options.runs[0], options.genes, options.cells), flush=True)
        return
    for run in options.runs:
        sizes = ["--genes", str(options.genes), "--cells", str(options.cells)]
        subprocess.run([sys.executable, __file__, str(run), *sizes], check=True)


if __name__ == "__main__":
    main()
