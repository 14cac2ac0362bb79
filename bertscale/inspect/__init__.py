"""What is in a folder, and what differs between two."""
