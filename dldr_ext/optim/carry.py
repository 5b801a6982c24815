"""What an optimizer knows, in the coordinates of another subspace: pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from .._affine import AffineSubspace

__all__ = ["carried_inverse_hessian", "overlap"]

# Directions that are projected together: one pass over the new basis for so many vectors of n.
_TOGETHER = 8


def overlap(new: AffineSubspace, old: AffineSubspace) -> Tensor:
    """M = P'^T P, shape (d', d), float64 on the CPU: how the old directions lie in the new ones."""
    columns = []
    for begin in range(0, old.dim, _TOGETHER):
        some = range(begin, min(begin + _TOGETHER, old.dim))
        columns.append(new.project_many([[old.direction(i)] for i in some]))
    return torch.cat(columns).T.to(device="cpu", dtype=torch.float64)


def carried_inverse_hessian(b: Tensor, m: Tensor) -> Tensor:
    """B' = M B M^T + tau (I - M M^T), symmetric positive definite.

    The first term is the old B as the new directions see it; the second, which is zero where the
    new subspace lies in the old one, stands for what the old one knew nothing about, with the
    geometric mean of the eigenvalues' sizes for tau. With orthonormal bases, x^T B' x is at least
    the smallest of the eigenvalues of B and tau, times |x|^2.

    Parameters
    ----------
    b : Tensor, shape (d, d), float64
        Symmetric positive definite.
    m : Tensor, shape (d', d), float64
        `overlap` of the two subspaces.

    Returns
    -------
    Tensor, shape (d', d'), float64
        Symmetric to the bit.
    """
    typical = torch.linalg.eigvalsh(b).abs().log().mean().exp()
    identity = torch.eye(len(m), dtype=torch.float64, device="cpu")
    shares, directions = torch.linalg.eigh(identity - m @ m.T)
    shares.clamp_(0.0, 1.0)  # rounding of the bases
    result = m @ b @ m.T + typical * (directions * shares) @ directions.T
    return (result + result.T) / 2
