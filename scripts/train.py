"""Train one model: pairs.h5ad + embeddings.parquet → model.npz or model.ckpt, and run.json."""

from perturbflow.cli import run
from perturbflow.train import train

if __name__ == "__main__":
    run(train, globals().get("snakemake"))
