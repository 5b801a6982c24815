"""Weights that something else wrote between two steps."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_problems import Batches, bits, flat, random_subspace, two_tensors
from torch import nn

from dldr_ext import PBFGS, PSGD, Status

MAKERS = [PBFGS, PSGD]


def add_one(params: list[nn.Parameter]) -> None:
    with torch.no_grad():
        params[2].add_(1.0)


def new_data(params: list[nn.Parameter]) -> None:
    params[2].data = params[2].data + 1.0


def another_optimizer(params: list[nn.Parameter]) -> None:
    params[2].grad = torch.ones_like(params[2])
    torch.optim.SGD([params[2]], lr=0.1).step()


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
    with pytest.raises(ValueError, match=r"PBFGS: params\[3\]: expected shape .* got \(50,\)"):
        optimizer.step(batches.forward(0))


def test_model_that_changed_shape_after_construction() -> None:
    params, subspace = two_tensors()
    optimizer = PBFGS(params, subspace)
    params[1].data = torch.zeros(5)
    with pytest.raises(ValueError, match=r"params\[1\]: expected shape \(4,\), as when"):
        optimizer.step(lambda: sum(p.square().sum() for p in params))
