"""What PSGD and InSubspace share: one gradient, and a step without a search."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from optim_problems import Batches, bits, random_subspace

from dldr_ext import PSGD, InSubspace, Status

CASES: list[tuple[Any, dict[str, Any], str]] = [
    (PSGD, {"lr": 0.1}, "momentum"),
    (InSubspace, {"optimizer": torch.optim.Adam}, "optimizer_state"),
]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(("make", "options", "learnt"), CASES)
def test_what_is_not_finite_moves_nothing(
    make: Any, options: dict[str, Any], learnt: str, bad: float
) -> None:
    batches = Batches(0)
    optimizer = make(batches.params, random_subspace(batches.params, 4), **options)
    optimizer.step(batches.forward(0))
    before, state = bits(batches.params), str(optimizer.state_dict()["subspace"][learnt])
    optimizer.step(lambda: batches.forward(0)() + bad)
    assert optimizer.status is Status.NON_FINITE_LOSS and bits(batches.params) == before
    batches.usual(0)()
    batches.params[0].grad[2, 2] = bad
    optimizer.step()
    assert optimizer.status is Status.NON_FINITE_GRADIENT and bits(batches.params) == before
    assert str(optimizer.state_dict()["subspace"][learnt]) == state
    optimizer.zero_grad()
    optimizer.step()
    assert optimizer.status is Status.NO_GRADIENT and bits(batches.params) == before


@pytest.mark.parametrize(("make", "options", "learnt"), CASES)
def test_a_step_returns_what_the_closure_does(
    make: Any, options: dict[str, Any], learnt: str
) -> None:
    batches = Batches(0)
    optimizer = make(batches.params, random_subspace(batches.params, 4), **options)
    loss = optimizer.step(batches.forward(0))
    assert torch.is_tensor(loss) and not loss.requires_grad
    usual = batches.usual(0)
    assert isinstance(optimizer.step(lambda: usual().item()), float)
    usual()
    assert optimizer.step() is None
