"""A safetensors file as `artifacts` writes, with tensors written in any order, in pieces."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch
from torch import Tensor

from . import artifacts

_PIECE = 1 << 24  # bytes


class PartialFile:
    """The file beside ``path`` that becomes it once all is written: a context manager.

    Parameters
    ----------
    path : Path
    kind, version, metadata
        As in `artifacts.save`.
    tensors : mapping of str to Tensor
        On the meta device: their dtypes and shapes.
    resume : bool
        Go on with what an earlier one has left, if it was of the same tensors.

    Attributes
    ----------
    resumed : bool

    Raises
    ------
    OSError
        No space for the whole file, among others: it is taken at the start.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        version: int,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        resume: bool = False,
    ) -> None:
        self.path, self.temporary = path, path.with_name(f".{path.name}.part")
        self._header = artifacts.header(kind, version, tensors, metadata)
        start = len(self._header).to_bytes(8, "little") + self._header
        self._begins: dict[str, int] = {}
        size = len(start)
        for name, tensor in tensors.items():
            self._begins[name] = size
            size += tensor.numel() * tensor.itemsize
        self.resumed = resume and self._holds(start, size)
        if not self.resumed:
            self._create(start, size)
        self._file = open(self.temporary, "r+b", buffering=0)  # noqa: SIM115  (see __exit__)

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, name: str, begin: int, values: Tensor) -> None:
        """Write elements ``begin``, ``begin + 1``, ... of a tensor in logical order."""
        flat: Any = values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        data = memoryview(flat)
        at = self._begins[name] + begin * values.itemsize
        while data:
            done = os.pwrite(self._file.fileno(), data, at)
            data, at = data[done:], at + done

    def sync(self) -> None:
        """Make what was written so far outlive a power cut."""
        os.fsync(self._file.fileno())

    def finish(self) -> None:
        """Put the file in its place."""
        self._file.seek(8)
        crc = 0
        while piece := self._file.read(_PIECE):
            crc = zlib.crc32(piece, crc)
        artifacts.write_checksum(self._file, self._header, crc)
        self.sync()
        os.replace(self.temporary, self.path)
        artifacts.sync_folder(self.path.parent)

    def discard(self) -> None:
        """Remove what was written."""
        self.temporary.unlink(missing_ok=True)

    def _holds(self, start: bytes, size: int) -> bool:
        try:
            with open(self.temporary, "rb") as file:
                return os.fstat(file.fileno()).st_size == size and file.read(len(start)) == start
        except FileNotFoundError:
            return False

    def _create(self, start: bytes, size: int) -> None:
        with reserved(self.temporary, size, self.path) as file:
            file.write(start)


def reserved(temporary: Path, size: int, path: Path) -> BinaryIO:
    """Open a new file of ``size`` bytes, which becomes ``path``: all of its space is taken.

    Raises
    ------
    OSError
        There is not as much space, or no permission.
    """
    file = open(temporary, "w+b")  # noqa: SIM115  (it is returned)
    try:
        os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        file.close()
        temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno, f"{error.strerror}; the file needs {size:,} bytes", str(path)
        ) from error
    return file
