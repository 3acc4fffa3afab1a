"""Which perturbations and cells train, validate and test."""
