"""Bring a screen to one schema: its retrieved files → harmonized.h5ad and harmonization.json."""

from perturbflow.cli import run
from perturbflow.screens.harmonize import harmonize

if __name__ == "__main__":
    run(harmonize, globals().get("snakemake"))
