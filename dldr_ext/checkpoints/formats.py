"""Where the tensors lie in a checkpoint file: found without reading them."""

from __future__ import annotations

import argparse
import json
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from pathlib import Path, PosixPath
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.serialization import safe_globals

from ..tensors.formats import SAFETENSORS_NAMES
from ..tensors.names import plain_names
from . import state_dicts
from .discovery import INDEX_SUFFIXES
from .errors import CheckpointError, reason

#: Tells whether tensors are those of the model in use.
Fits = Callable[[Mapping[str, Tensor]], bool]
_INDEX_LIMIT = 1 << 28  # bytes; the index of a model of 100,000 tensors has 10 MB
_SAFETENSORS_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
_SCALAR: Any = np.float64(0).__reduce__()[0]  # called as numpy 1 or numpy 2 calls it
# Harmless types that scripts save beside the weights (options, a best accuracy).
_HARMLESS: list[Any] = [
    argparse.Namespace,
    PosixPath,
    np.dtype,
    *((_SCALAR, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "b1")),
]


class Entry(NamedTuple):
    """A tensor in a file, not read yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    file: Path
    offset: int | None  # bytes before its first element; None: the file is loaded whole
    name: str  # in the file
    key: str | None = None  # where the state dict is in it

    def nbytes(self) -> int:
        """Return the bytes of its elements."""
        count: int = math.prod(self.shape)
        return count * self.dtype.itemsize

    def place(self) -> tuple[Any, ...]:
        """Return a key that is equal for two names of one tensor."""
        if self.offset is None:
            return (self.file, self.name)
        return (self.file, self.offset, self.dtype, self.shape, self.stride)


class Contents(NamedTuple):
    """What a checkpoint holds."""

    entries: dict[str, Entry]  # by plain name, in the order of the file
    files: list[Path]  # its shards, or the one file
    notes: list[str]
    passed_over: Sequence[str] = ()  # notes on what was not taken for the weights
    is_copy: bool = False  # of the weights: their average, a teacher, ...
    progress: Mapping[str, float] = MappingProxyType({})  # "epoch" and "step", if they are there
    kind: str | None = None  # of artefact of this package


def read_contents(path: Path, key: str | None = None, fits: Fits | None = None) -> Contents:
    """Find where the tensors of a checkpoint lie.

    Parameters
    ----------
    path : Path
        A file written by ``torch.save`` (pickles are loaded with ``weights_only=True``), a
        safetensors file, or a Hugging Face index of either. Told apart by what is in them.
    key, fits
        Where the state dict is in the file, and how to tell: see `state_dicts.find_state_dict`.

    Returns
    -------
    Contents

    Raises
    ------
    CheckpointError
        Missing, empty, truncated, corrupt, or something else.
    """
    try:
        if path.name.endswith(INDEX_SUFFIXES):
            return _read_index(path, key)
        contents = _read_file(path, key, fits)
    except OSError as error:
        raise CheckpointError(error.filename or path, reason(error)) from error
    return contents._replace(entries=_by_plain_name(path, contents.entries))


def load_whole(path: Path) -> Any:
    """Load a file that can only be loaded whole; the latest one stays in memory."""
    status = path.stat()
    return _load_whole(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1)
def _load_whole(path: Path, size: int, changed: int) -> Any:
    return _load(path, fake=False)


def load_tensor(entry: Entry) -> Tensor:
    """Return the tensor of an entry whose file is loaded whole."""
    status = entry.file.stat()
    return _load_tensors(entry.file, entry.key, status.st_size, status.st_mtime_ns)[entry.name]


@lru_cache(maxsize=1)
def _load_tensors(path: Path, key: str | None, size: int, changed: int) -> dict[str, Tensor]:
    return _choice(path, _load_whole(path, size, changed), key, None).tensors


def forget_loaded() -> None:
    """Free what was loaded whole."""
    _load_tensors.cache_clear()
    _load_whole.cache_clear()


def _under(path: Path, entries: dict[str, Entry], key: str | None) -> dict[str, Entry]:
    """Return the tensors of a flat file that a key names: it precedes their names."""
    if not key:
        return entries
    found = state_dicts.under(entries, key)
    if not found:
        raise CheckpointError(
            path, f"expected names that begin with the key {key!r}, found {list(entries)[:8]}"
        )
    return found


def _by_plain_name(path: Path, entries: dict[str, Entry]) -> dict[str, Entry]:
    try:
        names = plain_names(list(entries))
    except ValueError as error:
        raise CheckpointError(path, str(error)) from error
    return dict(zip(names, entries.values(), strict=True))


def _read_index(path: Path, key: str | None) -> Contents:
    if path.stat().st_size > _INDEX_LIMIT:
        raise CheckpointError(path, f"expected an index of at most {_INDEX_LIMIT} bytes")
    try:
        index = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"corrupt: not JSON ({error})") from error
    places = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(places, dict) or not places:
        raise CheckpointError(path, "expected an object with a 'weight_map' of names to files")
    shards: dict[str, Contents] = {}
    entries = {}
    for name, shard in places.items():
        if not isinstance(shard, str) or shard in ("", ".", "..") or Path(shard).name != shard:
            raise CheckpointError(
                path, f"{name}: expected the name of a file beside the index, found {shard!r}"
            )
        if shard not in shards:
            shards[shard] = _read_file(path.parent / shard, None)
        if name not in shards[shard].entries:
            raise CheckpointError(path, f"{name}: expected in {shard}, which lacks it")
        entries[name] = shards[shard].entries[name]
    return Contents(
        _by_plain_name(path, _under(path, entries, key)),
        [path, *(path.parent / shard for shard in shards)],
        [note for contents in shards.values() for note in contents.notes],
        is_copy=state_dicts.is_copy(key or ""),
        kind=next((contents.kind for contents in shards.values()), None),
    )


def _read_file(path: Path, key: str | None, fits: Fits | None = None) -> Contents:
    with open(path, "rb") as file:
        start = file.read(9)
    size = path.stat().st_size
    if size == 0:
        raise CheckpointError(path, "empty: 0 bytes")
    if start.startswith(b"PK"):
        return _read_torch(path, size, key, fits)
    if start[8:] == b"{" or path.suffix == ".safetensors":
        return _read_safetensors(path, key)
    return _read_whole(path, key, fits, "in the format of before torch 1.6")


def _read_safetensors(path: Path, key: str | None) -> Contents:
    from safetensors import SafetensorError, safe_open

    try:  # the library checks the header against the size of the file
        with safe_open(str(path), framework="numpy"):
            pass
    except (SafetensorError, OSError) as error:
        raise CheckpointError(path, f"not a whole safetensors file ({error})") from error
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", None) or {}
    entries, notes = {}, []
    for name, field in header.items():
        if field["dtype"] not in _SAFETENSORS_DTYPES:
            notes.append(f"{name}: left out, of the type {field['dtype']}")
            continue
        shape = tuple(field["shape"])
        entries[name] = Entry(
            _SAFETENSORS_DTYPES[field["dtype"]],
            shape,
            _contiguous_stride(shape),
            path,
            8 + length + field["data_offsets"][0],
            name,
        )
    return Contents(
        _under(path, entries, key),
        [path],
        notes,
        is_copy=state_dicts.is_copy(key or ""),
        progress=state_dicts.progress(metadata, lambda _: None),
        kind=metadata.get("dldr_ext.kind"),
    )


def _read_torch(path: Path, size: int, key: str | None, fits: Fits | None) -> Contents:
    try:
        with zipfile.ZipFile(path) as archive:
            compressed = any(
                record.compress_type != zipfile.ZIP_STORED for record in archive.filelist
            )
            order = [name for name in archive.namelist() if name.endswith("/byteorder")]
            swapped = bool(order) and archive.read(order[0]) != b"little"
    except OSError:
        raise
    except Exception as error:  # zipfile lets several through
        raise CheckpointError(path, f"truncated or corrupt ({error})") from error
    if compressed or swapped:
        return _read_whole(path, key, fits, "compressed" if compressed else "big-endian")
    saved = _load(path, fake=True)
    choice = _choice(path, saved, key, fits)
    entries, notes = {}, []
    for name, tensor in choice.tensors.items():
        if tensor.layout is not torch.strided or tensor.is_quantized:
            notes.append(f"{name}: left out, not a dense tensor")
            continue
        storage = tensor.untyped_storage()
        begin = storage._checkpoint_offset
        first = int(tensor.storage_offset()) * tensor.itemsize
        last = first + extent(tensor.shape, tensor.stride()) * tensor.itemsize
        if begin is None or first < 0 or last > storage.nbytes() or begin + last > size:
            raise CheckpointError(path, f"corrupt: {name} lies outside the file")
        entries[name] = Entry(
            tensor.dtype, tuple(tensor.shape), tensor.stride(), path, begin + first, name
        )
    counted = state_dicts.progress(saved, partial(_number, path))
    return Contents(entries, [path], notes, choice.notes, choice.is_copy, counted)


def _number(path: Path, tensor: Tensor) -> float | None:
    """Return the only element of a tensor in a file; None for what is not a plain number."""
    begin = tensor.untyped_storage()._checkpoint_offset
    if begin is None or tensor.is_complex():
        return None
    with open(path, "rb") as file:
        file.seek(begin + int(tensor.storage_offset()) * tensor.itemsize)
        data = bytearray(file.read(tensor.itemsize))
    if len(data) < tensor.itemsize:
        return None
    return float(torch.frombuffer(data, dtype=tensor.dtype)[0])


def extent(shape: torch.Size | tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Count the elements from the first to the last one of a strided tensor, both included."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def _read_whole(path: Path, key: str | None, fits: Fits | None, why: str) -> Contents:
    """Return the contents of a file without offsets: to be loaded whole each time it is read."""
    entries = {}
    saved = load_whole(path)
    choice = _choice(path, saved, key, fits)
    for name, tensor in choice.tensors.items():
        if tensor.layout is torch.strided and not tensor.is_quantized:
            shape = tuple(tensor.shape)
            stride = _contiguous_stride(shape)
            entries[name] = Entry(tensor.dtype, shape, stride, path, None, name, choice.key)
    note = f"{path}: {why}: loaded whole each time it is read, which takes memory"
    counted = state_dicts.progress(saved, lambda tensor: float(tensor.real))
    return Contents(entries, [path], [note], choice.notes, choice.is_copy, counted)


def _load(path: Path, *, fake: bool) -> Any:
    try:
        with safe_globals(_HARMLESS), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of another pickle protocol
            if not fake:
                return torch.load(path, map_location="cpu", weights_only=True)
            from torch._subclasses.fake_tensor import FakeTensorMode

            with FakeTensorMode():  # storages then only know where they lie in the file
                return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        text = str(error)
        refused = re.search(r"GLOBAL `?([\w.]+)", text)
        if refused is not None:
            raise CheckpointError(
                path,
                f"holds Python objects such as {refused[1]}, which could run code and are not "
                "loaded: save model.state_dict()",
            ) from error
        said = re.search(r"WeightsUnpickler error:\s*(.*)", text) or re.search(r"(.+)", text)
        detail = type(error).__name__ if said is None else said[1]
        raise CheckpointError(path, f"truncated or corrupt ({detail[:160]})") from error


def _choice(path: Path, saved: Any, key: str | None, fits: Fits | None) -> state_dicts.Choice:
    try:
        return state_dicts.find_state_dict(saved, key, fits)
    except ValueError as error:
        raise CheckpointError(path, str(error)) from error


def _contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))
