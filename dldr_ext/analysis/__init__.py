"""What the checkpoints of a run say of its trajectory: `dldr analyze`."""
