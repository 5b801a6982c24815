"""What DLDR and P-BFGS take on a model of any size, on devices of data sheets or measured ones."""

from __future__ import annotations

from .costs import Job, Plan, plan
from .devices import TABLE, Device, measure
from .remedies import remedies

__all__ = ["TABLE", "Device", "Job", "Plan", "measure", "plan", "remedies"]
