"""Random state and buffers: what a closure reads and changes besides the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from ...batch_norm import StatisticsWatch
from ...tensors.buffers import Buffers, SavedBuffers
from ...tensors.random_state import RandomState, process_generators, reachable


class Replay:
    """The random numbers and buffers that every evaluation of one step is to see.

    Random numbers are those of the generators of the process and of those that the closure reaches
    (`tensors.random_state`). Buffers are tensors that a forward pass changes, such as the running
    statistics of batch norm.
    """

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers
        self._statistics = (
            StatisticsWatch("PBFGS", buffers) if isinstance(buffers, nn.Module) else None
        )
        self._saved = self._kept = SavedBuffers(buffers)
        self._before = self._after = RandomState(())

    def begin(self, closure: Callable[..., Any]) -> None:
        """Remember where the step starts; to be called before its first evaluation."""
        if self._statistics is not None:
            self._statistics.step_begins()
        self._before = RandomState([*process_generators(), *reachable(closure)])
        self._saved = self._kept = SavedBuffers(self._buffers)

    def mark(self) -> None:
        """Remember the random state as the first evaluation leaves it.

        Raises
        ------
        ValueError
            It has written a frozen parameter, which the next one would write again.
        """
        name = self._saved.written_frozen()
        if name is not None:
            raise ValueError(
                f"buffers: {name}: expected a frozen parameter that stays as it is, got one that "
                "the forward pass writes (a teacher, an average?): the other evaluations of the "
                "step would write it too; make it a buffer, which they leave alone, or write it "
                "after the step"
            )
        self._after = RandomState(self._before.generators)

    def rewind(self) -> None:
        """Go back to the start of the step; to be called before every further evaluation."""
        self._before.restore()
        self._saved.put_back()

    def keep(self) -> None:
        """Remember the buffers as the weights accepted so far leave them."""
        self._kept = SavedBuffers(self._buffers)

    def restore_buffers(self) -> None:
        """Put back the buffers as before the step, or as at the last `keep` since."""
        self._kept.put_back()

    def finish(self) -> None:
        """Set the random state as one evaluation leaves it, however many there were."""
        self._after.restore()
        if self._statistics is not None:
            self._statistics.step_ended()
