"""Trajectories in files and folders. What they say of themselves is checked before it is used."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._eight_bits import STORED
from ._params import check_matches, dtype_name, named_parameters, numel
from ._recording import wide_dtype
from ._stored_rows import Matrix, StoredRows, as_stored
from .storage import Reader, Stream, save
from .stores import DiskStore, FolderLock, MemoryStore, Store
from .stores.disk import HEADER, HEADER_KIND, HEADER_VERSION

_KIND, _VERSION = "trajectory", 1


class Loaded(NamedTuple):
    """A trajectory that goes on."""

    params: list[Tensor]
    names: list[str] | None
    dtype: torch.dtype
    capacity: int
    storage: str
    anchor: Tensor
    store: Store


def save_trajectory(
    path: str | os.PathLike[str],
    metadata: Mapping[str, Any],
    snapshots: Matrix,
    gram: Tensor,
    anchor: Tensor,
) -> None:
    """Writes one file; stored rows are streamed."""
    rows, scale = as_stored(snapshots)
    tensors = {"snapshots": _streamed(rows), "gram": gram, "anchor": anchor}
    if scale is not None:
        tensors["scale"] = _streamed(scale)
    save(path, _KIND, _VERSION, tensors, {**metadata, "length": len(snapshots)})


def load_trajectory(path: str | os.PathLike[str], params: Iterable[Any]) -> Loaded:
    """Reads a file, or opens a folder to record on."""
    listed, names = named_parameters(params)
    if os.path.isdir(path):
        return _load_folder(Path(path), listed, names)
    with Reader(path, _KIND, _VERSION) as file:
        saved = _matching(file, listed, names)
        length = _count(file, "length", 1, saved.capacity)
        size, device = numel(listed), listed[0].device
        try:
            store = MemoryStore(size, saved.capacity, saved.dtype, device)
        except RuntimeError as error:
            raise file.error(f"capacity: {saved.capacity} snapshots do not fit: {error}") from error
        anchor = torch.empty(size, dtype=wide_dtype(saved.dtype), device=device)
        restored = store.restore(length)
        file.read_into("anchor", anchor)
        file.read_into("snapshots", restored.rows)
        file.read_into("gram", restored.gram)
        if restored.scale is not None:
            file.read_into("scale", restored.scale)
    return Loaded(listed, saved.names, saved.dtype, saved.capacity, "device", anchor, store)


def _streamed(rows: Tensor | StoredRows) -> Tensor | Stream:
    return rows if isinstance(rows, Tensor) else Stream(rows.dtype, rows.shape, iter(rows))


def _load_folder(path: Path, params: list[Tensor], names: list[str] | None) -> Loaded:
    if not (path / HEADER).is_file():
        raise ValueError(
            f"path: expected a folder that a trajectory was recorded to, got {path} without "
            f"{HEADER}"
        )
    lock = FolderLock(path)
    try:
        with Reader(path / HEADER, HEADER_KIND, HEADER_VERSION) as file:
            saved = _matching(file, params, names)
            if not isinstance(_field(file, "id"), str):
                raise _wrong(file, "id", "a string", file.metadata["id"])
            size, device = numel(params), params[0].device
            anchor = torch.empty(size, dtype=wide_dtype(saved.dtype), device=device)
            file.read_into("anchor", anchor)
            sizes = size, saved.capacity, saved.dtype, device
            store = DiskStore.resume(lock, *sizes, file.metadata)
    except BaseException:
        lock.close()
        raise
    return Loaded(params, saved.names, saved.dtype, saved.capacity, "disk", anchor, store)


class _Description(NamedTuple):
    shapes: list[tuple[int, ...]]
    names: list[str] | None
    dtype: torch.dtype
    capacity: int


def _matching(file: Reader, params: Sequence[Tensor], names: list[str] | None) -> _Description:
    """What the file says, if it is of these parameters; with their names, if they have some."""
    saved = _description(file)
    what = f"trajectory {file.path}"
    check_matches(params, saved.shapes, saved.names, what)
    if names is None:
        return saved
    for i, (name, expected) in enumerate(zip(names, saved.names or names, strict=True)):
        if name != expected:
            raise ValueError(
                f"params[{i}]: expected the name {expected}, as in the {what}, got {name}"
            )
    return saved._replace(names=names)


def _description(file: Reader) -> _Description:
    dtypes = {dtype_name(dtype): dtype for dtype in STORED}
    shapes, names, dtype = (_field(file, name) for name in ("shapes", "names", "dtype"))
    if not isinstance(shapes, list) or not all(map(_is_shape, shapes)):
        raise _wrong(file, "shapes", "a list of shapes", shapes)
    if names is not None and not _are_names(names, len(shapes)):
        raise _wrong(file, "names", f"{len(shapes)} names", names)
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise _wrong(file, "dtype", f"one of {', '.join(dtypes)}", dtype)
    capacity = _count(file, "capacity", 1, 1 << 40)
    return _Description([tuple(shape) for shape in shapes], names, dtypes[dtype], capacity)


def _field(file: Reader, name: str) -> Any:
    if name not in file.metadata:
        raise file.error(f"expected the field '{name}', found {sorted(file.metadata)}")
    return file.metadata[name]


def _count(file: Reader, name: str, least: int, most: int) -> int:
    value = _field(file, name)
    if type(value) is not int or not least <= value <= most:
        raise _wrong(file, name, f"a number from {least} to {most}", value)
    return value


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)


def _are_names(names: Any, count: int) -> bool:
    return (
        isinstance(names, list)
        and len(names) == count
        and all(isinstance(name, str) for name in names)
    )


def _wrong(file: Reader, name: str, expected: str, found: Any) -> ValueError:
    return file.error(f"{name}: expected {expected}, found {str(found)[:60]!r}")
