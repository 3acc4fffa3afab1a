"""The rule unite at full size: seconds, peak memory and bytes, for four screens of 8,000 genes.

    python workflow_tests/benchmarks/unite_scale.py --cells 100000 300000 1200000 --folder /a/disk/with/room

Each size is the sum over the members. Of each, 10,000 cells are made as `chain_scale.py` makes its screens, about 1,900
genes of a cell are expressed, and harmonized once. Larger members repeat these cells under other names: the rule reads,
compresses and compares as many counts as there are. Neither is measured. A row is a size; the last rows are the
exponents of seconds and peak memory in cells between the last two sizes.
"""

import argparse
import json
import math
import shutil
import sys
import tempfile
from pathlib import Path

import anndata as ad
import chain_scale
import h5py
import numpy as np
import pandas as pd
from harmonize_scale import SCRIPTS, measured

N_MEMBERS, N_PERTURBATIONS, N_MADE = 4, 2000, 10_000
CHUNK = 2**18  # values; cells that are repeated hold a multiple of it, so that their chunks repeat as they are
QC = dict.fromkeys(("min_counts", "min_genes", "max_pct_mt", "min_cells_per_gene", "min_cells_per_perturbation"))


def member(folder: Path, n_cells: int, seed: int) -> None:
    """Make a harmonized screen."""
    folder.mkdir(parents=True)
    chain_scale.generate(folder / "screen.h5ad", n_cells, N_PERTURBATIONS, seed=seed)
    block = {**chain_scale.DATASET, "source": {"path": str(folder / "screen.h5ad")}}
    measured(
        SCRIPTS / "harmonize.py", "--raw", folder / "screen.h5ad", "--harmonized", folder / "harmonized.h5ad",
        "--report", folder / "harmonization.json", "--name", folder.name, "--dataset", json.dumps(block),
        "--qc", json.dumps(QC), "--threads", 2,
    )  # fmt: skip
    (folder / "screen.h5ad").unlink()


def repeated(made: Path, folder: Path, times: int) -> None:
    """Write a screen that has the cells of another some times over; its last cells lose the counts beyond a chunk."""
    folder.mkdir(parents=True)
    shutil.copyfile(made / "harmonization.json", folder / "harmonization.json")
    cells = ad.read_h5ad(made / "harmonized.h5ad")
    n_values = cells.X.nnz // CHUNK * CHUNK
    ends = np.minimum(cells.X.indptr, n_values).astype(np.int64)
    names = [f"{i}:{name}" for i in range(times) for name in cells.obs_names]
    tables = ad.AnnData(obs=pd.concat([cells.obs] * times).set_axis(names), var=cells.var, uns=cells.uns)
    tables.write_h5ad(folder / "harmonized.h5ad")
    with h5py.File(folder / "harmonized.h5ad", "r+") as file:
        if "X" in file:
            del file["X"]
        X = file.create_group("X")
        X.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
        X.attrs["shape"] = np.array([times * cells.n_obs, cells.n_vars])
        starts = [ends[:1], *[ends[1:] + i * n_values for i in range(times)]]
        X["indptr"] = np.concatenate(starts)
        for name in ("data", "indices"):
            values = getattr(cells.X, name)[:n_values]
            of = {"chunks": (CHUNK,), "compression": "gzip", "compression_opts": 1, "dtype": values.dtype}
            written = X.create_dataset(name, (times * n_values,), **of)
            written[:n_values] = values
            for first in range(0, n_values, CHUNK):
                mask, chunk = written.id.read_direct_chunk((first,))
                for i in range(1, times):
                    written.id.write_direct_chunk((i * n_values + first,), chunk, mask)


def row_of(n_cells: int, made: list[Path], folder: Path) -> tuple[float, float]:
    """Print a row of the table; return seconds and peak memory."""
    names = [of.name for of in made]
    for of in made:
        repeated(of, folder / of.name, max(1, n_cells // N_MEMBERS // N_MADE))
    union = {"members": names, "genes": "shared", "perturbation_types": ["CRISPRi"], "organism": "human"}
    target = folder / "union" / "harmonized.h5ad"
    seconds, cpu, memory = measured(
        SCRIPTS / "unite.py", "--members", json.dumps([str(folder / name / "harmonized.h5ad") for name in names]),
        "--accounts", json.dumps([str(folder / name / "harmonization.json") for name in names]),
        "--harmonized", target, "--report", folder / "union" / "harmonization.json", "--name", "union",
        "--union", json.dumps(union), "--threads", 2,
    )  # fmt: skip
    read = sum((folder / name / "harmonized.h5ad").stat().st_size for name in names)
    cells = [f"{n_cells:,}", f"{read / 1e9:.2f}", f"{target.stat().st_size / 1e9:.2f}", f"{seconds:.0f}", f"{cpu:.0f}"]
    print("| " + " | ".join([*cells, f"{memory:,.0f}"]) + " |", flush=True)
    return cpu, memory


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, nargs="+", default=[100_000, 300_000])
    parser.add_argument("--folder", type=Path, help="on a disk with room; else a temporary one")
    arguments = parser.parse_args()
    chain_scale.N_GENES, chain_scale.UMI_PER_CELL = 8000, 9000
    print("| cells | members, GB | union, GB | seconds | CPU s | peak MB |\n" + "| --- " * 6 + "|", flush=True)
    found = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as made_in:
        made = [Path(made_in) / f"line{i}" for i in range(N_MEMBERS)]
        for i, place in enumerate(made):
            member(place, N_MADE, i)
            print(f"made {place.name}", file=sys.stderr)
        for n_cells in arguments.cells:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                found.append(row_of(n_cells, made, Path(folder)))
    if len(found) > 1:
        ratio = math.log(arguments.cells[-1] / arguments.cells[-2])
        exponents = [math.log(after / before) / ratio for before, after in zip(found[-2], found[-1], strict=True)]
        print(f"exponents in cells: CPU seconds {exponents[0]:.2f}, peak memory {exponents[1]:.2f}")


if __name__ == "__main__":
    main()
