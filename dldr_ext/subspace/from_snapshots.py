"""A subspace from raw snapshots that did not come through a `Trajectory`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import form_basis
from ..pca.decomposition import decompose
from ..pca.dimension import Request, checked_dim
from ..pca.gram import exact_gram, gram_schmidt, orthonormalize_
from ..pca.spectrum import square_of
from ..tensors.formats import wide_dtype
from ..tensors.parameters import (
    DTYPES,
    check_matches,
    dtype_name,
    dtype_names,
    named_parameters,
    numel,
    type_name,
)


def subspace_arguments(
    snapshots: Tensor | Sequence[Any], dim: int | str, orthonormal: str, dtype: torch.dtype | None
) -> dict[str, Any]:
    """Return the arguments of `Subspace` for `Subspace.from_snapshots`."""
    if orthonormal not in ("pca", "qr"):
        raise ValueError(f"orthonormal: expected 'pca' or 'qr', got {orthonormal!r}")
    if dtype is not None and dtype not in DTYPES:
        expected = dtype_names(DTYPES)
        raise ValueError(f"dtype: expected one of {expected}, got {dtype}")
    rows, shapes, names = _as_rows(snapshots)
    if len(rows) < 2:
        raise ValueError(f"snapshots: expected at least two, got {len(rows)}")
    arguments: dict[str, Any] = {"shapes": shapes, "names": names}
    dtype = rows.dtype if dtype is None else dtype
    if orthonormal == "pca":
        request = Request(dim)
        request.limit(len(rows))
        gram = exact_gram(rows, relative=True)
        _check_finite(rows, gram)
        origin = rows[0].to(wide_dtype(dtype), copy=True)
        try:
            components = decompose(
                gram, float(square_of(origin)), request, double=rows.dtype == torch.float64
            )
        except ValueError as error:
            raise ValueError(f"snapshots: {error}") from None
        if components.warning is not None:
            warnings.warn(components.warning, UserWarning, stacklevel=3)
        arguments |= components.metadata()
        # The rows of C sum to zero: C X is the same for the weights as for their differences.
        basis = form_basis(rows, components.coefficients.to(rows.device), dtype=dtype)
    else:
        if isinstance(dim, str):
            raise ValueError(f"dim: expected a number, for 'qr', got {dim!r}")
        most = checked_dim(dim, len(rows), f"{len(rows)} snapshots")
        gram = exact_gram(rows)
        _check_finite(rows, gram)
        combination = gram_schmidt(gram, most)
        _check_rank(len(combination), most)
        origin = torch.zeros(rows.shape[1], dtype=wide_dtype(dtype), device=rows.device)
        basis = form_basis(rows, combination.to(rows.device), dtype=dtype)
        # Snapshots nearly parallel, as those of one run are, cost digits: they come back here.
        orthonormalize_(basis)
    return {"basis": basis, "origin": origin, **arguments}


def _as_rows(
    snapshots: Tensor | Sequence[Any],
) -> tuple[Tensor, list[tuple[int, ...]] | None, list[str] | None]:
    """One flat row for each snapshot; the shapes and names if known."""
    if isinstance(snapshots, Tensor):
        if snapshots.dtype not in DTYPES or snapshots.layout != torch.strided:
            expected = dtype_names(DTYPES)
            raise TypeError(
                f"snapshots: expected a dense tensor of {expected}, got "
                f"{dtype_name(snapshots.dtype)}, {snapshots.layout}"
            )
        if snapshots.dim() != 2 or snapshots.shape[1] == 0:
            raise ValueError(
                f"snapshots: expected shape (T, n) with n >= 1, got {tuple(snapshots.shape)}"
            )
        return snapshots.detach().contiguous(), None, None
    if isinstance(snapshots, Mapping) or not isinstance(snapshots, Sequence):
        raise TypeError(
            "snapshots: expected a tensor (T, n), or a list of lists or dicts of tensors, got "
            f"{type_name(snapshots)}"
        )
    lists = [_one(snapshot, f"snapshots[{t}]") for t, snapshot in enumerate(snapshots)]
    if not lists:
        raise ValueError("snapshots: expected at least two, got 0")
    first, names = lists[0]
    shapes = [tuple(tensor.shape) for tensor in first]
    for t, (tensors, other) in enumerate(lists):
        check_matches(tensors, shapes, names, "first snapshot", f"snapshots[{t}]")
        if other != names:
            raise ValueError(f"snapshots[{t}]: expected the names {names}, got {other}")
    double = any(tensor.dtype == torch.float64 for tensors, _ in lists for tensor in tensors)
    rows = torch.empty(
        (len(lists), numel(first)),
        dtype=torch.float64 if double else torch.float32,
        device=first[0].device,
    )
    sizes = [tensor.numel() for tensor in first]
    for row, (tensors, _) in zip(rows, lists, strict=True):
        for piece, tensor in zip(row.split(sizes), tensors, strict=True):
            piece.view(tensor.shape).copy_(tensor.detach())
    return rows, shapes, names


def _one(snapshot: Any, argument: str) -> tuple[list[Tensor], list[str] | None]:
    if isinstance(snapshot, Mapping):
        snapshot = list(snapshot.items())
    return named_parameters(snapshot, argument)


def _check_finite(rows: Tensor, gram: Tensor) -> None:
    if not bool(gram.isfinite().all()):
        bad = [t for t, row in enumerate(rows) if not bool(row.isfinite().all())]
        raise ValueError(f"snapshots: expected finite values, got NaN or Inf in {bad}")


def _check_rank(kept: int, dim: int) -> None:
    if kept == 0:
        raise ValueError("snapshots: the snapshots are all zero: there is no direction to keep")
    if kept < dim:
        warnings.warn(
            f"dim = {dim} is above the numerical rank of the snapshots: kept {kept} directions",
            UserWarning,
            stacklevel=4,
        )
