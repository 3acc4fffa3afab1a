"""Harmonize at full size: time beside one bare h5py pass over the same file, and peak memory, in one run.

    python workflow_tests/benchmarks/harmonize_scale.py --cells 50000 310385 --folder /a/disk/with/room

makes files of the shape, chunks, compression and marginals of scPerturb's Replogle files (dense float32, gzip chunks as
h5py guesses them) and prints a Markdown table. Every measurement is a process of its own; bare pass and harmonize take
turns.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import anndata as ad
import h5py
import numpy as np
import pandas as pd

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from perturbflow.io.files import file_digest, write_json  # noqa: E402

N_GENES, N_PERTURBATIONS, N_CONTROLS, N_BATCHES = 8563, 2057, 10_691, 48
# Of ReplogleWeissman2022_K562_essential: 11-12 thousand UMI per cell, and with this spread and dispersion 41 % of the
# values are not zero and gzip leaves 0.58 bytes per value; the real file has 1,546,729,675 bytes for 310,385 × 8,563
# values, 0.58 each.
UMI_PER_CELL, SPREAD, DISPERSION = 11_500, 1.4, 2.0
DISTINCT_CELLS = 20_000

QC = {"min_counts": 500, "min_genes": 200, "max_pct_mt": 20, "min_cells_per_gene": 10, "min_cells_per_perturbation": 30}
DATASET = {
    "source": {"path": "screen.h5ad"},
    "subset": {},
    "perturbation": {"column": "perturbation", "control": ["control"], "separator": None, "drop": ["nan", "*", ""]},
    "covariates": {"batch": "batch", "cell_type": "celltype"},
    "perturbation_type": "CRISPRi",
    "organism": "human",
}


# --- a file like Replogle's -----------------------------------------------------------------------------------------


def _obs(n_cells: int, rng: np.random.Generator) -> pd.DataFrame:
    """Return the columns of a Replogle file of scPerturb; a share of controls and cells per perturbation as there."""
    targets = np.array([f"TARGET{i}" for i in range(N_PERTURBATIONS)])
    share = rng.lognormal(0, 0.5, N_PERTURBATIONS)
    chosen = rng.choice(N_PERTURBATIONS, n_cells, p=share / share.sum())
    is_control = rng.random(n_cells) < N_CONTROLS / 310_385

    def of_target(pattern: str, control: str) -> pd.Categorical:
        values = [pattern.format(target) for target in targets]
        return pd.Categorical.from_codes(np.where(is_control, len(values), chosen), [*values, control])

    def constant(value: str) -> pd.Categorical:
        return pd.Categorical.from_codes(np.zeros(n_cells, np.int8), [value])

    umi = rng.lognormal(np.log(UMI_PER_CELL), 0.35, n_cells)
    return pd.DataFrame(
        {
            "batch": rng.integers(1, N_BATCHES + 1, n_cells),
            "gene": of_target("{}", "non-targeting"),
            "gene_id": of_target("ENSG_{}", "non-targeting"),
            "transcript": of_target("{}_P1P2", "non-targeting"),
            "gene_transcript": of_target("1_{}_P1P2", "0_non-targeting"),
            "guide_id": of_target("{0}_+_1|{0}_-_2", "non-targeting_1|non-targeting_2"),
            "percent_mito": rng.beta(8, 70, n_cells),
            "UMI_count": umi,
            "z_gemgroup_UMI": rng.standard_normal(n_cells),
            "core_scale_factor": rng.lognormal(0, 0.3, n_cells),
            "core_adjusted_UMI_count": umi,
            "disease": constant("chronic myelogenous leukemia"),
            "cancer": np.ones(n_cells, bool),
            "cell_line": constant("K562"),
            "sex": constant("Female"),
            "age": constant("53"),
            "perturbation": of_target("{}", "control"),
            "organism": constant("human"),
            "perturbation_type": constant("CRISPR"),
            "tissue_type": constant("cell_line"),
            "ncounts": umi,
            "ngenes": rng.integers(2000, 5000, n_cells),
            "nperts": np.where(is_control, 0, 1),
            "percent_ribo": rng.beta(20, 80, n_cells),
            "celltype": constant("lymphoblasts"),
        },
        index=pd.Index([f"{i:012x}-1" for i in range(n_cells)], name="cell_barcode"),
    )


def generate(path: Path, n_cells: int, n_distinct: int = DISTINCT_CELLS, seed: int = 0) -> None:
    """Write a screen of `n_cells` cells; about `n_distinct` are distinct and come again, in other bands of chunks."""
    rng = np.random.default_rng(seed)
    names = [*(f"MT-{i}" for i in range(13)), *(f"TARGET{i}" for i in range(N_PERTURBATIONS))]
    names += [f"GENE{i}" for i in range(N_GENES - len(names))]
    var = pd.DataFrame(
        {"ensembl_id": [f"ENSG{i:011d}" for i in range(N_GENES)], "mean": 1.0, "std": 1.0},
        index=pd.Index(names, name="gene_name"),
    )
    level = rng.lognormal(0, SPREAD, N_GENES)
    level *= UMI_PER_CELL / level.sum()
    ad.AnnData(obs=_obs(n_cells, rng), var=var).write_h5ad(path, compression="gzip")
    with h5py.File(path, "r+") as file, ThreadPoolExecutor(os.cpu_count()) as pool:
        if "X" in file:
            del file["X"]
        X = file.create_dataset(
            "X", (n_cells, N_GENES), np.float32, chunks=True, compression="gzip", compression_opts=4
        )
        X.attrs.update({"encoding-type": "array", "encoding-version": "0.2.0"})
        height, width = X.chunks

        def encoded(seed: np.random.SeedSequence) -> list[bytes]:
            rng = np.random.default_rng(seed)
            depth = rng.lognormal(-0.06, 0.35, (height, 1))
            band = np.zeros((height, -(-N_GENES // width) * width), np.float32)
            band[:, :N_GENES] = rng.negative_binomial(DISPERSION, DISPERSION / (DISPERSION + level * depth))
            return [zlib.compress(band[:, left : left + width].tobytes(), 4) for left in range(0, N_GENES, width)]

        n_bands = -(-n_cells // height)
        distinct = list(pool.map(encoded, np.random.SeedSequence(seed).spawn(min(n_bands, -(-n_distinct // height)))))
        for band in range(n_bands):
            for k, chunk in enumerate(distinct[band % len(distinct)]):
                X.id.write_direct_chunk((band * height, k * width), chunk)


# --- what is measured -----------------------------------------------------------------------------------------------


# Reads X in bands of whole chunks, into one buffer, and does nothing with it.
BARE = """
import sys, h5py, numpy as np
with h5py.File(sys.argv[1]) as file:
    X = file["X"]
    buffer = np.empty((X.chunks[0], X.shape[1]), X.dtype)
    for start in range(0, len(X), len(buffer)):
        stop = min(start + len(buffer), len(X))
        X.read_direct(buffer, np.s_[start:stop], np.s_[: stop - start])
"""


def in_memory(path: Path, target: Path) -> None:
    """Do the same with scanpy in memory: limits, genes, rare perturbations, CSR."""
    import scanpy as sc
    from scipy import sparse

    adata = ad.read_h5ad(path)
    adata.X = sparse.csr_matrix(adata.X)
    adata.var["mt"] = adata.var_names.str.startswith("MT-")
    sc.pp.calculate_qc_metrics(adata, qc_vars=["mt"], percent_top=None, log1p=False, inplace=True)
    within = (adata.obs["total_counts"] >= QC["min_counts"]) & (adata.obs["n_genes_by_counts"] >= QC["min_genes"])
    adata = adata[within & (adata.obs["pct_counts_mt"] <= QC["max_pct_mt"])].copy()
    sc.pp.filter_genes(adata, min_cells=QC["min_cells_per_gene"])
    n_cells = adata.obs["perturbation"].value_counts()
    adata = adata[adata.obs["perturbation"].isin(n_cells.index[n_cells >= QC["min_cells_per_perturbation"]])].copy()
    adata.write_h5ad(target, compression="gzip")


# A process starts with the peak memory of the one that made it: this small one stands between.
MEASURED = """
import os, subprocess, sys, time
started = time.perf_counter()
_, status, usage = os.wait4(subprocess.Popen(sys.argv[1:]).pid, 0)
print(time.perf_counter() - started, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1000)
sys.exit(os.waitstatus_to_exitcode(status))
"""


def measured(*arguments: object) -> tuple[float, ...]:
    """Run Python with these arguments; return wall seconds, CPU seconds and peak memory in MB."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, arguments))} failed:\n{done.stderr[-2000:]}")
    return tuple(map(float, done.stdout.split()[-3:]))


def row_of(n_cells: int, folder: Path, threads: int, repeats: int, is_in_memory: bool) -> str:
    """Measure one size; return a row of the table."""
    raw, target = folder / f"cells_{n_cells}", folder / "harmonized.h5ad"
    path, manifest = raw / "screen.h5ad", raw / "manifest.json"
    if not manifest.exists():
        raw.mkdir(parents=True, exist_ok=True)
        generate(path, n_cells)
        write_json(
            manifest,
            {"files": {"file": {"file": path.name, "bytes": path.stat().st_size, "sha256": file_digest(path)}}},
        )
    ours = [
        SCRIPTS / "harmonize.py",
        "--raw",
        manifest,
        "--harmonized",
        target,
        "--report",
        folder / "harmonization.json",
        "--name",
        "made",
    ]
    ours += ["--dataset", json.dumps(DATASET), "--qc", json.dumps(QC), "--threads", threads]
    runs = []
    for _ in range(repeats):
        runs.append((measured("-c", BARE, path), measured(*ours)))
        print(f"{n_cells:,} cells: bare {runs[-1][0]}, harmonize {runs[-1][1]}", file=sys.stderr)
    bare_run, our_run = np.median(np.array(runs), axis=0)
    size = target.stat().st_size
    target.unlink()
    cells = [
        f"{n_cells:,}",
        f"{path.stat().st_size / 1e9:.2f}",
        f"{size / 1e9:.2f}",
        f"{bare_run[0]:.0f}",
        f"{our_run[0]:.0f}",
    ]
    cells += [f"**{our_run[0] / bare_run[0]:.2f}**", f"{our_run[1] / bare_run[1]:.2f}", f"**{our_run[2]:,.0f}**"]
    if is_in_memory:
        wall, _, peak = measured(__file__, "--in-memory", path, target)
        cells += [f"{wall:.0f}", f"{peak:,.0f}"]
        target.unlink()
    else:
        cells += ["–", "–"]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--cells",
        type=int,
        nargs="+",
        default=[50_000, 310_385],
        help="sizes of the files to be made (or found) and read",
    )
    parser.add_argument("--folder", type=Path, help="where the files are kept; default: a temporary folder")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=2, help="pairs of bare pass and harmonize; medians are shown")
    parser.add_argument(
        "--in-memory-up-to", type=int, default=50_000, help="cells up to which the in-memory way is measured, too"
    )
    parser.add_argument("--in-memory", type=Path, nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.in_memory:
        in_memory(*arguments.in_memory)
    else:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as temporary:
            folder = arguments.folder or Path(temporary)
            print(
                "| cells | file, GB | harmonized, GB | bare pass, s | harmonize, s | wall ratio | CPU ratio | peak, MB "
                "| scanpy, s | peak, MB |"
            )
            print("| " + "---: | " * 10)
            for n_cells in arguments.cells:
                print(
                    row_of(n_cells, folder, arguments.threads, arguments.repeats, n_cells <= arguments.in_memory_up_to),
                    flush=True,
                )


if __name__ == "__main__":
    main()
