"""Calls of the raw ops: errors that name the argument, and None in lists of gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..tensors.parameters import type_name
from .library import device_problem


def fill_none(
    op: str, name: str, basis: Tensor, tensors: Sequence[Tensor | None]
) -> Sequence[Tensor]:
    """Replace the Nones of a list by one zero of stride 0."""
    if not isinstance(tensors, (list, tuple)) or not any([t is None for t in tensors]):
        return tensors  # type: ignore[return-value]  # a list without None, or diagnosed later
    places = [i for i, t in enumerate(tensors) if t is None]
    if not isinstance(basis, Tensor) or basis.dim() != 2:
        _diagnose(op, {"basis": basis})
    first, last = places[0], places[-1]
    if last - first + 1 != len(places):
        raise ValueError(
            f"{op}: {name}: the Nones at {places} do not stand side by side, so the size of "
            "each is unknown; pass torch.zeros((), device=...).expand(shape) for each instead"
        )
    rest = [t for t in tensors if t is not None]
    _check_tensors(op, name, rest)
    missing = basis.shape[1] - sum(t.numel() for t in rest)
    if missing < 0:
        raise ValueError(
            f"{op}: {name}: expected {basis.shape[1]} elements in all (columns of basis), "
            f"got {basis.shape[1] - missing} beside None"
        )
    zero = torch.zeros((), dtype=torch.float32, device=basis.device).expand(missing)
    return [*rest[:first], zero, *rest[first:]]


def check_list(op: str, name: str, tensors: Any, basis: Any) -> None:
    """Check one of several lists before they are joined: then they cannot be told apart."""
    if not isinstance(tensors, (list, tuple)) or not all([isinstance(t, Tensor) for t in tensors]):
        _check_sequence(op, name, tensors)
    if not isinstance(basis, Tensor) or basis.dim() != 2:
        return  # the op refuses it
    total = sum([t.numel() for t in tensors])
    if total != basis.shape[1]:
        raise ValueError(
            f"{op}: {name}: expected {basis.shape[1]} elements in all (columns of basis), "
            f"got {total}"
        )


def call(name: str, op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call the raw op; turn its RuntimeError into a ValueError or TypeError.

    The checks live in C++ and cost nothing here. Only a failed call is looked at again: the ops
    mark their own messages with the exception's name, and what the dispatcher refuses before an op
    is reached (sparse, mixed devices, not a tensor) is diagnosed in Python, and so is a device that
    this build has no kernels for.
    """
    try:
        return op(*args, **kwargs)
    except (RuntimeError, TypeError) as error:
        schema = [argument.name for argument in op._schema.arguments]  # type: ignore[attr-defined]
        _diagnose(name, dict(zip(schema, args, strict=False)) | kwargs)
        name_of_error, _, rest = str(error).partition("\n")[0].partition(": ")
        if name_of_error == "ValueError":
            raise ValueError(rest) from None
        if name_of_error == "TypeError":
            raise TypeError(rest) from None
        raise


_LISTS = ("params", "tensors")
_NUMBERS = {"index": int, "count": int, "lists": int, "alpha": (int, float)}
_OPTIONAL = ("origin", "scale", "dtype")


def _diagnose(name: str, arguments: dict[str, Any]) -> None:
    """Raise an error for what the dispatcher refuses, if there is something."""
    devices: dict[torch.device, str] = {}
    for argument, value in arguments.items():
        if value is None and argument in _OPTIONAL:
            continue
        if argument == "dtype":
            if not isinstance(value, torch.dtype):
                raise TypeError(f"{name}: dtype: expected a torch.dtype, got {type_name(value)}")
        elif argument in _NUMBERS:
            if isinstance(value, bool) or not isinstance(value, _NUMBERS[argument]):  # type: ignore[arg-type]
                raise TypeError(f"{name}: {argument}: expected a number, got {type_name(value)}")
        elif argument in _LISTS:
            _check_sequence(name, argument, value)
            for i, tensor in enumerate(value):
                devices.setdefault(tensor.device, f"{argument}[{i}]")
        else:
            _check_tensors(name, argument, value)
            devices.setdefault(value.device, argument)
    if len(devices) > 1:
        where = ", ".join(f"{argument} on {device}" for device, argument in devices.items())
        raise ValueError(
            f"{name}: expected all tensors on one device, got {where}; move them to one with "
            ".to(device)"
        )
    for device, argument in devices.items():
        problem = device_problem(device)
        if problem is not None:
            raise ValueError(f"{name}: {argument}: {problem}")


def _check_sequence(name: str, argument: str, value: Any) -> None:
    if isinstance(value, Tensor) or not isinstance(value, (list, tuple)):
        got = type_name(value)
        raise TypeError(f"{name}: {argument}: expected a list or tuple of tensors, got {got}")
    _check_tensors(name, argument, value)


def _check_tensors(name: str, argument: str, value: Any) -> None:
    many = argument in _LISTS or argument.startswith("lists[")
    for i, tensor in enumerate(value if many else [value]):
        label = f"{argument}[{i}]" if many else argument
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: {label}: expected a tensor, got {type_name(tensor)}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name}: {label}: expected a dense tensor, got {tensor.layout}")
        if tensor.is_complex():
            raise TypeError(f"{name}: {label}: expected a real dtype, got {tensor.dtype}")
