"""Describe every gene by numbers: counts and tables → gene_vectors.parquet."""

from perturbflow.cli import run
from perturbflow.embeddings import gene_vectors

if __name__ == "__main__":
    run(gene_vectors, globals().get("snakemake"))
