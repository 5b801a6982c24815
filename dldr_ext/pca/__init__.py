"""Principal component analysis by the method of snapshots: from a Gram matrix to a basis."""
