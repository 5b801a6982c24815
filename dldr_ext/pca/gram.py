"""Gram matrices in float64, chunk by chunk, and bases made orthonormal through them."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..tensors.matrices import Matrix, column_pieces
from .spectrum import FLOAT64_SUMS

# Of a float64 chunk: near a CPU's caches; on a GPU enough to be worth its launches.
_CHUNK_BYTES = {"cpu": 1 << 25, "cuda": 1 << 29}


def exact_gram(snapshots: Matrix, *, relative: bool = False, total: Tensor | None = None) -> Tensor:
    """Return the Gram matrix summed in float64 throughout, chunk by chunk; shape (T, T), float64.

    The float32 sums of `ops.gram` are off by up to 1e-7 of the largest eigenvalue, which a
    direction with 1e-3 of the variance feels as 1e-4: its basis row would be that far from unit
    length and from orthogonal to the first. One more pass with float64 sums removes that.

    Parameters
    ----------
    snapshots : Tensor, StoredRows or ScaledRows, shape (T, n)
    relative : bool
        Of the differences from the first row. Raw weights differ by little, so that the Gram
        matrix of the weights themselves would lose these differences.
    total : Tensor, shape (T, T), optional
        Of the columns before these, which are added.
    """
    rows = len(snapshots)
    gram = torch.zeros(rows, rows, dtype=torch.float64, device=snapshots.device)
    if total is not None:
        gram += total
    step = column_step(snapshots)
    # One for all pieces: allocators may give a chunk back each time, and fresh memory is slow.
    size = rows * min(step, snapshots.shape[1])
    buffer = torch.empty(size, dtype=torch.float64, device=snapshots.device)
    for _, piece in column_pieces(snapshots, step):
        chunk = buffer[: piece.numel()].view(piece.shape).copy_(piece)
        if relative:
            chunk -= chunk[:1].clone()
        gram += ops.gram(chunk)
    return gram


def column_step(matrix: Matrix) -> int:
    """Return the columns of a chunk: a multiple of 4096, by the rows and the kind of device."""
    return columns_together(len(matrix), matrix.device)


def columns_together(rows: int, device: torch.device) -> int:
    """Return the columns of a chunk of so many rows."""
    size = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cpu"])
    return max(4096, size // (8 * rows) // 4096 * 4096)


def orthonormalize_(basis: Tensor) -> None:
    """Make linearly independent rows orthonormal in place, chunk by chunk (Cholesky QR).

    Row i stays in the span of rows 0 to i.
    """
    factor = torch.linalg.cholesky(exact_gram(basis).cpu())
    identity = torch.eye(len(factor), dtype=torch.float64, device="cpu")
    inverse = torch.linalg.solve_triangular(factor, identity, upper=False).to(basis.device)
    step = column_step(basis)
    for begin in range(0, basis.shape[1], step):
        chunk = basis[:, begin : begin + step]
        chunk.copy_(ops.form_basis(chunk.contiguous(), inverse))


def gram_schmidt(gram: Tensor, dim: int) -> Tensor:
    """Return coefficients (r, T) of the first ``dim`` independent rows, orthonormalised in order.

    Works on the Gram matrix alone. A row whose part orthogonal to the earlier ones has a squared
    length of less than 2^-44 of its own is left out: r may be less than ``dim``.
    """
    gram = gram.detach().cpu()
    combinations: list[Tensor] = []
    for t in range(len(gram)):
        if len(combinations) == dim:
            break
        row = torch.zeros_like(gram[t])
        row[t] = 1
        for _ in range(2):  # twice is enough (Kahan and Parlett)
            for earlier in combinations:
                row -= (earlier @ gram @ row) * earlier
        square = float(row @ gram @ row)
        if square > FLOAT64_SUMS * float(gram[t, t]):
            combinations.append(row / square**0.5)
    return torch.stack(combinations) if combinations else gram[:0].clone()
