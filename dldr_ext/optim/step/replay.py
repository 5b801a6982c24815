"""Random state and buffers: what a closure reads and changes besides the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from ...tensors.buffers import Buffers, SavedBuffers


class Replay:
    """The random numbers and buffers that every evaluation of one step is to see.

    Covers torch's random state on the CPU and on the parameters' CUDA device. Buffers are
    tensors that a forward pass changes, such as the running statistics of batch norm.
    """

    def __init__(self, device: torch.device, buffers: Buffers) -> None:
        self._device = device if device.type == "cuda" else None
        self._buffers = buffers
        self._saved = self._kept = SavedBuffers(buffers)
        self._before: list[Tensor] = []
        self._after: list[Tensor] = []

    def begin(self) -> None:
        """Remember where the step starts; to be called before its first evaluation."""
        self._before = self._random_state()
        self._saved = self._kept = SavedBuffers(self._buffers)

    def mark(self) -> None:
        """Remember the random state as the first evaluation leaves it."""
        self._after = self._random_state()

    def rewind(self) -> None:
        """Go back to the start of the step; to be called before every further evaluation."""
        self._set_random_state(self._before)
        self._saved.put_back()

    def keep(self) -> None:
        """Remember the buffers as the weights accepted so far leave them."""
        self._kept = SavedBuffers(self._buffers)

    def restore_buffers(self) -> None:
        """Put back the buffers as before the step, or as at the last `keep` since."""
        self._kept.put_back()

    def finish(self) -> None:
        """Set the random state as one evaluation leaves it, however many there were."""
        self._set_random_state(self._after)

    def _random_state(self) -> list[Tensor]:
        cpu = torch.get_rng_state()
        return [cpu] if self._device is None else [cpu, torch.cuda.get_rng_state(self._device)]

    def _set_random_state(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self._device is not None:
            torch.cuda.set_rng_state(states[1], self._device)
