"""Rows in the memory that the parameters are in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from ... import ops
from ...checkpoints.series import finite
from ...tensors.formats import empty_scale, scale_of, wide_dtype
from ...tensors.matrices import ScaledRows, scaled
from ...tensors.memory import empty_rows
from .base import RowPieces, Store, StoreSpec


class RestoredRows(NamedTuple):
    """Rows, their scale if they have one, and their Gram matrix, to be written to."""

    rows: Tensor
    scale: Tensor | None
    gram: Tensor


class MemoryStore(Store):
    """One matrix; each row is multiplied in the pass that stores it.

    Rows that came in pieces are multiplied all together, when the Gram matrix is asked for.
    """

    def __init__(self, spec: StoreSpec, anchor: Tensor | None = None) -> None:
        super().__init__(spec, anchor)
        self._rows, self._scale = self._new_rows()
        self._multiplied = 0  # rows in the Gram matrix

    @override
    def snapshots(self) -> Tensor | ScaledRows:
        return scaled(*self._stored())

    def restore(self, length: int, anchor: Tensor) -> RestoredRows:
        """Return the first ``length`` rows to be written to; they count from now on."""
        self._make_room(length)
        self.length = self._multiplied = length
        self.anchor = anchor
        return RestoredRows(*self._stored(), self.gram())

    def clear(self) -> None:
        """Forget all rows; their memory is used again."""
        self.length = self._multiplied = 0
        self.anchor = self._given_anchor

    @override
    def undo(self) -> None:
        super().undo()
        self._multiplied = min(self._multiplied, self.length)

    @override
    def _drop_odd_rows(self, in_place: bool) -> None:
        codes, scale = self._rows, self._scale
        if not in_place:
            self._rows, self._scale = self._new_rows()
        for source, target in ((codes, self._rows), (scale, self._scale)):
            if source is not None and target is not None:
                for row in range(0, self.length, 2):
                    target[row // 2].copy_(source[row])
        self._multiplied = (self.length + 1) // 2

    def _new_rows(self) -> tuple[Tensor, Tensor | None]:
        shape = self.capacity, self.numel
        rows = empty_rows(*shape, dtype=self.dtype, device=self.device)
        return rows, empty_scale(*shape, self.dtype, self.device)

    def _stored(self) -> tuple[Tensor, Tensor | None]:
        scale = None if self._scale is None else self._scale[: self.length]
        return self._rows[: self.length], scale

    def _append(self, params: Sequence[Tensor], anchor: Tensor) -> bool:
        self._complete()
        index = self.length
        ops.gram_append_(self._rows, self._gram, index, params, anchor, scale=self._scale)
        self._count(read=index * self.row_bytes)
        if bool(self._gram[index, : index + 1].isfinite().all()):
            self._multiplied = index + 1
            return True
        self._gram[index, : index + 1] = 0
        self._gram[: index + 1, index] = 0
        return False

    def _append_pieces(self, pieces: RowPieces, anchor: Tensor) -> bool:
        row = slice(self.length, self.length + 1)
        for columns, piece in pieces:
            target = self._rows[row, columns]
            scale = scale_of(self._scale, columns.start, columns.stop, self.length)
            ops.store_snapshot_(target, 0, [piece.to(anchor.device)], anchor[columns], scale=scale)
            # Numbers of 8 bits are finite; their scale is not if what they stand for is not.
            if not finite(target if scale is None else scale):
                return False
        return True

    def _complete(self) -> None:
        count = self.length - self._multiplied
        if count:
            rows, scale = self._stored()
            products = self._gram[: self.length, : self.length].clone()
            ops.gram_block_(rows, products, self._multiplied, count, scale=scale)
            self._gram[: self.length, : self.length] = products
            self._multiplied = self.length
            self._count(read=self.length * self.row_bytes)


class EmptyStore(Store):
    """The rows of a rank that keeps no columns: they are counted."""

    @override
    def append(self, params: Sequence[Tensor]) -> bool:
        return self._counted(self._no_columns(), lambda: True)

    @override
    def append_pieces(self, pieces: RowPieces) -> bool:
        return self._counted(self._no_columns(), lambda: True)

    @override
    def snapshots(self) -> Tensor:
        return torch.empty((self.length, 0), dtype=self.dtype, device=self.device)

    def restore(self, length: int) -> None:
        """Count ``length`` rows."""
        self._make_room(length)
        self.length, self.anchor = length, self._no_columns()

    def _append(self, params: Sequence[Tensor], anchor: Tensor) -> bool:
        return True

    def _no_columns(self) -> Tensor:
        return torch.empty(0, dtype=wide_dtype(self.dtype), device=self.device)
