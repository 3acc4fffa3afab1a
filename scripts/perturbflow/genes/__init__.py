"""Symbols of genes and where genes start."""
