"""BFGS in the inverse form: pure functions of float64 d-vectors, and the matrix H that they keep.

H approximates the inverse Hessian in the subspace, c is the projected gradient, s a step of theta
and y the change of c along s. References: Nocedal & Wright, Numerical Optimization (2nd edition,
2006), sections 6.1 and 18.3; Powell, "Algorithms for nonlinear constraints that use Lagrangian
functions", Math. Programming 14 (1978).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..status import Curvature
from .transfer import transferred

# Relative: y.s must exceed this part of |y||s|. Below it, rounding in y decides the update.
CURVATURE_TOLERANCE = 1e-8
# Relative: the cosine of the angle between -c and the direction must exceed this.
DESCENT_TOLERANCE = 1e-10
# Beyond this condition number rounding decides whether H is still positive definite.
CONDITION_LIMIT = 1e12
# Squared lengths below this may underflow in products.
_TINY = 1e-200
# The published test is absolute.
PUBLISHED_CURVATURE = 1e-20
# Powell's constant: the damped y keeps at least this part of the curvature that H predicts.
POWELL_THRESHOLD = 0.2
# Up to this d the op takes half the time of the functions on a CPU; from 100 on it takes more.
_SMALL = 64

_quasi_newton_ = torch.ops.dldr_ext.quasi_newton_.default


def descent_direction(h: Tensor, c: Tensor) -> tuple[Tensor, float] | None:
    """Return p = -H c and its slope c.p, or None if p does not clearly go downhill."""
    p = torch.mv(h, c).neg_()
    slope = float(torch.dot(c, p))
    bound = DESCENT_TOLERANCE * float(torch.linalg.vector_norm(c) * torch.linalg.vector_norm(p))
    return (p, slope) if math.isfinite(bound) and slope < -bound else None


def condition(h: Tensor) -> float:
    """Return a lower bound on the condition number of H; infinite if H is not positive definite.

    Damping bounds the curvature of one update from below, not what many updates in conflicting
    directions add up to. The bound is that of the Cholesky factor's diagonal; O(d^3 / 3).
    """
    factor, failed = torch.linalg.cholesky_ex(h)
    if bool(failed):
        return math.inf
    diagonal = factor.diagonal()
    bound = (float(diagonal.max()) / float(diagonal.min())) ** 2
    return bound if math.isfinite(bound) else math.inf


def powell_damped(y: Tensor, s: Tensor, predicted: Tensor) -> Tensor:
    """Return y with Powell's damping: y, or the mix of y and H^-1 s that keeps enough curvature.

    Parameters
    ----------
    y, s : Tensor, shape (d,)
    predicted : Tensor, shape (d,)
        H^-1 s, the y that H predicts. For a step s = alpha p along p = -H c that is -alpha c: no
        system is solved.

    Returns
    -------
    Tensor, shape (d,)
        r = t y + (1 - t) H^-1 s with r.s >= 0.2 s.H^-1 s, so that the update keeps H positive
        definite (Nocedal & Wright, procedure 18.2, for the inverse).
    """
    curvature, expected = float(torch.dot(s, y)), float(torch.dot(s, predicted))
    if curvature >= POWELL_THRESHOLD * expected:
        return y
    t = (1.0 - POWELL_THRESHOLD) * expected / (expected - curvature)
    return t * y + (1.0 - t) * predicted


def update(
    h: Tensor,
    s: Tensor,
    y: Tensor,
    *,
    predicted: Tensor | None = None,
    fresh: bool,
    damped: bool,
) -> tuple[Tensor, bool] | None:
    """Return the next H and whether y was damped; None where the pair (s, y) cannot be trusted.

    Parameters
    ----------
    h : Tensor, shape (d, d), float64
    s, y : Tensor, shape (d,), float64
    predicted : Tensor, shape (d,), optional
        H^-1 s where it is known; solved for otherwise, and only if damping needs it.
    fresh : bool
        H is an initial one: it is first scaled by y.s / y.Hy (Nocedal & Wright, 6.20, for H = I)
        where that is more than 1. One that is too large is left to the line search, which
        shortens steps but does not lengthen them; scaling it down too made training slower.
    damped : bool
        Use Powell's damping. Without it, a pair with y.s <= 1e-8 |y||s| is skipped.
    """
    if fresh:
        scale = initial_scale(s, y, torch.mv(h, y))
        h, predicted = h * scale, None if predicted is None else predicted / scale
    if damped and predicted is None:
        predicted = torch.linalg.solve(h, s)
    ss, yy, sy = float(torch.dot(s, s)), float(torch.dot(y, y)), float(torch.dot(s, y))
    if not (math.isfinite(ss + yy + sy) and min(ss, yy) > _TINY):
        return None
    as_given = y
    if damped and predicted is not None:
        y = powell_damped(y, s, predicted)
        yy, sy = float(torch.dot(y, y)), float(torch.dot(s, y))
    if not sy > CURVATURE_TOLERANCE * math.sqrt(ss * yy):
        return None
    return _inverse_bfgs(h, s, y, sy), y is not as_given


def initial_scale(s: Tensor, y: Tensor, hy: Tensor) -> float:
    """Return y.s / y.Hy, by which an initial H explains its first pair, where that is more than 1.

    1 where it is less, or no number.
    """
    top, bottom = float(torch.dot(s, y)), float(torch.dot(y, hy))
    scale = top / bottom if bottom > _TINY else 1.0
    return scale if math.isfinite(scale) and scale > 1.0 else 1.0


def published_update(h: Tensor, s: Tensor, y: Tensor) -> Tensor | None:
    """Return the next H by the rule of the DLDR paper's code: the plain update, if y.s > 1e-20."""
    sy = float(torch.dot(s, y))
    return _inverse_bfgs(h, s, y, sy) if sy > PUBLISHED_CURVATURE else None


def _inverse_bfgs(h: Tensor, s: Tensor, y: Tensor, sy: float) -> Tensor:
    """(I - s y'/sy) H (I - y s'/sy) + s s'/sy (Nocedal & Wright, 6.17) as a rank-two change.

    O(d^2), and symmetric to the bit if H is.
    """
    hy = torch.mv(h, y)
    v = (0.5 * (1.0 + float(torch.dot(y, hy)) / sy) / sy) * s - hy / sy
    change = torch.outer(s, v)
    return h + (change + change.T)


class Pair(NamedTuple):
    """A step s, the change y of c along it, and H^-1 s, the change that H predicted; (d,) each."""

    s: Tensor
    y: Tensor
    predicted: Tensor


class Rule(NamedTuple):
    """How H learns from a pair: as in `update`, or by `published_update`."""

    damped: bool
    published: bool


@dataclass
class Direction:
    """The direction p of a step, after H has learnt, and the numbers that go with it.

    Attributes
    ----------
    p : Tensor, shape (d,)
    unread : Tensor or None
        The numbers, where a GPU has them and the host does not: see `InverseHessian.read`.
    curvature : str
        What became of the pair, as in `StepRecord`.
    gradient_norm, slope, length : float
        |c|, c.p and |p|.
    downhill : bool
        Whether p goes downhill.
    from_initial : bool
        p is of the initial H, which is to replace one that gives no direction downhill.
    """

    p: Tensor
    unread: Tensor | None = None
    curvature: Curvature = "none"
    gradient_norm: float = math.nan
    slope: float = math.nan
    length: float = math.nan
    downhill: bool = False
    from_initial: bool = False


class InverseHessian:
    """The inverse Hessian H as it is learnt from step to step.

    On a GPU and where d is small it learns by the op ``quasi_newton_``, all of an update in one
    kernel; otherwise by the functions above, which do the same, but for rounding, with LAPACK.

    Parameters
    ----------
    initial : Tensor, shape (d, d), float64
        The diagonal matrix that `reset` goes back to; all other tensors are on its device.

    Attributes
    ----------
    matrix : Tensor, shape (d, d), float64
    fresh : bool
        Nothing has been learnt since the last reset.
    condition : float
        Estimate of the condition number, NaN where there is none.
    """

    def __init__(self, initial: Tensor) -> None:
        self.initial = initial
        self.reset()

    @property
    def _by_op(self) -> bool:
        return self.initial.device.type != "cpu" or len(self.initial) <= _SMALL

    def reset(self) -> None:
        """Forget all curvature."""
        self.matrix, self.fresh, self.condition = self.initial.clone(), True, math.nan

    def update(self, c: Tensor, pair: Pair | None, rule: Rule, *, ahead: bool) -> Direction:
        """Learn from the pair if there is one, then find the direction for c.

        With ``ahead`` nothing is read: all of it is the op, and its numbers are to be given to
        `read`. The op also resets H where it gives no direction downhill, as for a c of zero; the
        functions leave that to the caller (`Direction.from_initial`).
        """
        if ahead:
            return self._by_one_op(c, pair, rule)
        if self._by_op and 0.0 < float(torch.linalg.vector_norm(c)) < math.inf:
            direction = self._by_one_op(c, pair, rule)
            assert direction.unread is not None
            self.read(direction, direction.unread.tolist())
            return direction
        curvature: Curvature = "none" if pair is None else self.learn(pair, rule)
        descent, from_initial = descent_direction(self.matrix, c), False
        if descent is None:
            descent, from_initial = descent_direction(self.initial, c), True
        p, slope = (c, math.nan) if descent is None else descent
        return Direction(
            p,
            curvature=curvature,
            gradient_norm=float(torch.linalg.vector_norm(c)),
            slope=slope,
            length=float(torch.linalg.vector_norm(p)),
            downhill=descent is not None,
            from_initial=from_initial,
        )

    def read(self, direction: Direction, numbers: list[float]) -> None:
        """Take note of the numbers of an update that ran ahead of the host."""
        slope, gradient_norm, learnt, reset, downhill, condition, length = numbers
        direction.slope, direction.length, direction.downhill = slope, length, bool(downhill)
        direction.gradient_norm, direction.unread = gradient_norm, None
        if reset:
            self.fresh, self.condition, direction.curvature = True, math.nan, "reset"
        elif not learnt:
            direction.curvature = "skipped"
        else:
            self.fresh, self.condition = False, condition
            direction.curvature = "damped" if learnt == 2.0 else "updated"

    def learn(self, pair: Pair, rule: Rule) -> Curvature:
        """Learn from a pair, and say what became of it."""
        if self._by_op:
            # The direction is not used: any vector will do that a positive definite H turns into
            # one downhill.
            direction = self._by_one_op(torch.ones_like(pair.s), pair, rule)
            assert direction.unread is not None
            self.read(direction, direction.unread.tolist())
            return direction.curvature
        s, y, predicted = pair
        if rule.published:
            new = published_update(self.matrix, s, y)
            if new is None:
                return "skipped"
            self.matrix, self.fresh = new, False
            return "updated"
        updated = update(
            self.matrix, s, y, predicted=predicted, fresh=self.fresh, damped=rule.damped
        )
        if updated is None:
            return "skipped"
        self.condition = condition(updated[0])
        if self.condition >= CONDITION_LIMIT:
            self.reset()
            return "reset"
        self.matrix, self.fresh = updated[0], False
        return "damped" if updated[1] else "updated"

    def transfer(self, m: Tensor, initial: Tensor) -> None:
        """Go on in another subspace, M = P'^T P of shape (d', d), with its initial matrix."""
        old, fresh, self.initial = self.matrix, self.fresh, initial
        self.reset()
        if not fresh:
            new = transferred(old.cpu(), m).to(initial.device)
            bound = condition(new)
            if bound < CONDITION_LIMIT:
                self.matrix, self.fresh, self.condition = new, False, bound

    def _by_one_op(self, c: Tensor, pair: Pair | None, rule: Rule) -> Direction:
        s, y, predicted = pair or (None, None, None)
        p, numbers = _quasi_newton_(
            self.matrix, self.initial.diagonal(), c, s, y, predicted,
            fresh=self.fresh, damped=rule.damped, published=rule.published,
        )  # fmt: skip
        return Direction(p, unread=numbers)
