"""Which layers move: norms of the change of each, from one checkpoint to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..reporting.views import layer_of
from ..tensors.matrices import ScaledRows


class Layers:
    """The layers that tensors belong to: what precedes the last dot of their names.

    Parameters
    ----------
    names, shapes : sequence
        Of the tensors, in flat order.
    """

    def __init__(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> None:
        of_each = [layer_of(name) for name in names]
        self.names = list(dict.fromkeys(of_each))
        self._rows = [self.names.index(layer) for layer in of_each]
        self._sizes = [math.prod(shape) for shape in shapes]
        self._starts = [0, *accumulate(self._sizes)]

    def squares(self, rows: Tensor | ScaledRows, begin: int) -> Tensor:
        """Return the squared norms of the steps in some columns, (L, T - 1) float64.

        Parameters
        ----------
        rows : Tensor or ScaledRows, shape (T, k)
        begin : int
            The first of the columns.
        """
        end = begin + rows.shape[1]
        parts = []
        for row, first, last in zip(self._rows, self._starts, self._starts[1:], strict=False):
            if first < end and last > begin:
                parts.append((row, max(first, begin) - begin, min(last, end) - begin))
        total = torch.zeros(len(self.names), len(rows) - 1, dtype=torch.float64, device="cpu")
        before = _wide(rows[0])
        for t in range(1, len(rows)):
            now = _wide(rows[t])
            step = now - before
            for row, first, last in parts:
                total[row, t - 1] += torch.dot(step[first:last], step[first:last])
            before = now
        return total

    def described(self, squares: Tensor) -> dict[str, Any]:
        """Return names, sizes and norms, (L, T - 1), as JSON can hold them."""
        sizes = [0] * len(self.names)
        for row, size in zip(self._rows, self._sizes, strict=True):
            sizes[row] += size
        return {"names": self.names, "numel": sizes, "steps": squares.sqrt().tolist()}


def _wide(row: Tensor) -> Tensor:
    return row if row.dtype == torch.float64 else row.float()
