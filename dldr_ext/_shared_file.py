"""Files of one process, read and written by several ranks: each has its columns."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ._cut import Run, Share
from ._params import dtype_name
from ._recording import wide_dtype
from ._saved import KIND, VERSION, counted, matching
from .storage import Reader, Stream, save

if TYPE_CHECKING:
    from ._shared_trajectory import SharedTrajectory

__all__ = ["Found", "read_columns", "read_file", "write_file"]

_PIECE = 1 << 22  # columns that ranks put together at a time


class Found(NamedTuple):
    """A trajectory in a file: the columns of a rank, and the Gram matrix of all."""

    names: list[str] | None
    capacity: int
    dtype: torch.dtype
    rows: Tensor
    anchor: Tensor
    gram: Tensor


def read_columns(file: Reader, name: str, runs: Sequence[Run], device: Any) -> Tensor:
    """Some columns of a tensor in a file, one after the other; the others are not read."""
    whole = file.part(name)
    shape, dtype = whole.get_shape(), whole[..., :0].dtype
    out = torch.empty((*shape[:-1], sum(b - a for a, b in runs)), dtype=dtype, device=device)
    at = 0
    for begin, end in runs:
        out[..., at : at + end - begin].copy_(whole[..., begin:end])
        at += end - begin
    return out


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
