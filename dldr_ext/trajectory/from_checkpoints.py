"""A `Trajectory` from checkpoints: recorded row by row, each in pieces."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from .. import ops
from ..checkpoints.errors import CheckpointError
from ..checkpoints.reader import CheckpointReader
from ..checkpoints.series import Series, finite, model_parameters
from ..collectives.process_group import Ranks, members
from ..tensors.formats import empty_scale, scale_of, wide_dtype
from ..tensors.matrices import scaled
from .stores import DiskStore, MemoryStore, Store
from .stores.deferred import DeferredStore
from .stores.disk import HEADER, RANK_FOLDERS

if TYPE_CHECKING:
    from .trajectory import Trajectory
from typing import TYPE_CHECKING

from ..collectives.partition import Share

Progress = Callable[[int, int], None]
_PIECE = 1 << 22  # elements; DiskStore cuts rows at the same places, so that none is kept


def from_checkpoints(
    cls: type[Trajectory],
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    model: nn.Module,
    *,
    dtype: torch.dtype = torch.bfloat16,
    storage: str = "device",
    path: str | os.PathLike[str] | None = None,
    capacity: int | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
    key: str | None = None,
    skip_bad: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    process_group: Any = None,
) -> Trajectory:
    """A trajectory of checkpoints that a run left behind, streamed from their files.

    Parameters
    ----------
    paths : path or iterable of paths
        Files written by ``torch.save`` (loaded with ``weights_only=True``), safetensors files,
        indices of shards; or folders of these, whose numbers are put in order (2 before 10).
    model : nn.Module
        Names the parameters and their order: its trainable ones are recorded. May be on the
        meta device; its weights do not matter and stay as they are.
    dtype, storage, path
        As in the constructor.
    capacity : int, optional
        Default: the number of checkpoints.
    include, exclude : str or sequence of str
        Patterns of names (``encoder.*``) of the parameters to record, and of those not to.
    key : str, optional
        Where the state dict is in a file, nested keys joined by dots. Default: it is found.
    skip_bad : bool
        Go on without checkpoints that cannot be used, with a warning for each.
    resume : bool
        With ``storage="disk"``: go on in the folder that an earlier call with the same checkpoints,
        interrupted, has left; the first and the latest one in it are compared.
    progress : callable, optional
        Called with the bytes read so far and in all (of this rank's columns).
    process_group : ProcessGroup, DeviceMesh, module, "world" or None
        As in the constructor. Each rank reads its own columns of every checkpoint; files that can
        only be loaded whole (compressed ones, those of before torch 1.6) are so by every rank.

    Raises
    ------
    checkpoints.CheckpointError
        A ValueError: missing, truncated, corrupt, not finite, or not of this model: with the
        index of the checkpoint, its path and the tensor.
    """
    options: dict[str, Any] = {"include": include, "exclude": exclude}
    ranks = None if process_group is None else _ranks(process_group, model)
    with nullcontext() if ranks is None else ranks.agreeing():
        params, series = _opened(paths, model, key=key, skip_bad=skip_bad, **options)
        capacity = len(series) if capacity is None else capacity
        if capacity < len(series):
            raise ValueError(
                f"capacity: expected at least {len(series)}, one for each checkpoint, got "
                f"{capacity}"
            )
        if resume and (storage != "disk" or path is None):
            raise ValueError(
                f"resume: expected storage='disk' and a path, got {storage!r}, {path!r}"
            )
        if ranks is not None:
            ranks.agree({"checkpoints": series.indices, "capacity": capacity, "resume": resume})
    # Stand-ins without memory, on the CPU for a model on the meta device.
    named = [(name, p if hasattr(p, "device_mesh") else _stand_in(p)) for name, p in params.items()]
    if resume and path is not None and _holds_one(path, ranks):
        result = cls.load(path, named, process_group=process_group)
    else:
        result = cls(named, capacity, dtype, storage, path, process_group=process_group)
    result.params = list(params.values())
    try:
        with CheckpointReader() as pieces:
            if ranks is not None:
                pass

                record_on_ranks(result, series, pieces, dtype, capacity, skip_bad, progress)
            else:
                if result.anchor is not None:
                    check_same(result, series, pieces, dtype, capacity)
                record(result, series, pieces, skip_bad, progress)
    except BaseException:
        result.close()
        raise
    for error in series.skipped:
        warnings.warn(f"left out {error}", UserWarning, stacklevel=3)
    return result


def _opened(
    paths: Any,
    model: nn.Module,
    *,
    include: str | Sequence[str],
    exclude: str | Sequence[str],
    key: str | None,
    skip_bad: bool,
) -> tuple[dict[str, Tensor], Series]:
    include = [include] if isinstance(include, str) else include
    exclude = [exclude] if isinstance(exclude, str) else exclude
    params = model_parameters(model, include, exclude)
    if any(hasattr(p, "device_mesh") and p.device.type == "meta" for p in params.values()):
        raise ValueError("model: expected DTensors with memory, got some on the meta device")
    return params, Series(
        paths, model, include=include, exclude=exclude, key=key, skip_bad=skip_bad
    )


class Rows(Protocol):
    """What is read of a series: all columns, or those of a rank."""

    numel: int

    def __len__(self) -> int: ...
    def row_bytes(self, t: int) -> int: ...
    def read(self, reader: CheckpointReader, t: int, begin: int, out: Tensor) -> None: ...
    def error(self, t: int, problem: str) -> CheckpointError: ...
    def drop(self, error: CheckpointError) -> None: ...


class _Row:
    """One checkpoint as the parts of its flat vector, each valid until the next one."""

    def __init__(self, series: Rows, pieces: CheckpointReader, t: int, buffer: Tensor) -> None:
        self.series, self.t = series, t
        self._pieces, self._buffer = pieces, buffer

    def __iter__(self) -> Iterator[Tensor]:
        return (part for _, part in self.parts())

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        for begin in range(0, self.series.numel, _PIECE):
            columns = slice(begin, min(begin + _PIECE, self.series.numel))
            part = self._buffer[: columns.stop - begin]
            self.series.read(self._pieces, self.t, begin, part)
            yield columns, part


def record(
    trajectory: Trajectory,
    series: Rows,
    pieces: CheckpointReader,
    skip_bad: bool,
    progress: Progress | None,
    settle: Callable[[Exception | None, int], Exception | None] | None = None,
) -> None:
    """Stores the checkpoints after those that the trajectory has.

    ``settle`` makes an error of one rank that of all, and None that of none.
    """
    store = trajectory._store
    if isinstance(store, DeferredStore):
        store.block = trajectory.capacity  # one pass over all rows, at the end
    anchor, is_new = trajectory.anchor, trajectory.anchor is None
    if anchor is None:
        wide = wide_dtype(trajectory.dtype)
        anchor = torch.empty(series.numel, dtype=wide, device=trajectory.device)
    t = len(trajectory)
    read = sum(map(series.row_bytes, range(t)))
    buffer = _buffer(series, anchor)
    while t < len(series):
        row, own = _Row(series, pieces, t, buffer), None
        try:
            if t == 0 and is_new:
                for columns, part in row.parts():
                    anchor[columns] = part.to(anchor.device)
            if not _append(store, row, anchor, t):
                raise series.error(t, f"a difference from the first one overflows {store.dtype}")
        except Exception as error:
            own = error
        failed = own if settle is None else settle(own, t)
        if failed is not None:
            if own is None:
                _take_back(store)
            if not skip_bad or not isinstance(failed, CheckpointError):
                raise failed
            series.drop(failed)
            continue
        read += series.row_bytes(t)
        t += 1
        if progress is not None:
            progress(read, read + sum(map(series.row_bytes, range(t, len(series)))))
    if isinstance(store, MemoryStore):
        rows, scale, gram = store.restore(t)
        products = torch.empty((t, t), dtype=gram.dtype, device=gram.device)
        ops.gram_block_(rows, products, 0, t, scale=scale)
        gram.copy_(products)
    trajectory._anchor = anchor


def check_same(
    trajectory: Trajectory,
    series: Rows,
    pieces: CheckpointReader,
    dtype: torch.dtype,
    capacity: int,
) -> None:
    """That a folder was recorded from these checkpoints, as far as it goes."""
    anchor, last = trajectory.anchor, len(trajectory) - 1
    assert anchor is not None
    same = trajectory.dtype == dtype and trajectory.capacity == capacity and last < len(series)
    for t in {0, max(last, 0)} if same else ():
        for columns, part in _Row(series, pieces, t, _buffer(series, anchor)).parts():
            there = part.to(anchor.device)
            if t == 0:
                same = same and torch.equal(there, anchor[columns])
            if t == last:
                row = torch.empty((1, len(part)), dtype=dtype, device=anchor.device)
                scale = empty_scale(1, len(part), dtype, anchor.device)
                ops.store_snapshot_(row, 0, [there], anchor[columns], scale=scale)
                stored = trajectory.snapshots[t : t + 1, columns]
                same = same and torch.equal(scaled(row, scale)[:], stored)
    if not same:
        raise ValueError(
            f"path: expected the folder of a trajectory of {dtype}, capacity {capacity}, of these "
            f"checkpoints in this order, got {trajectory} of others"
        )


def _take_back(store: Store) -> None:
    if isinstance(store, MemoryStore):
        store.restore(len(store.snapshots()) - 1)
    else:
        store.undo()


def _buffer(series: Rows, anchor: Tensor) -> Tensor:
    return torch.empty(min(_PIECE, series.numel), dtype=anchor.dtype, device="cpu")


def _append(store: Store, row: _Row, anchor: Tensor, t: int) -> bool:
    """Stores one row; False if a difference does not fit."""
    if isinstance(store, DiskStore):
        lazily: Any = row
        return store.append(lazily, anchor)
    if isinstance(store, MemoryStore):
        restored = store.restore(t + 1)
        for columns, part in row.parts():
            target = restored.rows[t:, columns]
            scale = scale_of(restored.scale, columns.start, columns.stop, t)
            ops.store_snapshot_(target, 0, [part.to(anchor.device)], anchor[columns], scale=scale)
            # Numbers of 8 bits are; their scale is not if what they stand for is not.
            if not finite(target if scale is None else scale):
                store.restore(t)
                return False
        return True
    whole = torch.empty_like(anchor)  # on its way to the host
    for columns, part in row.parts():
        whole[columns] = part.to(anchor.device)
    return store.append([whole], anchor)


def _ranks(process_group: Any, model: nn.Module) -> Ranks:
    group, _ = members("Trajectory", process_group)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return Ranks("Trajectory", group, torch.device("cpu") if device.type == "meta" else device)


def _holds_one(path: str | os.PathLike[str], ranks: Ranks | None) -> bool:
    """Whether a folder has a trajectory, on any rank, to go on with."""
    if ranks is None:
        return (Path(path) / HEADER).exists()
    return bool(ranks.most(any(Path(path).glob(f"{RANK_FOLDERS}/{HEADER}"))))


def _stand_in(p: Tensor) -> Tensor:
    device = "cpu" if p.device.type == "meta" else p.device
    return torch.empty((), dtype=p.dtype, device=device).expand(p.shape)


class _Own:
    """The columns of a series that a rank keeps; as `Series` has them all."""

    def __init__(self, series: Series, share: Share) -> None:
        self._series, self._share = series, share
        self.numel = share.numel
        self.error, self.drop = series.error, series.drop

    def __len__(self) -> int:
        return len(self._series)

    def row_bytes(self, t: int) -> int:
        return self._series.row_bytes(t) * self.numel // self._share.total

    def read(self, reader: CheckpointReader, t: int, begin: int, out: Tensor) -> None:
        for place, (first, _) in self._share.stretches(begin, begin + len(out)):
            self._series.read(reader, t, first, out[place])


def record_on_ranks(
    result: Any,
    series: Series,
    pieces: CheckpointReader,
    dtype: torch.dtype,
    capacity: int,
    skip_bad: bool,
    progress: Progress | None,
) -> None:
    """`record` on every rank; a checkpoint that one of them cannot use counts on none."""
    from .stores.sharded import SharedTrajectory

    assert isinstance(result, SharedTrajectory)
    ranks, own = result.ranks, _Own(series, result.share)
    local = result.local

    def settle(error: Exception | None, t: int) -> Exception | None:
        if not ranks.most(error is not None):
            return None
        claims: dict[str, Any] = {}
        if error is not None:
            problem = error.problem if isinstance(error, CheckpointError) else str(error)
            claims = {"problem": problem, "bad": isinstance(error, CheckpointError)}
        for rank, one in enumerate(ranks.exchange(claims, "from_checkpoints")):
            if one and one["bad"]:
                return series.error(t, one["problem"])
            if one:
                return OSError(f"from_checkpoints: rank {rank}: {one['problem']}")
        return error

    with result.all_or_none("from_checkpoints"):
        if result.anchor is not None:
            check_same(local, own, pieces, dtype, capacity)
    record(local, own, pieces, skip_bad, progress, settle)
    result.take_over()
