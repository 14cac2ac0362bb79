"""Reads checkpoints and Hugging Face folders: names, orders, shapes."""
