"""Select genes on training cells, normalize, and match controls: harmonized.h5ad + split.json → pairs.h5ad."""

from perturbflow.cli import run
from perturbflow.pairs import pair

if __name__ == "__main__":
    run(pair, globals().get("snakemake"))
