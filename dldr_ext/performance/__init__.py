"""Measurements of the ops against plain torch and against the memory itself."""
