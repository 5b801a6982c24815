"""Steps that run ahead of the host, as on a GPU: on the CPU they must do the same."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from optim_problems import Batches, bits, flat, interrupted, random_subspace
from published import PUBLISHED
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dldr_ext import PBFGS, Status
from dldr_ext.optim import pbfgs
from dldr_ext.optim.step import line_trials

OPTIONS: list[dict[str, Any]] = [
    {},
    PUBLISHED,
    {"curvature": "consecutive"},
    {"damping": None},
    {"residual_lr": 0.05},
    {"maximize": True},
]


@pytest.fixture
def ahead(monkeypatch):
    monkeypatch.setattr(PBFGS, "_devices_ahead", ("cpu", "cuda"))


class Reads(TorchDispatchMode):
    """Counts how often the host waits for numbers."""

    def __init__(self, monkeypatch) -> None:
        super().__init__()
        self.count = 0
        together = line_trials.read_together

        def counted(*args):
            self.count += 1
            return together(*args)

        monkeypatch.setattr(pbfgs, "read_together", counted)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = (torch.ops.aten._local_scalar_dense, torch.ops.aten.equal, torch.ops.aten.nonzero)
        self.count += func.overloadpacket in waits
        return func(*args, **(kwargs or {}))


def run(options: dict[str, Any], style: str, steps: int = 25):
    batches = Batches(3)
    params = batches.params
    sign = -1.0 if options.get("maximize") else 1.0
    optimizer = PBFGS(params, random_subspace(params, 6), **options)
    for step in range(steps):
        if style == "usual" and sign > 0:
            optimizer.step(batches.usual(step))
        else:
            forward = batches.forward(step)
            optimizer.step(lambda f=forward: sign * f())
    return batches, optimizer


@pytest.mark.parametrize("style", ["usual", "forward"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_goes_where_an_ordinary_step_goes(options, style, monkeypatch) -> None:
    ordinary_batches, ordinary = run(options, style)
    monkeypatch.setattr(PBFGS, "_devices_ahead", ("cpu",))
    batches, optimizer = run(options, style)
    assert optimizer._runs_ahead()
    torch.testing.assert_close(optimizer.theta, ordinary.theta, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(
        flat(batches.params), flat(ordinary_batches.params), rtol=1e-7, atol=1e-8
    )
    # A trial keeps its graph before it is known that H learns: less often it is made once more.
    assert optimizer.closure_calls <= ordinary.closure_calls
    for mine, right in zip(optimizer.history, ordinary.history, strict=True):
        assert (mine.status, mine.trials, mine.curvature) == (
            right.status,
            right.trials,
            right.curvature,
        )
        for name in ("loss", "gradient_norm", "alpha", "step_length", "condition", "loss_after"):
            a, b = getattr(mine, name), getattr(right, name)
            assert a == pytest.approx(b, rel=1e-5, abs=1e-9, nan_ok=True), name


@pytest.mark.parametrize("style", ["usual", "forward"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_host_waits_once_a_trial(options, style, ahead, monkeypatch) -> None:
    batches, optimizer = run(options, style, steps=3)
    sign = -1.0 if options.get("maximize") else 1.0
    for step in range(3, 12):
        own = batches.usual(step) if style == "usual" and sign > 0 else batches.forward(step)
        with Reads(monkeypatch) as reads:
            optimizer.step(own if sign > 0 else lambda f=own: -f())
        assert optimizer.history[-1].status.moved
        assert 1 <= reads.count <= optimizer.history[-1].trials
        monkeypatch.undo()
        monkeypatch.setattr(PBFGS, "_devices_ahead", ("cpu", "cuda"))


def test_the_count_sees_an_ordinary_step(monkeypatch) -> None:
    batches, optimizer = run({}, "forward", steps=3)
    with Reads(monkeypatch) as reads:
        optimizer.step(batches.forward(3))
    assert reads.count > optimizer.history[-1].trials


@pytest.mark.parametrize("where", ["loss", "gradient", "nowhere"])
def test_a_step_that_cannot_be_taken_leaves_all_as_it_was(where, ahead) -> None:
    batches = Batches(5)
    norm = nn.BatchNorm1d(6).double()
    batches.model.insert(0, norm)
    params = batches.params
    optimizer = PBFGS(params, random_subspace(params, 6), buffers=batches.model)
    for step in range(4):
        optimizer.step(batches.forward(step))
    weights, buffers = bits(params), [b.clone() for b in batches.model.buffers()]
    closure = batches.forward(4)

    def broken():
        loss = closure()
        if where == "nowhere":  # |c| is exactly zero
            return 0.0 * loss.detach() + sum((0.0 * p).sum() for p in params)
        if where == "loss":
            return loss * math.nan
        return loss + 0.0 * (params[0] - params[0].detach()).sum().sqrt()  # 0 * inf backward

    optimizer.step(broken)
    expected = {
        "loss": Status.NON_FINITE_LOSS,
        "gradient": Status.NON_FINITE_GRADIENT,
        "nowhere": Status.CONVERGED,
    }
    assert optimizer.status is expected[where]
    assert bits(params) == weights
    for found, right in zip(batches.model.buffers(), buffers, strict=True):
        assert torch.equal(found, right)
    optimizer.step(closure)
    assert optimizer.status.moved


def test_a_gradient_that_breaks_at_the_accepted_point_is_found_by_the_next_step(ahead) -> None:
    batches = Batches(6)
    params = batches.params
    optimizer = PBFGS(params, random_subspace(params, 6))
    for step in range(4):
        optimizer.step(batches.forward(step))
    good = optimizer.theta
    closure, calls = batches.forward(4), 0

    def breaking():
        nonlocal calls
        calls += 1
        loss = closure()
        return loss if calls == 1 else loss + 0.0 * (params[0] - params[0].detach()).sum().sqrt()

    optimizer.step(breaking)  # the loss there is fine
    assert optimizer.status is Status.ACCEPTED
    calls = 1
    optimizer.step(breaking)
    assert optimizer.status is Status.RESTORED
    torch.testing.assert_close(optimizer.theta, good, rtol=0.0, atol=0.0)
    optimizer.step(batches.forward(5))
    assert optimizer.status is Status.ACCEPTED


def test_a_closure_that_raises_in_the_first_trial_loses_nothing(ahead) -> None:
    batches = Batches(7)
    params = batches.params
    optimizer = PBFGS(params, random_subspace(params, 6))
    for step in range(4):
        optimizer.step(batches.forward(step))
    weights, theta = bits(params), optimizer.theta
    closure = batches.forward(4)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(interrupted(closure, 2))
    assert bits(params) == weights
    assert torch.equal(optimizer.theta, theta)
    optimizer.step(closure)
    assert optimizer.status.moved


def test_an_h_that_learnt_before_the_closure_raised_is_no_initial_one_any_more(ahead) -> None:
    batches = Batches(7)
    optimizer = PBFGS(batches.params, random_subspace(batches.params, 6))
    optimizer.step(batches.forward(0))
    initial, closure = optimizer._inverse_hessian.matrix.clone(), batches.forward(1)
    assert optimizer._inverse_hessian.fresh
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(interrupted(closure, 2))
    assert not torch.equal(optimizer._inverse_hessian.matrix, initial)
    assert not optimizer._inverse_hessian.fresh


def test_a_closure_may_write_every_loss_into_one_tensor(monkeypatch) -> None:
    """As callables that replay a CUDA graph do."""
    ends = []
    for devices in (("cuda",), ("cpu",)):
        monkeypatch.setattr(PBFGS, "_devices_ahead", devices)
        batches, static = Batches(10), torch.zeros((), dtype=torch.float64)
        optimizer = PBFGS(batches.params, random_subspace(batches.params, 6))
        for step in range(8):
            usual = batches.usual(step)
            optimizer.step(lambda f=usual, out=static: out.copy_(f().detach()))
            assert optimizer.status is Status.ACCEPTED
        ends.append([record.loss for record in optimizer.history])
    assert ends[1] == pytest.approx(ends[0], rel=1e-6)


def test_a_first_loss_that_is_not_finite_is_refused(ahead) -> None:
    batches = Batches(8)
    params = batches.params
    optimizer = PBFGS(params, random_subspace(params, 6))
    weights, closure = bits(params), batches.forward(0)
    with pytest.raises(ValueError, match="expected a finite loss in the first step, got nan"):
        optimizer.step(lambda: closure() * math.nan)
    assert bits(params) == weights


def test_a_loss_that_is_a_number_is_taken_as_it_is(ahead) -> None:
    batches = Batches(9)
    params = batches.params
    optimizer = PBFGS(params, random_subspace(params, 6))
    usual = batches.usual(0)
    first = optimizer.step(lambda: usual().item())
    assert isinstance(first, float)
    assert usual().item() < first


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_resumes_bit_for_bit(options, ahead) -> None:
    batches, optimizer = run(options, "forward", steps=9)
    model, state = batches.model.state_dict(), optimizer.state_dict()
    model = {key: value.clone() for key, value in model.items()}
    for step in range(9, 15):
        optimizer.step(batches.forward(step))
    again = Batches(3)
    subspace = random_subspace(again.params, 6)
    again.model.load_state_dict(model)
    other = PBFGS(again.params, subspace, **options)
    other.load_state_dict(state)
    for step in range(9, 15):
        other.step(again.forward(step))
    assert bits(again.params) == bits(batches.params)
    assert torch.equal(other.theta, optimizer.theta)
