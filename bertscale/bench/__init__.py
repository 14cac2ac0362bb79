"""Measures how fast this machine trains a config."""
