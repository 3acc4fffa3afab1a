"""Baselines, ablations and ceilings: one effect per perturbation, without a network."""
