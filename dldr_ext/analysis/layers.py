"""Which layers move: norms of the change of each, from one checkpoint to the next."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..reporting.views import layer_of
from ..tensors.matrices import ScaledRows

_LARGE = 1 << 14  # elements, for which a call of its own is faster


class Layers:
    """The layers that tensors belong to: what precedes the last dot of their names.

    Parameters
    ----------
    names, shapes : sequence
        Of the tensors, in flat order.
    """

    def __init__(self, names: Sequence[str], shapes: Sequence[tuple[int, ...]]) -> None:
        of_each = [layer_of(name) for name in names]
        places = {layer: i for i, layer in enumerate(dict.fromkeys(of_each))}
        self.names = list(places)
        self._rows = [places[layer] for layer in of_each]
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
        layers, starts = [], []
        for row, first, last in zip(self._rows, self._starts, self._starts[1:], strict=False):
            if first < end and last > begin and first < last:
                layers.append(row)
                starts.append(max(first, begin) - begin)
        total = np.zeros((len(self.names), len(rows) - 1))
        before = _wide(rows[0])
        for t in range(1, len(rows)):
            now = _wide(rows[t])
            sums = _squares(now - before, starts)
            np.add.at(total[:, t - 1], layers, sums)
            before = now
        return torch.from_numpy(total)

    def described(self, squares: Tensor) -> dict[str, Any]:
        """Return names, sizes and norms, (L, T - 1), as JSON can hold them."""
        sizes = [0] * len(self.names)
        for row, size in zip(self._rows, self._sizes, strict=True):
            sizes[row] += size
        return {"names": self.names, "numel": sizes, "steps": squares.sqrt().tolist()}


def _squares(step: Tensor, starts: list[int]) -> Any:
    """Return the sums of squares of the parts that begin at ``starts``."""
    if len(starts) * _LARGE < len(step):
        sizes = [end - begin for begin, end in zip(starts, [*starts[1:], len(step)], strict=True)]
        return [float(torch.dot(part, part)) for part in step.split(sizes)]
    return np.add.reduceat(step.square_().numpy(), starts)


def _wide(row: Tensor) -> Tensor:
    return row if row.dtype == torch.float64 else row.float()
