"""Columns of all checkpoints at once: differences from the first, as a trajectory stores them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..checkpoints.reader import CheckpointReader
from ..checkpoints.series import Series, finite
from ..tensors.formats import empty_scale, scale_of, wide_dtype
from ..tensors.matrices import ScaledRows, scaled

_WINDOW = 1 << 20  # elements that are read at a time


class Columns:
    """Chunks of a (T, n) matrix whose rows are round_to(dtype, w_t - w_0), read from the files.

    Parameters
    ----------
    series : Series
    dtype : torch.dtype
    chunk_bytes : int
        Of a chunk, about: its rows and its part of the anchor.
    step : int
        A chunk is a multiple of as many columns.
    """

    def __init__(self, series: Series, dtype: torch.dtype, chunk_bytes: int, step: int) -> None:
        self.series, self.dtype = series, dtype
        self.wide = wide_dtype(dtype)
        column = len(series) * dtype.itemsize + self.wide.itemsize
        self.width = min(max(step, chunk_bytes // column // step * step), series.numel)
        self._rows = torch.empty(len(series) * self.width, dtype=dtype, device="cpu")
        self._anchor = torch.empty(self.width, dtype=self.wide, device="cpu")
        self._window = torch.empty(min(_WINDOW, self.width), dtype=self.wide, device="cpu")

    def read(self, pieces: CheckpointReader, begin: int) -> tuple[Tensor, Tensor | ScaledRows]:
        """Columns ``begin``, ``begin + 1``, ...: the anchor (k,) and the rows (T, k).

        Valid until the next call.
        """
        count = min(self.width, self.series.numel - begin)
        anchor = self._anchor[:count]
        rows = self._rows[: len(self.series) * count].view(len(self.series), count)
        scale = empty_scale(len(self.series), count, self.dtype, "cpu")
        for t in range(len(self.series)):
            for at in range(0, count, len(self._window)):
                columns = slice(at, min(at + len(self._window), count))
                part = self._window[: columns.stop - at]
                self.series.read(pieces, t, begin + at, part)
                if t == 0:
                    anchor[columns] = part
                own = scale_of(scale, at, columns.stop, t)
                ops.store_snapshot_(rows[t : t + 1, columns], 0, [part], anchor[columns], scale=own)
            # Numbers of 8 bits are; their scale is not if what they stand for is not.
            if not finite(rows[t] if scale is None else scale[t]):
                problem = f"a difference from the first checkpoint overflows {self.dtype}"
                raise self.series.error(t, problem)
        return anchor, scaled(rows, scale)
