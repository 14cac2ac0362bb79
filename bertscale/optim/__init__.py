"""Optimizers, exact where the parameters lie in fragments on many ranks."""
