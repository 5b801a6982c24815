"""Folders of torch.distributed.checkpoint: where each rank's parts of the tensors lie.

Read without torch.distributed and without running anything in the pickled metadata.
"""

from __future__ import annotations

import io
import json
import math
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from . import pickles, state_dicts
from .discovery import KIND_RECORD, METADATA
from .errors import CheckpointError, reason
from .formats import (
    Contents,
    Entry,
    Fits,
    Records,
    abridged,
    begin_of_data,
    by_plain_name,
    contiguous_stride,
    entry_of,
)

_SMALL = 1 << 16  # bytes; of an object that may be a counter
_WAY_OUT = (
    "python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE writes it anew"
)


def read_folder(folder: Path, key: str | None = None, fits: Fits | None = None) -> Contents:
    """Find where the tensors of a distributed checkpoint lie: see `formats.read_contents`."""
    try:
        with open(folder / METADATA, "rb") as file:
            metadata, _ = pickles.load(file)
        return _Folder(folder, metadata).contents(key, fits)
    except OSError as error:
        raise CheckpointError(error.filename or folder, reason(error)) from error
    except CheckpointError:
        raise
    except Exception as error:  # of a damaged pickle: any
        problem = f"truncated or corrupt ({type(error).__name__}: {error})"[:200]
        raise CheckpointError(folder / METADATA, problem) from error


class _Folder:
    """A folder, by what its metadata says: stubs of torch's classes, whose fields are items."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self._path = path
        self._kinds: Mapping[str, Mapping[str, Any]] = metadata["state_dict_metadata"]
        self._paths = metadata.get("planner_data") or {}
        self._parts: dict[str, list[tuple[tuple[int, ...], Mapping[str, Any]]]] = {}
        for index, place in metadata["storage_data"].items():
            offset = tuple(index.get("offset") or ())
            self._parts.setdefault(index["fqn"], []).append((offset, place))
        self._files: dict[Path, BinaryIO] = {}

    def contents(self, key: str | None, fits: Fits | None) -> Contents:
        names: dict[int, str] = {}  # of tensors on the meta device, by what stands for them
        saved: dict[str, Any] = {}
        try:
            for name, kind in self._kinds.items():
                inside, (*keys, last) = saved, self._path_of(name)
                for part in keys:
                    inside = inside.setdefault(part, {})
                inside[last] = value = self._value(name, kind, last)
                names[id(value)] = name
            try:
                choice = state_dicts.find_state_dict(saved, key, fits)
            except ValueError as error:
                raise CheckpointError(self._path, str(error)) from error
            entries = {
                name: self._entry(names[id(tensor)]) for name, tensor in choice.tensors.items()
            }
            progress = state_dicts.progress(saved, lambda _: None)
        finally:
            for file in self._files.values():
                file.close()
        files = [self._path / METADATA, *self._files]
        notes = [f"left out (not tensors): {abridged(choice.others)}"] if choice.others else []
        entries = by_plain_name(self._path, entries)
        own = self._path / KIND_RECORD
        written_as = json.loads(own.read_bytes())["dldr_ext.kind"] if own.is_file() else None
        return Contents(
            entries,
            files,
            notes,
            choice.notes,
            choice.is_copy,
            progress,
            written_as,
            keys={name: tuple(self._paths.get(name, (name,))) for name in self._kinds},
        )

    def _path_of(self, name: str) -> tuple[str, ...]:
        """Return the keys of the nested dicts that were saved."""
        if name in self._paths:
            return tuple(map(str, self._paths[name]))
        first, dot, rest = name.partition(".")
        return (first, rest) if dot and first.startswith("optim") else (name,)

    def _value(self, name: str, kind: Mapping[str, Any], last: str) -> Any:
        """Return a tensor on the meta device, or the object, if it may be a counter."""
        if "size" in kind:
            return torch.empty(tuple(kind["size"]), dtype=_dtype(kind), device="meta")
        if state_dicts.may_count(last) and self._parts[name][0][1]["length"] < _SMALL:
            place = self._parts[name][0][1]
            window = _Window(self._open(place), place["offset"], place["length"])
            with zipfile.ZipFile(window) as archive:
                return pickles.load(io.BytesIO(archive.read(_pickle_in(archive))))[0]
        return None

    def _entry(self, name: str) -> Entry:
        kind = self._kinds[name]
        parts = [
            (offset or (0,) * len(kind["size"]), self._part(name, place))
            for offset, place in self._parts.get(name, ())
        ]
        shape = tuple(kind["size"])
        if sum(math.prod(part.shape) for _, part in parts) != math.prod(shape):
            raise CheckpointError(
                self._path,
                f"{name}: expected parts of {shape} in all, found {len(parts)} that lack",
            )
        stride = contiguous_stride(shape)
        if not parts:  # of no elements
            dtype = _dtype(kind)
            return Entry(dtype, shape, stride, self._path / METADATA, 0, name)
        first = parts[0][1]
        if len(parts) == 1:
            return first
        return Entry(first.dtype, shape, stride, first.file, first.offset, name, parts=tuple(parts))

    def _part(self, name: str, place: Mapping[str, Any]) -> Entry:
        """Return the tensor that one rank saved: a file of torch.save inside a file."""
        path, begin = self._path / place["relative_path"], place["offset"]
        if place.get("transform_descriptors"):
            raise CheckpointError(
                path, f"{name}: expected plain numbers, found an encoding: {_WAY_OUT}"
            )
        file = self._open(place)
        try:
            with zipfile.ZipFile(_Window(file, begin, place["length"])) as archive:
                pickle = _pickle_in(archive)
                tensor, storages = pickles.load(io.BytesIO(archive.read(pickle)))
                begins = {}
                for storage in storages:
                    member = archive.getinfo(f"{pickle.removesuffix('data.pkl')}data/{storage}")
                    begins[storage] = (
                        begin_of_data(file, begin + member.header_offset),
                        member.file_size,
                    )
        except (zipfile.BadZipFile, KeyError, ValueError) as error:
            raise CheckpointError(path, f"truncated or corrupt: {name} ({error})") from error
        if not isinstance(tensor, Tensor):
            raise CheckpointError(path, f"{name}: expected a tensor, found another object")
        return entry_of(path, name, tensor, Records(begins, {}, swapped=False))

    def _open(self, place: Mapping[str, Any]) -> BinaryIO:
        name = place["relative_path"]
        if not isinstance(name, str) or Path(name).name != name:
            raise CheckpointError(
                self._path, f"expected the name of a file beside {METADATA}, found {name!r}"
            )
        path = self._path / name
        if path not in self._files:
            self._files[path] = open(path, "rb")  # noqa: SIM115  (see contents)
        return self._files[path]


class _Window(io.RawIOBase):
    """A stretch of a file as a file."""

    def __init__(self, file: BinaryIO, begin: int, length: int) -> None:
        super().__init__()
        self._file, self._begin, self._length, self._at = file, begin, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("a negative place in a file")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: max(self._length - self._at, 0)]
        got = os.preadv(self._file.fileno(), [view], self._begin + self._at)
        self._at += got
        return got


def _pickle_in(archive: zipfile.ZipFile) -> str:
    return next(name for name in archive.namelist() if name.endswith("data.pkl"))


def _dtype(kind: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype of a tensor, one of the fields of its properties."""
    properties = kind["properties"]
    fields = properties.state if isinstance(properties.state, tuple) else properties.values()
    return next(field for field in fields if isinstance(field, torch.dtype))
