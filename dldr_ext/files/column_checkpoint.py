"""Columns of flat vectors in the folders of torch.distributed.checkpoint."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..collectives.partition import Run, block_runs
from ..tensors.constants import SCALE_BLOCK
from ..tensors.formats import blocks

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
    from torch.distributed.checkpoint.planner import WriteItem

# torch.distributed.checkpoint takes half a second to import: only those who use it wait for it.

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
        """Make one of the columns that are here."""
        shape = (*local.shape[:-1], total)
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=local.dtype, device=local.device)
        rows = local[..., :1].numel() or 1
        step = max(1, _CHUNK // rows // SCALE_BLOCK) * SCALE_BLOCK
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
        from torch.distributed.checkpoint.metadata import MetadataIndex
        from torch.distributed.checkpoint.planner import WriteItem, WriteItemType

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
    from torch.distributed.checkpoint.metadata import MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

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
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata

    return ChunkStorageMetadata(offsets=torch.Size(at), sizes=chunk.shape)


def is_dcp(path: str | os.PathLike[str]) -> bool:
    """Return whether a folder is a checkpoint of torch.distributed.checkpoint."""
    return Path(path, ".metadata").is_file()


def saved_shape(path: str | os.PathLike[str], key: str) -> tuple[int, int]:
    """Return d and n of the subspace in a checkpoint."""
    return tuple(_entry(path, f"{key}.basis").size)


def read_subspace(
    path: str | os.PathLike[str],
    runs: Sequence[Run],
    device: Any,
    *,
    key: str = "subspace",
    process_group: Any = None,
) -> dict[str, Any]:
    """Read columns of a saved subspace, as arguments of `Subspace`."""
    import torch.distributed.checkpoint as dcp

    dim, total = saved_shape(path, key)
    width = sum(end - begin for begin, end in runs)
    entries = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {}
    columns: dict[str, Any] = {"known": ""}
    for name in ("basis", "origin", "scale"):
        entry: Any = entries.get(f"{key}.{name}")
        if entry is None:
            continue
        runs_of_tensor, count = (runs, total)
        if name == "scale":
            runs_of_tensor, count = block_runs(runs), blocks(total)
        size = sum(end - begin for begin, end in runs_of_tensor) if name == "scale" else width
        shape = (size,) if name == "origin" else (dim, size)
        tensors[name] = torch.empty(shape, dtype=entry.properties.dtype, device=device)
        columns[name] = Columns(tensors[name], runs_of_tensor, count)
    state = {key: columns}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.load(state, checkpoint_id=path, process_group=process_group)
    metadata = json.loads(state[key]["known"])
    for name, value in metadata.items():
        if value is not None and name not in ("shapes", "names", "choice"):  # for each direction
            metadata[name] = torch.tensor(value, dtype=torch.float64, device="cpu")
    return {**tensors, **metadata}


def _entry(path: str | os.PathLike[str], name: str) -> Any:
    from torch.distributed.checkpoint import FileSystemReader

    entries = FileSystemReader(path).read_metadata().state_dict_metadata
    if name not in entries:
        raise ValueError(f"{path}: expected {name} in the checkpoint, found {sorted(entries)[:9]}")
    return entries[name]
