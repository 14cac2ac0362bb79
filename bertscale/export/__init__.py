"""What `bertscale convert` and `bertscale average` write."""
