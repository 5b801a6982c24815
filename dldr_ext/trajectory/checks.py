"""Validate what is recorded before it counts."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..collectives.partition import ColumnShard
from ..tensors.constants import MAX_DIM
from ..tensors.formats import LARGEST, STORED, wide_dtype
from ..tensors.matrices import as_stored
from ..tensors.parameters import check_matches, dtype_name, dtype_names, flatten, type_name
from .stores import Store

#: How the message ends of a snapshot that is not finite; over ranks it is all that is passed on.
NOT_RECORDED = "; not recorded"


class Recorded(Protocol):
    """What a trajectory is of."""

    shapes: list[tuple[int, ...]]
    names: list[str] | None
    numel: int
    dtype: torch.dtype
    device: torch.device


def checked_capacity(capacity: int) -> int:
    """Return ``capacity`` as an int, at least 1."""
    result = operator.index(capacity)
    if result < 1:
        raise ValueError(f"capacity: expected at least 1 snapshot, got {result}")
    return result


def checked_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return ``dtype``, if rows may be stored in it."""
    if dtype not in STORED:
        name = dtype_name(dtype) if isinstance(dtype, torch.dtype) else repr(dtype)
        raise ValueError(f"dtype: expected one of {dtype_names(STORED)}, got {name}")
    return dtype


def flat_anchor(
    recorded: Recorded, anchor: Tensor | Sequence[Tensor], shard: ColumnShard | None = None
) -> Tensor:
    """Return a flat copy of an anchor that the user gives; over ranks this rank's columns of it."""
    if shard is not None and shard.mesh is not None:
        if isinstance(anchor, Tensor):
            raise ValueError("anchor: expected a list of DTensors, as params, got one tensor")
        tensors = shard.local_part(list(anchor))
        check_matches(tensors, shard.shapes, shard.names, "local shards", "anchor")
    else:
        tensors = _anchor_tensors(recorded, anchor)
    flat = flatten(tensors, wide_dtype(recorded.dtype))
    if not bool(flat.isfinite().all()):
        raise ValueError("anchor: expected finite values, got NaN or Inf")
    if shard is None or shard.mesh is not None:
        return flat
    return torch.cat([flat[:0], *(flat[begin:end] for begin, end in shard.runs)])


def _anchor_tensors(recorded: Recorded, anchor: Tensor | Sequence[Tensor]) -> list[Tensor]:
    tensors = [anchor] if isinstance(anchor, Tensor) else list(anchor)
    for i, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            got = tensor.dtype if isinstance(tensor, Tensor) else type_name(tensor)
            raise TypeError(f"anchor[{i}]: expected a floating-point tensor, got {got}")
        if tensor.device != recorded.device:
            raise ValueError(f"anchor[{i}]: expected device {recorded.device}, got {tensor.device}")
    if isinstance(anchor, Tensor):
        check_matches(tensors, [(recorded.numel,)], what="parameters (flat)", argument="anchor")
    else:
        check_matches(tensors, recorded.shapes, recorded.names, "parameters", "anchor")
    return tensors


def check_device(recorded: Recorded, params: Sequence[Tensor]) -> None:
    """Check that the parameters are where the snapshots are made: others have no values."""
    if params[0].device != recorded.device:
        raise ValueError(
            f"params[0]: expected device {recorded.device}, as when the trajectory was made, got "
            f"{params[0].device}"
        )


def why_not_finite(
    params: Sequence[Tensor], names: Sequence[str] | None, anchor: Tensor | None, dtype: torch.dtype
) -> str:
    """Return which parameter, or which difference from the anchor, is not to be stored."""
    for i, p in enumerate(params):
        if not bool(p.detach().isfinite().all()):
            name = f" ({names[i]})" if names else ""
            return f"params[{i}]{name}: expected finite values, got NaN or Inf{NOT_RECORDED}"
    largest = 0.0
    if anchor is not None:  # else there is no difference
        pieces = anchor.split([p.numel() for p in params])
        largest = max(
            float((p.detach().reshape(-1) - piece).abs().max())
            for p, piece in zip(params, pieces, strict=True)
            if p.numel()
        )
    holds = ""  # 8 bits hold what their scales, float32, hold
    if dtype not in LARGEST:
        most = torch.finfo(dtype).max
        holds = f"{dtype_name(dtype)} holds {most:.3g} at most, and "
    return (
        f"a difference from the anchor of {largest:.3g} overflows: {holds}its square must stay "
        f"below {torch.finfo(wide_dtype(dtype)).max:.3g}{NOT_RECORDED}"
    )


def check_in_memory(store: Store, storage: str, dtype: torch.dtype | None, what: str) -> None:
    """Check that the rows of a store can serve as they are, one matrix in memory.

    Parameters
    ----------
    store : Store
    storage : str
        Of the trajectory.
    dtype : torch.dtype or None
        The dtype that is asked for.
    what : str
        "materialize=False" or "into_subspace".
    """
    implicit = what == "materialize=False"
    if store.spans_ranks:
        raise ValueError(
            "materialize: expected True for a trajectory of ranks, got False"
            if implicit
            else f"{what}: expected a trajectory of one process, got one of ranks"
        )
    codes, _ = as_stored(store.snapshots())
    if not isinstance(codes, Tensor):
        raise ValueError(
            f"{what}: expected snapshots in the memory that the parameters are in (storage="
            f"'device'), got storage={storage!r}; subspace() forms a basis of these piece by piece"
        )
    if dtype not in (None, store.dtype):
        name = dtype_name(dtype) if isinstance(dtype, torch.dtype) else repr(dtype)
        raise ValueError(
            f"{what}: dtype: expected {dtype_name(store.dtype)}, as the snapshots are stored, got "
            f"{name}"
        )
    if implicit and store.length > MAX_DIM:
        raise ValueError(f"{what}: expected at most {MAX_DIM} snapshots, got {store.length}")
