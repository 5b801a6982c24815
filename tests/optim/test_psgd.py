"""P-SGD."""

from __future__ import annotations

import pytest
import torch
from optim_problems import Batches, flat, random_subspace
from torch import nn

from dldr_ext import PSGD, Status


@pytest.mark.parametrize("style", ["forward", "usual", "none"])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_is_sgd_with_the_gradient_projected(momentum: float, style: str) -> None:
    ours, theirs = Batches(0), Batches(0)
    subspace = random_subspace(ours.params, 7)
    optimizer = PSGD(ours.params, subspace, lr=0.3, momentum=momentum)
    reference = torch.optim.SGD(theirs.params, lr=0.3, momentum=momentum)
    for step in range(20):
        if style == "none":
            ours.usual(step)()
            assert optimizer.step() is None
        else:
            closure = ours.forward(step) if style == "forward" else ours.usual(step)
            loss = optimizer.step(closure)
            assert not loss.requires_grad
        theirs.usual(step)()
        projected = subspace.basis.T @ (subspace.basis @ flat(p.grad for p in theirs.params))
        for p, part in zip(
            theirs.params, projected.split([p.numel() for p in theirs.params]), strict=True
        ):
            p.grad = part.reshape(p.shape)
        reference.step()
        torch.testing.assert_close(flat(ours.params), flat(theirs.params), rtol=1e-9, atol=1e-10)
        assert optimizer.status is Status.ACCEPTED
    calls = 0 if style == "none" else 20
    assert (optimizer.closure_calls, optimizer.gradient_calls) == (calls, calls)
    there = subspace.origin + optimizer.theta @ subspace.basis
    torch.testing.assert_close(flat(ours.params), there, rtol=1e-12, atol=1e-12)


def test_schedulers_change_the_learning_rate() -> None:
    batches = Batches(1)
    subspace = random_subspace(batches.params, 4)
    optimizer = PSGD(batches.params, subspace, lr=0.5, momentum=0.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    for step in range(3):
        theta = optimizer.theta
        c = subspace.basis @ flat(torch.autograd.grad(batches.forward(step)(), batches.params))
        optimizer.step(batches.forward(step))
        torch.testing.assert_close(optimizer.theta - theta, -(0.5 * 0.1**step) * c)
        schedule.step()


def test_random_numbers_are_drawn_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    params, x = list(model.parameters()), torch.randn(4, 3)
    optimizer = PSGD(params, random_subspace(params, 3, torch.float32), lr=0.1)
    state = torch.get_rng_state()
    optimizer.step(lambda: model(x).square().mean())
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    nn.functional.dropout(torch.ones(4, 8))
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": -0.1}, ValueError, r"PSGD: lr: expected a number in \[0, inf\), got -0.1"),
        ({"lr": None}, TypeError, "lr: expected a number"),
        ({"momentum": 1.0}, ValueError, "momentum"),
        ({"momentum": -0.1}, ValueError, "momentum"),
        ({"momentum": True}, TypeError, "momentum"),
    ],
)
def test_bad_options(options: dict[str, float], error: type[Exception], message: str) -> None:
    batches = Batches(0)
    with pytest.raises(error, match=message):
        PSGD(batches.params, random_subspace(batches.params, 4), **options)
