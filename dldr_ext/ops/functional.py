"""The ops as functions with checked arguments: see `dldr_ext.ops`.

Every function raises ``TypeError`` or ``ValueError`` for an argument that is not as described, with
its name, what was expected and what came; nothing has been written then.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..tensors.derivatives import needed, refuse, refuse_transforms
from ..tensors.parameters import type_name
from .errors import call, check_list, fill_none

_raw = torch.ops.dldr_ext
_AS_IT_IS = nullcontext()


def _as_numbers(
    basis: Any, scale: Tensor | None, tensors: Sequence[Tensor | None]
) -> AbstractContextManager[None]:
    """Return what to call an op in: past autograd's kernel, in Python, where nothing needs it.

    That takes half of a small call. Subclasses and what torch.compile traces go the whole way.
    """
    whole = torch.compiler.is_compiling() or type(basis) is not Tensor
    if whole or not isinstance(tensors, (list, tuple)) or needed(basis, scale, *tensors):
        return _AS_IT_IS
    below: AbstractContextManager[None] = torch._C._AutoDispatchBelowAutograd()
    return below


def project(
    basis: Tensor, tensors: Sequence[Tensor | None], *, scale: Tensor | None = None
) -> Tensor:
    """Return the coordinates c = basis @ flat(tensors), the projected gradient P^T g.

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
        float32 (float64 for a float64 basis). Differentiable in the tensors, in both modes and to
        any order (backward is `reconstruct`); ``torch.func`` and ``torch.vmap`` go through.

    Raises
    ------
    TypeError, ValueError
        Another kind of argument than described, or another number of elements than the basis has
        columns; a basis or scale that requires a gradient, since there is none.

    See Also
    --------
    project_many : Several lists with one read of the basis.
    reconstruct : The way back, from coordinates to weights.

    References
    ----------
    Li, Tan, Huang, Tao, Liu, Huang, "Low Dimensional Trajectory Hypothesis is True: DNNs Can Be
    Trained in Tiny Subspaces", IEEE TPAMI 2022 (arXiv:2103.11154).

    Examples
    --------
    >>> import torch
    >>> from dldr_ext import ops
    >>> basis = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.6, 0.8]])
    >>> ops.project(basis, [torch.tensor([2.0]), torch.tensor([[1.0], [2.0]])])
    tensor([2.0000, 2.2000])
    """
    tensors = fill_none("project", "tensors", basis, tensors)
    with _as_numbers(basis, scale, tensors):
        return call("project", _raw.project.default, basis, tensors, scale=scale)


def project_many(
    basis: Tensor,
    lists: Sequence[Sequence[Tensor | None]],
    *,
    scale: Tensor | None = None,
) -> Tensor:
    """Return the coordinates of several lists of tensors, with one read of the basis.

    Parameters
    ----------
    basis, scale
        As in `project`.
    lists : sequence of sequences of Tensor or None
        At least one; n elements in each, None as in `project`.

    Returns
    -------
    Tensor, shape (len(lists), d)
        Row k is bitwise what `project` gives for ``lists[k]``. Differentiable as that is; then
        the basis is read once for each list.

    Raises
    ------
    TypeError, ValueError
        As in `project`, with the list that differs.

    See Also
    --------
    project : One list, differentiable.

    Examples
    --------
    >>> import torch
    >>> from dldr_ext import ops
    >>> basis = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.6, 0.8]])
    >>> gradient, weights = [torch.tensor([2.0, 1.0, 2.0])], [torch.ones(1), torch.zeros(2)]
    >>> ops.project_many(basis, [gradient, weights])
    tensor([[2.0000, 2.2000],
            [1.0000, 0.0000]])
    """
    if isinstance(lists, Tensor) or not isinstance(lists, (list, tuple)):
        raise TypeError(
            f"project_many: lists: expected a list or tuple of lists, got {type_name(lists)}"
        )
    tensors: list[Tensor] = []
    for k, listed in enumerate(lists):
        name = f"lists[{k}]"
        filled = fill_none("project_many", name, basis, listed)
        check_list("project_many", name, filled, basis)
        tensors += filled
    if lists and needed(basis, scale, *tensors):
        return torch.stack([project(basis, listed, scale=scale) for listed in lists])
    with torch.no_grad():
        return call(
            "project_many", _raw.project_many.default, basis, tensors, len(lists), scale=scale
        )


def reconstruct(
    origin: Tensor | None, basis: Tensor, theta: Tensor, *, scale: Tensor | None = None
) -> Tensor:
    """Return the flat weights origin + theta @ basis = w0 + P theta.

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
        in origin, as `project` is.

    Raises
    ------
    TypeError, ValueError
        As in `project`.

    See Also
    --------
    reconstruct_ : The same, written into a list of parameters.
    project : The way back, from a gradient to its coordinates.

    Examples
    --------
    >>> import torch
    >>> from dldr_ext import ops
    >>> basis = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.6, 0.8]])
    >>> ops.reconstruct(torch.ones(3), basis, torch.tensor([2.0, 5.0]))
    tensor([3., 4., 5.])
    """
    with _as_numbers(basis, scale, (origin, theta)):
        return call("reconstruct", _raw.reconstruct.default, origin, basis, theta, scale=scale)


def reconstruct_(
    params: Sequence[Tensor],
    origin: Tensor | None,
    basis: Tensor,
    theta: Tensor,
    *,
    scale: Tensor | None = None,
) -> None:
    """Write origin + theta @ basis into a list of tensors, rounded once to each one's dtype.

    Parameters
    ----------
    params : sequence of Tensor
        Written; n elements in all, any mix of dtypes, strides and memory formats. Leaves that
        require a gradient are written too (outside autograd).
    origin, basis, theta, scale
        As in `reconstruct`. Their values are read, as ``theta.data`` does: the derivative is that
        of `reconstruct`, and dual numbers and tensors of a transform of torch.func are refused.

    Raises
    ------
    TypeError, ValueError
        As in `reconstruct`; a tensor that cannot be written. No tensor has been written then.

    See Also
    --------
    reconstruct : The same as a new tensor, differentiable.
    trial_ : Another point on a line that was reconstructed once, without reading the basis.

    Examples
    --------
    >>> import torch
    >>> from dldr_ext import ops
    >>> weight, bias = torch.zeros(1, 2), torch.zeros(1, dtype=torch.bfloat16)
    >>> basis = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.6, 0.8]])
    >>> ops.reconstruct_([weight, bias], torch.ones(3), basis, torch.tensor([2.0, 5.0]))
    >>> weight, bias
    (tensor([[3., 4.]]), tensor([5.], dtype=torch.bfloat16))
    """
    refuse_transforms(
        "reconstruct_", theta=theta, params=params, origin=origin, basis=basis, scale=scale
    )
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
    """Return P theta and the part of a gradient outside the subspace, with one read of the basis.

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
        (float64 for a float64 basis). Differentiable as `reconstruct` is; then the basis is read
        twice.

    Raises
    ------
    TypeError, ValueError
        As in `project`.

    See Also
    --------
    project : The coordinates, which have to be complete before this pass begins.

    Examples
    --------
    >>> import torch
    >>> from dldr_ext import ops
    >>> basis, gradient = torch.tensor([[1.0, 0.0, 0.0]]), [torch.tensor([2.0, 1.0, 3.0])]
    >>> ops.reconstruct_residual(basis, torch.ones(1), ops.project(basis, gradient), gradient)
    (tensor([1., 0., 0.]), tensor([0., 1., 3.]))
    """
    name = "reconstruct_residual"
    tensors = fill_none(name, "tensors", basis, tensors)
    if isinstance(tensors, (list, tuple)) and needed(basis, scale, theta, coordinates, *tensors):
        check_list(name, "tensors", tensors, basis)
        direction = reconstruct(None, basis, theta, scale=scale)
        gradient = torch.cat([t.reshape(-1).to(direction.dtype) for t in tensors])
        return direction, gradient - reconstruct(None, basis, coordinates, scale=scale)
    with torch.no_grad():
        return call(
            name, _raw.reconstruct_residual.default, basis, theta, coordinates, tensors, scale=scale
        )


def trial_(params: Sequence[Tensor], point: Tensor, direction: Tensor, alpha: float) -> None:
    """Write point + alpha * direction into a list of tensors: one trial of a line search.

    Parameters
    ----------
    params : sequence of Tensor
        Written; n elements in all, any mix of dtypes and strides, rounded once.
    point, direction : Tensor, shape (n,)
        Both float32 or both float64.
    alpha : float
        Finite. The basis is not read: a trial moves 12 bytes a parameter.

    Raises
    ------
    TypeError, ValueError
        An alpha that is not finite, vectors of two lengths. No tensor has been written then.

    Examples
    --------
    >>> import torch
    >>> from dldr_ext import ops
    >>> params = [torch.zeros(2), torch.zeros(1)]
    >>> ops.trial_(params, torch.zeros(3), torch.tensor([1.0, 2.0, 3.0]), 0.5)
    >>> params
    [tensor([0.5000, 1.0000]), tensor([1.5000])]
    """
    refuse_transforms("trial_", params=params, point=point, direction=direction)
    with torch.no_grad():
        call("trial_", _raw.trial_.default, params, point, direction, alpha)
    _written(*params)


def gram(snapshots: Tensor, *, scale: Tensor | None = None) -> Tensor:
    """Return the Gram matrix K = X X^T of stored rows.

    Parameters
    ----------
    snapshots : Tensor, shape (T, n)
    scale : Tensor, shape (T, ceil(n / 256)), optional
        For int8 and float8_e4m3fn.

    Returns
    -------
    Tensor, shape (T, T), float64
        Symmetric to the bit.

    Raises
    ------
    TypeError, ValueError
        Another kind of matrix, or a scale that does not belong to it; a tensor that requires a
        gradient while gradients are recorded, since there is none.

    See Also
    --------
    gram_append_ : One row, together with storing its snapshot.

    Examples
    --------
    >>> import torch
    >>> from dldr_ext import ops
    >>> ops.gram(torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]]))
    tensor([[ 5.,  2.],
            [ 2., 10.]], dtype=torch.float64)
    """
    refuse("gram", snapshots=snapshots, scale=scale)
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
    """Store one snapshot and its row of the Gram matrix, in one pass over the earlier rows.

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

    Raises
    ------
    TypeError, ValueError
        An index out of range, another number of elements than the snapshots have columns. Nothing
        has been written then.

    See Also
    --------
    store_snapshot_, gram_block_ : The two halves, for products that are made later together.

    Examples
    --------
    >>> import torch
    >>> from dldr_ext import ops
    >>> snapshots, gram = torch.zeros(2, 3), torch.zeros(2, 2, dtype=torch.float64)
    >>> anchor = torch.ones(3)
    >>> ops.gram_append_(snapshots, gram, 0, [torch.tensor([2.0, 1.0, 3.0])], anchor)
    >>> ops.gram_append_(snapshots, gram, 1, [torch.tensor([1.0, 4.0, 2.0])], anchor)
    >>> snapshots
    tensor([[1., 0., 2.],
            [0., 3., 1.]])
    >>> gram
    tensor([[ 5.,  2.],
            [ 2., 10.]], dtype=torch.float64)
    """
    refuse_transforms(
        "gram_append_", snapshots=snapshots, gram=gram, params=params, anchor=anchor, scale=scale
    )
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
    """Store one snapshot exactly as `gram_append_` does, without any product.

    Parameters
    ----------
    snapshots, index, params, anchor, scale
        As in `gram_append_`; no other row is read.

    Raises
    ------
    TypeError, ValueError
        As in `gram_append_`.

    See Also
    --------
    gram_block_ : Makes the products later.

    Examples
    --------
    >>> import torch
    >>> from dldr_ext import ops
    >>> snapshots = torch.zeros(2, 3, dtype=torch.bfloat16)
    >>> ops.store_snapshot_(snapshots, 1, [torch.tensor([2.0, 1.0, 3.0])], torch.ones(3))
    >>> snapshots
    tensor([[0., 0., 0.],
            [1., 0., 2.]], dtype=torch.bfloat16)
    """
    refuse_transforms(
        "store_snapshot_", snapshots=snapshots, params=params, anchor=anchor, scale=scale
    )
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
    """Fill rows ``index``, ..., ``index + count - 1`` of the Gram matrix of rows stored already.

    Writes ``gram[index : index + count, : index + count]`` and its mirror, bit for bit as ``count``
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

    Raises
    ------
    TypeError, ValueError
        Rows out of range, a Gram matrix that is too small. Nothing has been written then.

    See Also
    --------
    store_snapshot_ : Stores the rows.

    Examples
    --------
    >>> import torch
    >>> from dldr_ext import ops
    >>> snapshots = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]])
    >>> gram = torch.zeros(2, 2, dtype=torch.float64)
    >>> ops.gram_block_(snapshots, gram, 0, 2)
    >>> gram
    tensor([[ 5.,  2.],
            [ 2., 10.]], dtype=torch.float64)
    """
    refuse_transforms("gram_block_", snapshots=snapshots, gram=gram, scale=scale)
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
    """Return the basis rows coefficients @ snapshots, chunk by chunk: no second (T, n) array.

    Parameters
    ----------
    snapshots : Tensor, shape (T, n)
    coefficients : Tensor, shape (d, T), float32 or float64
        Products are accumulated in float64 and rounded once; of bfloat16 snapshots into a
        bfloat16 basis in float32 where the processor has matrix instructions.
    scale : Tensor, shape (T, ceil(n / 256)), optional
        For int8 and float8_e4m3fn snapshots.
    dtype : torch.dtype, optional
        float32, bfloat16, float16 or float64; default the snapshots' (float32 if quantised).

    Returns
    -------
    Tensor, shape (d, n)
        Not differentiable.

    Raises
    ------
    TypeError, ValueError
        Coefficients of other snapshots or of more than 1,024 rows, an 8-bit ``dtype``; a tensor
        that requires a gradient while gradients are recorded.

    Examples
    --------
    >>> import torch
    >>> from dldr_ext import ops
    >>> snapshots = torch.tensor([[1.0, 0.0, 2.0], [0.0, 3.0, 1.0]])
    >>> ops.form_basis(snapshots, torch.tensor([[1.0, -1.0]], dtype=torch.float64))
    tensor([[ 1., -3.,  1.]])
    """
    refuse("form_basis", snapshots=snapshots, coefficients=coefficients, scale=scale)
    with torch.no_grad():
        return call(
            "form_basis", _raw.form_basis.default, snapshots, coefficients, scale=scale, dtype=dtype
        )


def _written(*tensors: Tensor) -> None:
    """Tell autograd that the tensors changed, so that a stale saved tensor is noticed."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)
