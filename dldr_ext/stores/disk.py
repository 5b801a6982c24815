"""Rows in a folder: one safetensors file for each, memory-mapped to be read.

`anchor.safetensors` holds the anchor and what the trajectory is of, `000000.safetensors`, ... one
stored delta each. A row is in its file, on the disk, before it is counted; the Gram matrix is not
kept, since the rows give it back to the bit.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import storage
from .._params import numel
from .deferred import DeferredStore, stored
from .lock import FolderLock

HEADER = "anchor.safetensors"
HEADER_KIND, HEADER_VERSION = "trajectory_folder", 1
_KIND, _VERSION = "snapshot", 1
_ROW_NAME = re.compile(r"(\d{6,})\.safetensors")

_PIECE = 1 << 22  # elements that are rounded and written at a time
_MAPPED_BYTES = (
    1 << 26
)  # read through mappings before they are given back, and their pages with them


class _Row(NamedTuple):
    path: Path
    offset: int  # of the numbers in the file


class DiskStore(DeferredStore):
    """A folder that this process alone records to.

    Parameters
    ----------
    path : Path
    numel, capacity, dtype, device
        As in `Store`.
    metadata : mapping
        What the trajectory is of, as JSON can hold it; written with the anchor.
    """

    def __init__(
        self,
        path: Path,
        numel: int,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        metadata: Mapping[str, Any],
    ) -> None:
        super().__init__(numel, capacity, dtype, device)
        os.makedirs(path, exist_ok=True)
        self._lock = FolderLock(path)
        self._path, self._metadata = path, {**metadata, "id": secrets.token_hex(8)}
        self._rows: list[_Row] = []
        self._next = 0  # number of the next file
        self._maps: dict[int, Tensor] = {}
        self._mapped = 0
        try:
            self._check_new()
        except BaseException:
            self.close()
            raise
        self._has_header = False

    @classmethod
    def resume(
        cls, lock: FolderLock, device: torch.device, metadata: dict[str, Any], size: int
    ) -> DiskStore:
        """The store of a folder that has one; rows that are not whole are reported and left out."""
        result = cls.__new__(cls)
        dtype = getattr(torch, metadata["dtype"])
        DeferredStore.__init__(result, size, metadata["capacity"], dtype, device)
        result._lock, result._path, result._metadata = lock, lock.folder, metadata
        result._rows, result._next, result._has_header = [], 0, True
        result._maps, result._mapped = {}, 0
        _drop_temporaries(lock.folder)
        for number, path in _row_files(lock.folder):
            result._next = number + 1
            try:
                result._rows.append(result._checked(path))
            except ValueError as error:
                warnings.warn(f"a snapshot was left out: {error}", UserWarning, stacklevel=4)
        result.length = len(result._rows)
        return result

    def close(self) -> None:
        self._maps.clear()
        self._lock.close()

    def read(self, row: int, begin: int, end: int, out: Tensor) -> None:
        if self._mapped > _MAPPED_BYTES:
            self._maps.clear()
            self._mapped = 0
        if row not in self._maps:
            self._maps[row] = self._map(self._rows[row])
        out.copy_(self._maps[row][begin:end], non_blocking=True)
        self._mapped += (end - begin) * self.dtype.itemsize

    def _put(self, params: Sequence[Tensor], anchor: Tensor) -> bool:
        if not self._lock.held:
            raise ValueError(
                f"path: expected a folder that this process has open, got {self._path}: it was "
                "closed, or this process is a fork of the one that opened it"
            )
        path = self._path / f"{self._next:06d}.safetensors"
        try:
            if not self._has_header:
                if not bool(anchor.isfinite().all()):
                    return False
                header = {"anchor": anchor}
                storage.save(
                    self._path / HEADER, HEADER_KIND, HEADER_VERSION, header, self._metadata
                )
                self._has_header = True
            delta = storage.Stream(self.dtype, (self.numel,), self._pieces(params, anchor))
            storage.save(path, _KIND, _VERSION, {"delta": delta}, {"of": self._metadata["id"]})
        except _NotFinite:
            return False
        except OSError as error:
            raise OSError(
                error.errno or errno.EIO,
                f"snapshot {self.length} was not recorded: {error.strerror or error}; the "
                f"{self.length} recorded before are whole",
                str(path),
            ) from error
        self._rows.append(_Row(path, storage.tensor_offset(path, "delta")))
        self._next += 1
        return True

    def _pieces(self, params: Sequence[Tensor], anchor: Tensor) -> Iterator[Tensor]:
        """The row, some at a time: the memory is a piece, however long the row."""
        for tensors, part in zip(_cut(params, _PIECE), anchor.split(_PIECE), strict=True):
            piece = stored(tensors, part, self.dtype)
            if piece is None:
                raise _NotFinite
            yield piece

    def _check_new(self) -> None:
        found = [path.name for _, path in _row_files(self._path)]
        if (self._path / HEADER).exists():
            found.insert(0, HEADER)
        if found:
            raise ValueError(
                f"path: expected a new or an empty folder, got {self._path} with {found[0]} and "
                f"{len(found) - 1} snapshots; Trajectory.load goes on with what is there"
            )
        _drop_temporaries(self._path)

    def _checked(self, path: Path) -> _Row:
        with storage.Reader(path, _KIND, _VERSION) as file:
            if file.metadata != {"of": self._metadata["id"]}:
                raise file.error(f"expected a snapshot of this trajectory, found {file.metadata}")
            file.check("delta", (self.numel,), self.dtype)
        row = _Row(path, storage.tensor_offset(path, "delta"))
        if row.offset % self.dtype.itemsize:
            raise file.error(f"expected aligned numbers, found them at byte {row.offset}")
        return row

    def _map(self, row: _Row) -> Tensor:
        size = row.offset + self.row_bytes
        found = row.path.stat().st_size
        if found != size:
            raise ValueError(
                f"{row.path}: changed since it was recorded: {found} bytes, not {size}"
            )
        # Mapped copy-on-write: nothing is ever written to the file.
        mapped = torch.from_file(str(row.path), shared=False, size=size, dtype=torch.uint8)
        return mapped[row.offset :].view(self.dtype)


class _NotFinite(Exception):
    pass


def _row_files(folder: Path) -> list[tuple[int, Path]]:
    """The files named like rows, by number."""
    matches = (_ROW_NAME.fullmatch(name) for name in os.listdir(folder))
    return sorted((int(match[1]), folder / match[0]) for match in matches if match)


def _drop_temporaries(folder: Path) -> None:
    """Removes what writers that were killed have left half-written."""
    for path in folder.glob(".*.safetensors.*.tmp"):
        path.unlink()
        warnings.warn(
            f"a half-written file was dropped: {path.name} in {folder}", UserWarning, stacklevel=6
        )


def _cut(params: Sequence[Tensor], step: int) -> Iterator[list[Tensor]]:
    """The flat vector of a list of tensors, ``step`` elements at a time."""
    piece: list[Tensor] = []
    left = step
    for tensor in params:
        if tensor.numel() <= left:
            parts = [tensor.detach()]
        else:
            flat = tensor.detach().reshape(-1)
            parts = [flat[:left], *flat[left:].split(step)]
        for part in parts:
            piece.append(part)
            left -= part.numel()
            if left == 0:
                yield piece
                piece, left = [], step
    if numel(piece):
        yield piece
