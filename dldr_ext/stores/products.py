"""Gram rows of rows that are stored elsewhere, to the bit those that `ops.gram_append_` makes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from .._rows import empty_rows
from .._stored_rows import StoredRows, staged

# The order in which the CPU kernels add (csrc/plan.h): products within a tile, tiles within a
# chunk, then the at most 1,024 chunks; each level from left to right.
_TILE, _MOST_CHUNKS = 4096, 1024

_WINDOW_BYTES = 1 << 24  # read at a time; more if a chunk of all rows is more


class Seconds(NamedTuple):
    reading: float
    computing: float


def multiply_on_cpu(rows: StoredRows, gram: Tensor, index: int) -> Seconds:
    """Fills rows ``index`` to T - 1 of a Gram matrix, reading every stored row once.

    By columns, a window of whole chunks at a time: the memory is a window, whatever T - ``index``.

    Parameters
    ----------
    rows : StoredRows, shape (T, n)
    gram : Tensor, shape (T, T) at least, float64
    index : int

    Returns
    -------
    Seconds
    """
    width, numel = rows.shape
    tiles = -(-numel // _TILE)
    chunk = max(1, -(-tiles // _MOST_CHUNKS)) * _TILE
    window = max(1, _WINDOW_BYTES // (chunk * width * rows.dtype.itemsize)) * chunk
    total, part, one = (gram.new_zeros((width, width)) for _ in range(3))
    computing, start = 0.0, time.perf_counter()
    for _, piece in rows.pieces(window):
        begun = time.perf_counter()
        for columns in piece.split(chunk, 1):
            part.zero_()
            for tile in _in_order(columns):
                ops.gram_block_(tile, one, index, width - index)
                part += one
            total += part
        computing += time.perf_counter() - begun
    gram[index:width, :width] = total[index:]
    gram[:width, index:width] = total[:, index:]
    return Seconds(time.perf_counter() - start - computing, computing)


def multiply_by_rows(rows: StoredRows, gram: Tensor, index: int, end: int) -> None:
    """Fills rows [index, end) of a Gram matrix, reading the rows before them once.

    For any device. The new rows are in its memory meanwhile, and up to three of the earlier ones.
    """
    count, numel = end - index, rows.shape[1]
    buffer = empty_rows(1 + count, numel, dtype=rows.dtype, device=rows.device)
    buffer[1:] = rows[index:end]
    products = torch.zeros(1 + count, 1 + count, dtype=torch.float64, device=rows.device)

    def make() -> Tensor:
        return empty_rows(1, numel, dtype=rows.dtype, device=rows.device)[0]

    for row, earlier in enumerate(staged(rows.read_row, index, make, rows.device)):
        buffer[0] = earlier
        ops.gram_block_(buffer, products, 1, count)
        gram[index:end, row] = products[1:, 0]
        gram[row, index:end] = products[1:, 0]
    ops.gram_block_(buffer[1:], products, 0, count)
    gram[index:end, index:end] = products[:count, :count]


def _in_order(columns: Tensor) -> Iterator[Tensor]:
    """Pieces of a chunk whose sums, added one after the other, are those of the chunk to the bit.

    The op adds up to 1,024 tiles from left to right, as the chunk has them; what a larger chunk has
    beyond them goes tile by tile.
    """
    first = _MOST_CHUNKS * _TILE
    yield columns[:, :first]
    if columns.shape[1] > first:
        yield from columns[:, first:].split(_TILE, 1)
