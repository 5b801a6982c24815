"""A `Trajectory` from checkpoints: recorded row by row, each in pieces."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops
from .._eight_bits import empty_scale, scale_of
from .._recording import wide_dtype
from .._stored_rows import scaled
from ..stores import DiskStore, MemoryStore, Store
from ..stores.deferred import DeferredStore
from ..stores.disk import HEADER
from .errors import CheckpointError
from .pieces import Pieces
from .series import Series, finite, model_parameters

if TYPE_CHECKING:
    from ..trajectory import Trajectory

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
        Called with the bytes read so far and in all.

    Raises
    ------
    checkpoints.CheckpointError
        A ValueError: missing, truncated, corrupt, not finite, or not of this model: with the
        index of the checkpoint, its path and the tensor.
    """
    include = [include] if isinstance(include, str) else include
    exclude = [exclude] if isinstance(exclude, str) else exclude
    params = model_parameters(model, include, exclude)
    series = Series(paths, model, include=include, exclude=exclude, key=key, skip_bad=skip_bad)
    capacity = len(series) if capacity is None else capacity
    if capacity < len(series):
        raise ValueError(
            f"capacity: expected at least {len(series)}, one for each checkpoint, got {capacity}"
        )
    # Stand-ins without memory, on the CPU for a model on the meta device.
    named = [(name, _stand_in(p)) for name, p in params.items()]
    if not resume:
        result = cls(named, capacity, dtype, storage, path)
    elif storage != "disk" or path is None:
        raise ValueError(f"resume: expected storage='disk' and a path, got {storage!r}, {path!r}")
    elif (Path(path) / HEADER).exists():
        result = cls.load(path, named)
    else:
        result = cls(named, capacity, dtype, storage, path)
    result.params = list(params.values())
    try:
        with Pieces() as pieces:
            if result.anchor is not None:
                _check_same(result, series, pieces, dtype, capacity)
            _record(result, series, pieces, skip_bad, progress)
    except BaseException:
        result.close()
        raise
    for error in series.skipped:
        warnings.warn(f"left out {error}", UserWarning, stacklevel=3)
    return result


class _Row:
    """One checkpoint as the parts of its flat vector, each valid until the next one."""

    def __init__(self, series: Series, pieces: Pieces, t: int, buffer: Tensor) -> None:
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


def _record(
    trajectory: Trajectory,
    series: Series,
    pieces: Pieces,
    skip_bad: bool,
    progress: Progress | None,
) -> None:
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
        row = _Row(series, pieces, t, buffer)
        try:
            if t == 0 and is_new:
                for columns, part in row.parts():
                    anchor[columns] = part.to(anchor.device)
            if not _append(store, row, anchor, t):
                raise series.error(t, f"a difference from the first one overflows {store.dtype}")
        except CheckpointError as error:
            if not skip_bad:
                raise
            series.drop(error)
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


def _check_same(
    trajectory: Trajectory, series: Series, pieces: Pieces, dtype: torch.dtype, capacity: int
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


def _buffer(series: Series, anchor: Tensor) -> Tensor:
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


def _stand_in(p: Tensor) -> Tensor:
    device = "cpu" if p.device.type == "meta" else p.device
    return torch.empty((), dtype=p.dtype, device=device).expand(p.shape)
