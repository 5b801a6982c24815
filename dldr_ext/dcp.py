"""What torch.distributed.checkpoint saves: flat vectors by their columns, all else as bytes.

The columns that a rank has are chunks of tensors of n columns, so that DCP itself gives any number
of ranks, cut in whatever way, the columns that they have.
"""

from __future__ import annotations

import io
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from . import ops
from ._cut import Run, cut, runs_of
from .distributed import LocalSubspace, ShardedSubspace
from .optim._base import SubspaceOptimizer
from .subspace import Subspace

__all__ = ["Columns", "is_dcp", "read_subspace", "stateful"]

_CHUNK = 1 << 26  # elements; DCP has a chunk that it reads in memory


class Columns(Tensor):
    """Some columns of a tensor (..., n), in the protocol by which DCP sees tensors of its own.

    Parameters
    ----------
    local : Tensor, shape (..., columns of the runs)
    runs : sequence of (begin, end)
    total : int
        n.
    known : bool
        False: there is nothing to save yet, but columns may be loaded.
    """

    local: Tensor
    known: bool
    whole: torch.Size
    chunks: dict[tuple[int, ...], Tensor]  # by offset
    size: Any = None  # DCP compares it if there is one; n is compared by who loads

    @staticmethod
    def __new__(cls, local: Tensor, runs: Sequence[Run], total: int, known: bool = True) -> Columns:
        shape = (*local.shape[:-1], total)
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)
        rows = local[..., :1].numel() or 1
        step = max(1, _CHUNK // rows // ops.SCALE_BLOCK) * ops.SCALE_BLOCK
        self.local, self.known, self.whole, self.chunks = local, known, torch.Size(shape), {}
        zeros, at = [0] * (local.ndim - 1), 0
        for begin, end in runs:
            for first in range(begin, end, step):
                last = min(first + step, end)
                place = (*zeros, first)
                self.chunks[place] = local[..., at : at + last - first]
                at += last - first
        return self

    def __create_write_items__(self, fqn: str, object: Any) -> list[WriteItem]:
        if not self.known:  # None, pickled
            return [WriteItem(index=MetadataIndex(fqn), type=WriteItemType.BYTE_IO)]
        return [_item(fqn, at, chunk, self.whole) for at, chunk in self.chunks.items()]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [_chunk(at, chunk) for at, chunk in self.chunks.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor | None:
        return None if index.offset is None else self.chunks[tuple(index.offset)]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise TypeError(f"expected no arithmetic on what is being saved, got {func}")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Columns({self.whole}, {len(self.chunks)} chunks here)"


def _item(fqn: str, at: tuple[int, ...], chunk: Tensor, whole: torch.Size) -> WriteItem:
    return WriteItem(
        index=MetadataIndex(fqn, torch.Size(at)),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=_chunk(at, chunk),
            properties=TensorProperties.create_from_tensor(chunk),
            size=whole,
        ),
    )


def _chunk(at: tuple[int, ...], chunk: Tensor) -> ChunkStorageMetadata:
    return ChunkStorageMetadata(offsets=torch.Size(at), sizes=chunk.shape)


class _Optimizer:
    """A Stateful: flat vectors by columns, and the rest of the state dict as bytes."""

    def __init__(self, optimizer: SubspaceOptimizer) -> None:
        self._optimizer = optimizer
        leaves: list[Any] = optimizer._leaves
        self._total = sum(p.numel() for p in leaves)
        sharded = any(hasattr(p, "device_mesh") for p in leaves)
        self._runs = runs_of(leaves) if sharded else [(0, self._total)]

    def state_dict(self) -> dict[str, Any]:
        state = self._optimizer.state_dict()
        found, flat = state["subspace"], self._optimizer.flat_state
        origin = self._optimizer.subspace.origin
        vectors = {key: found.pop(key) for key in flat}
        here = [key for key, vector in vectors.items() if vector is not None]
        buffer = io.BytesIO()
        torch.save({**state, "flat": here, "total": self._total}, buffer)
        columns = {
            key: Columns(
                torch.zeros_like(origin) if vector is None else vector,
                self._runs,
                self._total,
                known=vector is not None,
            )
            for key, vector in vectors.items()
        }
        return {"state": buffer.getvalue(), **columns}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        name = type(self._optimizer).__name__
        state = torch.load(io.BytesIO(state_dict["state"]), weights_only=True)
        here, total = state.pop("flat"), state.pop("total")
        if total != self._total:
            raise ValueError(
                f"{name}: checkpoint: expected the state of {self._total} weights, got {total}"
            )
        for key in self._optimizer.flat_state:
            state["subspace"][key] = state_dict[key].local if key in here else None
        self._optimizer.load_state_dict(state)


class _Subspace:
    """A Stateful that is only saved: `ShardedSubspace.load` and the like make another one."""

    def __init__(
        self, subspace: Any, runs: Sequence[Run], total: int, shapes: list[Any] | None
    ) -> None:
        self._subspace, self._runs, self._total, self._shapes = subspace, runs, total, shapes

    def state_dict(self) -> dict[str, Any]:
        subspace, runs, total = self._subspace, self._runs, self._total
        local = subspace if isinstance(subspace, Subspace) else subspace.local
        known: dict[str, Any] = {
            "shapes": self._shapes,
            "names": subspace.names,
            "choice": subspace.choice,
        }
        for key in ("explained_variance_ratio", "singular_values"):
            value = getattr(subspace, key)
            known[key] = None if value is None else value.tolist()
        basis = subspace._basis if local is None else local.basis
        origin = subspace.origin
        own = [(0, total)] if isinstance(subspace, ShardedSubspace) else runs
        state = {
            "known": json.dumps(known),
            "basis": Columns(basis, runs, total),
            "origin": Columns(origin, own, total),
        }
        scale = None if local is None else local.scale
        if scale is not None:
            state["scale"] = Columns(scale, _blocks(runs), -(-total // ops.SCALE_BLOCK))
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise TypeError(
            f"{type(self._subspace).__name__}: its load() makes one of the folder; none is loaded "
            "into another"
        )


def stateful(what: Any) -> Any:
    """An optimizer or a subspace as `torch.distributed.checkpoint` saves it.

    ``dcp.save({"optimizer": stateful(optimizer), "subspace": stateful(subspace)},
    checkpoint_id=folder)`` on all ranks; any number of ranks loads: the subspace with
    `ShardedSubspace.load`, `LocalSubspace.load` or `Subspace.load` of the folder, then
    ``dcp.load({"optimizer": stateful(optimizer)}, checkpoint_id=folder)``.

    Parameters
    ----------
    what : PBFGS, PSGD, Subspace, ShardedSubspace or LocalSubspace

    Raises
    ------
    TypeError, ValueError
        Something else; a `LocalSubspace` that was made of a basis of nobody knows which columns, or
        with one of 8 bits (its blocks are those of one cut: save it before `quantize`).
    """
    if isinstance(what, SubspaceOptimizer):
        return _Optimizer(what)
    if isinstance(what, LocalSubspace):
        if what.layout is None:
            raise ValueError(
                "LocalSubspace: expected one of a trajectory, of(), random() or load(), got one "
                "whose columns among all are not known"
            )
        if what.local is not None and what.local.scale is not None:
            raise ValueError("LocalSubspace: expected a basis that is not quantised, got 8 bits")
        return _Subspace(what, what.layout.runs, what.layout.numel, what.layout.shapes)
    if isinstance(what, ShardedSubspace):
        begin, end = cut(what.numel, what.ranks.rank, what.ranks.size)
        runs = [(begin, end)] if begin < end else []
        return _Subspace(what, runs, what.numel, what.shapes)
    if isinstance(what, Subspace):
        return _Subspace(what, [(0, what.numel)], what.numel, what.shapes)
    raise TypeError(
        f"stateful: expected an optimizer or a subspace of one basis, got {type(what).__name__}"
    )


def is_dcp(path: str | os.PathLike[str]) -> bool:
    """Whether a folder is a checkpoint of torch.distributed.checkpoint."""
    return Path(path, ".metadata").is_file()


def saved_shape(path: str | os.PathLike[str], key: str) -> tuple[int, int]:
    """d and n of the subspace in a checkpoint."""
    return tuple(_entry(path, f"{key}.basis").size)


def read_subspace(
    path: str | os.PathLike[str],
    runs: Sequence[Run],
    device: Any,
    *,
    key: str = "subspace",
    process_group: Any = None,
) -> dict[str, Any]:
    """Columns of a saved subspace, as arguments of `Subspace`."""
    dim, total = saved_shape(path, key)
    width = sum(end - begin for begin, end in runs)
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    found: dict[str, Any] = {}
    columns: dict[str, Any] = {"known": ""}
    for name in ("basis", "origin", "scale"):
        entry: Any = entries.get(f"{key}.{name}")
        if entry is None:
            continue
        own, count = (runs, total)
        if name == "scale":
            own, count = _blocks(runs), -(-total // ops.SCALE_BLOCK)
        size = sum(end - begin for begin, end in own) if name == "scale" else width
        shape = (size,) if name == "origin" else (dim, size)
        found[name] = torch.empty(shape, dtype=entry.properties.dtype, device=device)
        columns[name] = Columns(found[name], own, count)
    state = {key: columns}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, checkpoint_id=path, process_group=process_group)
    known = json.loads(state[key]["known"])
    for name in ("explained_variance_ratio", "singular_values"):
        if known[name] is not None:
            known[name] = torch.tensor(known[name], dtype=torch.float64, device="cpu")
    return {**found, **known}


def read_whole(path: str | os.PathLike[str], device: Any) -> Subspace:
    """See `Subspace.load`."""
    if not is_dcp(path):
        raise ValueError(
            f"path: expected a file, or a folder of torch.distributed.checkpoint, got {path}"
        )
    return Subspace(**read_subspace(path, [(0, saved_shape(path, "subspace")[1])], device))


def _entry(path: str | os.PathLike[str], name: str) -> Any:
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    if name not in entries:
        raise ValueError(f"{path}: expected {name} in the checkpoint, found {sorted(entries)[:9]}")
    return entries[name]


def _blocks(runs: Sequence[Run]) -> list[Run]:
    """Of the scales of 8-bit numbers."""
    return [(begin // ops.SCALE_BLOCK, -(-end // ops.SCALE_BLOCK)) for begin, end in runs]
