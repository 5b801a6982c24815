"""What PBFGS learns of the curvature, where it starts and when it forgets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from optim_problems import Batches, bits, flat, random_subspace
from torch import nn

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


def test_curvature_is_transferred_into_another_subspace() -> None:
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
        optimizer.step(batches.forward(1))
        assert optimizer.status is Status.ACCEPTED
        results.append(flat(batches.params))
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-8)
