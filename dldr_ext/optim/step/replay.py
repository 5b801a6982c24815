"""Random state and buffers: what a closure reads and changes besides the weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class Replay:
    """The random numbers and buffers that every evaluation of one step is to see.

    Covers torch's random state on the CPU and on the parameters' CUDA device. Buffers are
    tensors that a forward pass changes, such as the running statistics of batch norm.
    """

    def __init__(self, device: torch.device, buffers: list[Tensor]) -> None:
        self._device = device if device.type == "cuda" else None
        self._buffers = buffers
        self._saved = [b.detach().clone() for b in buffers]
        self._kept = self._saved
        self._before: list[Tensor] = []
        self._after: list[Tensor] = []

    def begin(self) -> None:
        """Remember where the step starts; to be called before its first evaluation."""
        self._before = self._random_state()
        self._kept = self._saved
        for saved, buffer in zip(self._saved, self._buffers, strict=True):
            saved.copy_(buffer)

    def mark(self) -> None:
        """Remember the random state as the first evaluation leaves it."""
        self._after = self._random_state()

    def rewind(self) -> None:
        """Go back to the start of the step; to be called before every further evaluation."""
        self._set_random_state(self._before)
        for saved, buffer in zip(self._saved, self._buffers, strict=True):
            buffer.copy_(saved)

    def keep(self) -> None:
        """Remember the buffers as the weights accepted so far leave them."""
        self._kept = [b.detach().clone() for b in self._buffers]

    def restore_buffers(self) -> None:
        """Put back the buffers as before the step, or as at the last `keep` since."""
        for kept, buffer in zip(self._kept, self._buffers, strict=True):
            buffer.copy_(kept)

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


def buffer_list(buffers: nn.Module | Iterable[Tensor] | None) -> list[Tensor]:
    """Return the tensors meant by the argument ``buffers`` of an optimizer."""
    if buffers is None:
        return []
    if isinstance(buffers, nn.Module):
        return list(buffers.buffers())
    if isinstance(buffers, Tensor) or not isinstance(buffers, Iterable):
        raise TypeError(
            "buffers: expected a module, an iterable of tensors or None, got "
            f"{type(buffers).__name__}"
        )
    result = list(buffers)
    for i, buffer in enumerate(result):
        if not isinstance(buffer, Tensor):
            raise TypeError(f"buffers[{i}]: expected a tensor, got {type(buffer).__name__}")
    return result
