"""Weights of averages: the schedules, and what any weights must be."""

from __future__ import annotations

import pytest
import torch

from dldr_ext import uniform_soup
from dldr_ext.averaging import schedule_weights


@pytest.mark.parametrize("count", [1, 2, 7, 20])
def test_schedules_stand_for_rates_that_fall(count: int) -> None:
    """w0 + sum r_k g_k, r_k the rate of step k, is the average of w_k with these weights."""
    torch.manual_seed(count)
    steps = torch.randn(count, 3, dtype=torch.float64)
    states = [{"w": row} for row in steps.cumsum(0)]
    k, b = torch.arange(1, count + 1, dtype=torch.float64), 0.9
    rates = {
        "mean": 1 - (k - 1) / count,
        "linear": 1 - k * (k - 1) / (count * (count + 1)),
        "1-sqrt": 1 - ((k - 1) / count).sqrt(),
        "ema:0.9": (1 - b ** (count - k + 1)) / (1 - b**count),
    }
    for schedule, rate in rates.items():
        weights = schedule_weights(schedule, count)
        assert len(weights) == count and sum(weights) == pytest.approx(1)
        torch.testing.assert_close(uniform_soup(states, weights)["w"], rate @ steps)


def test_weights_are_in_float64_and_may_be_negative() -> None:
    states = [{"w": torch.tensor([value])} for value in (2.0**24, 1.0, -(2.0**24))]
    assert uniform_soup(states, [2, 1, 2])["w"].item() == pytest.approx(0.2, rel=1e-7)
    assert uniform_soup(states[:2], [-1, 3])["w"].item() == (3 - 2.0**24) / 2


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1, -1], r"weights: expected finite numbers whose sum is not 0, got \[1, -1\]"),
        ([0.1 + 0.2, -0.3], "weights: expected finite numbers whose sum is not 0"),
        ([1, float("nan")], "weights: expected finite numbers"),
        ([1], "weights: expected 2 numbers, one for each checkpoint, got 1"),
        ([1, 2, 3], "weights: expected 2 numbers, one for each checkpoint, got 3"),
        ([], "weights: expected finite numbers whose sum is not 0"),
    ],
)
def test_weights_that_do_not_fit(weights, message) -> None:
    states = [{"w": torch.zeros(2)}, {"w": torch.ones(2)}]
    with pytest.raises(ValueError, match=message):
        uniform_soup(states, weights)


@pytest.mark.parametrize(
    "schedule", ["cosine", "ema", "ema:", "ema:1", "ema:0", "ema:x", "", "0.9"]
)
def test_unknown_schedules(schedule) -> None:
    expected = "schedule: expected one of mean, linear, 1-sqrt, or ema: and a number between 0 and"
    with pytest.raises(ValueError, match=expected):
        schedule_weights(schedule, 3)
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        schedule_weights("mean", 0)
