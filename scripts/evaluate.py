"""Score predicted cells against measured ones: predictions.h5ad + pairs.h5ad → metrics.tsv."""

from perturbflow.cli import run
from perturbflow.evaluation import evaluate

if __name__ == "__main__":
    run(evaluate, globals().get("snakemake"))
