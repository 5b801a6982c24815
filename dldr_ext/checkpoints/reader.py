"""Reading any stretch of a tensor in a file, through one small buffer.

Nothing is mapped: the pages of a mapped file count as memory of the process, and a file that
shrinks while it is mapped ends it. A short read is an error like any other.
"""

from __future__ import annotations

import math
import os
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from .errors import CheckpointError, reason
from .formats import Entry, extent, forget_loaded, load_tensor

_BUFFER = 1 << 23  # bytes


class CheckpointReader:
    """A reader of stretches of tensors, which keeps the latest file open: a context manager."""

    def __init__(self) -> None:
        self._buffer = bytearray(_BUFFER)
        self._path: Path | None = None
        self._handle = -1

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()
        forget_loaded()

    def read(self, entry: Entry, begin: int, out: Tensor) -> None:
        """Read the elements ``begin``, ``begin + 1``, ... of a tensor, in logical order.

        Parameters
        ----------
        entry : Entry
        begin : int
        out : Tensor, shape (k,), contiguous
            Its k elements are filled and converted to its dtype.

        Raises
        ------
        CheckpointError
            The file cannot be read or ends too early.
        """
        if entry.offset is None:
            try:
                tensor = load_tensor(entry)
            except (OSError, KeyError) as error:
                raise CheckpointError(entry.file, f"changed while it was read ({error})") from error
            out.copy_(tensor.detach().reshape(-1)[begin : begin + len(out)])
            return
        shape, stride = _without_ones(entry)
        if extent(shape, stride) == math.prod(shape) and all(a >= b for a, b in pairwise(stride)):
            self._read_contiguous(entry, begin, out)
        else:
            self._read_strided(entry, shape, stride, begin, out)

    def _read_contiguous(self, entry: Entry, begin: int, out: Tensor) -> None:
        most = len(self._buffer) // entry.dtype.itemsize
        for at in range(0, len(out), most):
            count = min(most, len(out) - at)
            out[at : at + count].copy_(self._elements(entry, begin + at, count))

    def _read_strided(
        self,
        entry: Entry,
        shape: tuple[int, ...],
        stride: tuple[int, ...],
        begin: int,
        out: Tensor,
    ) -> None:
        """Read whole rows, in cuts along the dimension of the largest stride: each fits."""
        row = math.prod(shape[1:])
        first, last = begin // row, -(-(begin + len(out)) // row)
        rows = torch.empty((last - first, *shape[1:]), dtype=out.dtype, device="cpu")
        far = max(range(len(shape)), key=lambda k: stride[k])
        shift = first * stride[0]
        for at in range(rows.shape[far]):
            cut = rows.narrow(far, at, 1)
            count = extent(cut.shape, stride)
            source = self._elements(entry, shift + at * stride[far], count)
            cut.copy_(source.as_strided(cut.shape, stride))
        out.copy_(rows.view(-1)[begin - first * row :][: len(out)])

    def _elements(self, entry: Entry, begin: int, count: int) -> Tensor:
        """Return stored elements; they are valid until the next call."""
        assert entry.offset is not None
        size = count * entry.dtype.itemsize
        if size > len(self._buffer):
            self._buffer = bytearray(size)
        view = memoryview(self._buffer)[:size]
        at, done = entry.offset + begin * entry.dtype.itemsize, 0
        try:
            self._open(entry.file)
            while done < size:
                got = os.preadv(self._handle, [view[done:]], at + done)
                if got == 0:
                    raise CheckpointError(entry.file, f"truncated: {entry.name} ends early")
                done += got
        except OSError as error:
            raise CheckpointError(entry.file, reason(error)) from error
        return torch.frombuffer(self._buffer, dtype=entry.dtype, count=count)

    def _open(self, path: Path) -> None:
        if path != self._path:
            handle = os.open(path, os.O_RDONLY)
            self._close()
            self._path, self._handle = path, handle

    def _close(self) -> None:
        if self._path is not None:
            os.close(self._handle)
            self._path = None


def _without_ones(entry: Entry) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return shape and stride without the dimensions of size 1, whose strides mean nothing."""
    kept = [k for k, size in enumerate(entry.shape) if size != 1] or [0]
    if not entry.shape:
        return (1,), (1,)
    return tuple(entry.shape[k] for k in kept), tuple(entry.stride[k] for k in kept)
