"""Training loops of other packages, a module for each; each needs its package."""
