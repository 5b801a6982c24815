"""PBFGS with each update rule, kind of pair and search."""

from __future__ import annotations

import math
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

from dldr_ext import PBFGS, Status, Subspace

SEARCHES = ["armijo", "strong_wolfe"]


def saved(optimizer: PBFGS) -> dict[str, Any]:
    return optimizer.state_dict()["subspace"]


@pytest.mark.parametrize("curvature", ["same_batch", "consecutive"])
@pytest.mark.parametrize("search", SEARCHES)
def test_exact_optimum_of_a_quadratic(search: str, curvature: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = nn.Parameter(torch.randn(37, dtype=torch.float64, generator=generator))
    root = torch.randn(37, 37, dtype=torch.float64, generator=generator)
    h = root @ root.T + torch.eye(37, dtype=torch.float64)
    q = torch.randn(37, dtype=torch.float64, generator=generator)
    subspace = random_subspace([weights], 9)
    p, w0 = subspace.basis.T, subspace.origin
    optimizer = PBFGS([weights], subspace, line_search_fn=search, curvature=curvature)
    for _ in range(80):
        optimizer.step(lambda: 0.5 * weights @ h @ weights + q @ weights)
    exact = -torch.linalg.solve(p.T @ h @ p, p.T @ (h @ w0 + q))
    torch.testing.assert_close(optimizer.theta, exact, rtol=1e-6, atol=1e-6)


def test_a_failure_forgets_the_curvature() -> None:
    batches = Batches(0)
    optimizer = PBFGS(batches.params, random_subspace(batches.params, 4))
    fresh = saved(optimizer)
    for _ in range(4):
        optimizer.step(batches.forward(0))
    before = bits(batches.params)
    optimizer.step(lambda: batches.forward(0)() + math.nan)
    assert optimizer.status is Status.NON_FINITE_LOSS and bits(batches.params) == before
    assert torch.equal(saved(optimizer)["inverse_hessian"], fresh["inverse_hessian"])
    optimizer.step(batches.forward(0))
    assert optimizer.status is Status.ACCEPTED


def test_first_guess_comes_from_the_singular_values() -> None:
    x = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    space = Subspace(torch.eye(2).double(), flat([x]), singular_values=torch.tensor([2.0, 0.5]))
    optimizer = PBFGS([x], space, line_search_fn=None, lr=0.1)
    optimizer.step(lambda: 0.5 * x.square().sum())
    torch.testing.assert_close(x.detach(), torch.tensor([0.9, 0.975], dtype=torch.float64))


def test_curvature_is_carried_into_another_subspace() -> None:
    """The same plane in other coordinates: the next step is the same one."""
    results = []
    for turned in (False, True):
        batches = Batches(2)
        subspace = random_subspace(batches.params, 5)
        optimizer = PBFGS(batches.params, subspace)
        for _ in range(5):
            optimizer.step(batches.forward(0))
        if turned:
            q, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
            optimizer.change_subspace(Subspace(q @ subspace.basis, subspace.origin))
        optimizer.step(batches.forward(0))
        assert optimizer.status is Status.ACCEPTED
        results.append(flat(batches.params))
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-8)


# Several iterations a step.


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
