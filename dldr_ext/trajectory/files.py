"""Trajectories in files and folders. What they say of themselves is checked before it is used."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..collectives.partition import ColumnShard, placeholders
from ..collectives.process_group import Ranks
from ..collectives.transaction import all_or_none
from ..files.artifacts import Reader, read_columns
from ..tensors.formats import STORED, wide_dtype
from ..tensors.parameters import check_matches, check_names, dtype_name, numel
from .stores import (
    DiskStore,
    EmptyStore,
    FolderLock,
    MemoryStore,
    ShardedStore,
    Store,
    StoreSpec,
    multiplies_at_once,
    rank_folder,
)
from .stores.disk import HEADER, HEADER_KIND, HEADER_VERSION, RANK_FOLDERS

KIND, VERSION = "trajectory", 1


class Saved(NamedTuple):
    """A trajectory that was saved, and goes on in ``store``."""

    names: list[str] | None
    storage: str
    store: Store


def load(
    path: str | os.PathLike[str],
    params: Sequence[Tensor],
    names: list[str] | None,
    ranks: Ranks | None = None,
    shard: ColumnShard | None = None,
) -> Saved:
    """Read a file, or open a folder to record on; over ranks this rank's columns."""
    if ranks is not None and shard is not None:
        return _load_on_ranks(path, params, names, ranks, shard)
    if os.path.isdir(path):
        names, store = _open_folder(Path(path), params, names)
        return Saved(names, "disk", store)
    with Reader(path, KIND, VERSION) as file:
        saved = matching(file, params, names)
        length = counted(file, "length", 1, saved.capacity)
        spec = StoreSpec(numel(params), saved.capacity, saved.dtype, params[0].device)
        try:
            memory = MemoryStore(spec)
        except RuntimeError as error:
            raise file.error(f"capacity: {saved.capacity} snapshots do not fit: {error}") from error
        anchor = torch.empty(spec.numel, dtype=wide_dtype(spec.dtype), device=spec.device)
        file.read_into("anchor", anchor)
        restored = memory.restore(length, anchor)
        file.read_into("snapshots", restored.rows)
        file.read_into("gram", restored.gram)
        if restored.scale is not None:
            file.read_into("scale", restored.scale)
    return Saved(saved.names, "device", memory)


def _load_on_ranks(
    path: str | os.PathLike[str],
    params: Sequence[Tensor],
    names: list[str] | None,
    ranks: Ranks,
    shard: ColumnShard,
) -> Saved:
    """Read this rank's columns of a file of any number of ranks; or open a folder of as many."""
    if os.path.isdir(path):
        return _open_rank_folders(Path(path), params, names, ranks, shard)
    local: Store | None = None
    with all_or_none(ranks, "load", lambda: 0 if local is None else local.length):
        # One rank checks the checksum of the file for all.
        with Reader(path, KIND, VERSION, check=ranks.rank == 0) as file:
            saved = matching(file, params, names)
            if saved.dtype.itemsize == 1:
                raise file.error(
                    f"expected snapshots of 16 bits or more, found {dtype_name(saved.dtype)}: "
                    "their blocks are not those of this cut; load it on one process"
                )
            length = counted(file, "length", 1, saved.capacity)
            file.check("snapshots", (length, shard.total), saved.dtype)
            file.check("anchor", (shard.total,), wide_dtype(saved.dtype))
            file.check("gram", (length, length), torch.float64)
            device = params[0].device
            rows = read_columns(file, "snapshots", shard.runs, device)
            anchor = read_columns(file, "anchor", shard.runs, device)
            gram = file.read("gram")
        spec = StoreSpec(shard.numel, saved.capacity, saved.dtype, device)
        local = EmptyStore(spec)
        if shard.numel:
            local = MemoryStore(spec)
            local.restore(length, anchor).rows.copy_(rows)
        else:
            local.restore(length)
    store = ShardedStore(ranks, shard, local, at_once=True)
    store.restore_gram(gram)
    return Saved(saved.names, "device", store)


def _open_rank_folders(
    path: Path,
    params: Sequence[Tensor],
    names: list[str] | None,
    ranks: Ranks,
    shard: ColumnShard,
) -> Saved:
    """Go on from the snapshots that all ranks have in their folders."""
    local: DiskStore | None = None

    def close() -> None:
        if local is not None:
            local.close()

    with all_or_none(ranks, "load", lambda: 0, close):
        if not any(path.glob(RANK_FOLDERS)):
            raise ValueError(
                f"path: expected a folder that {ranks.size} ranks recorded to, got {path} without "
                "one for each rank"
            )
        folder = rank_folder(path, ranks)
        if shard.numel:
            shards = placeholders(shard.shapes, params[0].dtype, params[0].device)
            _, local = _open_folder(folder, shards, shard.names)
    metadata: dict[str, Any] = {}
    if local is not None:
        metadata = {
            "capacity": local.capacity,
            "dtype": dtype_name(local.dtype),
            "part": local.metadata.get("part"),
            "numbers": local.numbers,
        }
    with_columns = [entry for entry in ranks.exchange(metadata, "load") if entry]
    with all_or_none(ranks, "load", lambda: 0, close):
        for key in ("capacity", "dtype", "part"):
            values = [entry[key] for entry in with_columns]
            if any(value != values[0] for value in values):
                raise ValueError(f"expected folders of one recording, got {key}: {values}")
    common = set.intersection(*(set(entry["numbers"]) for entry in with_columns))
    kept: Store
    if local is not None:
        numbers = (number for entry in with_columns for number in entry["numbers"])
        local.keep(common, max(numbers, default=-1) + 1)
        kept = local
    else:
        dtype = getattr(torch, with_columns[0]["dtype"])
        spec = StoreSpec(0, with_columns[0]["capacity"], dtype, params[0].device)
        kept = EmptyStore(spec)
        kept.restore(len(common))
    at_once = multiplies_at_once("disk", params[0].device)
    return Saved(names, "disk", ShardedStore(ranks, shard, kept, at_once))


def _open_folder(
    path: Path, params: Sequence[Tensor], names: list[str] | None
) -> tuple[list[str] | None, DiskStore]:
    parts = sorted(path.glob(RANK_FOLDERS))
    if parts and not (path / HEADER).is_file():
        raise ValueError(
            f"path: expected the folder of one process, got {path}, which ranks recorded to "
            f"({parts[0].name}, ...): load it on as many with process_group"
        )
    if not (path / HEADER).is_file():
        raise ValueError(
            f"path: expected a folder that a trajectory was recorded to, got {path} without "
            f"{HEADER}"
        )
    lock = FolderLock(path, reading=True)
    try:
        with Reader(path / HEADER, HEADER_KIND, HEADER_VERSION) as file:
            saved = matching(file, params, names)
            if not isinstance(_field(file, "id"), str):
                raise _wrong(file, "id", "a string", file.metadata["id"])
            if "kept" in file.metadata:
                _check_thinned(file)
            spec = StoreSpec(numel(params), saved.capacity, saved.dtype, params[0].device)
            anchor = torch.empty(spec.numel, dtype=wide_dtype(spec.dtype), device=spec.device)
            file.read_into("anchor", anchor)
            store = DiskStore.resume(lock, spec, file.metadata, anchor)
    except BaseException:
        lock.close()
        raise
    return saved.names, store


class _Description(NamedTuple):
    shapes: list[tuple[int, ...]]
    names: list[str] | None
    dtype: torch.dtype
    capacity: int


def matching(file: Reader, params: Sequence[Tensor], names: list[str] | None) -> _Description:
    """Return the file's description, if it is of these parameters; with their names, if known."""
    saved = _description(file)
    what = f"trajectory {file.path}"
    check_matches(params, saved.shapes, saved.names, what)
    if names is None:
        return saved
    check_names(names, saved.names, what)
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
    capacity = counted(file, "capacity", 1, 1 << 40)
    return _Description([tuple(shape) for shape in shapes], names, dtypes[dtype], capacity)


def _field(file: Reader, name: str) -> Any:
    if name not in file.metadata:
        raise file.error(f"expected the field '{name}', found {sorted(file.metadata)}")
    return file.metadata[name]


def counted(file: Reader, name: str, least: int, most: int) -> int:
    """Return a number in the metadata of a file, from ``least`` to ``most``."""
    value = _field(file, name)
    if type(value) is not int or not least <= value <= most:
        raise _wrong(file, name, f"a number from {least} to {most}", value)
    return value


def _check_thinned(file: Reader) -> None:
    """Check what a header says of the rows that were left when it was written."""
    kept = file.metadata["kept"]
    if not isinstance(kept, list) or not all(type(number) is int for number in kept):
        raise _wrong(file, "kept", "a list of numbers", kept)
    counted(file, "next", 0, 1 << 40)


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)


def _are_names(names: Any, count: int) -> bool:
    return (
        isinstance(names, list)
        and len(names) == count
        and all(isinstance(name, str) for name in names)
    )


def _wrong(file: Reader, name: str, expected: str, value: Any) -> ValueError:
    return file.error(f"{name}: expected {expected}, found {str(value)[:60]!r}")
