"""What the numbers of many steps tell of a run: no progress, losses that are not the gradients'."""

from __future__ import annotations

import math
from statistics import median

_STEPS = 20  # in each of the two stretches that are compared
# Two stretches of pure noise have half of all pairs in order; these are two standard deviations
# more, of the whole first stretch and of its first steps, since a run may come down within ten.
_IN_ORDER = {_STEPS: 0.68, 5: 0.79}

# The median of 20 ratios is 0.7 to 1.01 in runs of networks and on the problems of More, Garbow and
# Hillstrom; it is 0.18 to 0.36 where the loss is that of one of several micro-batches.
_LEAST, _MOST = 0.4, 2.5
# Changes of the loss below this part of it may be rounding, in 16 bits.
_VISIBLE = 1e-2


class OtherLosses:
    """Losses of one closure at the same weights, which are not the same."""

    def __init__(self) -> None:
        self._said = False

    def see(self, first: float, second: float) -> str | None:
        """Return what to say, once, of a closure that is not one function of the weights."""
        if self._said:
            return None
        self._said = True
        return (
            f"the closure gave {first:.6g} and then {second:.6g} at the same weights: it draws "
            "random numbers that are not replayed, or its loss depends on grad mode; its "
            "losses do not compare"
        )


class Agreement:
    """The changes of the loss along steps, and what the gradients at both ends say they are.

    On a parabola that is the length of the step times the mean of the two slopes.
    """

    def __init__(self) -> None:
        self._ratios: list[float] | None = []  # None: it has been said

    def see(self, change: float, expected: float, loss: float) -> str | None:
        """Take note of a step; return what to say if 20 of them do not agree."""
        seen = max(abs(change), abs(expected)) > _VISIBLE * abs(loss)
        if self._ratios is None or not seen or expected == 0.0:
            return None
        self._ratios.append(change / expected)
        if len(self._ratios) < _STEPS:
            return None
        ratio, self._ratios = median(self._ratios), []
        if _LEAST <= ratio <= _MOST:
            return None
        self._ratios = None
        return (
            f"in {_STEPS} steps the loss has changed by {ratio:.3g} times what its gradients say: "
            "the closure's gradients are not those of the loss that it returns (the loss of one of "
            "several micro-batches, gradients clipped by hooks, another scale)"
        )


class Plateau:
    """The losses of the first steps.

    Those of different batches differ: a run makes progress if a loss of its second 20 steps is
    below one of the first 20, or of the first 5, clearly more often than not (Mann and Whitney's
    U), or always below the first: one may come down in a single step.
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
        lower = (_lower(first[:count], second) > share for count, share in _IN_ORDER.items())
        if max(second) < first[0] or any(lower):
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
