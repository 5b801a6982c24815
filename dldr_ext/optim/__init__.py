"""Optimizers in a subspace."""

from __future__ import annotations

from .history import StepRecord
from .in_subspace import InSubspace
from .pbfgs import PBFGS
from .psgd import PSGD
from .status import Status
from .virtual_batch import virtual_batch

__all__ = ["PBFGS", "PSGD", "InSubspace", "Status", "StepRecord", "virtual_batch"]
