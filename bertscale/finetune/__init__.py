"""Trains a classifier on an encoder and labelled texts."""
