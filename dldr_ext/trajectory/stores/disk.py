"""Rows in a folder: one safetensors file for each, memory-mapped to be read.

`anchor.safetensors` holds the anchor and what the trajectory is of, `000000.safetensors`, ... one
stored delta each, in 8 bits with its scale. A row is in its file, on the disk, before it is
counted; the Gram matrix is not kept, since the rows give it back to the bit. Once rows were thinned
out, the header says which files below a number still count, before any of them is removed.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from ...files import artifacts
from ...tensors.formats import LARGEST, blocks
from ...tensors.parameters import numel
from .base import PIECE, RowPieces, StoreSpec
from .deferred import DeferredStore, stored
from .lock import FolderLock

RANK_FOLDERS = "rank-*-of-*"  # in a folder that several ranks recorded to
HEADER = "anchor.safetensors"
HEADER_KIND, HEADER_VERSION = "trajectory_folder", 1
_KIND, _VERSION = "snapshot", 1
_ROW_NAME = re.compile(r"(\d{6,})\.safetensors")
# Read through mappings before they are given back, and with them the pages that they keep in this
# process; a read brings in some on either side of what was asked for.
_MAPPED_BYTES, _AROUND_BYTES = 1 << 25, 1 << 17


class _Row(NamedTuple):
    path: Path
    offset: int  # of the numbers in the file; scales follow them


class DiskStore(DeferredStore):
    """A folder that this process alone records to: `create` or `resume`.

    Parameters
    ----------
    lock : FolderLock
    spec : StoreSpec
    metadata : mapping
        What the trajectory is of, as JSON can hold it; written with the anchor.
    """

    def __init__(
        self,
        lock: FolderLock,
        spec: StoreSpec,
        metadata: Mapping[str, Any],
        anchor: Tensor | None = None,
    ) -> None:
        super().__init__(spec, anchor)
        self._lock, self._path, self._metadata = lock, lock.folder, dict(metadata)
        self._rows: list[_Row] = []
        self._skipped = 0  # numbers of files that are no snapshots
        self._maps: dict[int, Tensor] = {}
        self._mapped = 0  # bytes read through them

    @classmethod
    def create(
        cls,
        path: Path,
        spec: StoreSpec,
        metadata: Mapping[str, Any],
        anchor: Tensor | None = None,
    ) -> DiskStore:
        """Make an empty store in a folder without one."""
        os.makedirs(path, exist_ok=True)
        lock = FolderLock(path)
        try:
            _check_new(path)
            _drop_temporaries(path)
            return cls(lock, spec, metadata, anchor)
        except BaseException:
            lock.close()
            raise

    @classmethod
    def resume(
        cls,
        lock: FolderLock,
        spec: StoreSpec,
        metadata: Mapping[str, Any],
        anchor: Tensor,
    ) -> DiskStore:
        """Open the store of a folder; rows that are not whole are reported and left out."""
        result = cls(lock, spec, metadata, anchor)
        if not lock.read_only:
            _drop_temporaries(lock.folder)
        files, next_number = result._counting(_row_files(lock.folder))
        for path in files:
            try:
                result._rows.append(result._checked(path))
            except ValueError as error:
                warnings.warn(f"a snapshot was left out: {error}", UserWarning, stacklevel=6)
        result.length = len(result._rows)
        result._skipped = next_number - result.length
        result._make_room(result.length)
        return result

    @property
    def numbers(self) -> list[int]:
        """The numbers of the files of the rows."""
        return [int(row.path.stem) for row in self._rows]

    @property
    def metadata(self) -> dict[str, Any]:
        """The description of the trajectory, as it was saved."""
        return self._metadata

    def keep(self, numbers: Collection[int], next_number: int) -> None:
        """Leave out all rows but those whose files have these numbers."""
        self._rows = [row for row in self._rows if int(row.path.stem) in numbers]
        self._maps.clear()
        self.length, self._multiplied = len(self._rows), 0
        self._skipped = next_number - self.length

    @override
    def check_writable(self) -> None:
        if self._lock.read_only:
            raise ValueError(
                f"path: expected a folder that may be written to, got {self._path}, which was "
                "opened to read: copy it to record on"
            )
        if not self._lock.held:
            raise ValueError(
                f"path: expected a folder that this process has open, got {self._path}: it was "
                "closed, or this process is a fork of the one that opened it"
            )

    @override
    def begin_thinning(self) -> None:
        super().begin_thinning()
        self.check_writable()
        assert self.anchor is not None
        thinned = {"kept": self.numbers[: self.length : 2], "next": self._skipped + self.length}
        try:
            self._write_header(self.anchor, {**self._metadata, **thinned})
        except OSError as error:
            raise OSError(
                error.errno or errno.EIO,
                f"the {self.length} snapshots were not thinned out: {error.strerror or error}; "
                "they are whole",
                str(self._path / HEADER),
            ) from error

    @override
    def _drop_odd_rows(self, in_place: bool) -> None:
        super()._drop_odd_rows(in_place)
        self._skipped += self.length // 2  # numbers go on
        dropped, self._rows = self._rows[1 : self.length : 2], self._rows[: self.length : 2]
        self._maps.clear()
        _remove([row.path for row in dropped])

    @override
    def undo(self) -> None:
        super().undo()
        self._rows[self.length].path.unlink()
        del self._rows[self.length :]

    @override
    def close(self) -> None:
        self._maps.clear()
        self._lock.close()

    @override
    def read(self, row: int, begin: int, end: int, out: Tensor) -> None:
        size = self.dtype.itemsize
        out.copy_(self._bytes(row, begin * size, end * size).view(self.dtype), non_blocking=True)

    @override
    def read_scale(self, row: int, begin: int, end: int, out: Tensor) -> None:
        start = self.numel * self.dtype.itemsize
        scale = self._bytes(row, start + 4 * begin, start + 4 * end)
        # A copy, since what follows 8-bit numbers need not be aligned.
        out.copy_(scale.clone().view(torch.float32))

    def _bytes(self, row: int, begin: int, end: int) -> Tensor:
        """Return some of the bytes of a row, mapped."""
        if self._mapped > _MAPPED_BYTES:
            self._maps.clear()
            self._mapped = 0
        # Of a file that has been cut since it was mapped, the rest reads as zeros or kills.
        size = self._checked_size(self._rows[row])
        if row not in self._maps:
            # Mapped copy-on-write: nothing is ever written to the file.
            whole = torch.from_file(
                str(self._rows[row].path), shared=False, size=size, dtype=torch.uint8, device="cpu"
            )
            self._maps[row] = whole[self._rows[row].offset :]
        self._mapped += end - begin + _AROUND_BYTES
        return self._maps[row][begin:end]

    def _put(self, params: Sequence[Tensor], anchor: Tensor) -> bool:
        lists = zip(_pieces_of(params, PIECE), anchor.split(PIECE), strict=True)
        return self._write_row(lists, anchor)

    def _put_pieces(self, pieces: RowPieces, anchor: Tensor) -> bool:
        return self._write_row((([piece], anchor[columns]) for columns, piece in pieces), anchor)

    def _write_row(self, pieces: Iterable[tuple[Sequence[Tensor], Tensor]], anchor: Tensor) -> bool:
        """Write one row, which comes as lists of tensors beside their part of the anchor."""
        self.check_writable()
        path = self._path / f"{self._skipped + self.length:06d}.safetensors"
        try:
            if self.length == 0:
                # In parts: the check makes copies.
                if not all(bool(part.isfinite().all()) for part in anchor.split(PIECE)):
                    return False
                # A new mark each time: what an earlier first snapshot that failed has left is not
                # taken for a difference from this anchor.
                self._write_header(anchor, {**self._metadata, "id": secrets.token_hex(8)})
            tensors = self._streams(pieces)
            artifacts.save(path, _KIND, _VERSION, tensors, {"of": self._metadata["id"]})
        except _NotFinite:
            return False
        except OSError as error:
            raise OSError(
                error.errno or errno.EIO,
                f"snapshot {self.length} was not recorded: {error.strerror or error}; the "
                f"{self.length} recorded before are whole",
                str(path),
            ) from error
        # An interrupt may have left one that was never counted.
        self._rows[self.length :] = [_Row(path, path.stat().st_size - self.row_bytes)]
        self._maps.pop(self.length, None)
        return True

    def _write_header(self, anchor: Tensor, metadata: dict[str, Any]) -> None:
        path = self._path / HEADER
        artifacts.save(path, HEADER_KIND, HEADER_VERSION, {"anchor": anchor}, metadata)
        self._metadata = metadata

    def _counting(self, files: list[tuple[int, Path]]) -> tuple[list[Path], int]:
        """Return the files that were not thinned out, and the number of the next one.

        A killed process may have left the others, which are removed.
        """
        end = self._metadata["next"] if "kept" in self._metadata else 0
        kept = set(self._metadata.get("kept", ()))
        counting = [path for number, path in files if number >= end or number in kept]
        if not self._lock.read_only:
            _remove([path for number, path in files if number < end and number not in kept])
        return counting, max(end, *(number + 1 for number, _ in files), 0)

    def _streams(
        self, pieces: Iterable[tuple[Sequence[Tensor], Tensor]]
    ) -> dict[str, Tensor | artifacts.Stream]:
        """Return the row as streams: the memory is a piece and the scales, however long the row."""
        scales: list[Tensor] = []

        def rounded() -> Iterator[Tensor]:
            for tensors, anchor in pieces:
                codes_and_scale = stored(tensors, anchor, self.dtype)
                if codes_and_scale is None:
                    raise _NotFinite
                scales.extend(codes_and_scale[1:])
                yield codes_and_scale[0]

        delta = artifacts.Stream(self.dtype, (self.numel,), rounded())
        if self.dtype not in LARGEST:
            return {"delta": delta}
        # Written second, when all of them are there.
        scale = artifacts.Stream(torch.float32, (blocks(self.numel),), iter(scales))
        return {"delta": delta, "scale": scale}

    def _checked(self, path: Path) -> _Row:
        with artifacts.Reader(path, _KIND, _VERSION) as file:
            if file.metadata != {"of": self._metadata["id"]}:
                raise file.error(f"expected a snapshot of this trajectory, found {file.metadata}")
            expected = {"delta": ((self.numel,), self.dtype)}
            if self.dtype in LARGEST:
                expected["scale"] = ((blocks(self.numel),), torch.float32)
            if file.names() != set(expected):
                raise file.error(
                    f"expected the tensors {sorted(expected)}, found {sorted(file.names())}"
                )
            for name, shape_and_dtype in expected.items():
                file.check(name, *shape_and_dtype)
            # The format has no gaps: the last tensor ends where the file ends.
            row = _Row(path, path.stat().st_size - self.row_bytes)
            if row.offset % self.dtype.itemsize:
                raise file.error(f"expected aligned numbers, found them at byte {row.offset}")
        return row

    def _checked_size(self, row: _Row) -> int:
        size = row.offset + self.row_bytes
        size_now = row.path.stat().st_size
        if size_now != size:
            raise ValueError(
                f"{row.path}: changed since it was recorded: {size_now} bytes, not {size}"
            )
        return size


class _NotFinite(Exception):
    pass


def _check_new(folder: Path) -> None:
    rows = _row_files(folder)
    if rows or (folder / HEADER).exists():
        raise ValueError(
            f"path: expected a new or an empty folder, got {folder}, which holds a trajectory of "
            f"{len(rows)} snapshots; Trajectory.load goes on with it"
        )


def _row_files(folder: Path) -> list[tuple[int, Path]]:
    """Return the files named like rows, by number."""
    matches = (_ROW_NAME.fullmatch(name) for name in os.listdir(folder))
    return sorted((int(match[1]), folder / match[0]) for match in matches if match)


def _remove(paths: Iterable[Path]) -> None:
    """Remove files that do not count; one that cannot be removed does no harm."""
    for path in paths:
        with suppress(OSError):
            path.unlink()


def _drop_temporaries(folder: Path) -> None:
    """Remove what writers that were killed have left half-written."""
    for path in folder.glob(".*.safetensors.*.tmp"):
        path.unlink()
        warnings.warn(
            f"a half-written file was dropped: {path.name} in {folder}", UserWarning, stacklevel=6
        )


def _pieces_of(params: Sequence[Tensor], step: int) -> Iterator[list[Tensor]]:
    """Yield the flat vector of a list of tensors, ``step`` elements at a time."""
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
