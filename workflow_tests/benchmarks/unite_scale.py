"""The rule unite at full size: seconds, peak memory and bytes, for four screens of 8,000 genes.

    python workflow_tests/benchmarks/unite_scale.py --cells 100000 300000 1200000 --folder /a/disk/with/room

Each size is the sum over the members. They are made as `chain_scale.py` makes its screens, about 1,900 genes of a cell
are expressed, and each is harmonized once, which is not measured. A row is a size; the last rows are the exponents of
seconds and peak memory in cells between the last two sizes.
"""

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

import chain_scale
from harmonize_scale import SCRIPTS, measured

N_MEMBERS, N_PERTURBATIONS = 4, 2000
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


def row_of(n_cells: int, folder: Path) -> tuple[float, float]:
    """Print a row of the table; return seconds and peak memory."""
    names = [f"line{i}" for i in range(N_MEMBERS)]
    for i, name in enumerate(names):
        if not (folder / name).exists():
            member(folder / name, n_cells // N_MEMBERS, i)
            print(f"made {name} of {n_cells:,}", file=sys.stderr)
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
    for n_cells in arguments.cells:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            found.append(row_of(n_cells, Path(folder)))
    if len(found) > 1:
        ratio = math.log(arguments.cells[-1] / arguments.cells[-2])
        exponents = [math.log(after / before) / ratio for before, after in zip(found[-2], found[-1], strict=True)]
        print(f"exponents in cells: CPU seconds {exponents[0]:.2f}, peak memory {exponents[1]:.2f}")


if __name__ == "__main__":
    main()
