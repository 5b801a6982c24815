"""A subspace from raw snapshots that did not come through a `Trajectory`."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..pca.dimension import MAX_DIM, checked_auto, checked_dim, choose
from ..pca.gram import exact_gram, gram_schmidt, orthonormalize_
from ..pca.spectrum import coefficients, exact_spectrum
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
    """The arguments of `Subspace` for `Subspace.from_snapshots`."""
    if orthonormal not in ("pca", "qr"):
        raise ValueError(f"orthonormal: expected 'pca' or 'qr', got {orthonormal!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {dtype_names(DTYPES)}, got {dtype}")
    rows, shapes, names = _as_rows(snapshots)
    count = len(rows)
    if count < 2:
        raise ValueError(f"snapshots: expected at least two, got {count}")
    pca = orthonormal == "pca"
    most = _asked(dim, count, pca)
    gram = exact_gram(rows, relative=pca)
    _check_finite(rows, gram)
    dtype = rows.dtype if dtype is None else dtype
    wide = wide_dtype(dtype)
    known: dict[str, Any] = {"shapes": shapes, "names": names}
    if pca:
        origin = rows[0].to(wide, copy=True)
        found = exact_spectrum(gram, rows.dtype == torch.float64, origin, center=True)
        if found.rank == 0:
            raise ValueError(
                "snapshots: the snapshots do not differ: there is no direction to keep"
            )
        kept, known["choice"], warning = choose(found, count, most, dim, None, True)
        if warning is not None:
            warnings.warn(warning, UserWarning, stacklevel=3)
        # The rows of C sum to zero: C X is the same for the weights as for their differences.
        known["explained_variance_ratio"] = found.explained(kept)
        known["singular_values"] = found.values[:kept].sqrt()
        combine = coefficients(found, kept)
    else:
        combine = gram_schmidt(gram, most)
        _check_rank(len(combine), most)
        origin = torch.zeros(rows.shape[1], dtype=wide, device=rows.device)
    basis = ops.form_basis(rows, combine.to(rows.device), dtype=dtype)
    if not pca:
        # Snapshots nearly parallel, as those of one run are, cost digits: they come back here.
        orthonormalize_(basis)
    return {"basis": basis, "origin": origin, **known}


def _as_rows(
    snapshots: Tensor | Sequence[Any],
) -> tuple[Tensor, list[tuple[int, ...]] | None, list[str] | None]:
    """One flat row for each snapshot; the shapes and names if known."""
    if isinstance(snapshots, Tensor):
        if snapshots.dtype not in DTYPES or snapshots.layout != torch.strided:
            raise TypeError(
                f"snapshots: expected a dense tensor of {dtype_names(DTYPES)}, got "
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


def _asked(dim: int | str, count: int, pca: bool) -> int:
    limit = count - 1 if pca else count
    if not isinstance(dim, str):
        return checked_dim(dim, limit, f"{count} {'centred ' if pca else ''}snapshots")
    if dim != "auto" or not pca:
        expected = "a number or 'auto'" if pca else "a number, for 'qr'"
        raise ValueError(f"dim: expected {expected}, got {dim!r}")
    checked_auto(count, True)
    return min(limit, MAX_DIM)


def _check_rank(kept: int, dim: int) -> None:
    if kept == 0:
        raise ValueError("snapshots: the snapshots are all zero: there is no direction to keep")
    if kept < dim:
        warnings.warn(
            f"dim = {dim} is above the numerical rank of the snapshots: kept {kept} directions",
            UserWarning,
            stacklevel=4,
        )
