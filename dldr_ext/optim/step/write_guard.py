"""Detection of weights that something else wrote."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class WriteGuard:
    """A guard that notices writes to the parameters between two steps.

    It looks at autograd's version counters and at addresses, which costs nothing. Writes that
    neither shows, ``p.data.add_()`` for one, go unnoticed.
    """

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params
        self._seen: list[int] = []

    def remember(self) -> None:
        """Take the weights as they are for those that should be there."""
        self._seen = self._now()

    def check(self, owner: str, expected: Callable[[], Tensor]) -> None:
        """Refuse weights that are no longer those of the last `remember`.

        Parameters
        ----------
        owner : str
        expected : callable
            Makes the flat weights as they should be; called only after a write, which may have
            written the same values, as loading a checkpoint does.

        Raises
        ------
        ValueError
            Naming the first parameter that differs.
        """
        now = self._now()
        if now == self._seen:
            return
        start, flat = 0, expected()
        for i, p in enumerate(self._params):
            if start + p.numel() > flat.numel():
                raise ValueError(
                    f"{owner}: params[{i}]: expected the shape it had at construction, got "
                    f"{tuple(p.shape)}: {flat.numel()} elements in all do not fit"
                )
            values = flat[start : start + p.numel()]
            start += p.numel()
            if not torch.equal(p.detach().reshape(-1).to(values.device), values.to(p.dtype)):
                raise ValueError(
                    f"{owner}: params[{i}]: expected the weights that the last step left, got "
                    f"others (shape {tuple(p.shape)}): something else wrote to them, and the "
                    f"optimizer would undo that; call {owner}.resync() to go on from there"
                )
        self._seen = now

    def _now(self) -> list[int]:
        # No tuples: the garbage collector would look at all of them, in each step.
        return [p._version for p in self._params] + [p.data_ptr() for p in self._params]
