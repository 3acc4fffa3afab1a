"""Quality of a screen, before models are trained.

It describes the effect of every perturbation, the number of its cells, and whether it can be scored.
"""

from perturbflow.quality.step import quality

__all__ = ["quality"]
