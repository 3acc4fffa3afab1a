"""Gather all scores with bootstrap intervals: every metrics.tsv → results/benchmark.tsv."""

from perturbflow.benchmark import benchmark
from perturbflow.cli import run

if __name__ == "__main__":
    run(benchmark, globals().get("snakemake"))
