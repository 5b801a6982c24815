"""DTensor parameters: the local shard of each, and how many ranks hold the same."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..tensors.parameters import is_dtensor, local_shard, named_parameters


def local_shards(params: Iterable[Any]) -> list[Tensor]:
    """Return the local shard of each parameter: views, which follow what is written.

    Parameters
    ----------
    params : iterable of Tensor
        As in `dldr_ext.Trajectory`.

    Returns
    -------
    list of Tensor
        Of a tensor that is no DTensor the tensor itself.
    """
    return [local_shard(p) for p in named_parameters(params)[0]]


def local_columns(params: Iterable[Any]) -> Tensor:
    """Return where the elements of `local_shards` are among all n elements in flat order.

    Parameters
    ----------
    params : iterable of Tensor
        As in `local_shards`.

    Returns
    -------
    Tensor, shape (columns of this rank,), int64
    """
    columns, start = [], 0
    for p in entries(params)[0]:
        index: Any = torch.arange(start, start + p.numel()).view(p.shape)
        if is_dtensor(p):
            from torch.distributed.tensor import distribute_tensor  # a third of a second

            index = index.to(p.device)
            index = distribute_tensor(index, p.device_mesh, p.placements, src_data_rank=None)
        columns.append(local_shard(index).reshape(-1))
        start += p.numel()
    return torch.cat(columns)


def entries(params: Iterable[Any]) -> tuple[list[Any], list[str] | None]:
    """Return `named_parameters`, of which some may be DTensors."""
    tensors, names = named_parameters(params)
    return list(tensors), names


def replicas_of(params: Sequence[Any]) -> int:
    """Return how many ranks hold each weight: the same for all.

    Raises
    ------
    ValueError
        A plain tensor; partial sums; weights of which some are held by more ranks than others.
    """
    counts = []
    for i, p in enumerate(params):
        if not is_dtensor(p):
            raise ValueError(f"params[{i}]: expected a DTensor (fully_shard), got a plain tensor")
        if any(place.is_partial() for place in p.placements):
            raise ValueError(f"params[{i}]: expected shards or replicas, got {p.placements}")
        sizes = zip(p.placements, p.device_mesh.shape, strict=True)
        count = 1
        for place, size in sizes:
            count *= size if place.is_replicate() else 1
        counts.append(count)
        if p.device_mesh != params[0].device_mesh or count != counts[0]:
            raise ValueError(
                f"params[{i}]: expected the mesh and the number of replicas of params[0] "
                f"({params[0].device_mesh}, {counts[0]}), got {p.device_mesh}, {count}"
            )
    return counts[0]
