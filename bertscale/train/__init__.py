"""Pretraining: the loop, a step of it, the sharded engine, checkpoints and what a run reports."""
