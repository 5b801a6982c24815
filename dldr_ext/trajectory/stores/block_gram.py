"""Gram matrices of rows that are stored elsewhere: to the bit those of `ops.gram_append_`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ... import ops
from ...tensors.constants import MAX_CHUNKS, TILE
from ...tensors.formats import empty_scale, scale_of
from ...tensors.matrices import ScaledRows, StoredRows, as_stored, staged, stored_pieces
from ...tensors.memory import empty_rows

# The order in which the CPU kernels add (csrc/plan.h): products within a tile, tiles within a
# chunk, then the at most 1,024 chunks; each level from left to right.
_TILE, _MOST_CHUNKS = TILE, MAX_CHUNKS
_WINDOW_BYTES = 1 << 24  # read at a time; more if a chunk of all rows is more


class Seconds(NamedTuple):
    """Time that a pass over stored rows took."""

    reading: float
    computing: float


def multiply_on_cpu(rows: StoredRows | ScaledRows, gram: Tensor, index: int) -> Seconds:
    """Fill rows ``index`` to T - 1 of a Gram matrix, reading every stored row once.

    By columns, a window of whole chunks at a time: the memory is a window, whatever T - ``index``.

    Parameters
    ----------
    rows : StoredRows or ScaledRows, shape (T, n)
    gram : Tensor, shape (T, T) at least, float64
    index : int

    Returns
    -------
    Seconds
    """
    width, numel = rows.shape
    tiles = -(-numel // _TILE)
    chunk = max(1, -(-tiles // _MOST_CHUNKS)) * _TILE
    itemsize = as_stored(rows)[0].dtype.itemsize
    window = max(1, _WINDOW_BYTES // (chunk * width * itemsize)) * chunk
    total, of_chunk, of_part = (gram.new_zeros((width, width)) for _ in range(3))
    computing, start = 0.0, time.perf_counter()
    for _, piece, scale in stored_pieces(rows, window):
        begun = time.perf_counter()
        for begin in range(0, piece.shape[1], chunk):
            of_chunk.zero_()
            for a, b in _in_order(begin, min(begin + chunk, piece.shape[1])):
                part_scale = scale_of(scale, a, b)
                ops.gram_block_(piece[:, a:b], of_part, index, width - index, scale=part_scale)
                of_chunk += of_part
            total += of_chunk
        computing += time.perf_counter() - begun
    gram[index:width, :width] = total[index:]
    gram[:width, index:width] = total[:, index:]
    return Seconds(time.perf_counter() - start - computing, computing)


def multiply_by_rows(rows: StoredRows | ScaledRows, gram: Tensor, index: int, end: int) -> None:
    """Fill rows [index, end) of a Gram matrix, reading the rows before them once.

    For any device. The new rows are in its memory meanwhile, and up to three of the earlier ones.
    """
    count, numel = end - index, rows.shape[1]
    parts = [part for part in as_stored(rows) if isinstance(part, StoredRows)]
    dtype, device = parts[0].dtype, rows.device

    def make(number: int) -> list[Tensor]:
        codes = empty_rows(number, numel, dtype=dtype, device=device)
        scale = empty_scale(number, numel, dtype, device)
        return [codes] if scale is None else [codes, scale]

    def load(row: int, out: list[Tensor]) -> None:
        for part, place in zip(parts, out, strict=True):
            part.read_row(row, place[0])

    def multiply(first: int, new: int) -> None:
        codes, *scale = (buffer[first:] for buffer in buffers)
        ops.gram_block_(codes, products, new, count, scale=scale[0] if scale else None)

    buffers = make(1 + count)
    for buffer, part in zip(buffers, parts, strict=True):
        buffer[1:] = part[index:end]
    products = torch.zeros(1 + count, 1 + count, dtype=torch.float64, device=device)
    for row, earlier in enumerate(staged(load, index, lambda: make(1), device)):
        for buffer, row_part in zip(buffers, earlier, strict=True):
            buffer[0] = row_part[0]
        multiply(0, 1)
        gram[index:end, row] = products[1:, 0]
        gram[row, index:end] = products[1:, 0]
    multiply(1, 0)
    gram[index:end, index:end] = products[:count, :count]


def _in_order(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Yield parts of a chunk whose sums, added in order, are those of the chunk to the bit.

    The op adds up to 1,024 tiles from left to right, as the chunk has them; what a larger chunk has
    beyond them goes tile by tile.
    """
    first = min(begin + _MOST_CHUNKS * _TILE, end)
    yield begin, first
    for at in range(first, end, _TILE):
        yield at, min(at + _TILE, end)
