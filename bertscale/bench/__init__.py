"""What this machine makes of a training config."""
