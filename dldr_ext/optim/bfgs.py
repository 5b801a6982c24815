"""BFGS in the inverse form: pure functions of a few float64 vectors and one d x d matrix.

B approximates the inverse Hessian in the subspace, c is the projected gradient, s a step of theta
and y the change of c along s. References: Nocedal & Wright, Numerical Optimization (2nd edition,
2006), sections 6.1 and 18.3; Powell, "Algorithms for nonlinear constraints that use Lagrangian
functions", Math. Programming 14 (1978).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["descent_direction", "identity", "powell_damped", "published_update", "update"]

# Relative: y.s must exceed this part of |y||s|. Below it, rounding in y decides the update.
CURVATURE_TOLERANCE = 1e-8
# Relative: the cosine of the angle between -c and the direction must exceed this.
DESCENT_TOLERANCE = 1e-10
# The published test is absolute.
PUBLISHED_CURVATURE = 1e-20
# Powell's constant: the damped y keeps at least this part of the curvature that B believes in.
POWELL_THRESHOLD = 0.2


def identity(dim: int) -> Tensor:
    """The matrix B of a search that knows nothing yet, (dim, dim) float64."""
    return torch.eye(dim, dtype=torch.float64)


def descent_direction(b: Tensor, c: Tensor) -> tuple[Tensor, float] | None:
    """Quasi-Newton direction p = -B c and its slope c.p, or None if p does not go downhill."""
    p = torch.mv(b, c).neg_()
    slope = float(torch.dot(c, p))
    bound = DESCENT_TOLERANCE * float(torch.linalg.vector_norm(c) * torch.linalg.vector_norm(p))
    return (p, slope) if math.isfinite(bound) and slope < -bound else None


def powell_damped(y: Tensor, s: Tensor, hs: Tensor) -> Tensor:
    """Powell's damping: y, or the mix of y and B^-1 s that keeps enough curvature.

    Parameters
    ----------
    y, s : Tensor, shape (d,)
    hs : Tensor, shape (d,)
        B^-1 s. For a step s = alpha p along p = -B c that is -alpha c: no system is solved.

    Returns
    -------
    Tensor, shape (d,)
        r = t y + (1 - t) B^-1 s with r.s >= 0.2 s.B^-1 s, so that the update keeps B positive
        definite (Nocedal & Wright, procedure 18.2, with H = B^-1).
    """
    curvature, believed = float(torch.dot(s, y)), float(torch.dot(s, hs))
    if curvature >= POWELL_THRESHOLD * believed:
        return y
    t = (1.0 - POWELL_THRESHOLD) * believed / (believed - curvature)
    return t * y + (1.0 - t) * hs


def update(
    b: Tensor, s: Tensor, y: Tensor, *, hs: Tensor | None = None, fresh: bool, damped: bool
) -> Tensor | None:
    """The next B, or None where the pair (s, y) tells nothing that can be trusted.

    Parameters
    ----------
    b : Tensor, shape (d, d), float64
    s, y : Tensor, shape (d,), float64
    hs : Tensor, shape (d,), optional
        B^-1 s where it is known; solved for otherwise, and only if damping needs it.
    fresh : bool
        B has not been updated since it was set to the identity: it is first scaled by
        y.s / y.y (Nocedal & Wright, 6.20), if the curvature along s is positive.
    damped : bool
        Use Powell's damping. Without it, a pair with y.s <= 1e-8 |y||s| is skipped.
    """
    ss, yy, sy = float(torch.dot(s, s)), float(torch.dot(y, y)), float(torch.dot(s, y))
    if not (math.isfinite(ss + yy + sy) and ss > 0.0 and yy > 0.0):
        return None
    if fresh and sy > CURVATURE_TOLERANCE * math.sqrt(ss * yy):
        b, hs = identity(s.numel()) * (sy / yy), s * (yy / sy)
    if damped:
        y = powell_damped(y, s, torch.linalg.solve(b, s) if hs is None else hs)
        yy, sy = float(torch.dot(y, y)), float(torch.dot(s, y))
    if not sy > CURVATURE_TOLERANCE * math.sqrt(ss * yy):
        return None
    return _inverse_bfgs(b, s, y, sy)


def published_update(b: Tensor, s: Tensor, y: Tensor) -> Tensor | None:
    """The rule of the DLDR paper's code: the plain update, if y.s > 1e-20."""
    sy = float(torch.dot(s, y))
    return _inverse_bfgs(b, s, y, sy) if sy > PUBLISHED_CURVATURE else None


def _inverse_bfgs(b: Tensor, s: Tensor, y: Tensor, sy: float) -> Tensor:
    """(I - s y'/sy) B (I - y s'/sy) + s s'/sy (Nocedal & Wright, 6.17) as a rank-two change.

    O(d^2), and symmetric to the bit if B is.
    """
    by = torch.mv(b, y)
    v = (0.5 * (1.0 + float(torch.dot(y, by)) / sy) / sy) * s - by / sy
    change = torch.outer(s, v)
    return b + (change + change.T)
