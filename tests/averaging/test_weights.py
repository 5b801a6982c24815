"""Weights of averages: the schedules, and what any weights must be."""

from __future__ import annotations

import pytest
import torch

from dldr_ext import uniform_soup
from dldr_ext.averaging import schedule_weights


def rates(schedule: str, count: int) -> list[float]:
    """The rate of each step of a run, as a share of the first: 1 down to nearly 0."""
    done = torch.arange(count, dtype=torch.float64) / count  # before the step
    b = 0.9
    return {
        "mean": 1 - done,
        "linear": 1 - done,
        "1-sqrt": 1 - done.sqrt(),
        "ema:0.9": (1 - b ** (count * (1 - done))) / (1 - b**count),
    }[schedule].tolist()


@pytest.mark.parametrize("count", [1, 2, 7, 20])
@pytest.mark.parametrize("schedule", ["mean", "linear", "1-sqrt", "ema:0.9"])
def test_a_schedule_is_a_run_whose_rate_falls(schedule: str, count: int) -> None:
    """SGD on a loss that is linear, so that the gradients of both runs are the same."""
    torch.manual_seed(count)
    slopes = torch.randn(count, 3, dtype=torch.float64)

    def sgd(scheduled: list[float]) -> list[dict[str, torch.Tensor]]:
        w = torch.nn.Parameter(torch.ones(3, dtype=torch.float64))
        optimizer = torch.optim.SGD([w], lr=0.1)
        states = []
        for slope, rate in zip(slopes, scheduled, strict=True):
            optimizer.param_groups[0]["lr"] = 0.1 * rate
            w.grad = slope.clone()
            optimizer.step()
            states.append({"w": w.detach().clone()})
        return states

    weights = schedule_weights(schedule, count)
    assert len(weights) == count and sum(weights) == pytest.approx(1)
    average = uniform_soup(sgd([1.0] * count), weights)["w"]
    torch.testing.assert_close(average, sgd(rates(schedule, count))[-1]["w"], rtol=1e-13, atol=0)


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
