"""Unite harmonized screens: harmonized.h5ad and harmonization.json of every member → those of the union."""

from perturbflow.cli import run
from perturbflow.screens.unite import unite

if __name__ == "__main__":
    run(unite, globals().get("snakemake"))
