"""Line searches as functions of a number."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import pytest

from dldr_ext import Status
from dldr_ext.optim.algebra.line_search import armijo, first_trial, fixed, strong_wolfe

Function = Callable[[float], float]


class Recorded:
    """A function and its derivative; checks the promise about the order of calls."""

    def __init__(self, f: Function, df: Function) -> None:
        self.f, self.df = f, df
        self.trials: list[float] = []
        self.slopes: list[float] = []

    def phi(self, alpha: float) -> float:
        self.trials.append(alpha)
        return self.f(alpha)

    def dphi(self, alpha: float) -> float:
        assert alpha == self.trials[-1]
        self.slopes.append(alpha)
        return self.df(alpha)

    def wolfe(self, alpha: float, **options: float) -> object:
        options = {"c1": 1e-4, "c2": 0.9, "max_ls": 40} | options
        return strong_wolfe(self.phi, self.dphi, self.f(0.0), self.df(0.0), alpha, **options)


def yanai(beta1: float, beta2: float) -> tuple[Function, Function]:
    """Functions 4 to 6 of Moré and Thuente (1994)."""
    g1 = math.sqrt(1 + beta1**2) - beta1
    g2 = math.sqrt(1 + beta2**2) - beta2
    return (
        lambda a: g1 * math.hypot(1 - a, beta2) + g2 * math.hypot(a, beta1),
        lambda a: g1 * (a - 1) / math.hypot(1 - a, beta2) + g2 * a / math.hypot(a, beta1),
    )


FUNCTIONS: dict[str, tuple[Function, Function]] = {
    "parabola": (lambda a: (a - 3) ** 2, lambda a: 2 * (a - 3)),
    "quartic": (lambda a: (a - 2) ** 4 - a, lambda a: 4 * (a - 2) ** 3 - 1),
    "more-thuente 1": (lambda a: -a / (a * a + 2), lambda a: (a * a - 2) / (a * a + 2) ** 2),
    "more-thuente 2": (
        lambda a: (a + 0.004) ** 5 - 2 * (a + 0.004) ** 4,
        lambda a: 5 * (a + 0.004) ** 4 - 8 * (a + 0.004) ** 3,
    ),
    "more-thuente 4": yanai(0.001, 0.001),
    "more-thuente 5": yanai(0.01, 0.001),
    "more-thuente 6": yanai(0.001, 0.01),
    "wavy": (lambda a: math.sin(3 * a) - a, lambda a: 3 * math.cos(3 * a) - 1),
    "exponential": (lambda a: math.exp(-a) + 0.01 * a * a, lambda a: -math.exp(-a) + 0.02 * a),
}
DESCENDING = {k: v for k, v in FUNCTIONS.items() if v[1](0.0) < 0}


@pytest.mark.parametrize("c2", [0.9, 0.1])
@pytest.mark.parametrize("alpha", [1e-3, 0.1, 1.0, 10.0, 1e3])
@pytest.mark.parametrize("name", DESCENDING)
def test_strong_wolfe_conditions_hold(name: str, alpha: float, c2: float) -> None:
    f, df = FUNCTIONS[name]
    recorded = Recorded(f, df)
    result = recorded.wolfe(alpha, c2=c2)
    assert result.status is Status.ACCEPTED
    assert result.loss == f(result.alpha) and result.slope == df(result.alpha)
    assert f(result.alpha) <= f(0.0) + 1e-4 * result.alpha * df(0.0)
    assert abs(df(result.alpha)) <= c2 * abs(df(0.0))
    assert result.evaluations == len(recorded.trials) <= 20
    assert result.last == result.alpha == recorded.trials[-1]


@pytest.mark.parametrize("alpha", [0.4, 1.5])
def test_strong_wolfe_finds_the_minimum_of_a_cubic_in_one_interpolation(alpha: float) -> None:
    """From both sides: beyond the first trial, and inside the bracket."""
    result = Recorded(lambda a: a**3 - 3 * a, lambda a: 3 * a * a - 3).wolfe(alpha, c2=0.01)
    assert result.evaluations == 2 and result.alpha == pytest.approx(1.0, rel=1e-12)


def test_strong_wolfe_finds_the_minimum_of_a_parabola_without_the_second_slope() -> None:
    recorded = Recorded(*FUNCTIONS["parabola"])
    result = recorded.wolfe(10.0, c2=0.01)  # the first trial is too high for its slope to be read
    assert recorded.slopes == recorded.trials[1:]
    assert result.evaluations == 2 and result.alpha == pytest.approx(3.0, rel=1e-12)


def test_strong_wolfe_asks_for_no_slope_of_a_rejected_trial() -> None:
    recorded = Recorded(*FUNCTIONS["parabola"])
    result = recorded.wolfe(100.0)
    assert result.evaluations > 1 and 100.0 not in recorded.slopes


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_strong_wolfe_backs_away_from_what_is_not_finite(bad: float) -> None:
    f = lambda a: -math.log(1 - a) - 3 * a if a < 1 else bad  # noqa: E731
    recorded = Recorded(f, lambda a: 1 / (1 - a) - 3)
    for alpha in (1e-2, 1.0, 1e4):
        result = recorded.wolfe(alpha, c2=0.1)
        assert result.status is Status.ACCEPTED and 0.5 < result.alpha < 0.8


def test_strong_wolfe_rejects_a_slope_that_is_not_finite() -> None:
    f, df = FUNCTIONS["parabola"]
    recorded = Recorded(f, lambda a: df(a) if a < 3.5 else math.nan)
    result = recorded.wolfe(4.0, c2=0.2)
    assert result.status is Status.ACCEPTED and result.alpha < 3.5


def test_strong_wolfe_out_of_trials() -> None:
    recorded = Recorded(*FUNCTIONS["parabola"])
    result = recorded.wolfe(0.01, c2=1e-3, max_ls=2)
    assert result.status is Status.DECREASED and result.evaluations == 2
    assert recorded.f(result.alpha) < recorded.f(0.0) and result.alpha in recorded.trials
    failed = Recorded(lambda a: a, lambda a: 1.0)
    result = strong_wolfe(failed.phi, failed.dphi, 0.0, -1.0, 1.0, c1=1e-4, max_ls=7)
    assert result.status is Status.LINE_SEARCH_FAILED
    assert (result.alpha, result.evaluations, len(failed.trials)) == (0.0, 7, 7)


def test_strong_wolfe_decreased_keeps_the_lowest_point_seen() -> None:
    """The last trial is rejected; the point before it is the result."""
    recorded = Recorded(lambda a: -a if a <= 1 else 5.0, lambda a: -1.0)
    result = recorded.wolfe(1.0, max_ls=2)
    assert result.status is Status.DECREASED
    assert result.alpha == 1.0 and result.last == recorded.trials[-1] != 1.0


def test_strong_wolfe_stops_when_the_bracket_is_a_point() -> None:
    """A kink: the slope jumps from -1 to 1, so no trial meets the curvature condition."""
    recorded = Recorded(lambda a: abs(a - 0.3), lambda a: math.copysign(1.0, a - 0.3))
    result = recorded.wolfe(1.0, max_ls=100_000)
    assert result.status is Status.DECREASED and result.alpha == pytest.approx(0.3)
    assert result.evaluations == len(recorded.trials) < 2000
    assert result.last == recorded.trials[-1]


def test_armijo_takes_the_first_power_that_decreases_enough() -> None:
    f = lambda a: (a - 0.1) ** 2  # noqa: E731
    seen: list[float] = []
    result = armijo(
        lambda a: seen.append(a) or f(a), f(0.0), -0.2, 2.0, c1=0.4, backtrack=0.5, max_ls=20
    )
    assert seen == [2.0 * 0.5**m for m in range(len(seen))]
    enough = [f(a) < f(0.0) + 0.4 * a * -0.2 for a in seen]
    assert enough == [False] * (len(seen) - 1) + [True]
    assert result.status is Status.ACCEPTED and result.alpha == result.last == seen[-1]
    assert result.evaluations == len(seen) and result.loss == f(seen[-1])


@pytest.mark.parametrize("minimiser", [0.001, 0.1, 0.25])
def test_armijo_interpolates(minimiser: float) -> None:
    """On a parabola the second trial is the minimiser, but for the shortest step it may take."""
    f = lambda a: (a - minimiser) ** 2  # noqa: E731
    line = {"c1": 1e-4, "backtrack": 0.5, "max_ls": 20, "interpolate": True}
    seen: list[float] = []
    phi = lambda a: seen.append(a) or f(a)  # noqa: E731
    result = armijo(phi, f(0.0), -2.0 * minimiser, 1.0, **line)
    assert result.alpha == pytest.approx(minimiser) and result.evaluations == len(seen)
    assert len(seen) == (2 if minimiser > 0.02 else 3) and seen[1] >= 0.02


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_armijo_does_not_interpolate_what_is_not_finite(bad: float) -> None:
    line = {"c1": 1e-4, "backtrack": 0.25, "max_ls": 20, "interpolate": True}
    result = armijo(lambda a: bad if a > 0.1 else -a, 0.0, -1.0, 1.0, **line)
    assert result.alpha == 0.0625 and result.evaluations == 3


def test_the_first_trial_lowers_a_parabola_as_much_as_the_last_step_did() -> None:
    slope = -4.0  # f(a) = 2 a^2 - 4 a, lowest at 1, by 2
    assert first_trial(10.0, slope, 2.0) == pytest.approx(1.01)
    assert first_trial(0.3, slope, 2.0) == 0.3
    assert first_trial(10.0, slope) == 0.5  # p = -c of length 2: a step of length 1


def test_armijo_is_strict() -> None:
    line = {"c1": 0.5, "backtrack": 0.5, "max_ls": 1}
    assert armijo(lambda a: -0.5 * a, 0.0, -1.0, 1.0, **line).status is Status.LINE_SEARCH_FAILED
    assert armijo(lambda a: -0.6 * a, 0.0, -1.0, 1.0, **line).status is Status.ACCEPTED


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_armijo_rejects_what_is_not_finite(bad: float) -> None:
    result = armijo(
        lambda a: bad if a > 0.2 else -a, 0.0, -1.0, 1.0, c1=1e-4, backtrack=0.5, max_ls=20
    )
    assert result.status is Status.ACCEPTED and result.alpha == 0.125 and result.evaluations == 4


def test_armijo_fails_after_max_ls_trials() -> None:
    seen: list[float] = []
    result = armijo(
        lambda a: seen.append(a) or 1.0, 0.0, -1.0, 1.0, c1=1e-4, backtrack=0.5, max_ls=6
    )
    assert result.status is Status.LINE_SEARCH_FAILED and result.alpha == 0.0
    assert result.evaluations == len(seen) == 6 and result.last == seen[-1]


def test_no_trial_follows_where_losses_can_show_no_decrease() -> None:
    """Losses are rounded to multiples of 1/8; the slope promises a decrease of alpha."""
    line = {"c1": 1e-4, "backtrack": 0.5, "max_ls": 20, "resolution": 1 / 16}
    seen: list[float] = []

    def rounded(alpha: float) -> float:
        seen.append(alpha)
        return 1.0

    wolfe = partial(strong_wolfe, rounded, lambda a: -1.0)
    for search in (partial(armijo, rounded), wolfe):
        seen.clear()
        result = search(1.0, -1.0, 0.25, **line)
        assert result.status is Status.LINE_SEARCH_FAILED and result.alpha == 0.0
        assert result.evaluations == len(seen) == 3 and result.last == seen[-1] == 1 / 16
    # The first trial is made all the same.
    assert armijo(lambda a: 0.0, 1.0, -1.0, 0.01, **line).status is Status.ACCEPTED


def test_fixed() -> None:
    result = fixed(0.3)
    assert (result.status, result.alpha, result.evaluations) == (Status.ACCEPTED, 0.3, 0)
