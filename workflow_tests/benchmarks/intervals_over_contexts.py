"""How often intervals over contexts hold the true mean, beside those that take every score for a draw of its own.

    python workflow_tests/benchmarks/intervals_over_contexts.py

Scores are made: a part of the context, a part of the perturbation and the rest. 600 tables of 25 perturbations each.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from perturbflow.evaluation.bootstrap import Estimates, estimate, estimate_over_contexts

N_TABLES, N_PERTURBATIONS = 600, 25
SPREADS = ((1.0, 0.0, 0.5), (1.0, 1.0, 1.0), (0.3, 1.0, 1.0), (0.0, 0.0, 1.0))


def main() -> None:
    """Print the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rng = np.random.default_rng(0)
    print("context\tperturbation\trest\tcontexts\tcovered\tcovered, naive\twidth, naive = 1")
    for of_context, of_perturbation, rest in SPREADS:
        for n in (2, 3, 4, 5, 8, 12):
            scores = of_context * rng.normal(size=(n, N_TABLES, 1, 1))
            scores = scores + of_perturbation * rng.normal(size=(1, N_TABLES, 1, N_PERTURBATIONS))
            scores = scores + rest * rng.normal(size=(n, N_TABLES, 1, N_PERTURBATIONS))
            found = estimate_over_contexts(scores)
            naive = estimate(np.moveaxis(scores, 0, 2).reshape(N_TABLES, 1, -1))
            ratio = np.median((found.high - found.low) / (naive.high - naive.low))
            shares = "\t".join(f"{_covered(one):.2f}" for one in (found, naive))
            print(f"{of_context:g}\t{of_perturbation:g}\t{rest:g}\t{n}\t{shares}\t{ratio:.1f}")


def _covered(found: Estimates) -> float:
    """Return the share of intervals that hold the true mean, 0."""
    return float(np.mean((found.low < 0) & (found.high > 0)))


if __name__ == "__main__":
    main()
