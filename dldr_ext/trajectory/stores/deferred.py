"""Rows that are slower to read than to multiply: several are multiplied in one pass."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from typing_extensions import override

from ... import ops
from ...tensors.formats import LARGEST, blocks, empty_scale
from ...tensors.matrices import ScaledRows, StoredRows
from .base import RowPieces, Store, StoreSpec
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

    def __init__(self, spec: StoreSpec, anchor: Tensor | None = None) -> None:
        super().__init__(spec, anchor)
        self.block = 1
        self._multiplied = 0

    @override
    def snapshots(self) -> StoredRows | ScaledRows:
        rows = StoredRows(self, self.length)
        if self.dtype not in LARGEST:
            return rows
        return ScaledRows(rows, StoredRows(_Scales(self), self.length))

    @abstractmethod
    def read(self, row: int, begin: int, end: int, out: Tensor) -> None:
        """Copy columns [begin, end) of a row into ``out``, on the parameters' device."""

    @abstractmethod
    def read_scale(self, row: int, begin: int, end: int, out: Tensor) -> None:
        """Copy the scale of an 8-bit row into ``out``: blocks [begin, end)."""

    @abstractmethod
    def _put(self, params: Sequence[Tensor], anchor: Tensor) -> bool:
        """Store row ``length``; False, and nothing stored, if it or its square is not finite."""

    def _put_pieces(self, pieces: RowPieces, anchor: Tensor) -> bool:
        """Store row ``length``, which comes piece by piece; as `_put`."""
        whole = torch.empty_like(anchor)
        for columns, piece in pieces:
            whole[columns] = piece.to(anchor.device)
        return self._put([whole], anchor)

    @override
    def defer_products(self) -> None:
        self.block = self.capacity

    @override
    def undo(self) -> None:
        super().undo()
        self._multiplied = min(self._multiplied, self.length)

    @override
    def _drop_odd_rows(self, in_place: bool) -> None:
        self._multiplied = (self.length + 1) // 2

    def _append(self, params: Sequence[Tensor], anchor: Tensor) -> bool:
        self._catch_up()
        return self._put(params, anchor)

    def _append_pieces(self, pieces: RowPieces, anchor: Tensor) -> bool:
        self._catch_up()
        return self._put_pieces(pieces, anchor)

    def _catch_up(self) -> None:
        # Before a new row is stored: an error here leaves the trajectory as it was.
        if self.length - self._multiplied >= self.block:
            self._complete()

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
        free, _ = torch.cuda.mem_get_info(self.device)
        return max(1, min(_MOST_ROWS, free // _FREE_SHARE // self.row_bytes))


class _Scales:
    """The scales of a store, read like rows."""

    dtype = torch.float32

    def __init__(self, store: DeferredStore) -> None:
        self.numel, self.device, self.read = blocks(store.numel), store.device, store.read_scale


def next_block(seconds: Seconds, count: int) -> int:
    """Return the k whose arithmetic takes four times the reading, after ``count`` rows."""
    each = max(seconds.computing, 1e-9) / count
    return max(1, min(_MOST_ROWS, math.ceil(_COMPUTING_SHARE * seconds.reading / each)))


def stored(
    params: Sequence[Tensor], anchor: Tensor, dtype: torch.dtype
) -> tuple[Tensor, ...] | None:
    """Return flat(params) - anchor, rounded to ``dtype``, and its scale if it has one.

    None if it, or its square, is not finite.
    """
    row = torch.empty((1, len(anchor)), dtype=dtype, device=anchor.device)
    scale = empty_scale(1, len(anchor), dtype, anchor.device)
    square = torch.zeros((1, 1), dtype=torch.float64, device=anchor.device)
    ops.gram_append_(row, square, 0, params, anchor, scale=scale)
    if not bool(square.isfinite()):
        return None
    return (row[0],) if scale is None else (row[0], scale[0])
