"""Draw the answer to one what-if question: {query}.h5ad and its tables → four figures."""

from perturbflow.cli import run
from perturbflow.counterfactuals.figures import draw

if __name__ == "__main__":
    run(draw, globals().get("snakemake"))
