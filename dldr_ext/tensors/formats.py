"""The 8-bit formats: numbers with one float32 scale for each row and block of 256 columns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from .constants import SCALE_BLOCK
from .memory import empty_rows
from .parameters import DTYPES

# The 8-bit formats, and the largest magnitude that each uses.
LARGEST = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
# The dtypes that rows may be stored in.
STORED = (*DTYPES, *LARGEST)
# Names of dtypes in the safetensors format.
SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.complex64: "C64",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# A block whose largest magnitude is below this is stored as zeros: its scale would be subnormal.
_SMALLEST = 448 * torch.finfo(torch.float32).tiny


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the arithmetic on rows of ``dtype``, of anchors and of origins."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def blocks(columns: int) -> int:
    """Return the number of scale blocks in a row."""
    return -(-columns // SCALE_BLOCK)


def block_range(begin: int, end: int) -> tuple[int, int]:
    """Return the scale block that column ``begin`` is in, and the end of those up to ``end``."""
    return begin // SCALE_BLOCK, blocks(end)


def row_bytes(columns: int, dtype: torch.dtype) -> int:
    """Return the bytes of a stored row, with its scale if it has one."""
    scale = blocks(columns) * torch.float32.itemsize if dtype in LARGEST else 0
    return columns * dtype.itemsize + scale


def empty_scale(
    rows: int, columns: int, dtype: torch.dtype, device: torch.device | str
) -> Tensor | None:
    """Return an uninitialised scale for rows of ``dtype``; None if they need none."""
    if dtype not in LARGEST:
        return None
    return torch.empty((rows, blocks(columns)), dtype=torch.float32, device=device)


def scale_of(scale: Tensor | None, begin: int, end: int, row: int | None = None) -> Tensor | None:
    """Return the scale of columns [begin, end), which begin with a block, as the ops take it.

    Of all rows, contiguous; or, to be written to, of one.
    """
    if scale is None:
        return None
    columns = slice(*block_range(begin, end))
    return scale[:, columns].contiguous() if row is None else scale[row : row + 1, columns]


def rounded(
    pieces: Iterable[tuple[int, Tensor]],
    shape: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> tuple[Tensor, Tensor]:
    """Round a matrix to 8 bits, piece by piece.

    Parameters
    ----------
    pieces : iterable of int and Tensor
        The column that each begins at, a multiple of the block size, and some columns in float32.
    shape : sequence of int
        Of the whole.
    dtype : torch.dtype
        int8 or float8_e4m3fn.
    device : torch.device

    Returns
    -------
    codes : Tensor of ``shape``
    scale : Tensor, shape (rows, blocks of the columns), float32
        The largest magnitude in each block over the largest of ``dtype``.

    Raises
    ------
    ValueError
        NaN or Inf.
    """
    rows, columns = shape
    codes = empty_rows(rows, columns, dtype=dtype, device=device)
    scale = torch.empty((rows, blocks(columns)), dtype=torch.float32, device=device)
    for begin, piece in pieces:
        width = piece.shape[1]
        chunk = functional.pad(piece, (0, -width % SCALE_BLOCK))
        chunk = chunk.view(rows, -1, SCALE_BLOCK)
        peak = chunk.abs().amax(2, keepdim=True)
        if not bool(peak.isfinite().all()):
            raise ValueError("basis: expected finite values, got NaN or Inf")
        peak = torch.where(peak < _SMALLEST, 0, peak)
        # Quotients of tensors, rounded once, as in the ops: torch divides a number otherwise.
        largest = torch.full_like(peak, LARGEST[dtype])
        inverse = torch.where(peak > 0, largest / peak, 0)
        # A rounding error of the product may pass the largest value by an ulp.
        values = (chunk * inverse).clamp_(-LARGEST[dtype], LARGEST[dtype])
        if dtype == torch.int8:
            values.round_()
        codes[:, begin : begin + width] = values.view(rows, -1)[:, :width].to(dtype)
        scale[:, slice(*block_range(begin, begin + width))] = (peak / largest)[:, :, 0]
    return codes, scale


def decoded(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the numbers that 8-bit rows stand for, from a block's first column on.

    Exact in float64.
    """
    rows, columns = codes.shape
    result = torch.empty((rows, scale.shape[1] * SCALE_BLOCK), dtype=dtype, device=codes.device)
    result[:, :columns] = codes
    result.view(*scale.shape, SCALE_BLOCK).mul_(scale[:, :, None])
    return result[:, :columns]
