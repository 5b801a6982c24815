"""Matrices whose rows are not a plain tensor in memory, worked on some columns at a time.

They lie on disk or on the host (`StoredRows`; read ahead on CUDA), or have scales (`ScaledRows`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from .constants import SCALE_BLOCK
from .formats import block_range, blocks, decoded
from .memory import empty_rows

Index = int | slice | tuple[int | slice, slice]
_Buffer = TypeVar("_Buffer")


class RowReader(Protocol):
    """A store of rows that `StoredRows` reads from."""

    numel: int
    dtype: torch.dtype
    device: torch.device

    def read(self, row: int, begin: int, end: int, out: Tensor) -> None:
        """Copy columns [begin, end) of a row into ``out``, on ``device``."""


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

    def __getitem__(self, index: Index) -> Tensor:
        rows, begin, end = _parsed(index, self.shape[1])
        if isinstance(rows, slice):
            return self._read(range(self._count)[rows], begin, end)
        row = range(self._count)[rows]
        return self._read(range(row, row + 1), begin, end)[0]

    def narrow(self, begin: int, end: int) -> StoredRows:
        """Return the matrix of some columns, not read yet."""
        return StoredRows(self._reader, self._count, slice(self._begin + begin, self._begin + end))

    def read_row(self, row: int, out: Tensor) -> None:
        """Copy a row into ``out``."""
        self._reader.read(row, self._begin, self._end, out)

    def pieces(self, step: int) -> Iterator[tuple[int, Tensor]]:
        """Yield all columns, ``step`` at a time: where a piece begins, and the piece (T, step).

        A piece is overwritten by the next one but one. On CUDA the next one is on its way while
        this one is worked on.
        """
        total = self.shape[1]
        places = [(begin, min(begin + step, total)) for begin in range(0, total, step)]
        for (begin, _), piece in zip(places, self.read_columns(places), strict=True):
            yield begin, piece

    def read_columns(self, places: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
        """Yield the columns [begin, end) of each of several places, as in `pieces`."""
        width = max((end - begin for begin, end in places), default=0)

        def make() -> Tensor:
            return empty_rows(self._count, width, dtype=self.dtype, device=self.device)

        def load(i: int, out: Tensor) -> None:
            begin, end = places[i]
            self._fill(range(self._count), begin, end, out[:, : end - begin])

        filled = staged(load, len(places), make, self.device)
        for (begin, end), buffer in zip(places, filled, strict=True):
            yield buffer[:, : end - begin]

    def _read(self, rows: range, begin: int, end: int) -> Tensor:
        out = torch.empty((len(rows), end - begin), dtype=self.dtype, device=self.device)
        self._fill(rows, begin, end, out)
        return out

    def _fill(self, rows: range, begin: int, end: int, out: Tensor) -> None:
        for row, place in zip(rows, out, strict=True):
            self._reader.read(row, self._begin + begin, self._begin + end, place)


class ScaledRows:
    """The numbers (T, n) that 8-bit rows stand for, with their scales: like an array of float32.

    ``rows[t]`` is row t and ``rows[s:t, a:b]`` a matrix of some rows and columns, both copies;
    ``rows[:]`` is all of it, T n numbers. ``len``, ``shape``, ``device`` and iterating over the
    rows are as for a tensor.

    Attributes
    ----------
    codes : Tensor or StoredRows, shape (T, n)
        The stored numbers: int8 or float8_e4m3fn.
    scale : Tensor or StoredRows, shape (T, ceil(n / 256)), float32
        Element i of row t stands for ``codes[t, i] * scale[t, i // 256]``.
    skip : int
        Columns that both have in front of the first one: a part of a matrix begins in a block.
    """

    dtype = torch.float32

    def __init__(
        self, codes: Tensor | StoredRows, scale: Tensor | StoredRows, skip: int = 0
    ) -> None:
        self.codes, self.scale, self.skip = codes, scale, skip
        self.shape = torch.Size((len(codes), codes.shape[1] - skip))
        self.device = codes.device

    def __len__(self) -> int:
        return len(self.codes)

    def __repr__(self) -> str:
        return (
            f"ScaledRows(shape={tuple(self.shape)}, stored as {self.codes.dtype}, "
            f"device={self.device})"
        )

    def __iter__(self) -> Iterator[Tensor]:
        return (self[t] for t in range(len(self)))

    def __getitem__(self, index: Index) -> Tensor:
        rows, begin, end = _parsed(index, self.shape[1])
        chosen = self.narrow(begin, end)
        codes, scale = chosen.codes[rows], chosen.scale[rows]
        if isinstance(rows, slice):
            return decoded(codes, scale, self.dtype)[:, chosen.skip :]
        return decoded(codes[None], scale[None], self.dtype)[0, chosen.skip :]

    def narrow(self, begin: int, end: int) -> ScaledRows:
        """Return the matrix of some columns, not read yet."""
        begin, end = begin + self.skip, end + self.skip
        block, skip = divmod(begin, SCALE_BLOCK)
        codes = columns(self.codes, begin - skip, end)
        return ScaledRows(codes, columns(self.scale, block, blocks(end)), skip)

    def pieces(self, step: int) -> Iterator[tuple[int, Tensor]]:
        """Yield all columns, ``step`` (a multiple of 256) at a time: exact, hence in float64."""
        for begin, codes, scale in self.stored_pieces(step):
            yield begin, decoded(codes, scale, torch.float64)[:, self.skip :]

    def stored_pieces(self, step: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield where each of `pieces` begins, its codes and its scale, `skip` columns wider."""
        total = self.shape[1]
        places = [(b, min(b + step, total) + self.skip) for b in range(0, total, step)]
        blocks_of = [block_range(begin, end) for begin, end in places]
        read = zip(_read(self.codes, places), _read(self.scale, blocks_of), strict=True)
        for (begin, _), (codes, scale) in zip(places, read, strict=True):
            yield begin, codes, scale.contiguous()


Matrix = Tensor | StoredRows | ScaledRows


def scaled(codes: Tensor, scale: Tensor | None) -> Tensor | ScaledRows:
    """Return rows in memory together with their scale if they have one."""
    return codes if scale is None else ScaledRows(codes, scale)


def as_stored(matrix: Matrix) -> tuple[Tensor | StoredRows, Tensor | StoredRows | None]:
    """Return the numbers that are stored, and their scale if they have one."""
    return (matrix.codes, matrix.scale) if isinstance(matrix, ScaledRows) else (matrix, None)


def columns(matrix: Any, begin: int, end: int) -> Any:
    """Return columns [begin, end) of any `Matrix`, not read yet."""
    return matrix[:, begin:end] if isinstance(matrix, Tensor) else matrix.narrow(begin, end)


def staged(
    load: Callable[[int, _Buffer], None],
    count: int,
    make: Callable[[], _Buffer],
    device: torch.device,
) -> Iterator[_Buffer]:
    """Yield buffers that ``load(i, buffer)`` has filled, i = 0, ..., count - 1, reused in turn.

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


def column_pieces(matrix: Matrix, step: int) -> Iterator[tuple[int, Tensor]]:
    """Yield all columns, ``step`` at a time; a piece is valid until the next one."""
    if not isinstance(matrix, Tensor):
        yield from matrix.pieces(step)
        return
    for begin in range(0, matrix.shape[1], step):
        yield begin, matrix[:, begin : begin + step]


def stored_pieces(matrix: Matrix, step: int) -> Iterator[tuple[int, Tensor, Tensor | None]]:
    """Yield `column_pieces` as they are stored: each with its scale, if there is one."""
    if isinstance(matrix, ScaledRows):
        yield from matrix.stored_pieces(step)
        return
    for begin, piece in column_pieces(matrix, step):
        yield begin, piece, None


def _read(matrix: Tensor | StoredRows, places: Sequence[tuple[int, int]]) -> Iterator[Tensor]:
    if not isinstance(matrix, Tensor):
        return matrix.read_columns(places)
    return (matrix[:, begin:end] for begin, end in places)


def _parsed(index: Index, width: int) -> tuple[int | slice, int, int]:
    """Return the rows that an index asks for, and where its columns begin and end."""
    rows, columns = index if isinstance(index, tuple) else (index, slice(None))
    if not isinstance(columns, slice) or columns.step not in (None, 1):
        raise TypeError(f"columns: expected a slice of step 1, got {columns!r}")
    begin, end, _ = columns.indices(width)
    return rows, begin, max(begin, end)
