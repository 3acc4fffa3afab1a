"""Search for the params of one model on training cells: pairs.h5ad + embeddings.parquet → best.yaml, trials.tsv."""

from perturbflow.cli import run
from perturbflow.sweep import sweep

if __name__ == "__main__":
    run(sweep, globals().get("snakemake"))
