"""What ranks send, and how long their steps take."""
