"""Latent spaces of expression."""
