"""Trajectories in files and folders. What they say of themselves is checked before it is used."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..collectives.partition import Share
from ..files.artifacts import Reader, Stream, read_columns, save
from ..tensors.formats import STORED, wide_dtype
from ..tensors.matrices import Matrix, StoredRows, as_stored
from ..tensors.parameters import check_matches, dtype_name, named_parameters, numel
from .stores import DiskStore, FolderLock, MemoryStore, Store
from .stores.disk import HEADER, HEADER_KIND, HEADER_VERSION

if TYPE_CHECKING:
    from .stores.sharded import SharedTrajectory
from typing import TYPE_CHECKING

from .stores.disk import RANK_FOLDERS

KIND, VERSION = "trajectory", 1


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
    save(path, KIND, VERSION, tensors, {**metadata, "length": len(snapshots)})


def load_trajectory(path: str | os.PathLike[str], params: Iterable[Any]) -> Loaded:
    """Reads a file, or opens a folder to record on."""
    listed, names = named_parameters(params)
    if os.path.isdir(path):
        return _load_folder(Path(path), listed, names)
    with Reader(path, KIND, VERSION) as file:
        saved = matching(file, listed, names)
        length = counted(file, "length", 1, saved.capacity)
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
    lock = FolderLock(path)
    try:
        with Reader(path / HEADER, HEADER_KIND, HEADER_VERSION) as file:
            saved = matching(file, params, names)
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


def matching(file: Reader, params: Sequence[Tensor], names: list[str] | None) -> _Description:
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
    capacity = counted(file, "capacity", 1, 1 << 40)
    return _Description([tuple(shape) for shape in shapes], names, dtypes[dtype], capacity)


def _field(file: Reader, name: str) -> Any:
    if name not in file.metadata:
        raise file.error(f"expected the field '{name}', found {sorted(file.metadata)}")
    return file.metadata[name]


def counted(file: Reader, name: str, least: int, most: int) -> int:
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


_PIECE = 1 << 22  # columns that ranks put together at a time


class Found(NamedTuple):
    """A trajectory in a file: the columns of a rank, and the Gram matrix of all."""

    names: list[str] | None
    capacity: int
    dtype: torch.dtype
    rows: Tensor
    anchor: Tensor
    gram: Tensor


def read_file(
    path: str | os.PathLike[str],
    params: Sequence[Tensor],
    names: list[str] | None,
    share: Share,
    check: bool,
) -> Found:
    """This rank's columns of a saved trajectory; one rank checks the checksum of the file."""
    with Reader(path, KIND, VERSION, check=check) as file:
        saved = matching(file, params, names)
        if saved.dtype.itemsize == 1:
            raise file.error(
                f"expected snapshots of 16 bits or more, found {dtype_name(saved.dtype)}: their "
                "blocks are not those of this cut; load it on one process"
            )
        length = counted(file, "length", 1, saved.capacity)
        file.check("snapshots", (length, share.total), saved.dtype)
        file.check("anchor", (share.total,), wide_dtype(saved.dtype))
        file.check("gram", (length, length), torch.float64)
        device = params[0].device
        rows = read_columns(file, "snapshots", share.runs, device)
        anchor = read_columns(file, "anchor", share.runs, device)
        gram = file.read("gram")
    return Found(saved.names, saved.capacity, saved.dtype, rows, anchor, gram)


def write_file(path: str | os.PathLike[str], trajectory: SharedTrajectory, gram: Tensor) -> None:
    """Rank 0 writes what all ranks put together. All take part to the end, errors or not."""
    anchor, rows = trajectory.anchor, trajectory.snapshots
    assert anchor is not None
    share, first = trajectory.share, trajectory.ranks.rank == 0
    pieces = _whole_rows(rows, share, trajectory), _whole_rows([anchor], share, trajectory)
    size = share.total
    tensors: dict[str, Tensor | Stream] = {
        "snapshots": Stream(rows.dtype, (len(rows), size), pieces[0]),
        "gram": gram,
        "anchor": Stream(anchor.dtype, (size,), pieces[1]),
    }
    try:
        if first:
            save(path, KIND, VERSION, tensors, {**trajectory._metadata(), "length": len(rows)})
    finally:
        for rest in pieces:
            for _ in rest:
                pass


def _whole_rows(rows: Any, share: Share, trajectory: SharedTrajectory) -> Iterator[Tensor]:
    """Pieces of the rows of all columns; on rank 0 alone with all their numbers."""
    for t in range(len(rows)):
        for begin in range(0, share.total, _PIECE):
            end = min(begin + _PIECE, share.total)
            own: Tensor = rows[t]
            piece = own.new_zeros(end - begin)
            for local, (low, high) in share.within(begin, end):
                piece[low - begin : high - begin] = own[local]
            # As bytes, of which all ranks but those that keep the column have zeros.
            dist.reduce(
                piece.view(torch.uint8), group_dst=0, op=dist.ReduceOp.MAX,
                group=trajectory.ranks.group,
            )  # fmt: skip
            yield piece


def open_file(trajectory: SharedTrajectory, path: str | os.PathLike[str]) -> None:
    """Goes on from a file, of which each rank reads its columns."""
    from .stores.sharded import NoColumns

    self, first = trajectory, trajectory.ranks.rank == 0
    with self.all_or_none("load"):
        found = read_file(path, self.params, self.names, self.share, check=first)
        self.names, self.storage = found.names, "device"
        self.capacity, self.dtype = found.capacity, found.dtype
        inner = self.piece(None, found.anchor, {})
        store = NoColumns(self) if inner is None else inner._store
        if isinstance(store, MemoryStore):
            store.restore(len(found.gram))[0].copy_(found.rows)
        store.length = len(found.gram)
        self.take(inner, store, found.anchor)
        self.take_gram(found.gram)


def open_folder(trajectory: SharedTrajectory, path: str | os.PathLike[str]) -> None:
    """Goes on from the snapshots that all ranks have in their folders."""
    from .stores.sharded import NoColumns, Piece, rank_folder

    self = trajectory
    inner: Piece | None = None
    with self.all_or_none("load", self.close):
        if not any(Path(path).glob(RANK_FOLDERS)):
            raise ValueError(
                f"path: expected a folder that {self.ranks.size} ranks recorded to, got {path} "
                "without one for each rank"
            )
        folder = rank_folder(path, self.ranks)
        if self.share.numel:
            inner = Piece.opened(folder, self.own_params())
            self.take(inner, NoColumns(self), None)
    claims: dict[str, Any] = {}
    if inner is not None:
        claims = {
            "capacity": inner.capacity,
            "dtype": dtype_name(inner.dtype),
            "part": inner.disk.metadata.get("part"),
            "numbers": inner.disk.numbers,
        }
    found = _told(self, claims, ("capacity", "dtype", "part"), "folders of one recording")
    common = set.intersection(*(set(one["numbers"]) for one in found))
    self.storage = "disk"
    if inner is None:
        self.take_nothing(len(common))
        return
    after = max((number + 1 for one in found for number in one["numbers"]), default=0)
    inner.disk.keep(common, after)
    self.take(inner, inner.disk, inner._anchor)


def _told(
    self: SharedTrajectory, claims: dict[str, Any], keys: Sequence[str], expected: str
) -> list[dict[str, Any]]:
    """What the ranks with columns say, of which the keys are the same."""
    found = [one for one in self.ranks.exchange(claims, "load") if one]
    with self.all_or_none("load", self.close):
        for key in keys:
            if any(one[key] != found[0][key] for one in found):
                raise ValueError(f"expected {expected}, got {key}: {[one[key] for one in found]}")
    self.capacity = found[0]["capacity"]
    self.dtype = getattr(torch, found[0]["dtype"])
    return found
