"""Answer one what-if question: a trained model + control cells → {query}.h5ad and {query}.tsv."""

from perturbflow.cli import run
from perturbflow.counterfactuals.answers import counterfactual

if __name__ == "__main__":
    run(counterfactual, globals().get("snakemake"))
