"""Saving, resuming and copying the optimizers."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from optim_problems import Batches, bits, check_copies_go_their_own_way, random_subspace

from dldr_ext import PBFGS, PSGD, Status

CASES: list[tuple[Any, dict[str, Any]]] = [
    (PBFGS, {}),
    (PBFGS, {"curvature": "consecutive", "damping": None, "c1": 0.4, "backtrack": 0.4}),
    (PBFGS, {"line_search_fn": "strong_wolfe"}),
    (PBFGS, {"residual_lr": 0.05, "curvature": "consecutive"}),
    (PBFGS, {"line_search_fn": None, "lr": 0.1}),
    (PBFGS, {"max_iter": 3, "weight_decay": 0.01}),
    (PBFGS, {"maximize": False, "weight_decay": 0.01, "residual_lr": 0.05}),
    (PSGD, {"lr": 0.1}),
    (PSGD, {"lr": 0.1, "weight_decay": 0.01}),
]


def saved_and_loaded(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("make", "options"), CASES)
def test_resumes_bit_for_bit(make: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    basis_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    batches = Batches(0, dtype=dtype)
    subspace = random_subspace(batches.params, 6, dtype=basis_dtype)
    optimizer = make(batches.params, subspace, **options)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.98)
    for step in range(40):  # past the step that computes the point anew
        if step == 17:
            checkpoint = saved_and_loaded(
                [batches.model.state_dict(), optimizer.state_dict(), schedule.state_dict()]
            )
        optimizer.step(batches.forward(step))
        schedule.step()

    again = Batches(1, dtype=dtype)  # other weights, same data
    again.inputs, again.targets = batches.inputs, batches.targets
    again.model.load_state_dict(checkpoint[0])
    resumed = make(again.params, subspace, lr=7.0)
    resumed_schedule = torch.optim.lr_scheduler.ExponentialLR(resumed, 0.5)
    resumed.load_state_dict(checkpoint[1])
    resumed_schedule.load_state_dict(checkpoint[2])
    assert bits(again.params) == bits(
        torch.nn.utils.parameters_to_vector([p]) for p in checkpoint[0].values()
    )
    for step in range(17, 40):
        resumed.step(again.forward(step))
        resumed_schedule.step()
    assert bits(again.params) == bits(batches.params)
    assert torch.equal(resumed.theta, optimizer.theta)
    assert resumed.status is optimizer.status
    assert resumed.closure_calls == optimizer.closure_calls
    assert resumed.gradient_calls == optimizer.gradient_calls
    ours, theirs = optimizer.state_dict(), resumed.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    for key, value in ours["subspace"].items():
        other = theirs["subspace"][key]
        assert torch.equal(value, other) if torch.is_tensor(value) else value == other


@pytest.mark.parametrize("make", [PBFGS, PSGD])
def test_loading_puts_the_model_where_it_was_saved(make: Any) -> None:
    batches = Batches(0)
    optimizer = make(batches.params, random_subspace(batches.params, 4), lr=0.1)
    optimizer.step(batches.forward(0))
    state, there = optimizer.state_dict(), bits(batches.params)
    for step in range(3):
        optimizer.step(batches.forward(step))
    assert bits(batches.params) != there
    optimizer.load_state_dict(state)
    assert bits(batches.params) == there and optimizer.status is Status.ACCEPTED


@pytest.mark.parametrize("make", [PBFGS, PSGD])
def test_the_state_is_a_copy(make: Any) -> None:
    batches = Batches(0)
    optimizer = make(batches.params, random_subspace(batches.params, 4), lr=0.1)
    optimizer.step(batches.forward(0))
    state = optimizer.state_dict()
    kept = copy.deepcopy(state)
    optimizer.step(batches.forward(1))
    for key, value in kept["subspace"].items():
        assert torch.equal(value, state["subspace"][key]) if torch.is_tensor(value) else True
    other = make(batches.params, optimizer.subspace)
    other.load_state_dict(state)
    other.step(batches.forward(1))
    assert torch.equal(state["subspace"]["theta"], kept["subspace"]["theta"])


def test_a_state_holds_no_more_flat_vectors_than_it_needs() -> None:
    for options, count in (({}, 1), (CASES[1][1], 1)):
        batches = Batches(0)
        optimizer = PBFGS(batches.params, random_subspace(batches.params, 4), **options)
        for step in range(3):
            optimizer.step(batches.forward(step))
        state = optimizer.state_dict()["subspace"].values()
        assert [torch.is_tensor(v) and v.shape == (83,) for v in state].count(True) == count


def test_wrong_states_are_refused_and_change_nothing() -> None:
    batches, small = Batches(0), Batches(0)
    subspace = random_subspace(batches.params, 4)
    optimizer = PBFGS(batches.params, subspace)
    for step in range(3):
        optimizer.step(batches.forward(step))
    before, state = bits(batches.params), copy.deepcopy(optimizer.state_dict())

    def refused(wrong: Any, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(wrong)
        assert bits(batches.params) == before
        now = optimizer.state_dict()
        for key, value in state["subspace"].items():
            other = now["subspace"][key]
            assert torch.equal(value, other) if torch.is_tensor(value) else value == other

    wide = PBFGS(small.params, random_subspace(small.params, 5))
    refused(wide.state_dict(), r"theta: expected a tensor of shape \(4,\), got shape \(5,\)")
    refused(PSGD(small.params, random_subspace(small.params, 4)).state_dict(), "keys")
    refused(torch.optim.SGD(small.params, lr=0.1).state_dict(), "PBFGS.state_dict")
    refused({}, "PBFGS.state_dict")
    half = Batches(0).params[:2]
    short = PBFGS(half, random_subspace(half, 4))
    refused(short.state_dict(), r"point: expected a tensor of shape \(83,\), got shape \(56,\)")
    elsewhere = PBFGS(small.params, random_subspace(small.params, 4, seed=1))
    for step in range(3):
        elsewhere.step(small.forward(step))
    refused(elsewhere.state_dict(), "saved with another subspace")
    for key, value in (("status", "DONE"), ("inverse_hessian", None), ("theta", [0.0] * 4)):
        broken = copy.deepcopy(state)
        broken["subspace"][key] = value
        refused(broken, key)
    older = copy.deepcopy(state)
    older["subspace"]["previous_direction"] = None  # of an option that is gone
    refused(older, "expected the keys .* got .*'previous_direction'")
    grouped = copy.deepcopy(state)
    grouped["param_groups"][0]["params"].pop()
    refused(grouped, "parameter group")
    optimizer.load_state_dict(state)


@pytest.mark.parametrize(("make", "options"), CASES)
def test_copies_go_their_own_way(make: Any, options: dict[str, Any]) -> None:
    batches = Batches(0)
    optimizer = make(batches.params, random_subspace(batches.params, 4), **options)
    check_copies_go_their_own_way(batches, optimizer)


def test_is_an_optimizer_to_torch() -> None:
    batches = Batches(0)
    optimizer = PBFGS(batches.params, random_subspace(batches.params, 4))
    assert isinstance(optimizer, torch.optim.Optimizer)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.step(batches.forward(0))
    assert seen == ["before", "after"]
    optimizer.zero_grad()
    assert all(p.grad is None for p in batches.params)
    assert "curvature: same_batch" in repr(optimizer)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    for _ in range(3):
        plateau.step(1.0)
    assert optimizer.param_groups[0]["lr"] == 0.25
