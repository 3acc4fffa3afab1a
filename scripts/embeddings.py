"""Describe every perturbed gene by numbers: pairs.h5ad and tables → embeddings.parquet."""

from perturbflow.cli import run
from perturbflow.embeddings import embeddings

if __name__ == "__main__":
    run(embeddings, globals().get("snakemake"))
