"""Divide perturbations and cells into roles: harmonized.h5ad → split.json."""

from perturbflow.cli import run
from perturbflow.splits.split import split

if __name__ == "__main__":
    run(split, globals().get("snakemake"))
