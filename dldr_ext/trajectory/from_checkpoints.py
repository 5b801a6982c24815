"""Recording from checkpoint files: row by row, each in pieces."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..checkpoints.errors import CheckpointError
from ..checkpoints.layouts import model_parameters
from ..checkpoints.reader import CheckpointReader
from ..checkpoints.series import Series
from ..collectives.process_group import Ranks, resolve_group
from ..collectives.transaction import RankErrors
from ..tensors.formats import empty_scale, wide_dtype
from ..tensors.matrices import scaled
from ..tensors.parameters import is_dtensor
from .stores import Store
from .stores.base import PIECE
from .stores.disk import HEADER, RANK_FOLDERS

#: Called with the bytes read so far and in all.
Progress = Callable[[int, int], None]


def ranks_of_model(process_group: Any, model: nn.Module) -> Ranks:
    """Return the ranks that record the checkpoints of a model together."""
    group, _ = resolve_group("Trajectory", process_group)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return Ranks("Trajectory", group, torch.device("cpu") if device.type == "meta" else device)


def was_recorded_to(path: str | os.PathLike[str], ranks: Ranks | None) -> bool:
    """Return whether a folder has a trajectory, on any rank, to go on with."""
    if ranks is None:
        return (Path(path) / HEADER).exists()
    return bool(ranks.maximum(any(Path(path).glob(f"{RANK_FOLDERS}/{HEADER}"))))


def placeholder(p: Tensor) -> Tensor:
    """Return a tensor of the same shape without memory, on the CPU for one on the meta device."""
    if is_dtensor(p):
        return p
    device = "cpu" if p.device.type == "meta" else p.device
    return torch.empty((), dtype=p.dtype, device=device).expand(p.shape)


def open_series(
    paths: Any,
    model: nn.Module,
    include: str | Sequence[str],
    exclude: str | Sequence[str],
    key: str | None,
    skip_bad: bool,
) -> tuple[dict[str, Tensor], Series]:
    """Return the parameters to record, by name, and the checkpoints that have them."""
    series = Series(paths, model, include=include, exclude=exclude, key=key, skip_bad=skip_bad)
    params = model_parameters(model, series.include, series.exclude)
    if any(is_dtensor(p) and p.device.type == "meta" for p in params.values()):
        raise ValueError("model: expected DTensors with memory, got some on the meta device")
    return params, series


def checked_options(
    series: Series,
    capacity: int | None,
    resume: bool,
    storage: str,
    path: str | os.PathLike[str] | None,
    ranks: Ranks | None,
) -> int:
    """Return the capacity, if all checkpoints fit and the ranks agree."""
    capacity = len(series) if capacity is None else capacity
    if capacity < len(series):
        raise ValueError(
            f"capacity: expected at least {len(series)}, one for each checkpoint, got {capacity}"
        )
    if resume and (storage != "disk" or path is None):
        raise ValueError(f"resume: expected storage='disk' and a path, got {storage!r}, {path!r}")
    if ranks is not None:
        facts = {"checkpoints": series.indices, "capacity": capacity, "resume": resume}
        ranks.check_consistent(facts)
    return capacity


class CheckpointRow:
    """The columns of one checkpoint that a store keeps, in pieces: each valid until the next.

    Whether their numbers are finite the store finds out, which looks at its own row anyway.
    """

    def __init__(
        self, series: Series, reader: CheckpointReader, t: int, store: Store, buffer: Tensor
    ) -> None:
        self._series, self._reader, self._t = series, reader, t
        self._store, self._buffer = store, buffer

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        return self._pieces(self._series.fill)

    def check_finite(self) -> None:
        """Read the row once more, and raise an error that names a tensor that is not finite."""
        for _ in self._pieces(self._series.read):
            pass

    def _pieces(
        self, read: Callable[[CheckpointReader, int, int, Tensor], None]
    ) -> Iterator[tuple[slice, Tensor]]:
        for begin in range(0, self._store.numel, PIECE):
            end = min(begin + PIECE, self._store.numel)
            piece = self._buffer[: end - begin]
            for place, (first, _) in self._store.column_runs(begin, end):
                read(self._reader, self._t, first, piece[place])
            yield slice(begin, end), piece
        self._series.check_unchanged([self._t])


class _CheckpointErrors(RankErrors):
    """A checkpoint that one rank cannot use is an error of that checkpoint on all of them."""

    def __init__(self, series: Series, t: int) -> None:
        self._series, self._t = series, t

    def told(self, error: Exception) -> dict[str, Any]:
        if isinstance(error, CheckpointError):
            return {"error": error.problem, "checkpoint": True}
        return {"error": str(error), "checkpoint": False}

    def raised(self, call: str, rank: int, details: dict[str, Any]) -> Exception:
        if details["checkpoint"]:
            return self._series.error(self._t, details["error"])
        return OSError(f"from_checkpoints: rank {rank}: {details['error']}")


def record_checked(
    store: Store,
    series: Series,
    skip_bad: bool,
    progress: Progress | None,
    dtype: torch.dtype,
    capacity: int,
    trajectory: object,
) -> None:
    """Store the checkpoints after those that the store has: see `_check_recorded`."""
    with CheckpointReader() as reader:
        if store.length:
            with store.transaction("from_checkpoints"):
                _check_recorded(store, series, reader, dtype, capacity, trajectory)
        _record_series(store, series, reader, skip_bad, progress)


def _record_series(
    store: Store,
    series: Series,
    reader: CheckpointReader,
    skip_bad: bool,
    progress: Progress | None,
) -> None:
    """Store the checkpoints after those that the store has."""
    store.defer_products()
    t = store.length
    read = sum(_row_bytes(store, series, i) for i in range(t))
    buffer = _buffer(store)
    while t < len(series):
        row = CheckpointRow(series, reader, t, store, buffer)
        try:
            with store.transaction("from_checkpoints", errors=_CheckpointErrors(series, t)):
                if not store.append_pieces(row):
                    row.check_finite()
                    problem = f"a difference from the first one overflows {store.dtype}"
                    raise series.error(t, problem)
        except CheckpointError as error:
            if not skip_bad:
                raise
            series.drop(error)
            continue
        read += _row_bytes(store, series, t)
        t += 1
        if progress is not None:
            left = sum(_row_bytes(store, series, i) for i in range(t, len(series)))
            progress(read, read + left)
    store.settle()


def _check_recorded(
    store: Store,
    series: Series,
    reader: CheckpointReader,
    dtype: torch.dtype,
    capacity: int,
    trajectory: object,
) -> None:
    """Check that a store was recorded from these checkpoints, as far as it goes.

    Parameters
    ----------
    dtype, capacity
        What is asked for.
    trajectory
        For the message.
    """
    anchor, last = store.anchor, store.length - 1
    assert anchor is not None
    same = store.dtype == dtype and store.capacity == capacity and last < len(series)
    buffer = _buffer(store)
    for t in {0, max(last, 0)} if same else ():
        for columns, piece in CheckpointRow(series, reader, t, store, buffer):
            weights = piece.to(anchor.device)
            if t == 0:
                same = same and torch.equal(weights, anchor[columns])
            if t == last:
                row = torch.empty((1, len(piece)), dtype=dtype, device=anchor.device)
                scale = empty_scale(1, len(piece), dtype, anchor.device)
                ops.store_snapshot_(row, 0, [weights], anchor[columns], scale=scale)
                stored = store.snapshots()[t : t + 1, columns]
                same = same and torch.equal(scaled(row, scale)[:], stored)
    if not same:
        raise ValueError(
            f"path: expected the folder of a trajectory of {dtype}, capacity {capacity}, of these "
            f"checkpoints in this order, got {trajectory} of others"
        )


def _row_bytes(store: Store, series: Series, t: int) -> int:
    """Return the bytes of one checkpoint in the columns that are kept here."""
    return series.row_bytes(t) * store.numel // series.numel


def _buffer(store: Store) -> Tensor:
    size = min(PIECE, store.numel)
    return torch.empty(size, dtype=wide_dtype(store.dtype), device="cpu")
