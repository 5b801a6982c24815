"""Recorded training trajectories and their principal directions."""

from __future__ import annotations

from .stores.base import RecordingCost
from .trajectory import Trajectory

__all__ = ["RecordingCost", "Trajectory"]
