"""Converts checkpoints to Hugging Face folders and back."""
