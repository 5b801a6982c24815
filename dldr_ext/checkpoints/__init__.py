"""Checkpoints that a run left behind, read in pieces: a model never has to fit into memory."""

from __future__ import annotations

from .errors import CheckpointError
from .series import Series

__all__ = ["CheckpointError", "Series"]
