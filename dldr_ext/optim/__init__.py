"""Optimizers in a subspace."""

from __future__ import annotations

from .history import StepRecord
from .pbfgs import PBFGS
from .psgd import PSGD
from .status import Status
from .virtual_batch import virtual_batch

__all__ = ["PBFGS", "PSGD", "Status", "StepRecord", "virtual_batch"]
