"""Weights changed from outside, losses that are none, and the way back to a good point."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_problems import (  # noqa: F401  (one_thread is a fixture)
    Batches,
    bits,
    flat,
    one_thread,
    random_subspace,
    whole_space,
)
from torch import Tensor, nn

from dldr_ext import PBFGS, PSGD, Status, StepRecord

MAKERS = [PBFGS, PSGD]


def add_one(params: list[nn.Parameter]) -> None:
    with torch.no_grad():
        params[2].add_(1.0)


def new_data(params: list[nn.Parameter]) -> None:
    params[2].data = params[2].data + 1.0


def another_optimizer(params: list[nn.Parameter]) -> None:
    params[2].grad = torch.ones_like(params[2])
    torch.optim.SGD([params[2]], lr=0.1).step()


# Weights changed from outside.


@pytest.mark.parametrize("change", [add_one, new_data, another_optimizer])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", MAKERS)
def test_a_step_refuses_weights_that_something_else_wrote(
    make: Any, dtype: torch.dtype, change: Callable[[list[nn.Parameter]], None]
) -> None:
    batches = Batches(0, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    optimizer = make(batches.params, random_subspace(batches.params, 4, wide), lr=0.1)
    optimizer.step(batches.forward(0))
    change(batches.params)
    before, calls = bits(batches.params), optimizer.closure_calls
    for _ in range(2):  # until it is accepted
        with pytest.raises(ValueError, match=r"params\[2\]: expected the weights.*resync\(\)"):
            optimizer.step(batches.forward(1))
    assert bits(batches.params) == before and optimizer.closure_calls == calls
    optimizer.resync()
    there = optimizer.subspace.reconstruct(optimizer.theta)
    close = 1e-2 if dtype == torch.bfloat16 else 1e-6
    torch.testing.assert_close(flat(batches.params).to(wide), there, rtol=close, atol=close)
    optimizer.step(batches.forward(1))
    assert optimizer.status.moved


@pytest.mark.parametrize("make", MAKERS)
def test_resync_goes_to_the_nearest_point_and_says_so(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    batches = Batches(0)
    subspace = random_subspace(batches.params, 4)
    optimizer = make(batches.params, subspace, lr=0.1)
    for step in range(3):
        optimizer.step(batches.forward(step))
    theta = torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64)
    inside = subspace.reconstruct(theta)
    nn.utils.vector_to_parameters(inside.clone(), batches.params)
    with caplog.at_level(logging.WARNING, logger="dldr_ext"):
        optimizer.resync()
    assert not caplog.records  # it was in the subspace
    torch.testing.assert_close(optimizer.theta, theta, rtol=1e-9, atol=1e-9)
    add_one(batches.params)
    with caplog.at_level(logging.WARNING, logger="dldr_ext"):
        optimizer.resync()
    assert "their projection on the subspace" in caplog.text
    loss = optimizer.step(batches.forward(0))
    assert optimizer.status is Status.ACCEPTED and math.isfinite(loss)


def test_resync_outside_the_subspace_keeps_the_weights() -> None:
    batches = Batches(0)
    optimizer = PBFGS(batches.params, random_subspace(batches.params, 4), residual_lr=0.05)
    for step in range(3):
        optimizer.step(batches.forward(step))
    add_one(batches.params)
    before = flat(batches.params)
    optimizer.resync()
    assert torch.equal(flat(batches.params), before)
    for step in range(40):  # past the step that computes the point anew
        optimizer.step(batches.forward(step))
        assert optimizer.status.moved
    state = optimizer.state_dict()["subspace"]
    there = state["moved_origin"] + optimizer.theta @ optimizer.subspace.basis
    torch.testing.assert_close(flat(batches.params), there, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", MAKERS)
def test_writes_of_the_same_values_are_no_change(make: Any) -> None:
    batches = Batches(0, dtype=torch.bfloat16)
    optimizer = make(batches.params, random_subspace(batches.params, 4, torch.float32), lr=0.1)
    optimizer.step(batches.forward(0))
    batches.model.load_state_dict({k: v.clone() for k, v in batches.model.state_dict().items()})
    optimizer.step(batches.forward(1))
    state = optimizer.state_dict()
    kept = [p.detach().clone() for p in batches.params]
    with torch.no_grad():  # as weights are swapped for an average and back
        for p in batches.params:
            p.mul_(2.0)
        for p, old in zip(batches.params, kept, strict=True):
            p.copy_(old)
    optimizer.step(batches.forward(2))
    with torch.no_grad():
        batches.params[0].zero_()
    optimizer.load_state_dict(state)  # writes the weights itself
    optimizer.step(batches.forward(3))
    assert optimizer.status.moved


def test_parameters_of_another_shape() -> None:
    batches = Batches(0)
    optimizer = PBFGS(batches.params, random_subspace(batches.params, 4))
    batches.params[3].data = torch.zeros(50, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"params\[3\]: expected the shape it had.* got \(50,\)"):
        optimizer.step(batches.forward(0))


# Losses that are none.


@pytest.mark.parametrize("make", MAKERS)
def test_a_detached_loss_is_refused(make: Any) -> None:
    batches = Batches(0)
    optimizer = make(batches.params, random_subspace(batches.params, 4), lr=0.1)
    before = bits(batches.params)

    def without_gradients() -> Tensor:
        with torch.no_grad():
            return batches.forward(0)()

    for closure in (
        lambda: batches.forward(0)().detach(),
        lambda: batches.forward(0)().item(),
        without_gradients,
    ):
        with pytest.raises(ValueError, match="closure: expected a loss with a graph, or gradients"):
            optimizer.step(closure)
    assert bits(batches.params) == before
    optimizer.step(batches.forward(0))
    assert optimizer.status.moved


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("make", MAKERS)
def test_a_first_loss_that_is_not_finite_is_refused(make: Any, bad: float) -> None:
    batches = Batches(0)
    optimizer = make(batches.params, random_subspace(batches.params, 4), lr=0.1)
    before = bits(batches.params)
    with pytest.raises(ValueError, match="closure: expected a finite loss in the first step, got"):
        optimizer.step(lambda: batches.forward(0)() + bad)
    assert bits(batches.params) == before and not optimizer.history
    optimizer.step(batches.forward(0))
    optimizer.step(lambda: batches.forward(0)() + bad)
    assert optimizer.status is Status.NON_FINITE_LOSS


# The last good point.


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


# Records.


def test_history() -> None:
    batches = Batches(0)
    optimizer = PBFGS(batches.params, random_subspace(batches.params, 4))
    calls = 0
    for step in range(6):
        theta = optimizer.theta
        loss = batches.forward(step)()
        c = optimizer.subspace.basis @ flat(torch.autograd.grad(loss, batches.params))
        returned = optimizer.step(batches.forward(step))
        record = optimizer.history[-1]
        assert record.step == step + 1 and record.status is optimizer.status
        assert record.loss == float(returned) == pytest.approx(loss.item())
        assert record.gradient_norm == pytest.approx(float(c.norm()))
        moved = float((optimizer.theta - theta).norm())
        assert record.step_length == pytest.approx(moved)
        assert record.loss_after == pytest.approx(batches.forward(step)().item())
        assert 1 <= record.trials <= optimizer.closure_calls - calls - 1
        calls = optimizer.closure_calls
        # Though saving the state made the pair count early.
        assert (record.curvature == "none") == (step == 0)
        assert str(record).startswith(f"step {step + 1}: loss {record.loss:.6g}, ")
        assert "accepted" in str(record)
        if step > 1:
            b = optimizer.state_dict()["subspace"]["inverse_hessian"]
            assert record.condition >= 1.0 and torch.linalg.cond(b) > 0
    optimizer.step(lambda: batches.forward(0)() + math.nan)
    last = optimizer.history[-1]
    assert math.isnan(last.loss) and last.trials == 0 and last.step_length == 0.0
    assert len(optimizer.history) == 7 and optimizer.history.maxlen == 1000


def test_condition_is_that_of_b() -> None:
    x = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    scale = torch.tensor([1.0, 100.0], dtype=torch.float64)
    optimizer = PBFGS([x], whole_space([x]), line_search_fn="strong_wolfe")
    for _ in range(12):
        optimizer.step(lambda: 0.5 * (scale * x * x).sum() + 1.0)
    conditions = [r.condition for r in optimizer.history if not math.isnan(r.condition)]
    assert conditions and 20 < max(conditions) < 500


def test_what_became_of_pairs() -> None:
    x = nn.Parameter(torch.tensor([0.1, 0.05], dtype=torch.float64))
    for damping, expected in (("powell", "damped"), (None, "skipped")):
        with torch.no_grad():
            x.copy_(torch.tensor([0.1, 0.05]))
        optimizer = PBFGS([x], whole_space([x]), damping=damping)
        for _ in range(4):
            optimizer.step(lambda: x.cos().sum())
        assert expected in [record.curvature for record in optimizer.history]


def test_psgd_keeps_a_history_too() -> None:
    batches = Batches(0)
    optimizer = PSGD(batches.params, random_subspace(batches.params, 4), lr=0.1)
    batches.usual(0)()
    optimizer.step()
    assert math.isnan(optimizer.history[0].loss)
    theta = optimizer.theta
    loss = optimizer.step(batches.forward(1))
    record = optimizer.history[1]
    assert isinstance(record, StepRecord) and record.loss == float(loss) and record.alpha == 0.1
    moved = float((optimizer.theta - theta).norm())
    assert record.step_length == pytest.approx(moved) and record.gradient_norm > 0
