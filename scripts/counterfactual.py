"""Answer one what-if question: a trained model + control cells → {query}.h5ad, {query}.tsv and {query}.ranking.tsv.

From the command line, for a question of your own about a model that the workflow has trained:
python scripts/counterfactual.py --run results/SCREEN/SPLIT/MODEL/seed_0 --perturbations GENE A+B --output answers/mine
"""

from perturbflow.cli import run
from perturbflow.counterfactuals.answers import counterfactual
from perturbflow.counterfactuals.asking import ask

if __name__ == "__main__":
    run(counterfactual, globals().get("snakemake"), by_hand=ask)
