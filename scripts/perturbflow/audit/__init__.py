"""Look for anything of held-out cells in what a model is trained on."""
