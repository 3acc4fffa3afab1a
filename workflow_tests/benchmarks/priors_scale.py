"""Time and memory of associations of the size of STRING's: a generated file in its format, read and decomposed.

    python workflow_tests/benchmarks/priors_scale.py --genes 19000 --pairs 6000000

Genes are in modules of unequal size, most pairs within them; degrees vary as a power law does. The file has every pair
in both directions. It is written and read in processes of their own, so that the memory is that of the step.
"""

import argparse
import gzip
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow import csv

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from perturbflow.priors import prior  # noqa: E402

N_MODULES = 150
WITHIN = 0.6  # share of pairs within a module
MANY = 1_000_000  # pairs that are sampled at a time


def pairs_of(n_genes: int, n_pairs: int) -> np.ndarray:
    """Return distinct pairs of genes, (pairs, 2), the lower number first."""
    rng = np.random.default_rng(0)
    fame = rng.permutation(n_genes) + 50.0
    chance = fame**-0.7 / (fame**-0.7).sum()
    module = rng.choice(N_MODULES, n_genes, p=rng.dirichlet(np.full(N_MODULES, 2.0)))
    members = [np.flatnonzero(module == i) for i in range(N_MODULES)]
    found = np.empty(0, np.int64)
    while len(found) < n_pairs:
        a = rng.choice(n_genes, MANY, p=chance)
        b = rng.choice(n_genes, MANY, p=chance)
        inside = rng.random(MANY) < WITHIN
        for i, genes in enumerate(members):
            here = np.flatnonzero(inside & (module[a] == i))
            b[here] = rng.choice(genes, len(here))
        key = np.minimum(a, b).astype(np.int64) * n_genes + np.maximum(a, b)
        found = np.unique(np.concatenate([found, key[a != b]]))
    found = np.sort(rng.choice(found, n_pairs, replace=False))
    return np.stack(np.divmod(found, n_genes), axis=1)


def write(folder: Path, n_genes: int, n_pairs: int) -> None:
    """Write links and info as STRING does."""
    pairs = pairs_of(n_genes, n_pairs)
    score = np.random.default_rng(1).choice(
        np.arange(150, 1000), n_pairs, p=np.arange(850, 0, -1) / np.arange(850, 0, -1).sum()
    )
    names = pa.array([f"9606.ENSP{i:011d}" for i in range(n_genes)])
    both = np.concatenate([pairs, pairs[:, ::-1]])
    order = np.lexsort(both.T[::-1])
    ends = [names.take(pa.array(both[order, i])) for i in (0, 1)]
    table = pa.table({"protein1": ends[0], "protein2": ends[1], "combined_score": np.tile(score, 2)[order]})
    options = csv.WriteOptions(delimiter=" ", quoting_style="none", quoting_header="none")
    with gzip.open(folder / "links.txt.gz", "wb", compresslevel=6) as file:
        csv.write_csv(table, file, options)
    info = pd.DataFrame(
        {
            "#string_protein_id": names.to_pandas(),
            "preferred_name": [f"GENE{i}" for i in range(n_genes)],
            "protein_size": 1,
        }
    )
    info.to_csv(folder / "info.txt.gz", sep="\t", index=False)


def read(folder: Path) -> None:
    """Run the step and print what it took."""
    started = time.perf_counter()
    prior(
        [folder / "links.txt.gz", folder / "info.txt.gz"],
        folder / "embedding.parquet",
        "associations",
        ["links", "info"],
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"{time.perf_counter() - started:.0f} s, {peak:,.0f} MiB at the most, "
        f"links of {(folder / 'links.txt.gz').stat().st_size / 1e6:.0f} MB"
    )
    print(pd.read_parquet(folder / "embedding.parquet").shape)


def main() -> None:
    """Write in one process, read in another."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--genes", type=int, default=19_000)
    parser.add_argument("--pairs", type=int, default=6_000_000)
    parser.add_argument(
        "--folder", type=Path, help="where the files are written, or are already; a temporary folder without it"
    )
    parser.add_argument("--step", choices=["write", "read"], help="one of the two; both without it")
    arguments = parser.parse_args()
    if arguments.step == "write":
        write(arguments.folder, arguments.genes, arguments.pairs)
    elif arguments.step == "read":
        read(arguments.folder)
    else:
        with tempfile.TemporaryDirectory() as temporary:
            given = [
                "--genes",
                str(arguments.genes),
                "--pairs",
                str(arguments.pairs),
                "--folder",
                str(arguments.folder or temporary),
            ]
            for step in ("write", "read"):
                subprocess.run([sys.executable, __file__, *given, "--step", step], check=True)


if __name__ == "__main__":
    main()
