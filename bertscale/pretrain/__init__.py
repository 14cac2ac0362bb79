"""Pretraining: the loop, and a run that starts from another."""
