"""Stored bases: checks of the arguments that make one, and its 8-bit formats."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..pca.gram import column_step
from ..tensors.constants import MAX_DIM, SCALE_BLOCK
from ..tensors.formats import LARGEST, STORED, blocks, decoded, rounded, scale_of, wide_dtype
from ..tensors.memory import empty_rows, readable_rows
from ..tensors.parameters import DTYPES, dtype_name, dtype_names, type_name

_FORMATS = {"int8": torch.int8, "float8_e4m3fn": torch.float8_e4m3fn}


def quantize(basis: Tensor, scale: Tensor | None, format: str) -> tuple[Tensor, Tensor]:
    """Round a basis (d, n) to 8 bits, chunk by chunk; return it and its scale."""
    if format not in _FORMATS:
        raise ValueError(f"format: expected one of {sorted(_FORMATS)}, got {format!r}")
    step = column_step(basis)
    places = range(0, basis.shape[1], step)
    pieces = ((begin, values(basis, scale, begin, step, torch.float32)) for begin in places)
    return rounded(pieces, basis.shape, _FORMATS[format], basis.device)


def dequantize(basis: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the values of an 8-bit basis in ``dtype``, chunk by chunk."""
    result = empty_rows(*basis.shape, dtype=dtype, device=basis.device)
    step = column_step(basis)
    for begin in range(0, basis.shape[1], step):
        result[:, begin : begin + step] = values(basis, scale, begin, step, torch.float32)
    return result


def checked_basis(basis: Any) -> Tensor:
    """Return a basis as the ops read it, or raise an error that says what is wrong with it."""
    if not isinstance(basis, Tensor):
        raise TypeError(f"basis: expected a tensor, got {type_name(basis)}")
    if basis.dtype not in STORED:
        raise TypeError(
            f"basis: expected a dtype of {dtype_names(STORED)}, got {dtype_name(basis.dtype)}"
        )
    if basis.layout != torch.strided:
        raise TypeError(f"basis: expected a dense tensor, got {basis.layout}")
    if basis.dim() != 2 or not 1 <= basis.shape[0] <= MAX_DIM or basis.shape[1] == 0:
        raise ValueError(
            f"basis: expected shape (d, n) with 1 <= d <= {MAX_DIM} rows and n >= 1 columns, "
            f"got {tuple(basis.shape)}"
        )
    return readable_rows(basis.detach())


def checked_scale(scale: Any, basis: Tensor) -> Tensor | None:
    """Return the scale of an 8-bit basis, contiguous; None for other bases."""
    quantized = basis.dtype in LARGEST
    if scale is None:
        if quantized:
            raise ValueError(f"scale: a basis of {dtype_name(basis.dtype)} needs one, got None")
        return None
    if not isinstance(scale, Tensor):
        raise TypeError(f"scale: expected a tensor, got {type_name(scale)}")
    if not quantized:
        raise ValueError(
            f"scale: expected None for a basis of {dtype_name(basis.dtype)}, got a tensor"
        )
    if scale.dtype != torch.float32:
        raise TypeError(f"scale: expected float32, got {dtype_name(scale.dtype)}")
    shape = (basis.shape[0], blocks(basis.shape[1]))
    if scale.shape != shape:
        raise ValueError(
            f"scale: expected shape {shape}, one for each row and block of {SCALE_BLOCK} "
            f"columns, got {tuple(scale.shape)}"
        )
    if scale.device != basis.device:
        raise ValueError(f"scale: expected device {basis.device}, as basis, got {scale.device}")
    if not bool(scale.isfinite().all()):
        raise ValueError("scale: expected finite values, got NaN or Inf")
    return scale.detach().contiguous()


def checked_origin(origin: Any, basis: Tensor) -> Tensor:
    """Return the origin in the dtype of the arithmetic, finite and as long as the basis."""
    if not isinstance(origin, Tensor):
        raise TypeError(f"origin: expected a tensor, got {type_name(origin)}")
    if origin.dtype not in DTYPES or origin.layout != torch.strided:
        raise TypeError(
            f"origin: expected a dense floating-point tensor, got {dtype_name(origin.dtype)}, "
            f"{origin.layout}"
        )
    if origin.shape != (basis.shape[1],):
        raise ValueError(
            f"origin: expected shape ({basis.shape[1]},), the columns of basis, got "
            f"{tuple(origin.shape)}"
        )
    if origin.device != basis.device:
        raise ValueError(f"origin: expected device {basis.device}, as basis, got {origin.device}")
    origin = origin.detach().to(wide_dtype(basis.dtype)).contiguous()
    if not bool(torch.stack(torch.aminmax(origin)).isfinite().all()):  # no mask of n numbers
        raise ValueError("origin: expected finite values, got NaN or Inf")
    return origin


def values(
    basis: Tensor, scale: Tensor | None, begin: int, step: int, dtype: torch.dtype
) -> Tensor:
    """Return columns [begin, begin + step) as numbers; ``begin`` is a multiple of 256."""
    chunk = basis[:, begin : begin + step]
    factors = scale_of(scale, begin, begin + chunk.shape[1])
    return chunk.to(dtype) if factors is None else decoded(chunk, factors, dtype)
