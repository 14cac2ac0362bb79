"""The encoder family as single-device text, its kernels, and the tensor-parallel layers for it."""
