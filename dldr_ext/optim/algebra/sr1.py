"""SR1 in the direct form and its trust region: pure functions of float64 d-vectors.

H approximates the Hessian in the subspace and may be indefinite, which a line search on -H^-1 c
could not use: the direction minimises the model c.p + p.Hp / 2 over |p| <= radius, exactly.
References: Nocedal & Wright, Numerical Optimization (2nd edition, 2006), section 6.2 (SR1), 4.3
(the exact subproblem) and algorithm 6.2 (the radius); Nocedal & Yuan, "Combining trust region and
line search techniques" (1998): where the step is too long, backtrack along p instead of solving
anew, which here saves a pass over the basis for every rejected trial.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Relative: |r.s| must exceed this part of |r||s|, r = y - Hs (Nocedal & Wright, 6.26).
UPDATE_TOLERANCE = 1e-8
# Agreement of the loss with the model: below the first the region shrinks, above the second it
# may grow (Nocedal & Wright, algorithm 6.2).
POOR, GOOD = 0.1, 0.75
# Parts of c smaller than this, relative to the largest, are none: their squares underflow.
_NOTHING = 1e-150
# Relative accuracy of |p| = radius.
_BOUNDARY = 1e-10


def update(h: Tensor, s: Tensor, y: Tensor) -> Tensor | None:
    """H + r r' / r.s with r = y - Hs (Nocedal & Wright, 6.24), or None where r.s is too small.

    Parameters
    ----------
    h : Tensor, shape (d, d), float64, symmetric
    s, y : Tensor, shape (d,), float64
    """
    r = y - torch.mv(h, s)
    rs = float(torch.dot(r, s))
    bound = UPDATE_TOLERANCE * float(torch.linalg.vector_norm(r) * torch.linalg.vector_norm(s))
    if not (math.isfinite(bound) and abs(rs) > bound):
        return None
    new = h + torch.outer(r, r / rs)
    new = 0.5 * (new + new.T)
    return new if bool(new.isfinite().all()) else None


@dataclass(frozen=True)
class ModelStep:
    """Minimiser of the model inside the region.

    Attributes
    ----------
    p : Tensor, shape (d,)
    slope, curvature : float
        c.p and p.Hp.
    length : float
        |p|.
    condition : float
        Largest by smallest eigenvalue of H, in absolute value.
    """

    p: Tensor
    slope: float
    curvature: float
    length: float
    condition: float

    def predicted(self, alpha: float) -> float:
        """The decrease that the model expects of the step alpha p."""
        return -alpha * (self.slope + 0.5 * alpha * self.curvature)


def model_step(h: Tensor, c: Tensor, radius: float) -> ModelStep | None:
    """Solves the subproblem by one eigen-decomposition of H; None if there is none.

    Parameters
    ----------
    h : Tensor, shape (d, d), float64, symmetric
    c : Tensor, shape (d,), float64
    radius : float
        > 0; infinity is allowed where H is positive definite.

    Notes
    -----
    In eigenvectors the solution is p_i = -c_i / (lambda_i + mu), mu >= max(0, -lambda_1). With
    t = lambda_1 + mu and the gaps lambda_i - lambda_1 >= 0 the divisors gap_i + t are exact
    however close mu comes to -lambda_1, so that only c_1 = 0 is left of the hard case.
    """
    if not bool(h.isfinite().all()) or not bool(c.isfinite().all()):
        return None
    values, vectors = torch.linalg.eigh(h)
    rotated = torch.mv(vectors.T, c)
    rotated[rotated.abs() < _NOTHING * rotated.abs().max()] = 0.0
    lowest = float(values[0])
    gaps = values - lowest
    t = max(lowest, 0.0)
    q = _shifted(rotated, gaps + t)
    length = float(torch.linalg.vector_norm(q))
    if length > radius or not math.isfinite(length):
        q = _shifted(rotated, gaps + _boundary_shift(rotated, gaps, radius, t))
        length = float(torch.linalg.vector_norm(q))
    elif lowest < 0.0 and math.isfinite(radius):  # the hard case: no part of c along the lowest
        q[0] += math.sqrt(max(radius * radius - length * length, 0.0))
        length = radius
    if not math.isfinite(length):
        return None
    sizes = values.abs()
    return ModelStep(
        p=torch.mv(vectors, q),
        slope=float(torch.dot(rotated, q)),
        curvature=float(torch.dot(values, q * q)),
        length=length,
        condition=float(sizes.max()) / max(float(sizes.min()), 1e-300),
    )


def next_radius(radius: float, step: ModelStep, alpha: float, decrease: float) -> float:
    """The radius after an accepted step alpha p.

    Parameters
    ----------
    radius : float
    step : ModelStep
    alpha : float
    decrease : float
        f(w) - f(w + alpha u); NaN where the loss was not evaluated: the radius stays.
    """
    moved = alpha * step.length
    if moved == 0.0:
        return radius
    if math.isinf(radius):  # the first step: the only scale there is
        return 2.0 * moved
    if math.isnan(decrease):
        return radius
    predicted = step.predicted(alpha)
    ratio = decrease / predicted if predicted > 0.0 else 1.0
    if ratio < POOR:
        return 0.5 * moved
    if alpha < 1.0:  # the search had to go back
        return moved
    return max(radius, 2.0 * moved) if ratio > GOOD and moved > 0.8 * radius else radius


def _shifted(rotated: Tensor, divisors: Tensor) -> Tensor:
    """-rotated / divisors, and 0 where both are 0."""
    return torch.where(rotated == 0.0, torch.zeros_like(rotated), -rotated / divisors)


def _boundary_shift(rotated: Tensor, gaps: Tensor, radius: float, t: float) -> float:
    """t with |rotated / (gaps + t)| = radius: Newton's method on 1 / |p|, kept in a bracket.

    1 / |p(t)| is almost linear in t (Nocedal & Wright, algorithm 4.3).
    """
    lowest = rotated[gaps == 0.0]
    low = max(t, float(torch.linalg.vector_norm(lowest)) / radius)
    high = float(torch.linalg.vector_norm(rotated)) / radius
    t = low  # from the left Newton's method converges without overshooting
    for _ in range(100):
        divisors = gaps + t
        q = _shifted(rotated, divisors)
        length = float(torch.linalg.vector_norm(q))
        if abs(length - radius) <= _BOUNDARY * radius:
            break
        low, high = (t, high) if length > radius else (low, t)
        derivative = float(torch.dot(q, _shifted(q, divisors)))  # |p| d|p|/dt
        guess = low if derivative == 0.0 else t - length**2 / derivative * (length / radius - 1.0)
        t = guess if low < guess < high else 0.5 * (low + high)
    return t
