"""Partitions of the columns of a flat vector of n weights over ranks."""

from __future__ import annotations

import itertools
import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..tensors.constants import SCALE_BLOCK
from ..tensors.formats import block_range
from ..tensors.parameters import is_dtensor, local_shard
from .dtensors import local_columns, replicas_of

Run = tuple[int, int]  # columns [begin, end) in flat order


class Layout(NamedTuple):
    """Where local shards are: their columns among all n, and the shapes of the whole parameters."""

    runs: list[Run]
    shapes: list[tuple[int, ...]]

    @property
    def numel(self) -> int:
        """The number of weights, n."""
        return sum(map(math.prod, self.shapes))


def layout_of(params: Sequence[Any]) -> Layout:
    """Return the partition given by the placements of DTensors."""
    return Layout(runs_of(params), [tuple(p.shape) for p in params])


class ColumnShard:
    """The columns of this rank: its local shards of DTensors; an equal part of whole weights.

    Parameters
    ----------
    params : sequence of Tensor
        All DTensors, or none.
    names : sequence of str, optional
    rank, size : int

    Attributes
    ----------
    total : int
        n, of all ranks.
    numel : int
        Of this rank; may be 0.
    runs : list of (begin, end)
        Its columns, ascending.
    mesh : DeviceMesh or None
        Of DTensors.
    replicas : int
        How many ranks keep each column.
    shapes, names : list
        Of the tensors that `local_part` gives.
    """

    def __init__(
        self, params: Sequence[Any], names: Sequence[str] | None, rank: int, size: int
    ) -> None:
        self.total = sum(p.numel() for p in params)
        self.mesh = next((p.device_mesh for p in params if is_dtensor(p)), None)
        self._parts: list[tuple[int, int, int]] | None = None
        if self.mesh is not None:
            self.replicas, self.runs = replicas_of(params), runs_of(params)
            self.shapes = [tuple(local_shard(p).shape) for p in params]
            self.names = None if names is None else list(names)
        else:
            self.replicas, run = 1, cut(self.total, rank, size)
            self.runs = [run] if run[0] < run[1] else []
            self._parts = list(_overlaps(params, run))
            self.shapes = [(end - begin,) for _, begin, end in self._parts]
            self.names = None if names is None else [names[i] for i, _, _ in self._parts]
        self.index()

    def index(self) -> None:
        """Find where each run is kept."""
        self._firsts = [begin for begin, _ in self.runs]
        self._places = [0, *itertools.accumulate(end - begin for begin, end in self.runs)]
        self.numel = self._places[-1]

    def local_part(self, params: Sequence[Tensor]) -> list[Tensor]:
        """Return what this rank keeps of a list of tensors: views where the memory allows it."""
        if self._parts is None:
            return [local_shard(p) for p in params]
        return [params[i].detach().reshape(-1)[begin:end] for i, begin, end in self._parts]

    def global_runs(self, begin: int, end: int) -> Iterator[tuple[slice, Run]]:
        """Yield where columns [begin, end) of those that this rank keeps are among all n.

        A slice, relative to ``begin``, and the run that belongs there.
        """
        for i in range(max(bisect_right(self._places, begin) - 1, 0), len(self.runs)):
            place, first = self._places[i], self.runs[i][0]
            low, high = max(begin, place), min(end, self._places[i + 1])
            if low >= end:
                return
            if low < high:
                yield slice(low - begin, high - begin), (first + low - place, first + high - place)

    def local_runs(self, begin: int, end: int) -> Iterator[tuple[slice, Run]]:
        """Yield where this rank has those of columns [begin, end) of all n that it keeps.

        A slice of its columns, and the run that is there.
        """
        for i in range(max(bisect_right(self._firsts, begin) - 1, 0), len(self.runs)):
            low, high = max(begin, self.runs[i][0]), min(end, self.runs[i][1])
            if low >= end:
                return
            if low < high:
                shift = self._places[i] - self.runs[i][0]
                yield slice(low + shift, high + shift), (low, high)


def cut(numel: int, rank: int, size: int, pad: bool = False) -> tuple[int, int]:
    """Return the columns [begin, end) of one of ``size`` ranks.

    All ranks have as many, but for the last ones, so that the blocks of an 8-bit basis stay whole.

    Parameters
    ----------
    numel : int
        n.
    rank, size : int
    pad : bool
        As if n were a multiple of the columns of a rank.

    Returns
    -------
    begin, end : int

    Examples
    --------
    >>> from dldr_ext.distributed import cut
    >>> [cut(1000, rank, 3) for rank in range(3)]
    [(0, 512), (512, 1000), (1000, 1000)]
    """
    length = -(-numel // (size * SCALE_BLOCK)) * SCALE_BLOCK
    begin, end = rank * length, (rank + 1) * length
    return (begin, end) if pad else (min(begin, numel), min(end, numel))


def block_runs(runs: Sequence[Run]) -> list[Run]:
    """Return the scale blocks of 8-bit numbers in runs of columns, which begin with a block."""
    return [block_range(begin, end) for begin, end in runs]


def runs_of(params: Sequence[Any]) -> list[Run]:
    """Return the columns of local shards of DTensors, as runs of neighbours."""
    runs, start = [], 0
    for p in params:
        runs += [(start + begin, start + end) for begin, end in _runs_of_one(p)]
        start += p.numel()
    return runs


def _runs_of_one(p: Any) -> list[Run]:
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    if any(type(place) not in (Shard, Replicate) for place in p.placements):
        index = local_columns([p]).cpu()  # of a strided shard
        borders = [0, *((index.diff() != 1).nonzero().flatten() + 1).tolist(), len(index)]
        pairs = itertools.pairwise(borders)
        return [(int(index[a]), int(index[b - 1]) + 1) for a, b in pairs if a < b]
    local, offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)
    if 0 in local:
        return []
    # The last dimension that is cut, and those before it, are walked through.
    cuts = [k for k, (size, whole) in enumerate(zip(local, p.shape, strict=True)) if size < whole]
    last = cuts[-1] if cuts else 0
    inner = math.prod(p.shape[last + 1 :])
    length = inner * (local[last] if len(local) else 1)
    places = [range(o, o + s) for o, s in zip(offset[:last], local[:last], strict=True)]
    runs = []
    for place in itertools.product(*places):
        row = 0
        for i, size in zip((*place, offset[last] if len(local) else 0), p.shape, strict=False):
            row = row * size + i
        runs.append((row * inner, row * inner + length))
    return runs


def _overlaps(params: Sequence[Tensor], run: Run) -> Iterator[tuple[int, int, int]]:
    """Yield the parameters that have elements in a run, and which of their elements."""
    start = 0
    for i, p in enumerate(params):
        begin, end = max(run[0] - start, 0), min(run[1] - start, p.numel())
        if begin < end:
            yield i, begin, end
        start += p.numel()


def placeholders(shapes: Sequence[Sequence[int]], dtype: torch.dtype, device: Any) -> list[Tensor]:
    """Return tensors of these shapes without memory."""
    return [torch.empty((), dtype=dtype, device=device).expand(shape) for shape in shapes]
