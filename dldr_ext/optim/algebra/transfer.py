"""The curvature learnt in one subspace, in the coordinates of another: pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from ...subspace.base import AffineSubspace

# Directions that are projected together: one pass over the new basis for so many vectors of n.
_TOGETHER = 8


def overlap(new: AffineSubspace, old: AffineSubspace) -> Tensor:
    """Return M = P'^T P, (d', d) float64 on the CPU: how the old directions lie in the new ones."""
    columns = []
    for begin in range(0, old.dim, _TOGETHER):
        end = min(begin + _TOGETHER, old.dim)
        columns.append(new.project_many([[old.direction(i)] for i in range(begin, end)]))
    return torch.cat(columns).T.to(device="cpu", dtype=torch.float64)


def transferred(matrix: Tensor, m: Tensor) -> Tensor:
    """Return M A M^T + tau (I - M M^T), symmetric to the bit.

    The first term is A as the new directions see it; the second, which is zero where the new
    subspace lies in the old one, stands for what the old one knew nothing about, with the
    geometric mean of the eigenvalues of A, by magnitude, for tau. With orthonormal bases and A
    positive definite, x^T A' x is at least |x|^2 times the smallest eigenvalue of A.

    Parameters
    ----------
    matrix : Tensor, shape (d, d), float64
        A, symmetric and not singular, such as an inverse Hessian.
    m : Tensor, shape (d', d), float64
        `overlap` of the two subspaces.

    Returns
    -------
    Tensor, shape (d', d'), float64
    """
    typical = torch.linalg.eigvalsh(matrix).abs().log().mean().exp()
    identity = torch.eye(len(m), dtype=torch.float64, device="cpu")
    unknown, directions = torch.linalg.eigh(identity - m @ m.T)
    unknown.clamp_(0.0, 1.0)  # rounding of the bases
    result = m @ matrix @ m.T + typical * (directions * unknown) @ directions.T
    return (result + result.T) / 2
