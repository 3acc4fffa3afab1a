"""Write one self-contained page: tables of the benchmark and run artefacts → results/report.html."""

from perturbflow.cli import run
from perturbflow.report import report

if __name__ == "__main__":
    run(report, globals().get("snakemake"))
