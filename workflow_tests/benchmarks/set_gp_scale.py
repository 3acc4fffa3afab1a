"""Time and memory of `set_gp` on generated effects: perturbations × genes.

    python workflow_tests/benchmarks/set_gp_scale.py 230x2000 2000x8000 10000x8000

Effects are single genes' alone, or with --doubles a third of them combinations, made of 60 directions, half of them
determined by gene vectors of 64 dimensions, with the sampling noise of 60 cells. Each size runs in a process of its
own. Printed: seconds to learn and to answer 100 questions with their uncertainty, processor seconds, peak memory, and
Pearson's r of the answers for genes that were held out, to see that something was learned.
"""

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from perturbflow.embeddings import Embeddings  # noqa: E402
from perturbflow.models.effects import Effects  # noqa: E402
from perturbflow.models.gaussian_process.kernel import EffectRows, Sampling  # noqa: E402
from perturbflow.models.gaussian_process.set_gp import SetGP  # noqa: E402

DIRECTIONS, DIMENSIONS, CELLS, CONTROLS, HELD_OUT = 60, 64, 60, 2000, 100


class Generated:
    """What a closed form learns from, as far as `set_gp` looks at it, without cells."""

    def __init__(self, n: int, n_genes: int, doubles: bool) -> None:
        rng = np.random.default_rng(0)
        names = [f"P{i:05d}" for i in range(n + HELD_OUT)]
        vectors = rng.normal(size=(len(names), DIMENSIONS))
        known_part = vectors @ rng.normal(size=(DIMENSIONS, DIRECTIONS)) / np.sqrt(DIMENSIONS)
        z = (known_part + rng.normal(size=known_part.shape)) * np.exp(0.5 * rng.normal(size=(len(names), 1)))
        of_gene = z @ (rng.normal(size=(DIRECTIONS, n_genes)) * np.arange(1, DIRECTIONS + 1)[:, None] ** -0.5) * 0.05
        self.held_out, self.truth = names[n:], of_gene[n:]
        singles = n - n // 3 if doubles else n
        pairs = (
            rng.permuted(np.tile(np.arange(singles), (n - singles, 1)), axis=1)[:, :2]
            if n > singles
            else np.zeros((0, 2), int)
        )
        labels = [*names[:singles], *("+".join(sorted((names[a], names[b]))) for a, b in pairs)]
        values = np.vstack([of_gene[:singles], 0.8 * (of_gene[pairs[:, 0]] + of_gene[pairs[:, 1]])])
        values += rng.normal(size=values.shape) * np.sqrt(0.1 / CELLS)
        order = np.argsort(labels)
        labels, values = [labels[i] for i in order], values[order].astype(np.float32)
        self.effects = Effects(labels, values)
        self.genes, self.row, self.seed, self.half = [f"G{i}" for i in range(n_genes)], {}, 0, None
        self.pairs = SimpleNamespace(genes=self.genes, control_level=np.full(n_genes, 0.5), obs={})
        self.embeddings = Embeddings(
            pd.DataFrame(vectors, index=names, columns=[f"vectors:{i}" for i in range(DIMENSIONS)]).astype(np.float32)
        )
        ones = np.ones((len(labels), 1))
        self.rows = EffectRows(
            labels,
            ["all"],
            ones,
            np.ones(1),
            np.full((1, n_genes), 0.5),
            values,
            Sampling(np.full(len(labels), CELLS), ones, np.array([CONTROLS])),
            np.full(n_genes, 0.1),
        )


def one(size: str, doubles: bool) -> None:
    """Learn and answer at one size, and print a row."""
    n, n_genes = map(int, size.split("x"))
    training = Generated(n, n_genes, doubles)
    EffectRows.of = classmethod(lambda cls, given: given.rows)  # the pass over cells is that of every closed form
    start, cpu = time.perf_counter(), time.process_time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = SetGP()
    model.restore(model.learn(training))
    learned, cpu = time.perf_counter() - start, time.process_time() - cpu
    start = time.perf_counter()
    answers = np.stack([model.effect(name) for name in training.held_out])
    for name in training.held_out:
        model.uncertainty(name)
    answered = time.perf_counter() - start
    r = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(answers, training.truth, strict=True)])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(
        f"| {size} | {learned:.1f} | {cpu:.1f} | {answered:.1f} | {peak / 1e6:.2f} | {before / 1e6:.2f} | {r:.2f} |",
        flush=True,
    )


def main() -> None:
    """Print one row per size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["230x2000", "2000x8000", "10000x8000"])
    parser.add_argument("--doubles", action="store_true")
    parser.add_argument("--threads", default="1")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.here:
        one(arguments.sizes[0], arguments.doubles)
        return
    print(
        "| size | learn, s | CPU, s | 100 answers, s | peak, GB | of that, the data, GB | r |\n" + "| --- " * 7 + "|",
        flush=True,
    )
    threads = {f"{name}_NUM_THREADS": arguments.threads for name in ("OMP", "OPENBLAS", "MKL")}
    for size in arguments.sizes:
        command = [sys.executable, __file__, size, "--here", *(["--doubles"] if arguments.doubles else [])]
        subprocess.run(command, check=True, env={**os.environ, **threads})


if __name__ == "__main__":
    main()
