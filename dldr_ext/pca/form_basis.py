"""Bases as combinations of stored rows, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .. import ops
from ..tensors.formats import LARGEST, rounded
from ..tensors.matrices import Matrix, ScaledRows, stored_pieces
from ..tensors.memory import empty_rows


def combined(matrix: Matrix, coefficients: Tensor, dtype: torch.dtype, step: int) -> Tensor:
    """Return coefficients @ matrix, as `ops.form_basis`; stored rows ``step`` columns at a time."""
    if isinstance(matrix, Tensor):
        return ops.form_basis(matrix, coefficients, dtype=dtype)
    size = (len(coefficients), matrix.shape[1])
    result = empty_rows(*size, dtype=dtype, device=matrix.device)
    for begin, product in _combined_pieces(matrix, coefficients, dtype, step):
        result[:, begin : begin + product.shape[1]] = product
    return result


def formed(
    matrix: Matrix, coefficients: Tensor, dtype: torch.dtype, step: int
) -> tuple[Tensor, Tensor | None]:
    """Return `combined` in any storage dtype, and the scale of an 8-bit one: chunk by chunk."""
    if dtype not in LARGEST:
        return combined(matrix, coefficients, dtype, step), None
    size = (len(coefficients), matrix.shape[1])
    pieces = _combined_pieces(matrix, coefficients, torch.float32, step)
    return rounded(pieces, size, dtype, matrix.device)


def _combined_pieces(
    matrix: Matrix, coefficients: Tensor, dtype: torch.dtype, step: int
) -> Iterator[tuple[int, Tensor]]:
    skip = matrix.skip if isinstance(matrix, ScaledRows) else 0
    for begin, piece, scale in stored_pieces(matrix, step):
        product = ops.form_basis(piece, coefficients, scale=scale, dtype=dtype)
        yield begin, product[:, skip:]
