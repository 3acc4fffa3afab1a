"""Gather all scores with bootstrap intervals: every metrics.tsv → results/benchmark.tsv."""

from perturbflow.cli import run
from perturbflow.benchmark import benchmark

if __name__ == "__main__":
    run(benchmark, globals().get("snakemake"))
