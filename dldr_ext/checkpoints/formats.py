"""Where the tensors lie in a checkpoint file: found without reading them."""

from __future__ import annotations

import io
import json
import math
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..tensors.formats import SAFETENSORS_NAMES
from ..tensors.names import plain_names
from . import pickles, state_dicts
from .discovery import INDEX_SUFFIXES, KIND_RECORD
from .errors import CheckpointError, reason

#: Tells whether tensors are those of the model in use.
Fits = Callable[[Mapping[str, Tensor]], bool]
_INDEX_LIMIT = 1 << 28  # bytes; the index of a model of 100,000 tensors has 10 MB
_SAFETENSORS_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}
_SAFETENSORS_DTYPES["F8_E8M0"] = torch.float8_e8m0fnu
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # what torch.save wrote first, before torch 1.6
_OTHERS = {  # how files begin that are not checkpoints of torch
    b"version https://git-lfs": "a Git LFS pointer, not the file that it stands for: git lfs pull",
    b"<!DOCTYPE": "an HTML page",
    b"<html": "an HTML page",
    b"\x1f\x8b": "a gzip archive: gunzip it",
    b"\x89HDF": "an HDF5 file",
    b"GGUF": "a GGUF file",
}
_SHOWN = 5  # names in a note


class Entry(NamedTuple):
    """A tensor in a file, not read yet."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    file: Path
    offset: int  # bytes before its first element
    name: str  # in the file
    record: str | None = None  # of a zip file that is compressed: what the offset counts in
    swapped: bool = False  # the bytes of each number, big-endian
    conj: bool = False  # the conjugate of what is stored
    neg: bool = False  # minus what is stored
    problem: str | None = None  # why it cannot be read as numbers
    # Of a tensor that lies in several parts: where each begins in it, along its dimensions.
    parts: tuple[tuple[tuple[int, ...], Entry], ...] = ()

    def nbytes(self) -> int:
        """Return the bytes of its elements."""
        count: int = math.prod(self.shape)
        return count * self.dtype.itemsize

    def place(self) -> tuple[Any, ...]:
        """Return a key that is equal for two tensors of the same numbers in any order.

        That of a transposed or reshaped view is that of the tensor.
        """
        dims: list[list[int]] = []
        pairs = zip(self.stride, self.shape, strict=True)
        for step, size in sorted((pair for pair in pairs if pair[1] != 1), reverse=True):
            if dims and dims[-1][0] == step * size:
                dims[-1] = [step, dims[-1][1] * size]
            else:
                dims.append([step, size])
        where = (self.file, self.record, self.offset, self.dtype, self.conj, self.neg)
        return (*where, *map(tuple, dims))


class Contents(NamedTuple):
    """What a checkpoint holds."""

    entries: dict[str, Entry]  # by plain name, in the order of the file
    files: list[Path]  # its shards, or the one file
    notes: list[str]
    passed_over: Sequence[str] = ()  # notes on what was not taken for the weights
    is_copy: bool = False  # of the weights: their average, a teacher, ...
    progress: Mapping[str, float] = MappingProxyType({})  # "epoch" and "step", if they are there
    kind: str | None = None  # of artefact of this package
    # Of torch.distributed.checkpoint: the keys in nested dicts of each name in the file.
    keys: Mapping[str, tuple[Any, ...]] = MappingProxyType({})
    statuses: Sequence[tuple[int, int]] = ()  # of the files, when they were opened


def read_contents(path: Path, key: str | None = None, fits: Fits | None = None) -> Contents:
    """Find where the tensors of a checkpoint lie.

    Parameters
    ----------
    path : Path
        A file written by ``torch.save`` (of which nothing is ever run), a safetensors file, or a
        Hugging Face index of either. Told apart by what is in them.
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
        if path.exists() and not path.is_file():  # which would wait for who writes to it
            raise CheckpointError(path, "expected a file or a folder, found a device or a pipe")
        if path.name.endswith(INDEX_SUFFIXES):
            return _read_index(path, key)
        contents = _read_file(path, key, fits)
    except OSError as error:
        raise CheckpointError(error.filename or path, reason(error)) from error
    return contents._replace(entries=by_plain_name(path, contents.entries))


def status_of(file: Path) -> tuple[int, int]:
    """Return what changes when a file is written: its size, and the time of its last change."""
    try:
        status = file.stat()
    except OSError as error:
        raise CheckpointError(file, reason(error)) from error
    return status.st_size, status.st_mtime_ns


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


def by_plain_name(path: Path, entries: dict[str, Entry]) -> dict[str, Entry]:
    """Remove from names what wrappers of modules put into them."""
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
        if not isinstance(shard, str) or not _is_file_name(shard):
            raise CheckpointError(
                path, f"{name}: expected the name of a file beside the index, found {shard!r}"
            )
        if shard not in shards:
            shards[shard] = _read_file(path.parent / shard, None)
        if name not in shards[shard].entries:
            raise CheckpointError(path, f"{name}: expected in {shard}, which lacks it")
        entries[name] = shards[shard].entries[name]
    return Contents(
        by_plain_name(path, _under(path, entries, key)),
        [path, *(path.parent / shard for shard in shards)],
        [note for contents in shards.values() for note in contents.notes],
        is_copy=state_dicts.is_copy(key or ""),
        kind=next((contents.kind for contents in shards.values()), None),
    )


def _is_file_name(text: str) -> bool:
    try:
        whole = Path(text).name == text and b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:
        return False
    return whole and text not in ("", ".", "..")


def _read_file(path: Path, key: str | None, fits: Fits | None = None) -> Contents:
    with open(path, "rb") as file:
        start = file.read(32)
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise CheckpointError(path, "empty: 0 bytes")
        for magic, what in _OTHERS.items():
            if start.startswith(magic):
                raise CheckpointError(path, f"expected a checkpoint of torch, found {what}")
        if start.startswith(b"PK"):
            return _read_zip(path, size, key, fits)
        if start[8:9] == b"{" or path.suffix == ".safetensors":
            return _read_safetensors(path, key)
        file.seek(0)
        return _read_legacy(path, file, size, key, fits)


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
    entries = {}
    for name, field in header.items():
        shape = tuple(field["shape"])
        dtype = _SAFETENSORS_DTYPES.get(field["dtype"])
        entries[name] = Entry(
            dtype or torch.uint8,
            shape,
            contiguous_stride(shape),
            path,
            8 + length + field["data_offsets"][0],
            name,
            problem=None if dtype else f"of the type {field['dtype']}",
        )
    return Contents(
        _under(path, entries, key),
        [path],
        [],
        is_copy=state_dicts.is_copy(key or ""),
        progress=state_dicts.progress(metadata, lambda _: None),
        kind=metadata.get("dldr_ext.kind"),
    )


class Records(NamedTuple):
    """Where the storages of a file of ``torch.save`` begin, and the bytes that each has."""

    begins: Mapping[str, tuple[int, int]]  # by key
    records: Mapping[str, str]  # of a compressed file: the name of each
    swapped: bool


def _read_zip(path: Path, size: int, key: str | None, fits: Fits | None) -> Contents:
    try:
        with zipfile.ZipFile(path) as archive, open(path, "rb") as file:
            members = {member.filename: member for member in archive.filelist}
            roots = [name.removesuffix("data.pkl") for name in members if _is_pickle(name)]
            if len(roots) != 1 or f"{roots[0]}constants.pkl" in members:
                raise CheckpointError(path, _other_archive(members))
            for packed in archive.filelist:
                if packed.compress_type not in _COMPRESSIONS or packed.flag_bits & 1:
                    raise CheckpointError(
                        path,
                        "expected a zip archive that Python reads (stored, deflated, bzip2, LZMA; "
                        f"not encrypted), found {packed.filename} otherwise: pack it anew",
                    )
            root = roots[0]
            order = members.get(f"{root}byteorder")
            swapped = order is not None and _whole(archive, file, order) == b"big"
            data = _whole(archive, file, members[f"{root}data.pkl"])
            saved, storages = pickles.load(io.BytesIO(data))
            facts = members.get(f"{root}{KIND_RECORD}")
            kind = json.loads(_whole(archive, file, facts))["dldr_ext.kind"] if facts else None
            begins, records = {}, {}
            for storage in storages:
                member = members.get(f"{root}data/{storage}")
                if member is None:
                    continue  # in a damaged file: noticed if a tensor needs it
                if member.compress_type == zipfile.ZIP_STORED:
                    begin = begin_of_data(file, member.header_offset)
                    begins[storage] = (begin, min(member.file_size, size - begin))
                else:
                    begins[storage] = (0, member.file_size)
                    records[storage] = member.filename
    except (OSError, CheckpointError):
        raise
    except Exception as error:  # of zipfile, or of a damaged pickle: any
        raise CheckpointError(path, f"truncated or corrupt ({_said(error)})") from error
    contents = _contents(path, saved, key, fits, Records(begins, records, swapped))
    return contents._replace(kind=kind)


def _is_pickle(name: str) -> bool:
    return name == "data.pkl" or (name.count("/") == 1 and name.endswith("/data.pkl"))


def _other_archive(members: Mapping[str, Any]) -> str:
    if any(name.endswith("constants.pkl") for name in members):
        return (
            "expected a file of torch.save, found a TorchScript archive: save the state_dict() of "
            "torch.jit.load"
        )
    return f"expected a file of torch.save, found a zip archive of {abridged(list(members))}"


def _whole(archive: zipfile.ZipFile, file: BinaryIO, member: zipfile.ZipInfo) -> bytes:
    if member.compress_type != zipfile.ZIP_STORED:
        return archive.read(member)
    data = os.pread(file.fileno(), member.file_size, begin_of_data(file, member.header_offset))
    if member.CRC not in (0, zlib.crc32(data)):  # 0: torch.serialization.set_crc32_options(False)
        raise zipfile.BadZipFile(f"the checksum of {member.filename} is another")
    return data


def begin_of_data(file: BinaryIO, header: int) -> int:
    """Return where the data of a zip record begin, whose header is at a place in the file."""
    start = os.pread(file.fileno(), 30, header)
    if start[:4] != b"PK\3\4":
        raise ValueError("a record does not begin where the archive says")
    name, extra = int.from_bytes(start[26:28], "little"), int.from_bytes(start[28:30], "little")
    return header + 30 + name + extra


def _read_legacy(
    path: Path, file: BinaryIO, size: int, key: str | None, fits: Fits | None
) -> Contents:
    """Read a file of before torch 1.6: pickles one after the other, then the storages.

    Their numbers are little-endian on every machine.
    """
    if tarfile.is_tarfile(path):
        raise CheckpointError(
            path,
            "expected a file of torch.save, found a tar archive; torch before 0.1.10 wrote such: "
            "load it with torch.load(..., weights_only=False), if you trust it, and save it again",
        )
    try:
        magic, _ = pickles.load(file)
        if magic != _LEGACY_MAGIC:
            raise CheckpointError(path, _other_pickle(magic))
        for _ in ("version of the protocol", "sizes of types"):
            pickles.load(file)
        saved, storages = pickles.load(file)
        keys, _ = pickles.load(file)
        begins = {}
        at = file.tell()
        for storage in map(str, keys):
            count = int.from_bytes(os.pread(file.fileno(), 8, at), "little")
            length = count * storages[storage].dtype.itemsize
            begins[storage] = (at + 8, min(length, size - at - 8))
            at += 8 + length
    except (OSError, CheckpointError):
        raise
    except Exception as error:
        raise CheckpointError(path, f"truncated or corrupt ({_said(error)})") from error
    return _contents(path, saved, key, fits, Records(begins, {}, swapped=False))


def _other_pickle(found: Any) -> str:
    what = found.name if isinstance(found, pickles.Stub) else type(found).__name__
    return (
        f"expected a file of torch.save, found a pickle of a {what}: load it, if you trust it, and "
        "write its state dict with torch.save"
    )


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:160]


def _contents(
    path: Path, saved: Any, key: str | None, fits: Fits | None, records: Records
) -> Contents:
    """Return what a file of ``torch.save`` holds."""
    try:
        choice = state_dicts.find_state_dict(saved, key, fits)
    except ValueError as error:
        raise CheckpointError(path, str(error)) from error
    entries = {n: entry_of(path, n, tensor, records) for n, tensor in choice.tensors.items()}
    notes = [f"left out (not tensors): {abridged(choice.others)}"] if choice.others else []
    counted = state_dicts.progress(saved, partial(_number, path, records))
    return Contents(entries, [path], notes, choice.notes, choice.is_copy, counted)


def _number(path: Path, records: Records, tensor: Tensor) -> float | None:
    """Return the only element of a tensor in a file; None for what is not a plain number."""
    entry = entry_of(path, "a number", tensor, records)
    if entry.problem is not None or tensor.is_complex():
        return None
    with zipfile.ZipFile(path).open(entry.record) if entry.record else open(path, "rb") as file:
        file.seek(entry.offset)
        data = file.read(tensor.itemsize)
    data = data[::-1] if entry.swapped else data
    return float(torch.frombuffer(bytearray(data), dtype=tensor.dtype)[0])


def entry_of(path: Path, name: str, tensor: Tensor, records: Records) -> Entry:
    """Return the entry of a tensor that `pickles.load` gave."""
    place, shape, stride = pickles.place_of(tensor), tuple(tensor.shape), tensor.stride()
    if place.storage is None:
        stride = contiguous_stride(shape)
        return Entry(tensor.dtype, shape, stride, path, 0, name, problem=place.problem)
    storage = place.storage
    begin, size = records.begins.get(storage.key, (0, -1))
    first = storage.begin * storage.dtype.itemsize + place.begin * tensor.itemsize
    if first + extent(shape, stride) * tensor.itemsize > size:
        raise CheckpointError(path, f"truncated or corrupt: {name} lies outside the file")
    return Entry(
        tensor.dtype,
        shape,
        stride,
        path,
        begin + first,
        name,
        records.records.get(storage.key),
        records.swapped,
        place.conj,
        place.neg,
    )


def extent(shape: torch.Size | tuple[int, ...], stride: tuple[int, ...]) -> int:
    """Count the elements from the first to the last one of a strided tensor, both included."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the stride of a tensor whose elements lie in logical order."""
    stride, step = [], 1
    for size in reversed(shape):
        stride.append(step)
        step *= max(size, 1)
    return tuple(reversed(stride))


def abridged(names: Sequence[str]) -> str:
    """List the first few names, and the number of others."""
    shown = ", ".join(names[:_SHOWN])
    return f"{shown} and {len(names) - _SHOWN} more" if len(names) > _SHOWN else shown or "nothing"
