"""What an average does with a tensor: mean of numbers, last of integers, codes as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tensors.parameters import DTYPES, dtype_name, is_dtensor

FLOAT, COMPLEX, INTEGER, OTHER = "floating-point", "complex", "integer", "another kind"
_COMPLEX = (torch.complex32, torch.complex64, torch.complex128)
_INTEGER = (
    torch.bool,
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
)
_COMPRESSED = {  # the parts of sparse tensors beside their values
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}


def kind_of_dtype(dtype: torch.dtype) -> str:
    """Return what the numbers of a dtype are; codes (float8, quantized, ...) are another kind."""
    if dtype in DTYPES:
        return FLOAT
    if dtype in _COMPLEX:
        return COMPLEX
    return INTEGER if dtype in _INTEGER else OTHER


def kind(value: Any) -> str | None:
    """Return what a value in a state dict is; None if it is not a tensor."""
    if not isinstance(value, Tensor):
        return None
    of_numbers = not (value.is_nested or value.is_quantized or value.is_meta) and (
        value.layout in (torch.strided, torch.sparse_coo)
    )
    plain = type(value).__torch_dispatch__ is Tensor.__torch_dispatch__ or is_dtensor(value)
    return kind_of_dtype(value.dtype) if of_numbers and plain else OTHER


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype that sums are formed in."""
    return torch.complex128 if dtype in _COMPLEX else torch.float64


def describe(value: Tensor) -> str:
    """Say what a tensor of another kind is."""
    if value.is_meta:
        return "a tensor on the meta device, without values"
    if value.is_nested:
        return "a nested tensor"
    if value.layout != torch.strided:
        return f"a tensor of layout {str(value.layout).removeprefix('torch.')}"
    name = dtype_name(value.dtype)
    return name if type(value) is Tensor else f"a {type(value).__name__} of {name}"


def same(one: Tensor, other: Tensor) -> bool:
    """Tell whether two tensors of any kind are equal to the bit."""
    if one is other:
        return True
    if one.is_meta or other.is_meta or type(one) is not type(other):
        return False
    if one.dtype != other.dtype or one.layout != other.layout:
        return False
    ours, theirs = _parts(one), _parts(other)
    if ours is None or theirs is None:
        same: bool = one.shape == other.shape and torch.equal(_bytes(one), _bytes(other))
        return same
    return len(ours) == len(theirs) and all(map(_same_part, ours, theirs))


def _same_part(one: Any, other: Any) -> bool:
    return same(one, other) if isinstance(one, Tensor) else bool(one == other)


def _parts(value: Tensor) -> list[Any] | None:
    """Return the plain tensors and numbers that one of a rare kind consists of; None for others."""
    if value.is_nested:
        return list(value.unbind())
    if value.layout in _COMPRESSED:
        indices = [getattr(value, part)() for part in _COMPRESSED[value.layout]]
        return [value.shape, *indices, value.values()]
    if value.layout == torch.sparse_coo:
        value = value.coalesce()
        return [value.shape, value.indices(), value.values()]
    if value.is_quantized:
        if value.qscheme() == torch.per_tensor_affine:
            return [value.int_repr(), value.q_scale(), value.q_zero_point()]
        scale = (value.q_per_channel_scales(), value.q_per_channel_zero_points())
        return [value.int_repr(), *scale, value.q_per_channel_axis()]
    if hasattr(value, "__tensor_flatten__"):
        names, context = value.__tensor_flatten__()
        return [*(getattr(value, name) for name in names), context]
    return None


def _bytes(value: Tensor) -> Tensor:
    value = value.detach().resolve_conj().resolve_neg().contiguous()
    return value.reshape(-1).view(torch.uint8)
