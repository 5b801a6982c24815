"""Steps that go wrong: failed searches, losses and gradients that are not finite, exceptions."""

from __future__ import annotations

import math

import pytest
import torch
from optim_problems import Batches, bits, closure_of, random_subspace, whole_space
from torch import Tensor, nn

from dldr_ext import PBFGS, Status

SEARCHES = ["armijo", "strong_wolfe"]
STYLES = ["forward", "usual"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def curvature_of(optimizer: PBFGS) -> Tensor:
    return optimizer.state_dict()["subspace"]["inverse_hessian"]


def mixed(dtype: torch.dtype) -> list[nn.Parameter]:
    """Parameters of one dtype and, beside them, of float32 and bfloat16."""
    shapes = ((7, 3), (300,), (5,))
    dtypes = (dtype, torch.float32, torch.bfloat16)
    return [nn.Parameter(torch.randn(s).to(t)) for s, t in zip(shapes, dtypes, strict=True)]


# A search that fails.


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_failed_search_leaves_the_weights_bitwise(
    dtype: torch.dtype, search: str, style: str
) -> None:
    params = mixed(dtype)
    subspace = random_subspace(params, 5, dtype=torch.float32)
    optimizer = PBFGS(params, subspace, lr=0.05, line_search_fn=search, max_ls=5)
    fine = lambda: sum(h * p.double().square().sum() for h, p in enumerate(params, 1))  # noqa: E731
    optimizer.step(closure_of(fine, params, style))
    assert optimizer.status.moved
    before, theta, calls = bits(params), optimizer.theta, optimizer.closure_calls
    visited: list[list[bytes]] = []

    def uphill() -> Tensor:
        visited.append(bits(params))
        return fine() + (0.0 if bits(params) == before else 1e6)

    optimizer.step(closure_of(uphill, params, style))
    assert optimizer.status is Status.LINE_SEARCH_FAILED and not optimizer.status.moved
    assert optimizer.closure_calls - calls == 6 and visited[1] != before
    assert bits(params) == before and torch.equal(optimizer.theta, theta)
    assert torch.equal(curvature_of(optimizer), torch.eye(5, dtype=torch.float64))
    optimizer.step(closure_of(fine, params, style))  # and it goes on from there
    assert optimizer.status.moved


def test_a_failed_search_forgets_the_last_gradient() -> None:
    """The step after a reset must not learn from a pair that spans it."""
    batches = Batches(0)
    optimizer = PBFGS(batches.params, random_subspace(batches.params, 4), curvature="consecutive")
    for step in range(3):
        optimizer.step(batches.forward(step))
    constant = iter([0.0, *[1e9] * 30])
    optimizer.step(lambda: batches.forward(0)() * 0.0 + 1.0 + next(constant) + penalty(batches))
    assert optimizer.status is Status.LINE_SEARCH_FAILED
    state = optimizer.state_dict()["subspace"]
    assert state["previous_step"] is None and state["fresh"]


def test_a_failed_step_forgets_the_momentum_outside_the_subspace() -> None:
    batches = Batches(0)
    optimizer = PBFGS(batches.params, random_subspace(batches.params, 4), residual_lr=0.01)
    optimizer.step(batches.forward(0))
    assert optimizer.state_dict()["subspace"]["residual"].abs().max() > 0
    optimizer.step(lambda: batches.forward(0)() + math.nan)
    assert optimizer.status is Status.RESTORED  # nothing was evaluated outside the subspace
    assert optimizer.state_dict()["subspace"]["residual"] is None


@pytest.mark.parametrize("curvature", ["same_batch", "consecutive"])
def test_h_that_rounding_rules_is_dropped(monkeypatch: pytest.MonkeyPatch, curvature: str) -> None:
    batches = Batches(0)
    optimizer = PBFGS(batches.params, random_subspace(batches.params, 4), curvature=curvature)
    for _ in range(3):
        optimizer.step(batches.forward(0))
    assert not optimizer.state_dict()["subspace"]["fresh"]
    monkeypatch.setattr("dldr_ext.optim.algebra.bfgs._SMALL", 0)  # the op is tested with others
    monkeypatch.setattr("dldr_ext.optim.algebra.bfgs.condition", lambda b: math.inf)
    optimizer.step(batches.forward(0))
    assert optimizer.status is Status.ACCEPTED
    assert optimizer.state_dict()["subspace"]["fresh"]
    assert torch.equal(curvature_of(optimizer), torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("curvature", ["same_batch", "consecutive"])
@pytest.mark.parametrize("search", [*SEARCHES, None])
def test_learning_rate_zero_is_a_step_of_length_zero(search: str | None, curvature: str) -> None:
    """Where a schedule ends: no failure, and what is known of the curvature stays."""
    batches = Batches(0)
    optimizer = PBFGS(
        batches.params,
        random_subspace(batches.params, 4),
        line_search_fn=search,
        curvature=curvature,
    )
    for _ in range(3):
        optimizer.step(batches.forward(0))
    before, learnt = bits(batches.params), curvature_of(optimizer)
    optimizer.param_groups[0]["lr"] = 0.0
    for _ in range(2):
        optimizer.step(batches.forward(0))
        assert optimizer.status is Status.ACCEPTED
        assert bits(batches.params) == before
        if curvature == "same_batch":
            assert torch.equal(curvature_of(optimizer), learnt)
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step(batches.forward(0))
    assert optimizer.status.moved


def penalty(batches: Batches) -> Tensor:
    return sum(p.square().sum() for p in batches.params)


# Losses and gradients that are not finite.


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_loss_that_is_not_finite_at_the_start(bad: float, style: str) -> None:
    batches = Batches(0)
    optimizer = PBFGS(batches.params, random_subspace(batches.params, 4), buffers=batches.model)
    for step in range(3):
        optimizer.step(batches.forward(step))
    before, theta = bits(batches.params), optimizer.theta
    broken = lambda: batches.forward(0)() + bad  # noqa: E731
    loss = optimizer.step(closure_of(broken, batches.params, style))
    assert not math.isfinite(loss) and optimizer.status is Status.NON_FINITE_LOSS
    assert bits(batches.params) == before and torch.equal(optimizer.theta, theta)
    assert torch.equal(curvature_of(optimizer), torch.eye(4, dtype=torch.float64))
    optimizer.step(batches.forward(0))
    assert optimizer.status is Status.ACCEPTED


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradient_that_is_not_finite(bad: float) -> None:
    batches = Batches(0)
    optimizer = PBFGS(batches.params, random_subspace(batches.params, 4))
    optimizer.step(batches.forward(0))
    before = bits(batches.params)

    def closure() -> Tensor:
        loss = batches.usual(0)()
        batches.params[2].grad[1, 3] = bad
        return loss

    optimizer.step(closure)
    assert optimizer.status is Status.NON_FINITE_GRADIENT and bits(batches.params) == before
    assert torch.equal(curvature_of(optimizer), torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("search", [*SEARCHES, None])
def test_gradient_that_is_not_finite_at_the_accepted_point(search: str | None) -> None:
    x = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = PBFGS([x], whole_space([x]), lr=0.5, line_search_fn=search)

    def closure() -> Tensor:
        x.grad = 2 * x.detach()
        if x[0] < 1:
            x.grad[1] = math.nan
        return x.detach().square().sum()

    optimizer.step(closure)
    assert not optimizer.status.moved and torch.equal(x.detach(), torch.ones(2).double())


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("search", SEARCHES)
def test_trial_that_is_not_finite_is_rejected(search: str, bad: float, style: str) -> None:
    x = nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    optimizer = PBFGS([x], whole_space([x]), lr=4.0, line_search_fn=search)
    seen: list[bool] = []

    def forward() -> Tensor:
        outside = bool((x.detach() < -1).any())
        seen.append(outside)
        return x.square().sum() + (bad if outside else 0.0)

    optimizer.step(closure_of(forward, [x], style))
    assert any(seen) and not seen[-1]
    assert optimizer.status is Status.ACCEPTED and bool((x >= -1).all())


def test_without_a_search_a_bad_step_is_taken_back() -> None:
    x = nn.Parameter(torch.full((3,), 2.0, dtype=torch.float64))
    optimizer = PBFGS([x], whole_space([x]), line_search_fn=None)
    optimizer.step(lambda: x.square().sum() + (math.nan if bool(x[0] < 0) else 0.0))
    assert optimizer.status is Status.LINE_SEARCH_FAILED
    assert torch.equal(x.detach(), torch.full((3,), 2.0, dtype=torch.float64))


def test_overflow_in_the_direction_is_survived() -> None:
    """u overflows to infinity in float32; the weights must not become 0 * inf."""
    x = nn.Parameter(torch.ones(4))
    optimizer = PBFGS([x], random_subspace([x], 4, dtype=torch.float32), max_ls=3)
    state = optimizer.state_dict()
    state["subspace"]["inverse_hessian"] = 1e100 * torch.eye(4, dtype=torch.float64)
    optimizer.load_state_dict(state)
    before = bits([x])
    optimizer.step(lambda: x.square().sum())
    assert optimizer.status is Status.LINE_SEARCH_FAILED and bits([x]) == before


# Exceptions.


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("call", [1, 2, 3])
def test_exception_in_the_closure_restores_everything(call: int, style: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)).bfloat16()
    params, x = list(model.parameters()), torch.randn(16, 3, dtype=torch.bfloat16)
    optimizer = PBFGS(params, random_subspace(params, 5, torch.float32), buffers=model)
    fine = lambda: model(x).float().square().mean()  # noqa: E731
    optimizer.step(fine)
    before, buffers, theta = bits(params), bits(model.buffers()), optimizer.theta
    calls = 0

    def forward() -> Tensor:
        nonlocal calls
        calls += 1
        loss = fine()
        if calls == call:
            raise KeyboardInterrupt("stop")
        return loss + 1e6 * (calls > 1)

    with pytest.raises(KeyboardInterrupt, match="stop"):
        optimizer.step(closure_of(forward, params, style))
    assert calls == call and bits(params) == before and bits(model.buffers()) == buffers
    assert torch.equal(optimizer.theta, theta)
    optimizer.step(fine)
    assert optimizer.status.moved
