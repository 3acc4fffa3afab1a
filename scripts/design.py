"""Choose which perturbations to measure next: a trained set_gp → {query}.design.tsv."""

from perturbflow.cli import run
from perturbflow.counterfactuals.design import design

if __name__ == "__main__":
    run(design, globals().get("snakemake"))
