"""Ask every registered host for headers: all sources → results/download_check.tsv."""

from perturbflow.cli import run
from perturbflow.download.check import download_check

if __name__ == "__main__":
    run(download_check, globals().get("snakemake"))
