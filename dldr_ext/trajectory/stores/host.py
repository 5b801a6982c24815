"""Rows in pinned memory of the host, for parameters on CUDA.

The copies on a stream of their own have not run on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from ...tensors.formats import LARGEST, blocks
from .base import StoreSpec
from .deferred import DeferredStore, stored

# Pinned memory comes in powers of two: in blocks of this many rows at least, little is wasted.
_ROWS_AT_ONCE = 8


class HostStore(DeferredStore):
    """Each row is copied to the host on a stream of its own while training goes on."""

    def __init__(self, spec: StoreSpec, anchor: Tensor | None = None) -> None:
        super().__init__(spec, anchor)
        # Allocated ahead. Each is the row, and its scale if it has one.
        self._rows: list[tuple[Tensor, ...]] = []
        self._copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    @override
    def read(self, row: int, begin: int, end: int, out: Tensor) -> None:
        self._read(self._rows[row][0][begin:end], out)

    @override
    def read_scale(self, row: int, begin: int, end: int, out: Tensor) -> None:
        self._read(self._rows[row][1][begin:end], out)

    @override
    def _drop_odd_rows(self, in_place: bool) -> None:
        super()._drop_odd_rows(in_place)
        stored, free = self._rows[: self.length], self._rows[self.length :]
        self._rows = stored[::2] + stored[1::2] + free  # the memory of those dropped is used again

    def _read(self, source: Tensor, out: Tensor) -> None:
        if self._copies is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._copies)
        out.copy_(source, non_blocking=True)

    def _put(self, params: Sequence[Tensor], anchor: Tensor) -> bool:
        if len(self._rows) == self.length:
            self._rows.extend(self._more_rows())
        row = stored(params, anchor, self.dtype)
        if row is None:
            return False
        if self._copies is not None:
            self._copies.wait_stream(torch.cuda.current_stream(self.device))
        for tensor, place in zip(row, self._rows[self.length], strict=True):
            if self._copies is None:
                place.copy_(tensor)
                continue
            with torch.cuda.stream(self._copies):
                place.copy_(tensor, non_blocking=True)
            tensor.record_stream(self._copies)
        return True

    def _more_rows(self) -> list[tuple[Tensor, ...]]:
        pinned = self.device.type == "cuda"
        block = 1 << (_ROWS_AT_ONCE * self.row_bytes - 1).bit_length() if pinned else self.row_bytes
        count = min(block // self.row_bytes, self.capacity - self.length)
        parts = [(self.numel, self.dtype)]
        if self.dtype in LARGEST:
            parts.append((blocks(self.numel), torch.float32))
        memory = [
            torch.empty(count * size, dtype=dtype, device="cpu", pin_memory=pinned)
            for size, dtype in parts
        ]
        return list(zip(*(block.view(count, -1) for block in memory), strict=True))
