"""A run that makes no progress from its start on is told so, once."""

from __future__ import annotations

import math
from statistics import median

_STEPS = 20  # in each of the two stretches that are compared
# Two stretches of pure noise have half of all pairs in order; this is two standard deviations more.
_IN_ORDER = 0.68


class Plateau:
    """The losses of the first steps.

    Those of different batches differ: a run makes progress if a loss of its second 20 steps is
    below one of the first 20 clearly more often than not (Mann and Whitney's U), or always below
    the first: one may come down in a single step.
    """

    def __init__(self, *, resumed: bool = False) -> None:
        self._losses: list[float] | None = None if resumed else []  # None: nothing to say any more

    def see(self, loss: float, maximize: bool) -> str | None:
        """Take note of a step's loss; return what to say if nothing has moved so far."""
        if self._losses is None or not math.isfinite(loss):
            return None
        self._losses.append(-loss if maximize else loss)
        if len(self._losses) < 2 * _STEPS:
            return None
        first, second = self._losses[:_STEPS], self._losses[_STEPS:]
        self._losses = None
        if max(second) < first[0] or _lower(first, second) > _IN_ORDER:
            return None
        sign = -1.0 if maximize else 1.0
        return (
            f"no progress in {2 * _STEPS} steps: the median loss of the first {_STEPS} was "
            f"{sign * median(first):.6g}, of the others {sign * median(second):.6g}. Where a run "
            'starts on a plateau these help: metric="trajectory", larger batches, one pass of '
            "InSubspace with torch.optim.Adam first, another start "
            '(trajectory.subspace(start="mean"))'
        )


def _lower(before: list[float], after: list[float]) -> float:
    """Return the share of pairs in which the later loss is lower; ties are half of one."""
    found = sum((b < a) + 0.5 * (a == b) for a in before for b in after)
    return found / (len(before) * len(after))
