"""P-BFGS: what it leaves behind when something goes wrong, and what every trial sees."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
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

from dldr_ext import PBFGS, PSGD, Status, Subspace

SEARCHES = ["armijo", "strong_wolfe"]
STYLES = ["forward", "usual"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def closure_of(forward: Callable[[], Tensor], params: list[nn.Parameter], style: str) -> Any:
    def usual() -> Tensor:
        for p in params:
            p.grad = None
        loss = forward()
        loss.backward()
        return loss

    return forward if style == "forward" else usual


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
    fine = lambda: sum(p.double().square().sum() for p in params)  # noqa: E731
    for _ in range(3):
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
def test_b_that_rounding_rules_is_dropped(monkeypatch: pytest.MonkeyPatch, curvature: str) -> None:
    batches = Batches(0)
    optimizer = PBFGS(batches.params, random_subspace(batches.params, 4), curvature=curvature)
    for _ in range(3):
        optimizer.step(batches.forward(0))
    assert not optimizer.state_dict()["subspace"]["fresh"]
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


# What trials see.


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("curvature", ["same_batch", "consecutive"])
@pytest.mark.parametrize("search", [*SEARCHES, None])
def test_random_numbers_and_buffers_are_the_same_in_every_evaluation(
    search: str | None, curvature: str, style: str
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    params, x = list(model.parameters()), torch.randn(32, 6)
    subspace = random_subspace(params, 5, dtype=torch.float32)
    optimizer = PBFGS(
        params, subspace, lr=20.0, line_search_fn=search, curvature=curvature, buffers=model
    )
    masks: list[bytes] = []
    entered: list[list[bytes]] = []

    def record(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        masks.append((output.detach() != 0).numpy().tobytes())

    model[2].register_forward_hook(record)

    def forward() -> Tensor:
        entered.append(bits(model.buffers()))
        return model(x).square().mean()

    last = None
    for _ in range(4):
        masks.clear()
        entered.clear()
        state, before = torch.get_rng_state(), bits(model.buffers())
        optimizer.step(closure_of(forward, params, style))
        assert len(masks) > 1 or (search is None and curvature == "consecutive")
        assert set(masks) == {masks[0]} and masks[0] != last  # new ones in the next step
        last = masks[0]
        assert all(found == before for found in entered)
        # Random state and buffers are as one evaluation at the weights we are at leaves them.
        after, buffers = torch.get_rng_state(), bits(model.buffers())
        if optimizer.status.moved and len(masks) > 1:
            replay = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
            replay.load_state_dict(
                {k: v for k, v in model.state_dict().items() if k.startswith(("0.", "1."))}
            )
            for buffer, old in zip(replay.buffers(), before, strict=True):
                dtype = buffer.dtype
                old_ = torch.frombuffer(bytearray(old), dtype=dtype).reshape(buffer.shape)
                buffer.copy_(old_)
            replay(x)
            assert bits(replay.buffers()) == buffers
        torch.set_rng_state(state)
        nn.functional.dropout(torch.ones(32, 8))
        assert torch.equal(after, torch.get_rng_state())
    assert model[1].num_batches_tracked == 4 or not optimizer.status.moved


def test_failed_search_leaves_the_buffers_and_moves_the_random_state_on() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    params, x = list(model.parameters()), torch.randn(16, 3)
    optimizer = PBFGS(
        params, random_subspace(params, 5, torch.float32), max_ls=3, buffers=model.buffers()
    )
    buffers, state = bits(model.buffers()), torch.get_rng_state()
    calls = iter(range(100))
    optimizer.step(lambda: model(x).square().mean() + 1e6 * next(calls))
    assert optimizer.status is Status.LINE_SEARCH_FAILED
    assert bits(model.buffers()) == buffers
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    nn.functional.dropout(torch.ones(16, 4))
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("search", SEARCHES)
def test_random_state_is_that_of_the_first_evaluation_alone(search: str) -> None:
    """Though the others draw more numbers."""
    params = [nn.Parameter(torch.full((4,), 2.0))]
    optimizer = PBFGS(params, whole_space(params), line_search_fn=search)
    drawn = []

    def closure() -> Tensor:
        drawn.append(torch.rand(1 + len(drawn)))
        return params[0].double().square().sum()

    state = torch.get_rng_state()
    optimizer.step(closure)
    after = torch.get_rng_state()
    assert optimizer.status.moved and len(drawn) > 1
    torch.set_rng_state(state)
    torch.rand(1)
    assert torch.equal(after, torch.get_rng_state())


# Where construction puts the model.


@pytest.mark.parametrize("optimizer", [PBFGS, PSGD])
def test_theta0_stays_the_callers(optimizer: type[PBFGS | PSGD]) -> None:
    batches = Batches(0)
    theta0 = torch.full((4,), 0.1, dtype=torch.float64)
    made = optimizer(batches.params, random_subspace(batches.params, 4), lr=0.1, theta0=theta0)
    made.step(batches.forward(0))
    assert made.status.moved and bool((theta0 == 0.1).all())


def test_construction_says_once_that_it_moved_the_weights(
    caplog: pytest.LogCaptureFixture,
) -> None:
    batches = Batches(0)
    subspace = random_subspace(batches.params, 4)
    for optimizer in (PBFGS, PSGD):
        with caplog.at_level(logging.WARNING, logger="dldr_ext"):
            optimizer(batches.params, subspace)
            assert not caplog.records  # it was there already
            with torch.no_grad():
                batches.params[1].add_(1.0)
            optimizer(batches.params, subspace)
        assert [r.name for r in caplog.records] == ["dldr_ext"]
        assert optimizer.__name__ in caplog.text and "moved to the origin" in caplog.text
        assert torch.equal(flat(batches.params), subspace.origin)
        caplog.clear()


@pytest.mark.parametrize("optimizer", [PBFGS, PSGD])
def test_theta0(optimizer: type[PBFGS | PSGD], caplog: pytest.LogCaptureFixture) -> None:
    batches = Batches(0)
    subspace = random_subspace(batches.params, 4)
    theta0 = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    made = optimizer(batches.params, subspace, theta0=theta0)
    assert torch.equal(made.theta, theta0) and "theta0" in caplog.text
    there = subspace.origin + theta0 @ subspace.basis
    torch.testing.assert_close(flat(batches.params), there, rtol=1e-12, atol=1e-12)
    caplog.clear()
    again = optimizer(batches.params, subspace, theta0="current")
    torch.testing.assert_close(again.theta, theta0, rtol=1e-10, atol=1e-10)
    assert not caplog.records
    made.theta.zero_()  # a copy
    assert torch.equal(made.theta, theta0)


# Bad input.


def problem() -> tuple[list[nn.Parameter], Subspace]:
    params = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4))]
    subspace = random_subspace(params, 3, dtype=torch.float32)
    return params, Subspace(subspace.basis, subspace.origin + 1.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": 0.0}, ValueError, r"lr: expected a number in \(0, inf\), got 0.0"),
        ({"lr": -1.0}, ValueError, "lr"),
        ({"lr": math.nan}, ValueError, "lr"),
        ({"lr": "1"}, TypeError, "lr: expected a number, got '1'"),
        ({"line_search_fn": "wolfe"}, ValueError, "line_search_fn: expected one of 'armijo'"),
        ({"c1": 0.0}, ValueError, "c1"),
        ({"c1": 1.0}, ValueError, "c1"),
        ({"c1": 0.95, "line_search_fn": "strong_wolfe"}, ValueError, r"c1: .*\(0, 0.9\)"),
        ({"backtrack": 1.0}, ValueError, "backtrack"),
        ({"backtrack": 0.0}, ValueError, "backtrack"),
        ({"max_ls": 0}, ValueError, "max_ls: expected at least 1, got 0"),
        ({"max_ls": 2.0}, TypeError, "max_ls: expected an int"),
        ({"curvature": "other"}, ValueError, "curvature: expected one of 'same_batch'"),
        ({"damping": "lm"}, ValueError, "damping: expected one of 'powell', None"),
        ({"residual_lr": -0.1}, ValueError, "residual_lr"),
        ({"residual_momentum": 1.0}, ValueError, "residual_momentum"),
        ({"buffers": 3}, TypeError, "buffers: expected a module"),
        ({"buffers": [1]}, TypeError, r"buffers\[0\]: expected a tensor, got int"),
        ({"process_group": object()}, ValueError, "process_group: expected an initialised group"),
        ({"theta0": torch.zeros(4)}, ValueError, r"theta0: .*shape \(3,\), got shape \(4,\)"),
        ({"theta0": torch.zeros(3, dtype=torch.int64)}, ValueError, "theta0"),
        ({"theta0": torch.full((3,), math.inf)}, ValueError, "theta0: expected finite"),
        ({"theta0": "origin"}, TypeError, "theta0"),
        ({"theta0": [0.0, 0.0, 0.0]}, TypeError, "theta0"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    params, subspace = problem()
    before = bits(params)
    with pytest.raises(error, match=message):
        PBFGS(params, subspace, **options)
    assert bits(params) == before


@pytest.mark.parametrize("optimizer", [PBFGS, PSGD])
def test_bad_parameters_and_subspaces(optimizer: type[PBFGS | PSGD]) -> None:
    params, subspace = problem()
    before = bits(params)
    with pytest.raises(TypeError, match=r"dldr_ext.Subspace or GroupedSubspace, got Tensor"):
        optimizer(params, subspace.basis)
    with pytest.raises(ValueError, match=r"params: expected 10 elements .* got 6"):
        optimizer(params[:1], subspace)
    with pytest.raises(ValueError, match="empty"):
        optimizer([], subspace)
    with pytest.raises(TypeError, match="params"):
        optimizer(params[0], subspace)
    with pytest.raises(ValueError, match=r"no options of single parameter groups, got .'lr'"):
        optimizer([{"params": params[:1], "lr": 1.0}, {"params": params[1:]}], subspace)
    with pytest.raises(ValueError, match="requires_grad"):
        optimizer([p.detach() for p in params], subspace)
    assert bits(params) == before
    made = optimizer([{"params": params[:1]}, {"params": params[1:]}], subspace)
    with pytest.raises(ValueError, match="add_param_group"):
        made.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(made.param_groups) == 1


def test_subspace_of_a_model_of_another_shape() -> None:
    params, _ = problem()
    subspace = Subspace.random(params, 3)
    other = [nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4))]
    before = bits(other)
    for optimizer in (PBFGS, PSGD):
        with pytest.raises(ValueError, match=r"params\[0\].*expected shape \(3, 2\)"):
            optimizer(other, subspace)
    assert bits(other) == before


def test_model_that_changed_shape_after_construction() -> None:
    params, subspace = problem()
    optimizer = PBFGS(params, subspace)
    params[1].data = torch.zeros(5)
    with pytest.raises(ValueError, match="10"):
        optimizer.step(lambda: sum(p.square().sum() for p in params))


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
        params, subspace = problem()
        optimizer = make(params, subspace)
        before = bits(params)
        with pytest.raises(TypeError, match=rf"closure: expected .* scalar.*{message}"):
            optimizer.step(lambda: returned(params[0]))  # noqa: B023
        assert bits(params) == before


def test_step_needs_a_closure() -> None:
    params, subspace = problem()
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
