"""Check a trained model before it answers what-if questions: model + pairs → warranty.json and calibration.npz."""

from perturbflow.cli import run
from perturbflow.counterfactuals.warranty import warranty

if __name__ == "__main__":
    run(warranty, globals().get("snakemake"))
