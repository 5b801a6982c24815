"""Files that are either whole or refused, and the columns of distributed checkpoints."""
