"""Line searches: pure functions of callables phi(alpha) = f(w + alpha u).

A trial whose loss is NaN or infinite counts as rejected. None of them knows about tensors.
References: Nocedal & Wright, Numerical Optimization (2nd edition, 2006), algorithms 3.1 (Armijo
backtracking), 3.5 and 3.6 (strong Wolfe).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from ..status import Status

Phi = Callable[[float], float]
# While the slope stays negative the step grows by a factor between these.
_GROWTH = (2.0, 10.0)
# An interpolated trial is at least this part of the one before.
_SHORTEST = 0.02
# An interpolated point keeps this part of the bracket away from its ends.
_MARGIN = 0.1


@dataclass(frozen=True)
class SearchResult:
    """The outcome of a line search.

    Attributes
    ----------
    status : Status
        ACCEPTED; DECREASED (strong Wolfe only: sufficient decrease without the curvature
        condition); LINE_SEARCH_FAILED.
    alpha : float
        Accepted step; 0.0 after a failure.
    loss : float
        phi(alpha); NaN where it was not evaluated (`fixed`).
    slope : float
        phi'(alpha); NaN where it was not evaluated (all but `strong_wolfe`).
    evaluations : int
        Number of trials.
    last : float
        The trial evaluated last: where the weights are now. NaN if there was none.
    """

    status: Status
    alpha: float
    loss: float
    slope: float
    evaluations: int
    last: float


@dataclass(frozen=True)
class _Point:
    alpha: float
    loss: float
    slope: float  # NaN: not evaluated


def fixed(alpha: float) -> SearchResult:
    """Return the step alpha without a search."""
    return SearchResult(Status.ACCEPTED, alpha, math.nan, math.nan, 0, math.nan)


def first_trial(lr: float, slope: float, decrease: float | None = None) -> float:
    """Return the first trial where ``lr`` is only known to be an upper bound.

    Parameters
    ----------
    lr, slope : float
        slope < 0.
    decrease : float or None
        What the search before has lowered the same function by: the step is the one that would do
        so again on a parabola (Nocedal & Wright, 3.60, as in SciPy's BFGS). None, where nothing is
        known: a step of length 1 in the metric of the initial H.
    """
    step = math.sqrt(-slope) if decrease is None else 1.01 * 2.0 * decrease
    return min(lr, step / -slope)


def armijo(
    phi: Phi,
    loss: float,
    slope: float,
    alpha: float,
    *,
    c1: float,
    backtrack: float,
    max_ls: int,
    interpolate: bool = False,
    resolution: float = 0.0,
) -> SearchResult:
    """Return the first of shorter and shorter trials with sufficient decrease.

    Parameters
    ----------
    phi : callable
    loss, slope : float
        phi(0) and phi'(0) < 0.
    alpha : float
        First trial.
    c1 : float
        Accepted is the first trial with phi(alpha) < phi(0) + c1 * alpha * phi'(0), strictly, as
        in the published algorithm.
    backtrack : float
        Factor in (0, 1) from trial to trial: they are alpha * backtrack^m, m = 0, 1, ...
    max_ls : int
        Largest number of trials.
    interpolate : bool
        Go on at the minimiser of the parabola through the trial, by ``backtrack`` shorter at least
        (Nocedal & Wright, 3.57).
    resolution : float
        Losses that differ by less are the same: no trial follows where the slope promises less.
    """
    trial, last = alpha, math.nan
    for m in range(max_ls):
        if m and -trial * slope < resolution:
            break
        value = phi(trial)
        if math.isfinite(value) and value < loss + c1 * trial * slope:
            return SearchResult(Status.ACCEPTED, trial, value, math.nan, m + 1, trial)
        last = trial
        trial = trial * backtrack if interpolate else alpha * backtrack ** (m + 1)
        if interpolate and math.isfinite(value):
            parabola = _minimiser(_Point(0.0, loss, slope), _Point(last, value, math.nan))
            trial = min(trial, max(parabola, _SHORTEST * last))
    else:
        m = max_ls
    return SearchResult(Status.LINE_SEARCH_FAILED, 0.0, math.nan, math.nan, m, last)


def strong_wolfe(
    phi: Phi,
    dphi: Phi,
    loss: float,
    slope: float,
    alpha: float,
    *,
    c1: float,
    c2: float = 0.9,
    backtrack: float = 0.5,
    max_ls: int,
    resolution: float = 0.0,
) -> SearchResult:
    """Find a step with sufficient decrease and |phi'(alpha)| <= c2 |phi'(0)|.

    Brackets such a step by growing alpha, then zooms into the bracket with cubic (quadratic, where
    a slope is missing) interpolation, kept off the ends of the bracket.

    Parameters
    ----------
    phi, dphi : callable
        Loss and slope. ``dphi(a)`` is called only right after ``phi(a)`` for the same a, and only
        where a's loss is low enough to be of interest.
    loss, slope : float
        phi(0) and phi'(0) < 0.
    alpha : float
        First trial.
    c1, c2 : float
        0 < c1 < c2 < 1.
    backtrack : float
        Where a trial is not finite, the next one goes this part of the way to it.
    max_ls : int
        Largest number of trials. If they run out, the lowest point with sufficient decrease is
        returned with status DECREASED, if there is one.
    resolution : float
        Losses that differ by less are the same: no trial follows where the bracket still begins at
        0 and the slope promises less.
    """
    start = _Point(0.0, loss, slope)
    low, high = start, None
    last, count = math.nan, 0
    while count < max_ls:
        trial = alpha if high is None else _inside(low, high, backtrack)
        if trial == low.alpha:  # the bracket has shrunk to a point
            break
        if count and low is start and -trial * slope < resolution:
            break
        last, count = trial, count + 1
        point = _Point(trial, phi(trial), math.nan)
        enough = point.loss <= loss + c1 * trial * slope and point.loss < low.loss
        if enough and math.isfinite(point.loss):
            point = _Point(trial, point.loss, dphi(trial))
            if not math.isfinite(point.slope):
                point = _Point(trial, math.inf, math.nan)
        if math.isnan(point.slope):  # too high, or not finite
            high = point
            continue
        if abs(point.slope) <= -c2 * slope:
            return SearchResult(Status.ACCEPTED, trial, point.loss, point.slope, count, trial)
        if high is None:
            if point.slope > 0.0:
                low, high = point, low
            else:
                alpha = _beyond(low, point)
                low = point
        else:
            if point.slope * (high.alpha - low.alpha) >= 0.0:
                high = low
            low = point
    if low is start:
        return SearchResult(Status.LINE_SEARCH_FAILED, 0.0, math.nan, math.nan, count, last)
    return SearchResult(Status.DECREASED, low.alpha, low.loss, low.slope, count, last)


def _inside(low: _Point, high: _Point, backtrack: float) -> float:
    """Return the next trial inside a bracket."""
    width = high.alpha - low.alpha
    if width == 0.0 or not math.isfinite(high.loss):
        return low.alpha + backtrack * width
    fraction = (_minimiser(low, high) - low.alpha) / width
    if not math.isfinite(fraction):
        fraction = 0.5
    return low.alpha + min(max(fraction, _MARGIN), 1.0 - _MARGIN) * width


def _beyond(previous: _Point, point: _Point) -> float:
    """Return the next, longer trial while the slope is still steep and negative."""
    shortest, longest = (factor * point.alpha for factor in _GROWTH)
    lowest = _minimiser(previous, point)
    return min(max(lowest, shortest), longest) if lowest > point.alpha else longest


def _minimiser(a: _Point, b: _Point) -> float:
    """Return the minimiser of the cubic through both losses and slopes (Nocedal & Wright, 3.59).

    Of the parabola through both losses and a's slope where b's slope is unknown. NaN if there is
    none.
    """
    width = b.alpha - a.alpha
    if math.isnan(b.slope):
        curvature = b.loss - a.loss - a.slope * width
        return a.alpha - 0.5 * a.slope * width * width / curvature if curvature > 0 else math.nan
    d1 = a.slope + b.slope - 3.0 * (a.loss - b.loss) / (a.alpha - b.alpha)
    square = d1 * d1 - a.slope * b.slope
    if not square >= 0.0:
        return math.nan
    d2 = math.copysign(math.sqrt(square), width)
    bottom = b.slope - a.slope + 2.0 * d2
    return b.alpha - width * (b.slope + d2 - d1) / bottom if bottom != 0.0 else math.nan
