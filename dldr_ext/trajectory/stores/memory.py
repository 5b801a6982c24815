"""Rows in the memory that the parameters are in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ... import ops
from ...tensors.alignment import empty_rows
from ...tensors.formats import empty_scale
from ...tensors.matrices import ScaledRows, scaled
from .base import Store


class Restored(NamedTuple):
    """Rows, their scale if they have one, and their Gram matrix, to be written to."""

    rows: Tensor
    scale: Tensor | None
    gram: Tensor


class MemoryStore(Store):
    """One matrix; each row is multiplied in the pass that stores it."""

    def __init__(self, numel: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(numel, capacity, dtype, device)
        self._rows = empty_rows(capacity, numel, dtype=dtype, device=device)
        self._scale = empty_scale(capacity, numel, dtype, device)

    def snapshots(self) -> Tensor | ScaledRows:
        return scaled(*self._stored())

    def restore(self, length: int) -> Restored:
        """The first ``length`` rows, which count from now on."""
        self._make_room(length)
        self.length = length
        return Restored(*self._stored(), self.gram())

    def _stored(self) -> tuple[Tensor, Tensor | None]:
        scale = None if self._scale is None else self._scale[: self.length]
        return self._rows[: self.length], scale

    def _append(self, params: Sequence[Tensor], anchor: Tensor) -> bool:
        index = self.length
        ops.gram_append_(self._rows, self._gram, index, params, anchor, scale=self._scale)
        self._count(read=index * self.row_bytes)
        if bool(self._gram[index, : index + 1].isfinite().all()):
            return True
        self._gram[index, : index + 1] = 0
        self._gram[: index + 1, index] = 0
        return False
