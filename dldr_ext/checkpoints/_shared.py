"""Checkpoints read by several ranks, each its columns of every one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._cut import Share
from .._shared_trajectory import SharedTrajectory
from .errors import CheckpointError
from .pieces import Pieces
from .record import check_same, record
from .series import Series

if TYPE_CHECKING:
    from .record import Progress


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

    def read(self, pieces: Pieces, t: int, begin: int, out: Tensor) -> None:
        for place, (first, _) in self._share.stretches(begin, begin + len(out)):
            self._series.read(pieces, t, first, out[place])


def record_on_ranks(
    result: Any,
    series: Series,
    pieces: Pieces,
    dtype: torch.dtype,
    capacity: int,
    skip_bad: bool,
    progress: Progress | None,
) -> None:
    """`record` on every rank; a checkpoint that one of them cannot use counts on none."""
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
