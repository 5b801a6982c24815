"""Whole training runs that back or refute what is claimed of training in tiny subspaces.

``python -m benchmarks.experiments --help`` from the root of the source tree; what came out is in
docs/experiments.md.
"""
