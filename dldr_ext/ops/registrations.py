"""Fake (meta) kernels of the ops."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tensors.formats import wide_dtype
from ..tensors.memory import empty_rows

_check = torch._check


def _check_list(
    op: str, name: str, tensors: Sequence[Tensor], numel: int, device: torch.device
) -> None:
    # Also reached by real tensors of which one is on the meta device.
    for i, tensor in enumerate(tensors):
        _check(
            tensor.device == device,
            lambda: (
                f"ValueError: {op}: {name}[{i}]: expected a tensor on {device}, "  # noqa: B023
                f"got one on {tensor.device}"  # noqa: B023
            ),
        )
    total = sum(t.numel() for t in tensors)
    _check(
        total == numel,
        lambda: f"ValueError: {op}: {name}: expected {numel} elements in all, got {total}",
    )


def _check_rows(op: str, name: str, rows: Tensor) -> None:
    _check(
        rows.dim() == 2,
        lambda: f"ValueError: {op}: {name}: expected 2 dimensions, got shape {tuple(rows.shape)}",
    )


@torch.library.register_fake("dldr_ext::project")
def _project(basis: Tensor, tensors: list[Tensor], scale: Tensor | None = None) -> Tensor:
    _check_rows("project", "basis", basis)
    _check_list("project", "tensors", tensors, basis.shape[1], basis.device)
    return basis.new_empty((basis.shape[0],), dtype=wide_dtype(basis.dtype))


@torch.library.register_fake("dldr_ext::project_many")
def _project_many(
    basis: Tensor, tensors: list[Tensor], lists: int, scale: Tensor | None = None
) -> Tensor:
    _check_rows("project_many", "basis", basis)
    _check_list("project_many", "tensors", tensors, lists * basis.shape[1], basis.device)
    return basis.new_empty((lists, basis.shape[0]), dtype=wide_dtype(basis.dtype))


@torch.library.register_fake("dldr_ext::reconstruct")
def _reconstruct(
    origin: Tensor | None, basis: Tensor, theta: Tensor, scale: Tensor | None = None
) -> Tensor:
    _check_rows("reconstruct", "basis", basis)
    for name, tensor in (("theta", theta), ("origin", origin)):
        _check(
            tensor is None or tensor.device == basis.device,
            lambda: f"ValueError: reconstruct: {name}: expected a tensor on {basis.device}",  # noqa: B023
        )
    _check(
        theta.dim() == 1 and theta.shape[0] == basis.shape[0],
        lambda: (
            f"ValueError: reconstruct: theta: expected shape ({basis.shape[0]},), "
            f"got {tuple(theta.shape)}"
        ),
    )
    return basis.new_empty((basis.shape[1],), dtype=wide_dtype(basis.dtype))


@torch.library.register_fake("dldr_ext::reconstruct_")
def _reconstruct_(
    params: list[Tensor],
    origin: Tensor | None,
    basis: Tensor,
    theta: Tensor,
    scale: Tensor | None = None,
) -> None:
    _check_rows("reconstruct_", "basis", basis)
    _check_list("reconstruct_", "params", params, basis.shape[1], basis.device)


@torch.library.register_fake("dldr_ext::reconstruct_residual")
def _reconstruct_residual(
    basis: Tensor,
    theta: Tensor,
    coordinates: Tensor,
    tensors: list[Tensor],
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check_rows("reconstruct_residual", "basis", basis)
    _check_list("reconstruct_residual", "tensors", tensors, basis.shape[1], basis.device)
    shape, dtype = (basis.shape[1],), wide_dtype(basis.dtype)
    return basis.new_empty(shape, dtype=dtype), basis.new_empty(shape, dtype=dtype)


@torch.library.register_fake("dldr_ext::trial_")
def _trial_(params: list[Tensor], point: Tensor, direction: Tensor, alpha: float) -> None:
    _check_list("trial_", "params", params, point.numel(), point.device)


@torch.library.register_fake("dldr_ext::gram")
def _gram(snapshots: Tensor, scale: Tensor | None = None) -> Tensor:
    _check_rows("gram", "snapshots", snapshots)
    rows = snapshots.shape[0]
    return snapshots.new_empty((rows, rows), dtype=torch.float64)


@torch.library.register_fake("dldr_ext::gram_append_")
def _gram_append_(
    snapshots: Tensor,
    gram: Tensor,
    index: int,
    params: list[Tensor],
    anchor: Tensor,
    scale: Tensor | None = None,
) -> None:
    _check_rows("gram_append_", "snapshots", snapshots)
    _check_list("gram_append_", "params", params, snapshots.shape[1], snapshots.device)


@torch.library.register_fake("dldr_ext::store_snapshot_")
def _store_snapshot_(
    snapshots: Tensor,
    index: int,
    params: list[Tensor],
    anchor: Tensor,
    scale: Tensor | None = None,
) -> None:
    _check_rows("store_snapshot_", "snapshots", snapshots)
    _check_list("store_snapshot_", "params", params, snapshots.shape[1], snapshots.device)


@torch.library.register_fake("dldr_ext::gram_block_")
def _gram_block_(
    snapshots: Tensor, gram: Tensor, index: int, count: int, scale: Tensor | None = None
) -> None:
    _check_rows("gram_block_", "snapshots", snapshots)


@torch.library.register_fake("dldr_ext::quasi_newton_")
def _quasi_newton_(
    b: Tensor,
    guess: Tensor,
    c: Tensor,
    s: Tensor | None,
    y: Tensor | None,
    hs: Tensor | None,
    *,
    fresh: bool,
    damped: bool,
    published: bool,
) -> tuple[Tensor, Tensor]:
    return b.new_empty(len(b)), b.new_empty(7)


@torch.library.register_fake("dldr_ext::form_basis")
def _form_basis(
    snapshots: Tensor,
    coefficients: Tensor,
    scale: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    _check_rows("form_basis", "snapshots", snapshots)
    if dtype is None:
        dtype = snapshots.dtype if snapshots.dtype.is_floating_point else torch.float32
        dtype = torch.float32 if dtype == torch.float8_e4m3fn else dtype
    return empty_rows(
        coefficients.shape[0], snapshots.shape[1], dtype=dtype, device=snapshots.device
    )
