"""Optimizers in a subspace."""

from __future__ import annotations

from .in_subspace import InSubspace
from .pbfgs import PBFGS
from .psgd import PSGD
from .status import Status, StepRecord
from .step.closure import virtual_batch

__all__ = ["PBFGS", "PSGD", "InSubspace", "Status", "StepRecord", "virtual_batch"]
