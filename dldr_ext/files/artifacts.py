"""Saved artefacts: safetensors files that are either whole or refused.

A file holds tensors and, in its metadata, the kind of artefact, the version of its format, whatever
the kind needs (as JSON) and a CRC-32 of the whole file. Any safetensors reader can open it.

Saving writes a temporary file beside the target, flushes it to disk and renames it: at every moment
the path holds the old file or the new one, whole. Tensors are streamed piece by piece, so that no
second copy of a large one is made.
"""

from __future__ import annotations

import json
import math
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..collectives.partition import Run
from ..tensors.formats import SAFETENSORS_NAMES
from ..tensors.parameters import dtype_name

_PREFIX = "dldr_ext."
_CHECKSUM = _PREFIX + "crc32"
_NO_CHECKSUM = "0" * 8  # what the checksum field holds while the checksum is computed
_PIECE = 1 << 24  # bytes handled at a time


class Stream(NamedTuple):
    """A tensor that is made while it is written: its pieces, in logical order."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Iterator[Tensor]


def save(
    path: str | os.PathLike[str],
    kind: str,
    version: int,
    tensors: Mapping[str, Tensor | Stream],
    metadata: Mapping[str, Any],
) -> None:
    """Save an artefact; an earlier file at ``path`` stays in place unless all went well.

    Parameters
    ----------
    path : path
        Its folder must exist.
    kind : str
        What it is ("trajectory", "subspace", ...); `Reader` refuses another kind.
    version : int
        Version of the kind's format; `Reader` refuses a newer one.
    tensors : mapping of str to Tensor or Stream
        On any device, with any strides.
    metadata : mapping
        Anything that JSON can hold.

    Raises
    ------
    OSError, TypeError
        The file cannot be written; a tensor or the metadata cannot be stored.
    """
    target = Path(os.path.realpath(path))  # of a symbolic link, the file that it points to
    temporary = target.with_name(f".{target.name}.{os.urandom(4).hex()}.tmp")
    try:
        with open(temporary, "xb") as file:
            _write(file, kind, version, tensors, metadata)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


class Reader:
    """An open artefact, checked: a context manager.

    Parameters
    ----------
    path : path
    kind : str
    version : int
        The newest version of the kind's format that the caller knows.
    check : bool
        Read the whole file once to compare its checksum.

    Attributes
    ----------
    metadata : dict
        As it was saved.
    version : int
        Of the file.

    Raises
    ------
    FileNotFoundError
    ValueError
        Not a safetensors file, truncated or corrupt, another kind, a newer version: with the path
        and what was found.
    """

    def __init__(
        self, path: str | os.PathLike[str], kind: str, version: int, *, check: bool = True
    ) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        with open(self.path, "rb"):
            pass  # a missing or unreadable file is the usual OSError
        try:
            self._file = safe_open(str(self.path), framework="pt")
            header = self._file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise self.error(f"not a whole safetensors file ({error})") from error
        self._check_kind(header, kind, version)
        if check:
            self._check_sum(header)
        self.version = int(header[_PREFIX + "version"])
        self.metadata: dict[str, Any] = self._parsed(header[_PREFIX + "metadata"])

    def __enter__(self) -> Reader:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._file.__exit__(*error)

    def error(self, what: str) -> ValueError:
        """Return a ValueError that names the file."""
        return ValueError(f"{self.path}: {what}")

    def names(self) -> set[str]:
        """Return the names of the tensors in the file."""
        return set(self._file.keys())

    def read(self, name: str, device: torch.device | str = "cpu") -> Tensor:
        """Return one tensor, in memory of its own."""
        source = self._get(name)
        out = torch.empty(source.shape, dtype=source.dtype, device=device)
        out.copy_(source)
        return out

    def read_into(self, name: str, out: Tensor) -> None:
        """Read one tensor into ``out``, which must have its shape and dtype."""
        self.check(name, tuple(out.shape), out.dtype)
        out.copy_(self._get(name))

    def check(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Check the shape and the dtype of a tensor."""
        source = self._get(name)
        if source.shape != shape or source.dtype != dtype:
            raise self.error(
                f"expected '{name}' of shape {shape} and dtype {dtype_name(dtype)}, "
                f"found {tuple(source.shape)} and {dtype_name(source.dtype)}"
            )

    def part(self, name: str) -> Any:
        """Return a tensor that is read when it is indexed, and only what is asked for."""
        self._check_name(name)
        return self._file.get_slice(name)

    def _get(self, name: str) -> Tensor:
        self._check_name(name)
        return self._file.get_tensor(name)

    def _check_name(self, name: str) -> None:
        if name not in self.names():
            raise self.error(f"expected a tensor '{name}', found {sorted(self.names())}")

    def _parsed(self, text: str) -> dict[str, Any]:
        try:
            metadata = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self.error(f"expected metadata as JSON, found {error}") from error
        if not isinstance(metadata, dict):
            raise self.error(f"expected metadata as a JSON object, found {text[:40]}")
        return metadata

    def _check_kind(self, header: Mapping[str, str], kind: str, version: int) -> None:
        fields = {key: header.get(_PREFIX + key) for key in ("kind", "version", "metadata")}
        if None in fields.values():
            raise self.error(
                f"expected a {kind} saved by dldr_ext, found a safetensors file with the metadata "
                f"keys {sorted(header)}"
            )
        if fields["kind"] != kind:
            raise self.error(f"expected a {kind}, found a {fields['kind']}")
        found_version = str(fields["version"])
        if not re.fullmatch("[0-9]{1,9}", found_version) or int(found_version) > version:
            raise self.error(
                f"expected a {kind} of format version {version} or older, found version "
                f"{fields['version']}; a newer dldr_ext can read it"
            )

    def _check_sum(self, found: Mapping[str, str]) -> None:
        expected = found.get(_CHECKSUM, "nothing")
        with open(self.path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = file.read(size).replace(_field(expected), _field(_NO_CHECKSUM), 1)
            crc = zlib.crc32(header)
            while piece := file.read(_PIECE):
                crc = zlib.crc32(piece, crc)
        if f"{crc:08x}" != expected:
            raise self.error(f"corrupt: expected the CRC-32 {expected}, found {crc:08x}")


def _write(
    file: BinaryIO,
    kind: str,
    version: int,
    tensors: Mapping[str, Tensor | Stream],
    metadata: Mapping[str, Any],
) -> None:
    text = header(kind, version, tensors, metadata)
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    crc = zlib.crc32(text)
    for tensor in tensors.values():
        for piece in _pieces(tensor):
            file.write(piece)
            crc = zlib.crc32(piece, crc)
    write_checksum(file, text, crc)


def header(
    kind: str,
    version: int,
    tensors: Mapping[str, Tensor | Stream],
    metadata: Mapping[str, Any],
) -> bytes:
    """Return the header of a file, without its checksum and the 8 bytes before it."""
    fields: dict[str, Any] = {
        "__metadata__": {
            "format": "pt",  # which transformers asks for
            _CHECKSUM: _NO_CHECKSUM,
            _PREFIX + "kind": kind,
            _PREFIX + "version": str(version),
            _PREFIX + "metadata": json.dumps(metadata),
        }
    }
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in SAFETENSORS_NAMES:
            raise TypeError(f"{name}: cannot save a tensor of dtype {dtype_name(tensor.dtype)}")
        begin, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        fields[name] = {
            "dtype": SAFETENSORS_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(fields, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)  # the format allows it, and the tensors start aligned
    return text


def write_checksum(file: BinaryIO, header: bytes, crc: int) -> None:
    """Write the CRC-32 of the header and all that follows it."""
    place = header.index(_field(_NO_CHECKSUM)) + len(_field(""))
    file.seek(8 + place - 1)
    file.write(f"{crc:08x}".encode())


def _field(checksum: str) -> bytes:
    return f'"{_CHECKSUM}":"{checksum}"'.encode()


def _pieces(tensor: Tensor | Stream) -> Iterator[memoryview]:
    """Yield the bytes of a tensor in logical order, some at a time."""
    if isinstance(tensor, Stream):
        for piece_of_tensor in tensor.pieces:
            yield from _pieces(piece_of_tensor)
        return
    tensor = tensor.detach()
    if tensor.numel() == 0:
        return
    if not tensor.is_contiguous():
        if tensor.dim() > 1:
            for piece_of_tensor in tensor:
                yield from _pieces(piece_of_tensor)
            return
        tensor = tensor.contiguous()
    flat = tensor.reshape(-1).view(torch.uint8)
    for piece in flat.split(_PIECE):
        yield memoryview(piece.cpu().numpy())


def sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system can."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:  # some systems cannot open a folder
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_columns(file: Reader, name: str, runs: Sequence[Run], device: Any) -> Tensor:
    """Return some columns of a tensor in a file, one after the other; no others are read."""
    whole = file.part(name)
    shape, dtype = whole.get_shape(), whole[..., :0].dtype
    out = torch.empty((*shape[:-1], sum(b - a for a, b in runs)), dtype=dtype, device=device)
    at = 0
    for begin, end in runs:
        out[..., at : at + end - begin].copy_(whole[..., begin:end])
        at += end - begin
    return out
