"""A safetensors file as `artifacts` writes, with tensors written in any order, in pieces."""

from __future__ import annotations

import fcntl
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

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
        No space for the whole file, among others: it is taken at the start. Another process writes
        to the same path.
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
        self._file = locked(self.temporary, path)
        self.resumed = resume and self._holds(start, size)
        if not self.resumed:
            reserve(self._file, self.temporary, size, path)
            self._file.write(start)

    def __enter__(self) -> PartialFile:
        return self

    def __exit__(self, *_: object) -> None:
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
        handle = self._file.fileno()
        return os.fstat(handle).st_size == size and os.pread(handle, len(start), 0) == start


def locked(temporary: Path, path: Path) -> FileIO:
    """Open the file that becomes ``path``, new or as it was left: no other process has it open.

    Raises
    ------
    OSError
        Another one writes to it; no permission.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC
    while True:
        file = FileIO(temporary, "r+", opener=lambda name, _: os.open(name, flags, 0o666))
        try:
            _lock(file.fileno(), path)
            if os.path.samestat(os.fstat(file.fileno()), temporary.stat()):
                return file
        except FileNotFoundError:  # it has become the file of another process meanwhile
            pass
        except BaseException:
            file.close()
            raise
        file.close()


def reserve(file: FileIO, temporary: Path, size: int, path: Path) -> None:
    """Make a file that `locked` opened an empty one of ``size`` bytes: all of its space is taken.

    Raises
    ------
    OSError
        There is not as much space; the file is then closed and gone.
    """
    try:
        file.truncate(0)
        os.posix_fallocate(file.fileno(), 0, size)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        file.close()
        if isinstance(error, OSError):
            what = f"{error.strerror}; the file needs {size:,} bytes"
            raise OSError(error.errno, what, str(path)) from error
        raise


@contextmanager
def alone_in(folder: Path, path: Path | None = None) -> Iterator[None]:
    """Let no other process that calls this for the same folder write to it.

    Parameters
    ----------
    folder : Path
        Made if it is missing, with those around it.
    path : Path, optional
        What is named in the error; by default the folder.

    Raises
    ------
    OSError
        Another one writes to it; no permission.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, path or folder)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, path: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise OSError(error.errno, "another process is writing there", str(path)) from None
    except OSError:
        pass  # a file system that has no locks
