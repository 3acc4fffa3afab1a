"""The Gaussian process over sets of genes."""
