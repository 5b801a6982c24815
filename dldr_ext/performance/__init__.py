"""Measurements of the ops, the speeds of devices, and what a run would cost."""
