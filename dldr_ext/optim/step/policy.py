"""How a step goes on from what it has found: pure functions of numbers and `Status`."""

from __future__ import annotations

import math

from ..status import Status


def at_start(gradient_norm: float, tolerance: float) -> Status | None:
    """Return how |c| ends a step before anything has moved; None: go on."""
    if not math.isfinite(gradient_norm):
        return Status.NON_FINITE_GRADIENT
    return Status.CONVERGED if gradient_norm <= tolerance else None


def after_search(loss: float, slope: float) -> Status | None:
    """Return how the accepted point ends a step after its search; None: take the point.

    Parameters
    ----------
    loss : float
        At the point, as evaluated last: a closure may not give the same loss twice.
    slope : float
        Gradient there times direction, or 0 where no gradient was asked for.
    """
    if not math.isfinite(loss):
        return Status.LINE_SEARCH_FAILED
    return None if math.isfinite(slope) else Status.NON_FINITE_GRADIENT


def forgets(status: Status) -> bool:
    """Whether the curvature is reset: what H predicted led nowhere."""
    return status in (
        Status.LINE_SEARCH_FAILED,
        Status.NON_FINITE_LOSS,
        Status.NON_FINITE_GRADIENT,
        Status.RESTORED,
    )
