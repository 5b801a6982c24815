"""Going on in another subspace: what is transferred, and how."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from optim_problems import Batches, bits, flat, random_subspace
from torch import Tensor

from dldr_ext import PBFGS, PSGD, GroupedSubspace, InSubspace, Subspace, Trajectory

CASES: list[tuple[Any, dict[str, Any]]] = [
    (PBFGS, {}),
    (PBFGS, {"curvature": "consecutive"}),
    (PSGD, {"lr": 0.1}),
    (InSubspace, {"optimizer": torch.optim.SGD, "lr": 0.1}),
]


def rotated(subspace: Subspace, origin: Tensor | None = None) -> Subspace:
    """The same subspace with other directions."""
    q, _ = torch.linalg.qr(torch.randn(subspace.dim, subspace.dim, dtype=torch.float64))
    return Subspace(q @ subspace.basis, subspace.origin if origin is None else origin)


def steps(optimizer: Any, batches: Batches, first: int, last: int) -> None:
    for step in range(first, last):
        optimizer.step(batches.forward(step))


# Not "consecutive" curvature: the gradient before the change is unknown in new directions, so that
# one pair is dropped.
@pytest.mark.parametrize(("make", "options"), [CASES[0], *CASES[2:]])
def test_the_same_subspace_in_other_directions_changes_nothing(
    make: Any, options: dict[str, Any]
) -> None:
    batches, kept = Batches(0), Batches(0)
    subspace = random_subspace(batches.params, 6)
    optimizer = make(batches.params, subspace, **options)
    twin = make(kept.params, subspace, **options)
    steps(optimizer, batches, 0, 8)
    steps(twin, kept, 0, 8)
    # Through the weights where it is now, or anywhere else: it is the same set of weights.
    optimizer.change_subspace(rotated(subspace, subspace.reconstruct(torch.randn(6).double())))
    torch.testing.assert_close(flat(batches.params), flat(kept.params), rtol=1e-12, atol=1e-12)
    calls = optimizer.closure_calls
    steps(optimizer, batches, 8, 20)
    steps(twin, kept, 8, 20)
    torch.testing.assert_close(flat(batches.params), flat(kept.params), rtol=1e-6, atol=1e-8)
    assert optimizer.closure_calls == twin.closure_calls > calls


def test_transferred_curvature_saves_evaluations() -> None:
    """An ill-conditioned quadratic: the new subspace shares most directions with the old one."""
    scales = torch.logspace(0, 4, 30, dtype=torch.float64)
    x = torch.nn.Parameter(torch.zeros(30, dtype=torch.float64))
    q, _ = torch.linalg.qr(torch.randn(30, 30, dtype=torch.float64))
    target = torch.randn(30, dtype=torch.float64)

    def closure() -> Tensor:
        return 0.5 * (scales * (q @ x - target).square()).sum()

    old = Subspace(torch.eye(30, dtype=torch.float64)[:12], torch.zeros(30).double())
    new = Subspace(torch.eye(30, dtype=torch.float64)[2:14], torch.zeros(30).double())

    def converge(optimizer: PBFGS) -> None:
        for _ in range(200):
            optimizer.step(closure)
            gradient = torch.autograd.grad(closure(), x)
            if float(optimizer.subspace.project(gradient).norm()) < 1e-3:
                return
        raise AssertionError("not converged")

    def evaluations(transfer: bool) -> int:
        x.data.zero_()
        optimizer = PBFGS([x], old)
        converge(optimizer)
        if transfer:
            optimizer.change_subspace(new.with_origin([x]))
        else:
            optimizer = PBFGS([x], new.with_origin([x]))
        before = optimizer.closure_calls
        converge(optimizer)
        return optimizer.closure_calls - before

    assert evaluations(transfer=True) < 0.8 * evaluations(transfer=False)


@pytest.mark.parametrize(("make", "options"), CASES)
def test_other_kinds_and_dimensions(
    make: Any, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    batches = Batches(0)
    optimizer = make(batches.params, random_subspace(batches.params, 6), **options)
    loss = batches.forward(0)().item()
    steps(optimizer, batches, 0, 3)
    for new in (
        random_subspace(batches.params, 9, seed=1),
        GroupedSubspace.random(batches.params, 4, [2, 2], dtype=torch.float64),
        random_subspace(batches.params, 2, seed=2).to(dtype=torch.float32),
    ):
        before = bits(batches.params)
        with caplog.at_level(logging.WARNING, logger="dldr_ext"):
            optimizer.change_subspace(new.with_origin(batches.params))
        assert not caplog.records
        if new.coordinate_dtype == torch.float64:
            assert bits(batches.params) == before
        assert optimizer.theta.shape == (new.dim,) and optimizer.subspace.dim == new.dim
        steps(optimizer, batches, 0, 6)
        assert optimizer.status.moved
    assert batches.forward(0)().item() < loss
    # A new optimizer in the new subspace takes up its state.
    resumed = make(Batches(1).params, optimizer.subspace, **options)
    resumed.load_state_dict(optimizer.state_dict())
    assert torch.equal(resumed.theta, optimizer.theta)


def test_weights_off_the_new_subspace_are_projected(caplog: pytest.LogCaptureFixture) -> None:
    batches = Batches(0)
    optimizer = PBFGS(batches.params, random_subspace(batches.params, 6), residual_lr=0.05)
    steps(optimizer, batches, 0, 5)
    new = random_subspace(Batches(1).params, 6, seed=3)
    expected = new.coordinates(batches.params)
    with caplog.at_level(logging.WARNING, logger="dldr_ext"):
        optimizer.change_subspace(new)
    assert "moved to their projection on the new subspace" in caplog.text
    torch.testing.assert_close(optimizer.theta, expected)
    torch.testing.assert_close(flat(batches.params), new.reconstruct(expected))
    steps(optimizer, batches, 5, 8)
    assert optimizer.status.moved


def test_dldr_with_its_basis_refreshed() -> None:
    """Record in the subspace and around it, extract again, go on from the same weights."""
    batches = Batches(0)
    trajectory = Trajectory(batches.params, dtype=torch.float64)
    sgd = torch.optim.SGD(batches.params, lr=0.3)
    for step in range(15):
        trajectory.record()
        batches.usual(step)()
        sgd.step()
    optimizer = PBFGS(batches.params, trajectory.subspace(dim=4), residual_lr=0.1)
    losses = []
    for _ in range(3):
        trajectory = Trajectory(batches.params, dtype=torch.float64)
        for step in range(12):
            optimizer.step(batches.forward(step))
            trajectory.record()
        losses.append(sum(batches.forward(i)().item() for i in range(4)))
        optimizer.change_subspace(trajectory.subspace(dim=4, start="last"))
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize(("make", "options"), CASES)
def test_bad_subspaces_change_nothing(make: Any, options: dict[str, Any]) -> None:
    batches, twin = Batches(0), Batches(0)
    subspace = random_subspace(batches.params, 4)
    optimizer, other = (
        make(batches.params, subspace, **options),
        make(twin.params, subspace, **options),
    )
    steps(optimizer, batches, 0, 3)
    steps(other, twin, 0, 3)
    small = random_subspace(batches.params[:2], 4)
    with pytest.raises(ValueError, match="expected 56 elements in all, as in the subspace, got 83"):
        optimizer.change_subspace(small)
    with pytest.raises(TypeError, match=r"subspace: expected a dldr_ext.Subspace .* got Tensor"):
        optimizer.change_subspace(subspace.basis)
    assert optimizer.subspace is subspace
    steps(optimizer, batches, 3, 6)
    steps(other, twin, 3, 6)
    assert bits(batches.params) == bits(twin.params)
