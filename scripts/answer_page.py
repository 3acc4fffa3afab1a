"""Write one page on a what-if question: its answers → {query}.html."""

from perturbflow.cli import run
from perturbflow.report.answer_page import answer_page

if __name__ == "__main__":
    run(answer_page, globals().get("snakemake"))
