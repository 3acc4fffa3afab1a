"""Turn knowledge of genes into vectors: GO annotations or interactions → resources/{dataset}/embedding.parquet."""

from perturbflow.cli import run
from perturbflow.priors import prior

if __name__ == "__main__":
    run(prior, globals().get("snakemake"))
