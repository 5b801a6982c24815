"""Rows that do not lie in the memory they are worked on in: read in pieces, ahead on CUDA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from . import ops
from ._rows import empty_rows


class RowReader(Protocol):
    """What `StoredRows` reads from."""

    numel: int
    dtype: torch.dtype
    device: torch.device

    def read(self, row: int, begin: int, end: int, out: Tensor) -> None:
        """Copies columns [begin, end) of a row into ``out``, on ``device``."""


class StoredRows:
    """A matrix (T, n) whose rows lie on disk or in host memory: read piece by piece, like an array.

    ``rows[t]`` is row t and ``rows[s:t, a:b]`` a matrix of some rows and columns, both copies on
    the parameters' device; ``rows[:]`` is all of it, T n numbers. ``len``, ``shape``, ``dtype``,
    ``device`` and iterating over the rows are as for a tensor.
    """

    def __init__(self, reader: RowReader, count: int, columns: slice | None = None) -> None:
        self._reader, self._count = reader, count
        self._begin, self._end, _ = (columns or slice(None)).indices(reader.numel)
        self.shape = torch.Size((count, self._end - self._begin))
        self.dtype, self.device = reader.dtype, reader.device

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"StoredRows(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device})"

    def __iter__(self) -> Iterator[Tensor]:
        return (self[t] for t in range(self._count))

    def __getitem__(self, index: int | slice | tuple[int | slice, slice]) -> Tensor:
        rows, columns = index if isinstance(index, tuple) else (index, slice(None))
        if not isinstance(columns, slice) or columns.step not in (None, 1):
            raise TypeError(f"columns: expected a slice of step 1, got {columns!r}")
        begin, end, _ = columns.indices(self.shape[1])
        if isinstance(rows, slice):
            return self._read(range(self._count)[rows], begin, max(begin, end))
        row = range(self._count)[rows]
        return self._read(range(row, row + 1), begin, max(begin, end))[0]

    def narrow(self, begin: int, end: int) -> StoredRows:
        """Some columns, not read yet."""
        return StoredRows(self._reader, self._count, slice(self._begin + begin, self._begin + end))

    def read_row(self, row: int, out: Tensor) -> None:
        """Copies a row into ``out``."""
        self._reader.read(row, self._begin, self._end, out)

    def pieces(self, step: int) -> Iterator[tuple[int, Tensor]]:
        """All columns, ``step`` at a time: where a piece begins, and the piece (T, step).

        A piece is overwritten by the next one but one. On CUDA the next one is on its way while
        this one is worked on.
        """
        total = self.shape[1]

        def make() -> Tensor:
            size = (self._count, min(step, total))
            return empty_rows(*size, dtype=self.dtype, device=self.device)

        def load(i: int, out: Tensor) -> None:
            begin = i * step
            end = min(begin + step, total)
            self._fill(range(self._count), begin, end, out[:, : end - begin])

        for i, buffer in enumerate(staged(load, -(-total // step), make, self.device)):
            yield i * step, buffer[:, : min(step, total - i * step)]

    def _read(self, rows: range, begin: int, end: int) -> Tensor:
        out = torch.empty((len(rows), end - begin), dtype=self.dtype, device=self.device)
        self._fill(rows, begin, end, out)
        return out

    def _fill(self, rows: range, begin: int, end: int, out: Tensor) -> None:
        for row, place in zip(rows, out, strict=True):
            self._reader.read(row, self._begin + begin, self._begin + end, place)


def staged(
    load: Callable[[int, Tensor], None],
    count: int,
    make: Callable[[], Tensor],
    device: torch.device,
) -> Iterator[Tensor]:
    """Buffers that ``load(i, buffer)`` has filled, i = 0, ..., count - 1, each for a short while.

    On CUDA there are two: while one is worked on, the next is loaded on a stream of its own. (This
    branch has not run on a GPU.)
    """
    if device.type != "cuda":
        buffer = make()
        for i in range(count):
            load(i, buffer)
            yield buffer
        return
    current, side = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    buffers = make(), make()
    loaded, used = ([torch.cuda.Event() for _ in buffers] for _ in range(2))

    def fetch(i: int) -> None:
        with torch.cuda.stream(side):
            side.wait_event(used[i % 2])  # an event that was never recorded is no wait
            load(i, buffers[i % 2])
            loaded[i % 2].record(side)

    side.wait_stream(current)  # the memory of the buffers may still be in use there
    try:
        if count:
            fetch(0)
        for i in range(count):
            if i + 1 < count:
                fetch(i + 1)
            current.wait_event(loaded[i % 2])
            yield buffers[i % 2]
            used[i % 2].record(current)
    finally:
        current.wait_stream(side)  # the buffers go back to the current stream


def column_pieces(matrix: Tensor | StoredRows, step: int) -> Iterator[tuple[int, Tensor]]:
    """All columns, ``step`` at a time; a piece is valid until the next one."""
    if isinstance(matrix, StoredRows):
        yield from matrix.pieces(step)
        return
    for begin in range(0, matrix.shape[1], step):
        yield begin, matrix[:, begin : begin + step]


def combined(
    matrix: Tensor | StoredRows, coefficients: Tensor, dtype: torch.dtype, step: int
) -> Tensor:
    """coefficients @ matrix, as `ops.form_basis`; stored rows ``step`` columns at a time."""
    if isinstance(matrix, Tensor):
        return ops.form_basis(matrix, coefficients, dtype=dtype)
    size = (len(coefficients), matrix.shape[1])
    result = empty_rows(*size, dtype=dtype, device=matrix.device)
    for begin, piece in matrix.pieces(step):
        part = ops.form_basis(piece, coefficients, dtype=dtype)
        result[:, begin : begin + part.shape[1]] = part
    return result
