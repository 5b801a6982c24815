"""A file of tensors as `torch.save` writes it, with the tensors written in pieces."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checkpoints.discovery import KIND_RECORD
from ..checkpoints.pickles import STORAGES
from .artifacts import sync_folder
from .partial import locked, reserve

_ROOT = "archive/"
_ALIGNMENT = 64  # bytes, as torch.save has it: such a file can be mapped
_HEADER = 1 << 9  # bytes that a record takes beside its tensor, at most


class TorchFile:
    """The file beside ``path`` that becomes it once all is written: a context manager.

    Parameters
    ----------
    path : Path
    kind, version, metadata
        As in `artifacts.save`; torch.load passes them over.
    tensors : mapping of str to Tensor
        On the meta device: their dtypes and shapes. They are written in this order. Names of one
        object are names of one tensor, which is written under the first.
    bare : bool
        Of one tensor: torch.load returns it, not a dict with it.

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
        bare: bool = False,
    ) -> None:
        self.path, self.temporary = path, path.with_name(f".{path.name}.part")
        self._keys: dict[str, str] = {}
        of_tensor: dict[int, str] = {}
        for name, tensor in tensors.items():
            if id(tensor) not in of_tensor:
                self._keys[name] = of_tensor[id(tensor)] = str(len(of_tensor))
        self._tensors = dict(tensors)
        saved = next(iter(tensors.values())) if bare else OrderedDict(tensors)
        pickled = _pickled(saved, of_tensor)
        size = sum(tensors[name].nbytes + _HEADER for name in self._keys) + len(pickled) + _HEADER
        file = locked(self.temporary, path)
        reserve(file, self.temporary, size, path)
        self._file = io.BufferedRandom(file)
        self._zip = zipfile.ZipFile(self._file, "w")
        self._record: Any = None
        facts = {"dldr_ext.kind": kind, "version": version, "metadata": metadata}
        for name, data in (
            (KIND_RECORD, json.dumps(facts).encode()),  # at the start, where it is looked for
            ("data.pkl", pickled),
            ("byteorder", b"little"),
            ("version", b"3\n"),
            *((f"data/{key}", b"") for name, key in self._keys.items() if not tensors[name].nbytes),
        ):
            with self._open(name, len(data)) as record:
                record.write(data)

    def __enter__(self) -> TorchFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, name: str, begin: int, values: Tensor) -> None:
        """Write elements ``begin``, ``begin + 1``, ... of a tensor: from the first to the last."""
        if begin == 0:
            self._finish_record()
            self._record = self._open(f"data/{self._keys[name]}", self._tensors[name].nbytes)
        flat: Any = values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy()
        self._record.write(memoryview(flat))

    def finish(self) -> None:
        """Put the file in its place."""
        self._finish_record()
        self._zip.close()
        self._file.truncate()
        self._file.flush()
        os.fsync(self._file.fileno())
        os.replace(self.temporary, self.path)
        sync_folder(self.path.parent)

    def discard(self) -> None:
        """Remove what was written."""
        with suppress(OSError, ValueError):
            self._finish_record()
            self._zip.close()
        self.temporary.unlink(missing_ok=True)

    def _finish_record(self) -> None:
        if self._record is not None:
            self._record.close()

    def _open(self, name: str, size: int) -> Any:
        """Begin a record whose data begins at a multiple of the alignment."""
        info = zipfile.ZipInfo(_ROOT + name)
        info.file_size = size
        large = size * 1.05 > zipfile.ZIP64_LIMIT
        start = self._zip.start_dir + 30 + len(info.filename) + 20 * large + 4  # of its headers
        padding = -start % _ALIGNMENT
        info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
        return self._zip.open(info, "w", force_zip64=large)


class _Storage(NamedTuple):
    dtype: torch.dtype
    key: str
    nbytes: int


def _pickled(saved: Any, keys: Mapping[int, str]) -> bytes:
    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if not isinstance(value, _Storage):
                return None
            name = _NAMES.get(value.dtype, "Untyped")
            size = value.nbytes if name == "Untyped" else value.nbytes // value.dtype.itemsize
            return ("storage", getattr(torch, f"{name}Storage"), value.key, "cpu", size)

        def reducer_override(self, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return NotImplemented
            storage = _Storage(value.dtype, keys[id(value)], value.nbytes)
            rest: tuple[Any, ...] = (0, tuple(value.shape), value.stride(), False, OrderedDict())
            if value.dtype in _NAMES:
                return torch._utils._rebuild_tensor_v2, (storage, *rest)
            return torch._utils._rebuild_tensor_v3, (storage, *rest, value.dtype)

    buffer = io.BytesIO()
    Pickler(buffer, protocol=2).dump(saved)
    return buffer.getvalue()


_NAMES = {dtype: name for name, dtype in reversed(STORAGES.items()) if name[0] not in "QU"}
