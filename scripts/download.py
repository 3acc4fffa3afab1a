"""Retrieve a dataset's files: its block → resources/{dataset}/raw/manifest.json and the verified files beside it."""

from perturbflow.cli import run
from perturbflow.download import download

if __name__ == "__main__":
    run(download, globals().get("snakemake"))
