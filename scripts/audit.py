"""Look for leaks from held-out cells into training: split, pairs, embeddings → audit.json; a leak fails the run."""

from perturbflow.audit.audit import audit
from perturbflow.cli import run

if __name__ == "__main__":
    run(audit, globals().get("snakemake"))
