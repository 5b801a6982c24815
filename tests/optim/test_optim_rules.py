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

RULES = ["bfgs", "lbfgs", "sr1"]
SEARCHES = ["armijo", "strong_wolfe"]


def saved(optimizer: PBFGS) -> dict[str, Any]:
    return optimizer.state_dict()["subspace"]


@pytest.mark.parametrize("curvature", ["same_batch", "overlap", "consecutive"])
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("update", RULES)
def test_exact_optimum_of_a_quadratic(update: str, search: str, curvature: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = nn.Parameter(torch.randn(37, dtype=torch.float64, generator=generator))
    root = torch.randn(37, 37, dtype=torch.float64, generator=generator)
    h = root @ root.T + torch.eye(37, dtype=torch.float64)
    q = torch.randn(37, dtype=torch.float64, generator=generator)
    subspace = random_subspace([weights], 9)
    p, w0 = subspace.basis.T, subspace.origin
    optimizer = PBFGS(
        [weights], subspace, update=update, line_search_fn=search, curvature=curvature
    )
    for _ in range(80):
        optimizer.step(lambda: 0.5 * weights @ h @ weights + q @ weights)
    exact = -torch.linalg.solve(p.T @ h @ p, p.T @ (h @ w0 + q))
    torch.testing.assert_close(optimizer.theta, exact, rtol=1e-6, atol=1e-6)


def test_sr1_learns_negative_curvature() -> None:
    x = nn.Parameter(torch.tensor([0.1, 0.05], dtype=torch.float64))
    optimizer = PBFGS([x], whole_space([x]), update="sr1")
    lowest, losses = [], []
    for _ in range(40):
        losses.append(float(optimizer.step(lambda: x.cos().sum())))
        lowest.append(float(torch.linalg.eigvalsh(saved(optimizer)["hessian"])[0]))
        record = optimizer.history[-1]
        assert record.curvature in ("none", "updated", "skipped")
        assert record.step_length <= 2 * saved(optimizer)["radius"] * (1 + 1e-9)
    assert min(lowest) < -0.5
    assert losses == sorted(losses, reverse=True) and losses[-1] == pytest.approx(-2.0)


def test_sr1_goes_back_along_its_direction_without_a_pass_over_the_basis() -> None:
    x = nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    optimizer = PBFGS([x], whole_space([x]), update="sr1", lr=64.0)
    optimizer.step(lambda: x.square().sum())
    record = optimizer.history[-1]
    assert record.trials > 4 and record.status is Status.ACCEPTED
    radius = saved(optimizer)["radius"]
    assert radius == pytest.approx(2 * record.step_length)  # the first step gives the scale


def test_lbfgs_keeps_so_many_pairs_and_no_matrix() -> None:
    batches = Batches(0)
    optimizer = PBFGS(
        batches.params, random_subspace(batches.params, 6), update="lbfgs", history_size=3
    )
    for step in range(8):
        optimizer.step(batches.forward(0))
        state = saved(optimizer)
        assert state["pair_steps"].shape == (min(step + 1, 3), 6)
        assert all(not torch.is_tensor(v) or v.shape != (6, 6) for v in state.values())
    curvatures = (state["pair_steps"] * state["pair_changes"]).sum(1)
    torch.testing.assert_close(curvatures, state["pair_curvatures"])
    assert curvatures.min() > 0


def test_lbfgs_with_all_pairs_takes_the_steps_of_bfgs() -> None:
    """On a quadratic whose curvature makes the scaling of the first guess the same for both."""

    def quadratic(x: Tensor) -> Tensor:
        return 0.5 * (x * torch.tensor([1.0, 1.0, 1.0, 0.3]).double() * x).sum()

    results = []
    for update in ("bfgs", "lbfgs"):
        x = nn.Parameter(torch.tensor([1.0, 2.0, -1.0, 0.0], dtype=torch.float64))
        optimizer = PBFGS([x], whole_space([x]), update=update, lr=0.5, line_search_fn=None)
        for _ in range(3):
            optimizer.step(lambda: quadratic(x))  # noqa: B023
        results.append(x.detach().clone())
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("update", RULES)
def test_a_failure_forgets_the_curvature(update: str) -> None:
    batches = Batches(0)
    optimizer = PBFGS(batches.params, random_subspace(batches.params, 4), update=update)
    fresh = saved(optimizer)
    for _ in range(4):
        optimizer.step(batches.forward(0))
    before = bits(batches.params)
    optimizer.step(lambda: batches.forward(0)() + math.nan)
    assert optimizer.status is Status.NON_FINITE_LOSS and bits(batches.params) == before
    for key in ("hessian", "radius", "inverse_hessian", "pair_steps", "pair_changes"):
        if key in fresh:
            now = saved(optimizer)[key]
            assert torch.equal(now, fresh[key]) if torch.is_tensor(now) else now == fresh[key]
    optimizer.step(batches.forward(0))
    assert optimizer.status is Status.ACCEPTED


@pytest.mark.parametrize("update", RULES)
def test_first_guess_comes_from_the_singular_values(update: str) -> None:
    x = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    space = Subspace(torch.eye(2).double(), flat([x]), singular_values=torch.tensor([2.0, 0.5]))
    optimizer = PBFGS([x], space, update=update, line_search_fn=None, lr=0.1)
    optimizer.step(lambda: 0.5 * x.square().sum())
    torch.testing.assert_close(x.detach(), torch.tensor([0.9, 0.975], dtype=torch.float64))


@pytest.mark.parametrize("update", RULES)
def test_curvature_is_carried_into_another_subspace(update: str) -> None:
    """The same plane in other coordinates: the next step is the same one."""
    results = []
    for turned in (False, True):
        batches = Batches(2)
        subspace = random_subspace(batches.params, 5)
        optimizer = PBFGS(batches.params, subspace, update=update)
        for _ in range(5):
            optimizer.step(batches.forward(0))
        if turned:
            q, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
            optimizer.change_subspace(Subspace(q @ subspace.basis, subspace.origin))
        optimizer.step(batches.forward(0))
        assert optimizer.status is Status.ACCEPTED
        results.append(flat(batches.params))
    torch.testing.assert_close(*results, rtol=1e-7, atol=1e-8)


# Where y comes from.


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("style", ["forward", "usual"])
def test_overlap_takes_both_gradients_from_the_new_batch(style: str, decay: float) -> None:
    batches = Batches(1)
    subspace = random_subspace(batches.params, 5)
    optimizer = PBFGS(
        batches.params, subspace, curvature="overlap", damping=None, weight_decay=decay
    )
    closure = getattr(batches, style)
    points = [flat(batches.params)]

    def coordinates(step: int, point: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(point, other.params)
        loss = other.forward(step)()
        return subspace.basis @ (flat(torch.autograd.grad(loss, other.params)) + decay * point)

    other = Batches(1)
    seen = []
    for step in range(12):
        before = saved(optimizer)["inverse_hessian"]
        calls = optimizer.closure_calls
        optimizer.step(closure(step))
        points.append(flat(batches.params))
        record = optimizer.history[-1]
        assert optimizer.closure_calls - calls == record.trials + (2 if step else 1)
        if record.curvature == "updated" and step > 1:  # not the first, which B is scaled for
            s = subspace.basis @ (points[step] - points[step - 1])
            y = coordinates(step, points[step]) - coordinates(step, points[step - 1])
            after = saved(optimizer)["inverse_hessian"]
            assert not torch.equal(before, after)
            torch.testing.assert_close(after @ y, s, rtol=1e-6, atol=1e-8)  # the secant equation
            seen.append(step)
    assert len(seen) >= 3


def test_overlap_leaves_gradients_and_buffers_of_the_current_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    params, x = list(model.parameters()), torch.randn(16, 3)
    optimizer = PBFGS(
        params, random_subspace(params, 4, torch.float32), curvature="overlap", buffers=model
    )
    masks: list[bytes] = []
    model[2].register_forward_hook(
        lambda _, __, out: masks.append((out.detach() != 0).numpy().tobytes())
    )
    for step in range(3):
        masks.clear()
        optimizer.step(lambda: model(x).square().mean())
        assert optimizer.status.moved and len(set(masks)) == 1
        assert len(masks) == optimizer.history[-1].trials + (2 if step else 1)
    assert model[1].num_batches_tracked == 3


def test_a_pair_that_is_not_finite_at_the_old_point_is_skipped() -> None:
    x = nn.Parameter(torch.tensor([2.0, -1.0], dtype=torch.float64))
    optimizer = PBFGS([x], whole_space([x]), curvature="overlap", lr=0.1)
    optimizer.step(lambda: x.square().sum())
    old = 2.0
    optimizer.step(lambda: x.square().sum() * (math.nan if x[0].item() == old else 1.0))
    assert optimizer.history[-1].curvature == "skipped"
    assert optimizer.status is Status.ACCEPTED


# Several iterations a step.


@pytest.mark.parametrize("style", ["forward", "usual"])
@pytest.mark.parametrize("search", [*SEARCHES, None])
@pytest.mark.parametrize("update", RULES)
def test_iterations_on_one_closure_are_steps_with_one_evaluation_less(
    update: str, search: str | None, style: str
) -> None:
    options = {"update": update, "line_search_fn": search, "lr": 0.5}
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


# Searches.


def test_interpolation_needs_fewer_trials_from_a_bad_first_step() -> None:
    counts = []
    for interpolate in (False, True):
        x = nn.Parameter(torch.full((3,), 1.0, dtype=torch.float64))
        optimizer = PBFGS([x], whole_space([x]), interpolate=interpolate)
        optimizer.step(lambda: 500 * x.square().sum())  # noqa: B023
        assert optimizer.status is Status.ACCEPTED
        counts.append(optimizer.history[0].trials)
    assert counts[1] < counts[0]


def test_first_step_limits_the_first_trial_only() -> None:
    x = nn.Parameter(torch.tensor([300.0, -400.0], dtype=torch.float64))
    optimizer = PBFGS([x], whole_space([x]), first_step=2.0)
    optimizer.step(lambda: 0.5 * x.square().sum())
    assert optimizer.history[0].step_length == pytest.approx(2.0)
    optimizer.step(lambda: 0.5 * x.square().sum())
    assert optimizer.history[1].step_length == pytest.approx(498.0)
    torch.testing.assert_close(x.detach(), torch.zeros(2).double(), rtol=0, atol=1e-10)
