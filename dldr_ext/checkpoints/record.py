"""A `Trajectory` from checkpoints: recorded tensor by tensor, piece by piece."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import ops
from .errors import CheckpointError
from .pieces import Pieces
from .series import Series, model_parameters

if TYPE_CHECKING:
    from ..trajectory import Trajectory

Progress = Callable[[int, int], None]
_PIECE = 1 << 22  # elements


def from_checkpoints(
    cls: type[Trajectory],
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    model: nn.Module,
    *,
    include: str | Sequence[str],
    exclude: str | Sequence[str],
    key: str | None,
    skip_bad: bool,
    progress: Progress | None,
    capacity: int | None,
    **options: Any,
) -> Trajectory:
    """See `Trajectory.from_checkpoints`."""
    series = Series(paths, model, include=include, exclude=exclude, key=key, skip_bad=skip_bad)
    include = [include] if isinstance(include, str) else include
    exclude = [exclude] if isinstance(exclude, str) else exclude
    params = model_parameters(model, include, exclude)
    # Stand-ins without memory, on the CPU for a model on the meta device.
    result = cls(
        [(name, _stand_in(p)) for name, p in params.items()],
        len(series) if capacity is None else capacity,
        **options,
    )
    if result.capacity < len(series):
        raise ValueError(
            f"capacity: expected at least {len(series)}, one for each checkpoint, got "
            f"{result.capacity}"
        )
    result.params = list(params.values())
    with Pieces() as pieces:
        _record(result, series, pieces, skip_bad, progress)
    for error in series.skipped:
        warnings.warn(f"left out {error}", UserWarning, stacklevel=3)
    return result


def _record(
    trajectory: Trajectory,
    series: Series,
    pieces: Pieces,
    skip_bad: bool,
    progress: Progress | None,
) -> None:
    device = trajectory.device
    anchor = torch.empty(series.numel, dtype=trajectory._wide(), device=device)
    buffer = torch.empty(min(_PIECE, series.numel), dtype=anchor.dtype, device="cpu")
    rows, total, done, t = trajectory._snapshots, series.row_bytes(), 0, 0
    each = total // len(series)
    while t < len(series):
        try:
            for begin in range(0, series.numel, _PIECE):
                piece = buffer[: min(_PIECE, series.numel - begin)]
                series.read(pieces, t, begin, piece)
                columns = slice(begin, begin + len(piece))
                if t == 0:
                    anchor[columns].copy_(piece)
                row = rows[t : t + 1, columns]
                ops.store_snapshot_(row, 0, [piece.to(device)], anchor[columns])
                if not bool(row.isfinite().all()):
                    raise series.error(t, f"a difference overflows {trajectory.dtype}")
                if progress is not None:
                    progress(done + each * columns.stop // series.numel, total)
        except CheckpointError as error:
            if not skip_bad or len(series) == 1:
                raise
            series.drop(t, error)
            total -= each
            continue
        done += each
        t += 1
    ops.gram_block_(rows, trajectory._gram, 0, t)
    trajectory._anchor, trajectory._length = anchor, t


def _stand_in(p: Tensor) -> Tensor:
    device = "cpu" if p.device.type == "meta" else p.device
    return torch.empty((), dtype=p.dtype, device=device).expand(p.shape)
