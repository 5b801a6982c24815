"""Optimizers in a subspace."""

from __future__ import annotations

from ._virtual_batch import virtual_batch
from .history import StepRecord
from .in_subspace import InSubspace
from .pbfgs import PBFGS
from .psgd import PSGD
from .status import Status

__all__ = ["PBFGS", "PSGD", "InSubspace", "Status", "StepRecord", "virtual_batch"]
