"""The ops as functions with checked arguments: see `dldr_ext.ops`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tensors.parameters import type_name
from .errors import call, check_list, fill_none

_raw = torch.ops.dldr_ext


def project(
    basis: Tensor, tensors: Sequence[Tensor | None], *, scale: Tensor | None = None
) -> Tensor:
    """Coordinates c = basis @ flat(tensors), the projected gradient P^T g.

    Parameters
    ----------
    basis : Tensor, shape (d, n)
        Basis vectors as rows.
    tensors : sequence of Tensor or None
        Gradients (or any vectors), n elements in all. None counts as zeros; the Nones of one list
        must stand side by side, since only their common size can be inferred.
    scale : Tensor, shape (d, ceil(n / 256)), optional
        For int8 and float8_e4m3fn.

    Returns
    -------
    Tensor, shape (d,)
        float32 (float64 for a float64 basis). Differentiable in the tensors (backward is
        `reconstruct`).
    """
    tensors = fill_none("project", "tensors", basis, tensors)
    return call("project", _raw.project.default, basis, tensors, scale=scale)


def project_many(
    basis: Tensor,
    lists: Sequence[Sequence[Tensor | None]],
    *,
    scale: Tensor | None = None,
) -> Tensor:
    """Coordinates of several lists of tensors, with one read of the basis.

    Parameters
    ----------
    basis, scale
        As in `project`.
    lists : sequence of sequences of Tensor or None
        At least one; n elements in each, None as in `project`.

    Returns
    -------
    Tensor, shape (len(lists), d)
        Row k is bitwise what `project` gives for ``lists[k]``.
    """
    if isinstance(lists, Tensor) or not isinstance(lists, (list, tuple)):
        raise TypeError(
            f"project_many: lists: expected a list or tuple of lists, got {type_name(lists)}"
        )
    tensors: list[Tensor] = []
    for k, one in enumerate(lists):
        name = f"lists[{k}]"
        filled = fill_none("project_many", name, basis, one)
        check_list("project_many", name, filled, basis)
        tensors += filled
    with torch.no_grad():
        return call(
            "project_many", _raw.project_many.default, basis, tensors, len(lists), scale=scale
        )


def reconstruct(
    origin: Tensor | None, basis: Tensor, theta: Tensor, *, scale: Tensor | None = None
) -> Tensor:
    """Flat weights origin + theta @ basis = w0 + P theta.

    Parameters
    ----------
    origin : Tensor, shape (n,), or None
        float32 (float64 with a float64 basis); None stands for zeros and reads no memory.
    basis, scale
        As in `project`.
    theta : Tensor, shape (d,)

    Returns
    -------
    Tensor, shape (n,)
        float32 (float64 for a float64 basis). Differentiable in theta (backward is `project`) and
        in origin.
    """
    if isinstance(basis, Tensor) and basis.requires_grad and torch.is_grad_enabled():
        raise ValueError("reconstruct: basis: expected a tensor that needs no gradient, got one")
    return call("reconstruct", _raw.reconstruct.default, origin, basis, theta, scale=scale)


def reconstruct_(
    params: Sequence[Tensor],
    origin: Tensor | None,
    basis: Tensor,
    theta: Tensor,
    *,
    scale: Tensor | None = None,
) -> None:
    """Writes origin + theta @ basis into a list of tensors, rounded once to each one's dtype.

    Arguments as in `reconstruct`; ``params`` holds n elements in all and may mix dtypes, strides
    and memory formats. Works on leaves that require a gradient (outside autograd).
    """
    with torch.no_grad():
        call("reconstruct_", _raw.reconstruct_.default, params, origin, basis, theta, scale=scale)
    _written(*params)


def reconstruct_residual(
    basis: Tensor,
    theta: Tensor,
    coordinates: Tensor,
    tensors: Sequence[Tensor | None],
    *,
    scale: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """P theta and the part of a gradient outside the subspace, with one read of the basis.

    Parameters
    ----------
    basis, scale
        As in `project`.
    theta, coordinates : Tensor, shape (d,)
    tensors : sequence of Tensor or None
        As in `project`.

    Returns
    -------
    direction : Tensor, shape (n,)
        theta @ basis, bitwise what `reconstruct` gives with origin None.
    residual : Tensor, shape (n,)
        flat(tensors) - coordinates @ basis, the product summed alone and subtracted once: the
        gradient less its projection if ``coordinates`` is what `project` gives. Both float32
        (float64 for a float64 basis).
    """
    name = "reconstruct_residual"
    tensors = fill_none(name, "tensors", basis, tensors)
    with torch.no_grad():
        return call(
            name, _raw.reconstruct_residual.default, basis, theta, coordinates, tensors, scale=scale
        )


def trial_(params: Sequence[Tensor], point: Tensor, direction: Tensor, alpha: float) -> None:
    """Writes point + alpha * direction into a list of tensors: one trial of a line search.

    Parameters
    ----------
    params : sequence of Tensor
        Written; n elements in all, any mix of dtypes and strides, rounded once.
    point, direction : Tensor, shape (n,)
        Both float32 or both float64.
    alpha : float
        Finite. The basis is not read: a trial moves 12 bytes a parameter.
    """
    with torch.no_grad():
        call("trial_", _raw.trial_.default, params, point, direction, alpha)
    _written(*params)


def gram(snapshots: Tensor, *, scale: Tensor | None = None) -> Tensor:
    """Gram matrix K = X X^T of stored rows.

    Parameters
    ----------
    snapshots : Tensor, shape (T, n)
    scale : Tensor, shape (T, ceil(n / 256)), optional

    Returns
    -------
    Tensor, shape (T, T), float64
        Symmetric to the bit.
    """
    with torch.no_grad():
        return call("gram", _raw.gram.default, snapshots, scale=scale)


def gram_append_(
    snapshots: Tensor,
    gram: Tensor,
    index: int,
    params: Sequence[Tensor],
    anchor: Tensor,
    *,
    scale: Tensor | None = None,
) -> None:
    """Stores one snapshot and its row of the Gram matrix, in one pass over the earlier rows.

    Row ``index`` of ``snapshots`` becomes flat(params) - anchor, rounded to the storage dtype;
    ``gram[index, :index + 1]`` and its mirror become the products of the *stored* rows.

    Parameters
    ----------
    snapshots : Tensor, shape (capacity, n)
        Written in row ``index`` alone; rows before it are read.
    gram : Tensor, shape (capacity, capacity), float64
    index : int
        0 <= index < capacity.
    params : sequence of Tensor
        n elements in all.
    anchor : Tensor, shape (n,)
        float32 (float64 with float64 snapshots).
    scale : Tensor, shape (capacity, ceil(n / 256)), optional
        For int8 and float8_e4m3fn: row ``index`` is written, largest |delta| of a block of 256
        over the largest stored value.
    """
    with torch.no_grad():
        call(
            "gram_append_",
            _raw.gram_append_.default,
            snapshots,
            gram,
            index,
            params,
            anchor,
            scale=scale,
        )
    _written(snapshots, gram, *(() if scale is None else (scale,)))


def store_snapshot_(
    snapshots: Tensor,
    index: int,
    params: Sequence[Tensor],
    anchor: Tensor,
    *,
    scale: Tensor | None = None,
) -> None:
    """Stores one snapshot exactly as `gram_append_` does, without any product.

    Arguments as in `gram_append_`. No other row is read; `gram_block_` makes the products later.
    """
    with torch.no_grad():
        call(
            "store_snapshot_",
            _raw.store_snapshot_.default,
            snapshots,
            index,
            params,
            anchor,
            scale=scale,
        )
    _written(snapshots, *(() if scale is None else (scale,)))


def gram_block_(
    snapshots: Tensor, gram: Tensor, index: int, count: int, *, scale: Tensor | None = None
) -> None:
    """Rows ``index``, ..., ``index + count - 1`` of the Gram matrix of rows stored already.

    Fills ``gram[index : index + count, : index + count]`` and its mirror, bit for bit as ``count``
    calls of `gram_append_` would have, with one read of the rows before ``index``.

    Parameters
    ----------
    snapshots : Tensor, shape (capacity, n)
        Rows up to ``index + count - 1`` are read.
    gram : Tensor, shape (capacity, capacity), float64
    index, count : int
        0 <= index, 1 <= count, index + count <= capacity.
    scale : Tensor, shape (capacity, ceil(n / 256)), optional
        For int8 and float8_e4m3fn snapshots.
    """
    with torch.no_grad():
        call("gram_block_", _raw.gram_block_.default, snapshots, gram, index, count, scale=scale)
    _written(gram)


def form_basis(
    snapshots: Tensor,
    coefficients: Tensor,
    *,
    scale: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Basis rows coefficients @ snapshots, chunk by chunk: no second (T, n) array.

    Parameters
    ----------
    snapshots : Tensor, shape (T, n)
    coefficients : Tensor, shape (d, T), float32 or float64
        Products are accumulated in float64 and rounded once.
    scale : Tensor, shape (T, ceil(n / 256)), optional
        For int8 and float8_e4m3fn snapshots.
    dtype : torch.dtype, optional
        float32, bfloat16, float16 or float64; default the snapshots' (float32 if quantised).

    Returns
    -------
    Tensor, shape (d, n)
    """
    with torch.no_grad():
        return call(
            "form_basis", _raw.form_basis.default, snapshots, coefficients, scale=scale, dtype=dtype
        )


def _written(*tensors: Tensor) -> None:
    """Tells autograd that the tensors changed, so that a stale saved tensor is noticed."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)
