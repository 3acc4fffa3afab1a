"""Gather all scores, with intervals and verdicts: all metrics.tsv → results/benchmark.tsv and tables beside it."""

from perturbflow.benchmark import benchmark
from perturbflow.cli import run

if __name__ == "__main__":
    run(benchmark, globals().get("snakemake"))
