"""Reading any stretch of a tensor in a file, straight to its place or through one small buffer.

Nothing is mapped: the pages of a mapped file count as memory of the process, and a file that
shrinks while it is mapped ends it. A short read is an error like any other.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, cast

import torch
from torch import Tensor

from .errors import CheckpointError, reason
from .formats import Entry, extent

_BUFFER = 1 << 23  # bytes
_OPEN = 64  # files


class CheckpointReader:
    """A reader of stretches of tensors, which keeps the latest files open: a context manager."""

    def __init__(self) -> None:
        self._buffer = bytearray(_BUFFER)
        self._files: OrderedDict[tuple[Path, str | None], BinaryIO] = OrderedDict()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        while self._files:
            self._files.popitem()[1].close()

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
        if entry.problem is not None:
            raise CheckpointError(
                entry.file, f"{entry.name}: expected a tensor of numbers, found {entry.problem}"
            )
        if entry.parts:
            if len(out):
                self._read_parts(entry, begin, out)
            return
        shape, stride = _without_ones(entry)
        if extent(shape, stride) == math.prod(shape) and all(a >= b for a, b in pairwise(stride)):
            self._read_contiguous(entry, begin, out)
        else:
            self._read_strided(entry, shape, stride, begin, out)

    def state(self, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
        """Read whole tensors into a state dict.

        Parameters
        ----------
        entries : mapping of str to Entry

        Returns
        -------
        dict of str to Tensor
            On the CPU, each with a memory of its own.

        Raises
        ------
        CheckpointError
            As for `read`.
        """
        state = {}
        for name, entry in entries.items():
            state[name] = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
            self.read(entry, 0, state[name].view(-1))
        return state

    def _read_contiguous(self, entry: Entry, begin: int, out: Tensor) -> None:
        as_stored = not (entry.swapped or entry.conj or entry.neg) and entry.dtype == out.dtype
        if as_stored and out.device.type == "cpu" and len(out):
            self._fill(entry, begin, out.view(torch.uint8).numpy().data)
            return
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

    def _read_parts(self, entry: Entry, begin: int, out: Tensor) -> None:
        """Read whole rows of the parts that overlap, each into its place in rows of the whole."""
        row = math.prod(entry.shape[1:])
        first, last = begin // row, -(-(begin + len(out)) // row)
        rows = torch.empty((last - first, *entry.shape[1:]), dtype=out.dtype, device="cpu")
        for offset, part in entry.parts:
            start, stop = max(first, offset[0]), min(last, offset[0] + part.shape[0])
            if start >= stop or 0 in part.shape:
                continue
            width = math.prod(part.shape[1:])
            values = torch.empty((stop - start) * width, dtype=out.dtype, device="cpu")
            self.read(part, (start - offset[0]) * width, values)
            columns = [slice(start - first, stop - first)]
            for at, size in zip(offset[1:], part.shape[1:], strict=True):
                columns.append(slice(at, at + size))
            place = rows[tuple(columns)]
            place.copy_(values.view(place.shape))
        out.copy_(rows.view(-1)[begin - first * row :][: len(out)])

    def _elements(self, entry: Entry, begin: int, count: int) -> Tensor:
        """Return stored elements; they are valid until the next call."""
        size = count * entry.dtype.itemsize
        if size > len(self._buffer):
            self._buffer = bytearray(size)
        self._fill(entry, begin, memoryview(self._buffer)[:size])
        values = torch.frombuffer(self._buffer, dtype=entry.dtype, count=count)
        if entry.swapped:
            width = entry.dtype.itemsize // (2 if entry.dtype.is_complex else 1)
            values = values.view(torch.uint8).view(-1, width).flip(1).view(-1).view(entry.dtype)
        values = values.conj() if entry.conj else values
        return values.neg() if entry.neg else values

    def _fill(self, entry: Entry, begin: int, view: memoryview) -> None:
        """Read bytes of a tensor, from an element of it on, until the view is full."""
        at, done, size = entry.offset + begin * entry.dtype.itemsize, 0, len(view)
        try:
            file = self._open(entry)
            if entry.record is not None:
                file.seek(at)  # forward without starting again
            while done < size:
                rest = view[done:]
                got = (
                    os.preadv(file.fileno(), [rest], at + done)
                    if entry.record is None
                    else file.readinto(rest)  # type: ignore[attr-defined]
                )
                if got == 0:
                    raise CheckpointError(entry.file, f"truncated: {entry.name} ends early")
                done += got
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(entry.file, reason(error)) from error
        except Exception as error:  # of a damaged record: any
            raise CheckpointError(entry.file, f"corrupt: {entry.name} ({error})") from error

    def _open(self, entry: Entry) -> BinaryIO:
        key = (entry.file, entry.record)
        if key not in self._files:
            if len(self._files) == _OPEN:
                self._files.popitem(last=False)[1].close()
            self._files[key] = _opened(entry)
        self._files.move_to_end(key)
        return self._files[key]


def _opened(entry: Entry) -> BinaryIO:
    if entry.record is None:
        return open(entry.file, "rb", buffering=0)
    with zipfile.ZipFile(entry.file) as archive:  # the record keeps the file open
        return cast(BinaryIO, archive.open(entry.record))


def _without_ones(entry: Entry) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return shape and stride without the dimensions of size 1, whose strides mean nothing."""
    kept = [k for k, size in enumerate(entry.shape) if size != 1] or [0]
    if not entry.shape:
        return (1,), (1,)
    return tuple(entry.shape[k] for k in kept), tuple(entry.stride[k] for k in kept)
