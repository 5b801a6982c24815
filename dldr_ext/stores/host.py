"""Rows in pinned memory of the host, for parameters on CUDA. (Has not run on a GPU.)"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .deferred import DeferredStore, stored

# Pinned memory comes in powers of two: in blocks of this many rows at least, little is wasted.
_ROWS_AT_ONCE = 8


class HostStore(DeferredStore):
    """Each row is copied to the host on a stream of its own while training goes on."""

    def __init__(self, numel: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(numel, capacity, dtype, device)
        self._rows: list[Tensor] = []  # allocated ahead
        self._copies = torch.cuda.Stream(device) if device.type == "cuda" else None

    def read(self, row: int, begin: int, end: int, out: Tensor) -> None:
        if self._copies is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._copies)
        out.copy_(self._rows[row][begin:end], non_blocking=True)

    def _put(self, params: Sequence[Tensor], anchor: Tensor) -> bool:
        if len(self._rows) == self.length:
            self._rows.extend(self._more_rows())
        row = stored(params, anchor, self.dtype)
        if row is None:
            return False
        if self._copies is None:
            self._rows[self.length].copy_(row)
            return True
        self._copies.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._copies):
            self._rows[self.length].copy_(row, non_blocking=True)
        row.record_stream(self._copies)
        return True

    def _more_rows(self) -> list[Tensor]:
        pinned = self.device.type == "cuda"
        block = 1 << (_ROWS_AT_ONCE * self.row_bytes - 1).bit_length() if pinned else self.row_bytes
        count = min(block // self.row_bytes, self.capacity - self.length)
        memory = torch.empty(count * self.numel, dtype=self.dtype, device="cpu", pin_memory=pinned)
        return list(memory.view(count, self.numel))
