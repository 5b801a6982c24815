"""The small problem of a principal component analysis: from a Gram matrix to coefficients.

T snapshots of n numbers each, T far below n: the directions come from the T x T Gram matrix K (the
"method of snapshots"), float64 throughout. Only `exact_gram` reads the snapshots.
"""

from __future__ import annotations

import operator
from typing import NamedTuple

import torch
from torch import Tensor

from . import ops
from ._stored_rows import Matrix, column_pieces

MAX_DIM = 1024

# Shares of the largest eigenvalue (of the Gram matrix before it is centred) up to which one is not
# told from zero.
#
# The ops add products of float32 numbers in float32 within a tile of some thousand elements and in
# float64 beyond it: each entry of their K is off by some 1e-7 of |x_i| |x_j| at most (far less
# where many tiles average it out). A symmetric error E moves each eigenvalue by at most ||E||, so
# that one of 1e-7 of the largest may be all error, and its eigenvector arbitrary.
_FLOAT32_SUMS = 2.0**-22
# With float64 sums: a few roundings of the sums and of the eigensolver; and where the snapshots are
# float32 or less, 4e-6 in terms of singular values, the length that a direction of float32 updates
# loses in the noise of their own arithmetic.
_FLOAT64_SUMS, _FLOAT64_SUMS_OF_FLOAT32 = 2.0**-44, 2.0**-36
# A float32 weight is off by up to 2^-24 of itself (2^-25.3 in the root mean square), independently
# in each snapshot: a direction with an eigenvalue below this share of |w|^2 is made of just that.
_WEIGHTS, _WEIGHTS_OF_FLOAT64 = 2.0**-48, 2.0**-104

# Of a float64 chunk: near a CPU's caches; on a GPU enough to be worth its launches.
_CHUNK_BYTES = {"cpu": 1 << 25, "cuda": 1 << 29}
_PIECE = 1 << 22  # elements of a flat vector


class Spectrum(NamedTuple):
    """Eigenvalues (T,), descending, none negative; eigenvectors as rows (T, T); rank."""

    values: Tensor
    vectors: Tensor
    rank: int

    def explained(self, count: int) -> Tensor:
        """Share of the variance along each of the first ``count`` directions."""
        return self.values[:count] / self.values.sum()


def checked_dim(dim: int, limit: int, have: str) -> int:
    """``dim`` as an int, if 1 <= dim <= min(limit, 1024); ``have`` says where the limit is from."""
    result = operator.index(dim)
    limit = min(limit, MAX_DIM)
    if not 1 <= result <= limit:
        raise ValueError(f"dim: expected 1 <= dim <= {limit} ({have}), got {result}")
    return result


def stored_spectrum(gram: Tensor, dtype: torch.dtype) -> Spectrum:
    """Centred spectrum of a Gram matrix that the ops made of snapshots of ``dtype``."""
    share = _FLOAT64_SUMS if dtype == torch.float64 else _FLOAT32_SUMS
    return _spectrum(gram, True, share, 0.0)


def square_of(weights: Tensor) -> Tensor:
    """|w|^2, float64. Piece by piece: each is copied to float64."""
    norms = [torch.linalg.vector_norm(w, dtype=torch.float64) for w in weights.split(_PIECE)]
    return torch.stack(norms).square().sum()


def exact_spectrum(gram: Tensor, double: bool, weights: Tensor, *, center: bool) -> Spectrum:
    """Spectrum of an `exact_gram`.

    Parameters
    ----------
    gram : Tensor, shape (T, T)
    double : bool
        The weights and the snapshots are float64 (else at least one of them is float32 or less).
    weights : Tensor, shape (n,)
        One point of the trajectory: how large the weights are.
    center : bool
    """
    square = float(square_of(weights))
    if double:
        return _spectrum(gram, center, _FLOAT64_SUMS, _WEIGHTS_OF_FLOAT64 * square)
    return _spectrum(gram, center, _FLOAT64_SUMS_OF_FLOAT32, _WEIGHTS * square)


def _spectrum(gram: Tensor, center: bool, share: float, floor: float) -> Spectrum:
    """Eigenvalues and eigenvectors of K or, centred, of H K H with H = I - 11^T / T.

    Signs are set as scikit-learn's svd_flip does: the largest entry of each eigenvector, by
    magnitude, is positive.
    """
    gram = gram.detach().cpu()
    floor = max(floor, share * float(torch.linalg.eigvalsh(gram)[-1]))
    values, vectors = torch.linalg.eigh(centered(gram) if center else gram)
    values, vectors = values.flip(0).clamp_min(0), vectors.T.flip(0)
    peaks = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    vectors = torch.where(peaks < 0, -vectors, vectors)
    return Spectrum(values, vectors, int((values > floor).sum()))


def centered(gram: Tensor) -> Tensor:
    """H K H, symmetric to the bit."""
    columns = gram.mean(0)
    result = gram - columns[None, :] - columns[:, None] + columns.mean()
    return (result + result.T) / 2


def coefficients(found: Spectrum, dim: int, *, center: bool = True) -> Tensor:
    """C = diag(1 / sigma) V_d^T H, shape (d, T): the basis is C X."""
    result = found.vectors[:dim] / found.values[:dim, None].sqrt()
    return result - result.mean(1, keepdim=True) if center else result


def exact_gram(snapshots: Matrix, *, relative: bool = False) -> Tensor:
    """Gram matrix summed in float64 throughout, chunk by chunk; shape (T, T), float64.

    The float32 sums of `ops.gram` are off by up to 1e-7 of the largest eigenvalue, which a
    direction with 1e-3 of the variance feels as 1e-4: its basis row would be that far from unit
    length and from orthogonal to the first. One more pass with float64 sums removes that.

    Parameters
    ----------
    snapshots : Tensor, StoredRows or ScaledRows, shape (T, n)
    relative : bool
        Of the differences from the first row. Raw weights differ by little, so that the Gram
        matrix of the weights themselves would lose these differences.
    """
    rows = len(snapshots)
    gram = torch.zeros(rows, rows, dtype=torch.float64, device=snapshots.device)
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
    """Columns of a chunk: a multiple of 4096 set by the number of rows and the kind of device."""
    return columns_together(len(matrix), matrix.device)


def columns_together(rows: int, device: torch.device) -> int:
    """The same for so many rows."""
    size = _CHUNK_BYTES.get(device.type, _CHUNK_BYTES["cpu"])
    return max(4096, size // (8 * rows) // 4096 * 4096)


def orthonormalize_(basis: Tensor) -> None:
    """Makes linearly independent rows orthonormal in place, chunk by chunk (Cholesky QR).

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
    """Coefficients (r, T) of the first ``dim`` linearly independent rows, orthonormalised in order.

    Works on the Gram matrix alone. A row whose part orthogonal to the earlier ones has a squared
    length of less than 2^-44 of its own is left out: r may be less than ``dim``.
    """
    gram = gram.detach().cpu()
    found: list[Tensor] = []
    for t in range(len(gram)):
        if len(found) == dim:
            break
        row = torch.zeros_like(gram[t])
        row[t] = 1
        for _ in range(2):  # twice is enough (Kahan and Parlett)
            for earlier in found:
                row -= (earlier @ gram @ row) * earlier
        square = float(row @ gram @ row)
        if square > _FLOAT64_SUMS * float(gram[t, t]):
            found.append(row / square**0.5)
    return torch.stack(found) if found else gram[:0].clone()
