"""Look for leaks: anything of held-out cells in the training data."""
