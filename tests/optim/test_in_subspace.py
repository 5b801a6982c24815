"""Optimizers of torch on theta."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from optim_problems import Batches, bits, check_copies_go_their_own_way, random_subspace

from dldr_ext import GroupedSubspace, InSubspace, Status, ops

OPTIMIZERS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.Adam, {"lr": 0.1}),
    (torch.optim.AdamW, {"lr": 0.1, "weight_decay": 0.1}),
    (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9, "nesterov": True}),
    (torch.optim.RMSprop, {"lr": 0.05, "centered": True}),
    (torch.optim.LBFGS, {"max_iter": 3, "line_search_fn": "strong_wolfe"}),
]


@pytest.mark.parametrize(("make", "options"), OPTIMIZERS)
@pytest.mark.parametrize("style", ["forward", "usual"])
def test_is_the_optimizer_on_a_parametrized_model(
    make: type[torch.optim.Optimizer], options: dict[str, Any], style: str
) -> None:
    ours, theirs = Batches(0), Batches(0)
    optimizer = InSubspace(ours.params, random_subspace(ours.params, 6), make, **options)
    module = random_subspace(theirs.params, 6).parametrize(theirs.model)
    twin = make(module.parameters(), **options)
    for step in range(20):
        i = step % 4

        def closure(i: int = i) -> torch.Tensor:
            twin.zero_grad()
            loss = torch.nn.functional.cross_entropy(module(theirs.inputs[i]), theirs.targets[i])
            loss.backward()
            return loss

        loss, other = optimizer.step(getattr(ours, style)(step)), twin.step(closure)
        torch.testing.assert_close(loss, other.detach(), rtol=1e-9, atol=1e-9)
        assert optimizer.status is Status.ACCEPTED
        torch.testing.assert_close(optimizer.theta, module.theta.detach(), rtol=1e-7, atol=1e-9)
    module.write_back()
    for p, q in zip(ours.params, theirs.params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-7, atol=1e-9)


def test_two_passes_over_the_basis_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    batches = Batches(0)
    optimizer = InSubspace(batches.params, random_subspace(batches.params, 6), torch.optim.Adam)
    passes: list[str] = []
    for name in ("project", "project_many", "reconstruct", "reconstruct_", "reconstruct_residual"):
        real = getattr(ops, name)

        def counted(*args: Any, name: str = name, real: Any = real, **options: Any) -> Any:
            passes.append(name)
            return real(*args, **options)

        monkeypatch.setattr(ops, name, counted)
    optimizer.step(batches.forward(0))
    assert passes == ["project_many", "reconstruct_"] and optimizer.closure_calls == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("make", "options"), OPTIMIZERS)
def test_resumes_bit_for_bit(
    make: type[torch.optim.Optimizer], options: dict[str, Any], dtype: torch.dtype
) -> None:
    batches = Batches(0, dtype=dtype)
    basis = torch.float64 if dtype == torch.float64 else torch.float32
    subspace = random_subspace(batches.params, 6, dtype=basis)
    optimizer = InSubspace(batches.params, subspace, make, **options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in range(12):
        if step == 7:
            file = io.BytesIO()
            torch.save([optimizer.state_dict(), schedule.state_dict()], file)
        optimizer.step(batches.forward(step))
        schedule.step()

    file.seek(0)
    states = torch.load(file, weights_only=True)
    again = Batches(1, dtype=dtype)  # other weights, same data
    again.inputs, again.targets = batches.inputs, batches.targets
    resumed = InSubspace(again.params, subspace, make, lr=7.0)
    resumed_schedule = torch.optim.lr_scheduler.ExponentialLR(resumed, 0.5)
    resumed.load_state_dict(states[0])
    resumed_schedule.load_state_dict(states[1])
    for step in range(7, 12):
        resumed.step(again.forward(step))
        resumed_schedule.step()
    assert bits(again.params) == bits(batches.params)
    assert torch.equal(resumed.theta, optimizer.theta)
    assert resumed.closure_calls == optimizer.closure_calls
    assert resumed.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize(("make", "options"), OPTIMIZERS)
def test_copies_go_their_own_way(
    make: type[torch.optim.Optimizer], options: dict[str, Any]
) -> None:
    batches = Batches(0)
    optimizer = InSubspace(batches.params, random_subspace(batches.params, 4), make, **options)
    check_copies_go_their_own_way(batches, optimizer)


def test_the_state_is_a_copy() -> None:
    batches = Batches(0)
    optimizer = InSubspace(batches.params, random_subspace(batches.params, 4), torch.optim.Adam)
    optimizer.step(batches.forward(0))
    state = optimizer.state_dict()
    kept, there = copy.deepcopy(state), bits(batches.params)
    optimizer.step(batches.forward(1))
    assert str(state) == str(kept) and bits(batches.params) != there
    optimizer.load_state_dict(state)
    assert bits(batches.params) == there
    optimizer.step(batches.forward(1))
    assert str(state) == str(kept)


def test_schedules_reach_the_optimizer() -> None:
    batches = Batches(0)
    optimizer = InSubspace(
        batches.params, random_subspace(batches.params, 4), torch.optim.SGD, lr=0.5
    )
    c = optimizer.subspace.project(torch.autograd.grad(batches.forward(0)(), batches.params))
    optimizer.param_groups[0]["lr"] = 0.25
    optimizer.step(batches.forward(0))
    torch.testing.assert_close(optimizer.theta, -0.25 * c)


def test_without_a_closure_and_with_layers() -> None:
    batches = Batches(0)
    subspace = GroupedSubspace.random(batches.params, 4, [2, 2], dtype=torch.float64)
    optimizer = InSubspace(batches.params, subspace, torch.optim.Adam, lr=0.1)
    before = batches.usual(0)()
    for _ in range(30):
        batches.usual(0)()
        assert optimizer.step() is None
    assert batches.forward(0)() < 0.9 * before
    lbfgs = InSubspace(batches.params, subspace, torch.optim.LBFGS, theta0="current")
    batches.usual(0)()
    with pytest.raises(
        TypeError, match=r"InSubspace: step: closure: expected .*, got None; .* use"
    ):
        lbfgs.step()
    here = optimizer.subspace.reconstruct(lbfgs.theta)
    assert torch.equal(here, torch.nn.utils.parameters_to_vector(batches.params).detach())


def test_bad_arguments_move_nothing() -> None:
    batches = Batches(0)
    subspace = random_subspace(batches.params, 4)
    for p in batches.params:
        p.data.add_(1.0)
    before = bits(batches.params)
    for optimizer, options, error, message in (
        (torch.optim.Adam([torch.zeros(1)]), {}, TypeError, "expected a class such as"),
        (dict, {}, TypeError, "optimizer: expected a class such as torch.optim.Adam, got <class"),
        (torch.optim.Adam, {"lr": -1.0}, ValueError, "Invalid learning rate"),
        (torch.optim.Adam, {"nesterov": True}, TypeError, "nesterov"),
    ):
        with pytest.raises(error, match=message):
            InSubspace(batches.params, subspace, optimizer, **options)
    adam = InSubspace(Batches(0).params, subspace, torch.optim.Adam)
    made = InSubspace(Batches(0).params, subspace, torch.optim.SGD)
    with pytest.raises(ValueError, match="optimizer: expected SGD, got Adam"):
        made.load_state_dict(adam.state_dict())
    assert bits(batches.params) == before


def test_history() -> None:
    batches = Batches(0)
    subspace = random_subspace(batches.params, 4)
    optimizer = InSubspace(batches.params, subspace, torch.optim.LBFGS, lr=0.5, max_iter=4)
    before, loss = optimizer.theta, batches.forward(0)().item()
    optimizer.step(batches.forward(0))
    (record,) = optimizer.history
    assert record.loss == loss and record.alpha == 0.5 and record.status is Status.ACCEPTED
    assert record.step_length == pytest.approx(float((optimizer.theta - before).norm()))
    assert record.trials == optimizer.closure_calls - 1 == 3 and record.gradient_norm > 0


def test_weights_that_something_else_wrote() -> None:
    batches = Batches(0)
    optimizer = InSubspace(batches.params, random_subspace(batches.params, 4), torch.optim.Adam)
    optimizer.step(batches.forward(0))
    with torch.no_grad():
        batches.params[1].add_(0.1)
    with pytest.raises(ValueError, match=r"InSubspace: params\[1\]: expected the weights"):
        optimizer.step(batches.forward(1))
    optimizer.resync()
    theta = optimizer.subspace.coordinates(batches.params)
    torch.testing.assert_close(optimizer.theta, theta)
    optimizer.step(batches.forward(1))
    assert not torch.equal(optimizer.theta, theta)
