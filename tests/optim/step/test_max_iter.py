"""Several iterations on the closure of one step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_problems import Batches, bits, flat, random_subspace, whole_space
from torch import Tensor, nn

from dldr_ext import PBFGS, Status

SEARCHES = ["armijo", "strong_wolfe"]


@pytest.mark.parametrize("style", ["forward", "usual"])
@pytest.mark.parametrize("search", [*SEARCHES, None])
def test_iterations_on_one_closure_are_steps_with_one_evaluation_less(
    search: str | None, style: str
) -> None:
    options = {"line_search_fn": search, "lr": 0.5}
    one, many = Batches(3), Batches(3)
    subspace = random_subspace(one.params, 5)
    single = PBFGS(one.params, subspace, **options)
    several = PBFGS(many.params, subspace, max_iter=6, **options)
    for _ in range(6):
        single.step(getattr(one, style)(0))
    first = several.step(getattr(many, style)(0))
    assert bits(one.params) == bits(many.params)
    assert len(several.history) == 6
    assert [r.loss for r in several.history] == [r.loss for r in single.history]
    assert float(first) == single.history[0].loss
    assert several.closure_calls == single.closure_calls - 5


def test_iterations_stop_at_the_tolerance() -> None:
    x = nn.Parameter(torch.full((4,), 2.0, dtype=torch.float64))
    optimizer = PBFGS(
        [x], whole_space([x]), max_iter=50, tolerance_grad=1e-3, line_search_fn="strong_wolfe"
    )
    optimizer.step(lambda: (x**4).sum() + x.square().sum())
    assert optimizer.status is Status.CONVERGED
    assert len(optimizer.history) < 50 and 0 < optimizer.history[-1].gradient_norm <= 1e-3
    assert optimizer.closure_calls == 1 + sum(r.trials for r in optimizer.history)


def test_a_later_iteration_that_fails_keeps_the_earlier_ones() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    params, x = list(model.parameters()), torch.randn(16, 3)
    optimizer = PBFGS(
        params, random_subspace(params, 4, torch.float32), max_iter=5, buffers=model, max_ls=3
    )
    visited: list[tuple[list[bytes], list[bytes]]] = []

    def closure() -> Tensor:
        loss = model(x).square().mean()
        visited.append((bits(params), bits(model.buffers())))
        return loss + (1e6 if len(optimizer.history) >= 2 else 0.0)

    optimizer.step(closure)
    assert [r.status for r in optimizer.history] == [
        *(Status.ACCEPTED, Status.ACCEPTED, Status.LINE_SEARCH_FAILED)
    ]
    kept = next(b for p, b in visited if p == bits(params))
    assert bits(model.buffers()) == kept  # as the accepted weights left them
    there = optimizer.subspace.reconstruct(optimizer.theta)
    torch.testing.assert_close(flat(params).float(), there, rtol=1e-5, atol=1e-6)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(interrupted(optimizer, lambda: model(x).square().mean()))
    there = optimizer.subspace.reconstruct(optimizer.theta)
    torch.testing.assert_close(flat(params).float(), there, rtol=1e-5, atol=1e-6)


def interrupted(optimizer: PBFGS, forward: Any) -> Any:
    """A closure that is stopped in the second iteration."""
    steps = len(optimizer.history)

    def closure() -> Tensor:
        if len(optimizer.history) > steps:
            raise KeyboardInterrupt
        return forward()

    return closure
