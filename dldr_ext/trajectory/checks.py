"""Validate what is recorded before it counts."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..collectives.partition import ColumnShard
from ..tensors.formats import LARGEST, wide_dtype
from ..tensors.parameters import check_matches, dtype_name, flatten, type_name


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


def check_current(recorded: Recorded, params: Sequence[Tensor]) -> None:
    """Check that the parameters are still those that the trajectory was made for."""
    check_matches(params, recorded.shapes, recorded.names, "trajectory when it was made")
    for i, p in enumerate(params):
        if p.device != recorded.device:
            raise ValueError(
                f"params[{i}]: expected device {recorded.device}, as when the trajectory was made, "
                f"got {p.device}"
            )


def why_not_finite(
    params: Sequence[Tensor], names: Sequence[str] | None, anchor: Tensor | None, dtype: torch.dtype
) -> str:
    """Return which parameter, or which difference from the anchor, is not to be stored."""
    for i, p in enumerate(params):
        if not bool(p.detach().isfinite().all()):
            name = f" ({names[i]})" if names else ""
            return f"params[{i}]{name}: expected finite values, got NaN or Inf; not recorded"
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
        f"below {torch.finfo(wide_dtype(dtype)).max:.3g}; not recorded"
    )
