"""Closures that are refused: no loss, a loss without a graph, one that is not finite at first."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_problems import Batches, bits, random_subspace, two_tensors
from torch import Tensor, nn

from dldr_ext import PBFGS, PSGD, InSubspace, Status

MAKERS = [PBFGS, PSGD]


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


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda p: None, "got None"),
        (lambda p: "1.0", "got str"),
        (lambda p: True, "got bool"),
        (lambda p: p.square(), r"tensor of shape \(3, 2\)"),
        (lambda p: torch.complex(p.sum(), p.sum()), "complex64"),
    ],
)
def test_closure_that_returns_no_loss(returned: Callable[[Tensor], Any], message: str) -> None:
    for make in (PBFGS, PSGD):
        params, subspace = two_tensors()
        optimizer = make(params, subspace)
        before = bits(params)
        with pytest.raises(TypeError, match=rf"closure: expected .* scalar.*{message}"):
            optimizer.step(lambda: returned(params[0]))  # noqa: B023
        assert bits(params) == before


def test_step_needs_a_closure() -> None:
    params, subspace = two_tensors()
    optimizer = PBFGS(params, subspace)
    with pytest.raises(TypeError, match="closure: expected a callable, got None"):
        optimizer.step(None)
    with pytest.raises(TypeError, match="closure"):
        optimizer.step()


def test_sparse_gradients_are_refused() -> None:
    weight = nn.Parameter(torch.randn(5, 2))
    optimizer = PBFGS([weight], random_subspace([weight], 2, dtype=torch.float32))
    before = bits([weight])
    with pytest.raises(TypeError, match="dense gradient"):
        optimizer.step(
            lambda: nn.functional.embedding(torch.tensor([1, 2]), weight, sparse=True).sum()
        )
    assert bits([weight]) == before


@pytest.mark.parametrize(
    "make",
    [PBFGS, PSGD, lambda params, subspace: InSubspace(params, subspace, torch.optim.LBFGS)],
)
def test_a_loss_whose_memory_is_used_again(make: Any) -> None:
    """As a captured graph does it: the step returns the loss before it all the same."""
    batches = Batches(0)
    optimizer = make(batches.params, random_subspace(batches.params, 4))
    kept = torch.zeros((), dtype=torch.float64)

    def closure() -> Tensor:
        loss = batches.usual(0)()
        return kept.copy_(loss.detach())

    for _ in range(3):
        with torch.no_grad():
            before = float(batches.forward(0)())
        assert float(optimizer.step(closure)) == pytest.approx(before, rel=1e-12)
        assert optimizer.history[-1].loss == pytest.approx(before, rel=1e-12)
