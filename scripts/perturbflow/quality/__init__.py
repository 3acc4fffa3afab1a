"""Is this screen good enough? What every perturbation did, how many cells tell it, and what will not be scorable."""

from perturbflow.quality.step import quality

__all__ = ["quality"]
