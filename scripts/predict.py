"""Predict cells for every held-out perturbation: a trained model + test controls → predictions.h5ad."""

from perturbflow.cli import run
from perturbflow.predict import predict

if __name__ == "__main__":
    run(predict, globals().get("snakemake"))
