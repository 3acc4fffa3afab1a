"""Describe a screen before any training: harmonized.h5ad, harmonization.json → quality.tsv, .json and .html."""

from perturbflow.cli import run
from perturbflow.quality import quality

if __name__ == "__main__":
    run(quality, globals().get("snakemake"))
