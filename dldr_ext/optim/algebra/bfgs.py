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

# Relative: y.s must exceed this part of |y||s|. Below it, rounding in y decides the update.
CURVATURE_TOLERANCE = 1e-8
# Relative: the cosine of the angle between -c and the direction must exceed this.
DESCENT_TOLERANCE = 1e-10
# Beyond this condition number rounding decides whether B is still positive definite.
CONDITION_LIMIT = 1e12
# No direction starts with less than this part of the longest one's scale.
FIRST_GUESS_FLOOR = 1e-3
# Squared lengths below this may underflow in products.
_TINY = 1e-200
# The published test is absolute.
PUBLISHED_CURVATURE = 1e-20
# Powell's constant: the damped y keeps at least this part of the curvature that B believes in.
POWELL_THRESHOLD = 0.2


def first_guess(dim: int, singular_values: Tensor | None = None) -> Tensor:
    """The matrix B of a search that knows nothing of the loss yet, (dim, dim) float64.

    The identity; or diag(sigma_i / sigma_1), if it is known how far training went along each
    direction: a long way means little curvature there. On digit classification (64-64-64-10 and
    a small convolutional network, d = 20) that saved two thirds of the passes over the data.
    """
    if singular_values is None:
        return torch.eye(dim, dtype=torch.float64, device="cpu")
    sigma = singular_values.to(device="cpu", dtype=torch.float64)
    guess = (sigma / sigma.max()).clamp_min(FIRST_GUESS_FLOOR)
    return torch.diag(guess) if bool(guess.isfinite().all()) else first_guess(dim)


def descent_direction(b: Tensor, c: Tensor) -> tuple[Tensor, float] | None:
    """Quasi-Newton direction p = -B c and its slope c.p, or None if p does not go downhill."""
    return downhill(torch.mv(b, c).neg_(), c)


def downhill(p: Tensor, c: Tensor) -> tuple[Tensor, float] | None:
    """p and its slope c.p, or None if p does not clearly go downhill."""
    slope = float(torch.dot(c, p))
    bound = DESCENT_TOLERANCE * float(torch.linalg.vector_norm(c) * torch.linalg.vector_norm(p))
    return (p, slope) if math.isfinite(bound) and slope < -bound else None


def condition(b: Tensor) -> float:
    """A lower bound on the condition number of B; infinite if B is not positive definite.

    Damping bounds the curvature of one update from below, not what many updates in conflicting
    directions add up to. The bound is that of the Cholesky factor's diagonal; O(d^3 / 3).
    """
    factor, failed = torch.linalg.cholesky_ex(b)
    if bool(failed):
        return math.inf
    diagonal = factor.diagonal()
    bound = (float(diagonal.max()) / float(diagonal.min())) ** 2
    return bound if math.isfinite(bound) else math.inf


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


def trusted(
    s: Tensor, y: Tensor, *, hs: Tensor | None = None, damped: bool
) -> tuple[Tensor, float, bool] | None:
    """What a pair (s, y) has to tell, or None if it tells nothing that can be trusted.

    Returns
    -------
    y : Tensor, shape (d,)
        As given, or with Powell's damping.
    sy : float
        y.s of that, more than 1e-8 |y||s|.
    changed : bool
        Whether y was damped.
    """
    ss, yy, sy = float(torch.dot(s, s)), float(torch.dot(y, y)), float(torch.dot(s, y))
    if not (math.isfinite(ss + yy + sy) and min(ss, yy) > _TINY):
        return None
    kept = y
    if damped and hs is not None:
        y = powell_damped(y, s, hs)
        yy, sy = float(torch.dot(y, y)), float(torch.dot(s, y))
    if not sy > CURVATURE_TOLERANCE * math.sqrt(ss * yy):
        return None
    return y, sy, y is not kept


def update(
    b: Tensor,
    s: Tensor,
    y: Tensor,
    *,
    hs: Tensor | None = None,
    fresh: bool,
    damped: bool,
) -> tuple[Tensor, bool] | None:
    """The next B and whether y was damped; None where the pair tells nothing: see `trusted`.

    Parameters
    ----------
    b : Tensor, shape (d, d), float64
    s, y : Tensor, shape (d,), float64
    hs : Tensor, shape (d,), optional
        B^-1 s where it is known; solved for otherwise, and only if damping needs it.
    fresh : bool
        B is a first guess: it is first scaled by y.s / y.By (Nocedal & Wright, 6.20, for B = I)
        where that is more than 1. A guess that is too large is left to the line search, which
        shortens steps but does not lengthen them; scaling it down too made training slower.
    damped : bool
        Use Powell's damping. Without it, a pair with y.s <= 1e-8 |y||s| is skipped.
    """
    if fresh:
        scale = first_scale(s, y, torch.mv(b, y))
        b, hs = b * scale, None if hs is None else hs / scale
    if damped and hs is None:
        hs = torch.linalg.solve(b, s)
    pair = trusted(s, y, hs=hs, damped=damped)
    if pair is None:
        return None
    y, sy, changed = pair
    return _inverse_bfgs(b, s, y, sy), changed


def first_scale(s: Tensor, y: Tensor, by: Tensor) -> float:
    """y.s / y.By, by which a first guess B explains the first pair, or 1.

    1 where it is no number or less than 1.
    """
    top, bottom = float(torch.dot(s, y)), float(torch.dot(y, by))
    scale = top / bottom if bottom > _TINY else 1.0
    return scale if math.isfinite(scale) and scale > 1.0 else 1.0


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
