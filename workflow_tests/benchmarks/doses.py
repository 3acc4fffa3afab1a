"""Verdicts on a made screen of compounds at doses, in the schema of sci-Plex 3 and read by its registered block.

    python workflow_tests/benchmarks/doses.py made --splits unseen_perturbation unseen_dose

A compound is of one of a few mechanisms, has an effect of its own besides, and a response over dose by Hill's equation.
With --repository another version of the workflow is run on the same file.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import yaml
from scipy import sparse

ROOT = Path(__file__).resolve().parents[2]
DOSES = (10.0, 100.0, 1000.0, 10_000.0)  # nM
LINES, PLATES = ("A549", "K562", "MCF7"), ("plate1", "plate2")
MODELS = ("no_change", "perturbed_mean", "additive", "ridge", "set_gp", "technical_duplicate", "scppdm_quick")


def made_screen(n_compounds: int, n_cells: int, n_genes: int, seed: int) -> ad.AnnData:
    """Return raw counts; n_cells of each compound × dose, ten times as many of vehicle."""
    rng = np.random.default_rng(seed)
    level = rng.lognormal(0.5, 1.0, n_genes)
    of_line = rng.normal(0.0, 0.5, (len(LINES), n_genes))
    mechanisms = rng.normal(0.0, 0.5, (6, n_genes)) * (rng.random((6, n_genes)) < 0.25)
    own = rng.normal(0.0, 0.5, (n_compounds, n_genes)) * (rng.random((n_compounds, n_genes)) < 0.1)
    half = 10.0 ** rng.uniform(1.5, 4.5, n_compounds)
    blocks, rows = [], []
    for compound, dose in [(-1, 0.0), *[(i, dose) for i in range(n_compounds) for dose in DOSES]]:
        n = 10 * n_cells if compound < 0 else n_cells
        line, plate = np.arange(n) % len(LINES), rng.integers(len(PLATES), size=n)
        effect = 0.0 if compound < 0 else (mechanisms[compound % 6] + own[compound]) * dose / (dose + half[compound])
        blocks.append(rng.poisson(rng.gamma(8.0, level * np.exp(of_line[line] + effect) / 8.0)))
        name = "control" if compound < 0 else f"Compound {compound + 1:02d}"
        rows += [(name, dose, LINES[i], PLATES[j]) for i, j in zip(line, plate, strict=True)]
    obs = pd.DataFrame(
        rows,
        columns=["perturbation", "dose_value", "cell_line", "plate"],
        index=[f"cell_{i}" for i in range(len(rows))],
    )
    var = pd.DataFrame(
        {"ensembl_id": [f"ENSG{i:011d}" for i in range(n_genes)]}, index=[f"GENE{i}" for i in range(n_genes)]
    )
    return ad.AnnData(sparse.csr_matrix(np.vstack(blocks).astype(np.float32)), obs=obs, var=var)


def configuration(screen: Path, splits: list[str], models: list[str], seeds: list[int]) -> dict:
    """Return a configuration that reads the screen by the block of sciplex3."""
    block = yaml.safe_load((ROOT / "config/datasets.yaml").read_text())["datasets"]["sciplex3"]
    kept = {key: value for key, value in block.items() if key not in ("source", "bytes", "md5", "shape")}
    qc = dict.fromkeys(("min_counts", "min_genes", "max_pct_mt", "min_cells_per_gene"))
    return {
        "effort": "standard",
        "select": {"datasets": ["sciplex_made"], "splits": splits, "models": models, "seeds": seeds},
        "models": {"scppdm_quick": {"family": "diffusion", "params": {"latent": "pca", "n_steps": 800}}},
        "datasets": {"sciplex_made": {**kept, "source": {"path": str(screen.resolve())}, "qc": qc}},
    }


def main() -> None:
    """Make the screen, run the workflow on it and print the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the screen and the run")
    parser.add_argument("--repository", type=Path, default=ROOT)
    parser.add_argument("--splits", nargs="+", default=["unseen_perturbation"])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--compounds", type=int, default=24)
    parser.add_argument("--cells", type=int, default=60, help="of each compound × dose")
    parser.add_argument("--genes", type=int, default=300)
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    screen = arguments.folder / "screen.h5ad"
    made_screen(arguments.compounds, arguments.cells, arguments.genes, seed=0).write_h5ad(screen)
    config = configuration(screen, arguments.splits, arguments.models, arguments.seeds)
    (arguments.folder / "mine.yaml").write_text(yaml.safe_dump(config))
    command = [
        sys.executable,
        "-m",
        "snakemake",
        "--snakefile",
        str(arguments.repository / "Snakefile"),
        "--cores",
        "2",
    ]
    subprocess.run([*command, "--configfile", "mine.yaml"], cwd=arguments.folder, check=True)
    verdicts = pd.read_csv(arguments.folder / "results/verdicts.tsv", sep="\t")
    for row in verdicts.itertuples():
        print(f"| {row.split} | {row.model} | {row.verdict} | {row.best_baselines} | {row.sentence} |")


if __name__ == "__main__":
    main()
