"""Rows in the memory that the parameters are in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from .._rows import empty_rows
from .base import Store


class MemoryStore(Store):
    """One matrix; each row is multiplied in the pass that stores it."""

    def __init__(self, numel: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(numel, capacity, dtype, device)
        self._rows = empty_rows(capacity, numel, dtype=dtype, device=device)

    def snapshots(self) -> Tensor:
        return self._rows[: self.length]

    def restore(self, length: int) -> tuple[Tensor, Tensor]:
        """The first ``length`` rows and their Gram matrix, to be written to."""
        self._make_room(length)
        self.length = length
        return self.snapshots(), self.gram()

    def _append(self, params: Sequence[Tensor], anchor: Tensor) -> bool:
        index = self.length
        ops.gram_append_(self._rows, self._gram, index, params, anchor)
        self._count(read=index * self.row_bytes)
        if bool(self._gram[index, : index + 1].isfinite().all()):
            return True
        self._gram[index, : index + 1] = 0
        self._gram[: index + 1, index] = 0
        return False
