"""The fused, memory-bound ops over lists of parameter tensors.

Notation: ``n`` parameters in all, ``d`` basis rows, ``T`` snapshots. ``basis`` is P^T, shape
(d, n). Flat order is logical order: the concatenation of ``t.reshape(-1)`` over the list, whatever
the memory format of each tensor.

Storage dtypes of ``basis`` and ``snapshots``: float32, bfloat16, float16, float64; int8 and
float8_e4m3fn together with ``scale``, float32 of shape (d, ceil(n / 256)): element i of row r
stands for ``basis[r, i] * scale[r, i // 256]``. Tensor lists may mix float32, bfloat16, float16
and float64. Arithmetic is float32 (float64 for a float64 basis) with float64 across chunks, in an
order set by n alone: results are bitwise the same from run to run, and on CPU for any number of
threads and any way the same flat vector is cut into tensors.

Bad input raises ``ValueError`` or ``TypeError`` before anything is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "form_basis",
    "gram",
    "gram_append_",
    "project",
    "reconstruct",
    "reconstruct_",
    "trial_",
]

SCALE_BLOCK = 256
_QUANTIZED = (torch.int8, torch.float8_e4m3fn)
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
    tensors = _fill_none(basis, tensors)
    return _call("project", _raw.project.default, basis, tensors, scale=scale)


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
    return _call("reconstruct", _raw.reconstruct.default, origin, basis, theta, scale=scale)


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
        _call("reconstruct_", _raw.reconstruct_.default, params, origin, basis, theta, scale=scale)
    _written(*params)


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
        _call("trial_", _raw.trial_.default, params, point, direction, alpha)
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
        return _call("gram", _raw.gram.default, snapshots, scale=scale)


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
        _call(
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
        return _call(
            "form_basis", _raw.form_basis.default, snapshots, coefficients, scale=scale, dtype=dtype
        )


def _written(*tensors: Tensor) -> None:
    """Tells autograd that the tensors changed, so that a stale saved tensor is noticed."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version(tensors)


def _fill_none(basis: Tensor, tensors: Sequence[Tensor | None]) -> Sequence[Tensor]:
    """Puts one stride-0 zero in the place of the Nones of a list."""
    if not isinstance(tensors, (list, tuple)) or not any(t is None for t in tensors):
        return tensors  # type: ignore[return-value]  # a list without None, or diagnosed later
    places = [i for i, t in enumerate(tensors) if t is None]
    if not isinstance(basis, Tensor) or basis.dim() != 2:
        _diagnose("project", {"basis": basis})
    first, last = places[0], places[-1]
    if last - first + 1 != len(places):
        raise ValueError(
            f"project: tensors: the Nones at {places} do not stand side by side, so the size of "
            "each is unknown; pass torch.zeros((), device=...).expand(shape) for each instead"
        )
    rest = [t for t in tensors if t is not None]
    _check_tensors("project", "tensors", rest)
    missing = basis.shape[1] - sum(t.numel() for t in rest)
    if missing < 0:
        raise ValueError(
            f"project: tensors: expected {basis.shape[1]} elements in all (columns of basis), "
            f"got {basis.shape[1] - missing} beside None"
        )
    zero = torch.zeros((), dtype=torch.float32, device=basis.device).expand(missing)
    return [*rest[:first], zero, *rest[first:]]


def _call(name: str, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Calls the raw op; turns its RuntimeError into a ValueError or TypeError.

    The checks live in C++ and cost nothing here. Only a failed call is looked at again: the ops
    mark their own messages with the exception's name, and what the dispatcher refuses before an op
    is reached (sparse, mixed devices, not a tensor) is diagnosed in Python.
    """
    try:
        return op(*args, **kwargs)
    except (RuntimeError, TypeError) as error:
        schema = [argument.name for argument in op._schema.arguments]  # type: ignore[attr-defined]
        _diagnose(name, dict(zip(schema, args, strict=False)) | kwargs)
        kind, _, rest = str(error).partition("\n")[0].partition(": ")
        if kind == "ValueError":
            raise ValueError(rest) from None
        if kind == "TypeError":
            raise TypeError(rest) from None
        raise


_LISTS = ("params", "tensors")
_NUMBERS = {"index": int, "alpha": (int, float)}
_OPTIONAL = ("origin", "scale", "dtype")


def _diagnose(name: str, arguments: dict[str, Any]) -> None:
    """Raises for what the dispatcher refuses; returns if nothing is found."""
    devices: dict[torch.device, str] = {}
    for argument, value in arguments.items():
        if value is None and argument in _OPTIONAL:
            continue
        if argument == "dtype":
            if not isinstance(value, torch.dtype):
                raise TypeError(f"{name}: dtype: expected a torch.dtype, got {_kind(value)}")
        elif argument in _NUMBERS:
            if isinstance(value, bool) or not isinstance(value, _NUMBERS[argument]):  # type: ignore[arg-type]
                raise TypeError(f"{name}: {argument}: expected a number, got {_kind(value)}")
        elif argument in _LISTS:
            if isinstance(value, Tensor) or not isinstance(value, (list, tuple)):
                raise TypeError(
                    f"{name}: {argument}: expected a list or tuple of tensors, got {_kind(value)}"
                )
            _check_tensors(name, argument, value)
            for i, tensor in enumerate(value):
                devices.setdefault(tensor.device, f"{argument}[{i}]")
        else:
            _check_tensors(name, argument, value)
            devices.setdefault(value.device, argument)
    if len(devices) > 1:
        where = ", ".join(f"{argument} on {device}" for device, argument in devices.items())
        raise ValueError(f"{name}: expected all tensors on one device, got {where}")


def _check_tensors(name: str, argument: str, value: Any) -> None:
    many = argument in _LISTS
    for i, tensor in enumerate(value if many else [value]):
        label = f"{argument}[{i}]" if many else argument
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {label}: expected a tensor, got {_kind(tensor)}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name}: {label}: expected a dense tensor, got {tensor.layout}")
        if tensor.is_complex():
            raise TypeError(f"{name}: {label}: expected a real dtype, got {tensor.dtype}")


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__
