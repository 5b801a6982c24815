"""The way back to the last iterate with finite loss and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from optim_problems import Batches, bits, flat, random_subspace, whole_space
from torch import Tensor, nn

from dldr_ext import PBFGS, Status


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("residual_lr", [0.0, 0.05])
def test_a_step_into_nan_is_taken_back(bad: float, residual_lr: float) -> None:
    """Without a search nothing looks at the new point before the next step does."""
    batches = Batches(0)
    optimizer = PBFGS(
        batches.params,
        random_subspace(batches.params, 4),
        lr=0.1,
        line_search_fn=None,
        curvature="consecutive",
        residual_lr=residual_lr,
    )
    for step in range(3):
        optimizer.step(batches.forward(step))
    good, theta = flat(batches.params), optimizer.theta
    optimizer.param_groups[0]["lr"] = 1e6
    optimizer.step(batches.forward(0))
    assert optimizer.status is Status.ACCEPTED
    assert torch.linalg.vector_norm(flat(batches.params) - good) > 1e3
    for _ in range(3):  # however often
        optimizer.step(lambda: batches.forward(0)() + bad)
        torch.testing.assert_close(flat(batches.params), good, rtol=1e-9, atol=1e-9)
        assert torch.equal(optimizer.theta, theta)
    statuses = [record.status for record in optimizer.history][-3:]
    assert statuses[0] is Status.RESTORED and statuses[0].moved
    assert statuses[1:] == [Status.NON_FINITE_LOSS] * 2
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step(batches.forward(0))
    assert optimizer.status is Status.ACCEPTED


@pytest.mark.parametrize("search", ["armijo", "strong_wolfe"])
def test_a_gradient_that_no_trial_looked_at(search: str) -> None:
    """The loss is fine at the accepted point, its gradient is not, step after step."""
    x = nn.Parameter(torch.tensor([2.0, 1.0], dtype=torch.float64))
    optimizer = PBFGS([x], whole_space([x]), lr=0.4, line_search_fn=search, curvature="consecutive")

    def closure() -> Tensor:
        x.grad = 2 * x.detach()
        if 0 < x[0].item() < 1:
            x.grad[1] = math.nan
        return x.detach().square().sum()

    optimizer.step(closure)
    if search == "strong_wolfe":  # its slopes do look
        assert optimizer.status is not Status.RESTORED
        return
    assert optimizer.status is Status.ACCEPTED and x[0].item() < 1
    optimizer.step(closure)
    assert optimizer.status is Status.RESTORED
    assert x.detach().tolist() == [2.0, 1.0]


def test_a_bad_batch_takes_nothing_back() -> None:
    """The loss was finite at these weights: the batch is to blame."""
    batches = Batches(0)
    for curvature in ("same_batch", "consecutive"):
        optimizer = PBFGS(
            batches.params,
            random_subspace(batches.params, 4),
            theta0="current",
            curvature=curvature,
        )
        optimizer.step(batches.forward(0))
        before = bits(batches.params)
        optimizer.step(lambda: batches.forward(1)() * math.nan)
        assert optimizer.status is Status.NON_FINITE_LOSS and bits(batches.params) == before


def test_the_good_point_survives_a_checkpoint() -> None:
    batches = Batches(0)
    subspace = random_subspace(batches.params, 4)
    options = {"line_search_fn": None, "curvature": "consecutive", "lr": 0.1}
    optimizer = PBFGS(batches.params, subspace, **options)
    optimizer.step(batches.forward(0))
    good = optimizer.theta
    optimizer.step(batches.forward(0))
    state = optimizer.state_dict()
    other = PBFGS(batches.params, subspace, theta0="current")
    other.load_state_dict(state)
    other.step(lambda: batches.forward(0)() * math.nan)
    assert other.status is Status.RESTORED and torch.equal(other.theta, good)
