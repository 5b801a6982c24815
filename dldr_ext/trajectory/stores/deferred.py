"""Rows that are slower to read than to multiply: several are multiplied in one pass."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ... import ops
from ...tensors.formats import LARGEST, blocks, empty_scale
from ...tensors.matrices import ScaledRows, StoredRows
from ...tensors.memory import free_memory
from .base import Store
from .block_gram import Seconds, multiply_by_rows, multiply_on_cpu

_MOST_ROWS = 32  # are multiplied in one pass while recording
_COMPUTING_SHARE = 4  # times as long as reading
_FREE_SHARE = 8  # of the free memory of a GPU, one in so many bytes is taken for it


class DeferredStore(Store):
    """Rows out of the fast memory: the Gram matrix lags behind and catches up in blocks of k rows.

    Each pass reads the earlier rows once for all k. A subclass keeps the rows: `_put`, `read`,
    `read_scale`.

    Attributes
    ----------
    block : int
        k. On the CPU it grows until reading the earlier rows takes a quarter of the time that
        multiplying them takes, as measured; on CUDA, as many as an eighth of the free memory holds;
        32 at most.
    """

    def __init__(self, numel: int, capacity: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__(numel, capacity, dtype, device)
        self.block = 1
        self._multiplied = 0

    def snapshots(self) -> StoredRows | ScaledRows:
        rows = StoredRows(self, self.length)
        if self.dtype not in LARGEST:
            return rows
        return ScaledRows(rows, StoredRows(_Scales(self), self.length))

    @abstractmethod
    def read(self, row: int, begin: int, end: int, out: Tensor) -> None:
        """Copies columns [begin, end) of a row into ``out``, on the parameters' device."""

    @abstractmethod
    def read_scale(self, row: int, begin: int, end: int, out: Tensor) -> None:
        """The same for the scale of a row, of 8-bit rows: blocks [begin, end)."""

    @abstractmethod
    def _put(self, params: Sequence[Tensor], anchor: Tensor) -> bool:
        """Stores row ``length``; False, and nothing stored, if it or its square is not finite."""

    def _append(self, params: Sequence[Tensor], anchor: Tensor) -> bool:
        # Before the new row is stored: an error here leaves the trajectory as it was.
        if self.length - self._multiplied >= self.block:
            self._complete()
        return self._put(params, anchor)

    def _complete(self) -> None:
        while self._multiplied < self.length:
            index, end = self._multiplied, self.length
            if self.device.type == "cpu":
                seconds = multiply_on_cpu(self.snapshots(), self._gram, index)
                self.block = next_block(seconds, end - index)
            else:
                self.block = self._rows_that_fit()
                end = min(index + self.block, end)
                multiply_by_rows(self.snapshots(), self._gram, index, end)
            self._multiplied = end
            self._count(read=end * self.row_bytes)

    def _rows_that_fit(self) -> int:
        return max(1, min(_MOST_ROWS, free_memory(self.device) // _FREE_SHARE // self.row_bytes))


class _Scales:
    """The scales of a store, read like rows."""

    dtype = torch.float32

    def __init__(self, store: DeferredStore) -> None:
        self.numel, self.device, self.read = blocks(store.numel), store.device, store.read_scale


def next_block(seconds: Seconds, count: int) -> int:
    """The k whose arithmetic takes four times the reading, after a pass for ``count`` rows."""
    each = max(seconds.computing, 1e-9) / count
    return max(1, min(_MOST_ROWS, math.ceil(_COMPUTING_SHARE * seconds.reading / each)))


def stored(
    params: Sequence[Tensor], anchor: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...] | None:
    """flat(params) - anchor, rounded to ``dtype``, and its scale if it has one.

    None if it, or its square, is not finite.
    """
    row = torch.empty((1, len(anchor)), dtype=dtype, device=anchor.device)
    scale = empty_scale(1, len(anchor), dtype, anchor.device)
    square = torch.zeros((1, 1), dtype=torch.float64, device=anchor.device)
    ops.gram_append_(row, square, 0, params, anchor, scale=scale)
    if not bool(square.isfinite()):
        return None
    return (row[0],) if scale is None else (row[0], scale[0])
