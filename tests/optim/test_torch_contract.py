"""What torch's own optimizer tests check of an optimizer, of those in a subspace."""

from __future__ import annotations

import copy
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from optim_problems import Batches, bits, flat, random_subspace
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.optim import lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from dldr_ext import PBFGS, PSGD, Status, Subspace
from dldr_ext.optim.step.write_guard import GradientWatch

MAKERS = [PBFGS, PSGD]
SCHEDULES = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.3, total_steps=9, cycle_momentum=False),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.2, 1.0, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
}


def made(make: Any, seed: int = 0, **options: Any) -> tuple[Batches, Any]:
    batches = Batches(seed)
    return batches, make(batches.params, random_subspace(batches.params, 5), lr=0.1, **options)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("make", MAKERS)
def test_schedules(make: Any, schedule: str) -> None:
    """The same numbers as torch's SGD gets; and each is what the step does."""
    batches, optimizer = made(make, **({"line_search_fn": None} if make is PBFGS else {}))
    reference = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    ours, theirs = SCHEDULES[schedule](optimizer), SCHEDULES[schedule](reference)
    for step in range(8):
        optimizer.step(batches.forward(step))
        reference.step()
        assert optimizer.param_groups[0]["lr"] == reference.param_groups[0]["lr"]
        assert optimizer.history[-1].alpha == optimizer.param_groups[0]["lr"]
        ours.step()
        theirs.step()


def test_a_cycle_of_momentum() -> None:
    batches, optimizer = made(PSGD)
    schedule = lr_scheduler.OneCycleLR(optimizer, 0.3, total_steps=5)
    seen = []
    for step in range(4):
        optimizer.step(batches.forward(step))
        seen.append(optimizer.param_groups[0]["momentum"])
        schedule.step()
    assert len(set(seen)) > 1


@pytest.mark.parametrize("make", MAKERS)
def test_learning_rate_as_a_tensor(make: Any) -> None:
    one, other = Batches(0), Batches(0)
    subspace = random_subspace(one.params, 5)
    lr = torch.tensor(0.25)
    tensor, number = make(one.params, subspace, lr=lr), make(other.params, subspace, lr=0.25)
    schedule = [lr_scheduler.ExponentialLR(o, 0.5) for o in (tensor, number)]
    for step in range(4):
        tensor.step(one.forward(step))
        number.step(other.forward(step))
        for s in schedule:
            s.step()
        torch.testing.assert_close(flat(one.params), flat(other.params), rtol=1e-5, atol=1e-6)
    assert tensor.param_groups[0]["lr"] is lr
    with pytest.raises(ValueError, match="lr: expected a number"):
        make(one.params, subspace, lr=torch.tensor(-1.0))
    with pytest.raises(TypeError, match="lr: expected a number"):
        make(one.params, subspace, lr=torch.ones(2))


@pytest.mark.parametrize("make", MAKERS)
def test_step_hooks_see_the_arguments_and_may_change_them(make: Any) -> None:
    batches, optimizer = made(make)
    seen: list[Any] = []
    closure = batches.forward(0)

    def before(hooked: Any, args: Any, kwargs: Any) -> Any:
        assert hooked is optimizer
        seen.append("before")
        return (optimizer, closure), kwargs

    handles = [
        optimizer.register_step_pre_hook(before),
        optimizer.register_step_post_hook(lambda o, a, k: seen.append(o.status)),
        register_optimizer_step_pre_hook(lambda *_: seen.append("all before")),
        register_optimizer_step_post_hook(lambda *_: seen.append("all after")),
    ]
    optimizer.step(lambda: pytest.fail("replaced by the hook"))
    assert seen == ["all before", "before", Status.ACCEPTED, "all after"]
    for handle in handles:
        handle.remove()
    optimizer.step(closure)
    assert len(seen) == 4


@pytest.mark.parametrize("make", MAKERS)
def test_state_dict_hooks_see_the_whole(make: Any) -> None:
    batches, optimizer = made(make)
    optimizer.step(batches.forward(0))
    seen: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: seen.append("before"))

    def renamed(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        assert torch.equal(state_dict["subspace"]["theta"], optimizer._theta)
        return {**state_dict, "theirs": state_dict["subspace"], "subspace": None}

    optimizer.register_state_dict_post_hook(renamed)
    state = optimizer.state_dict()
    assert seen == ["before"] and state["subspace"] is None and set(state["theirs"])

    other_batches, other = made(make, seed=0)
    with pytest.raises(ValueError, match="expected what"):
        other.load_state_dict(state)
    other.register_load_state_dict_pre_hook(lambda _, s: {**s, "subspace": s["theirs"]})
    other.register_load_state_dict_post_hook(lambda o: seen.append(o.theta))
    other.load_state_dict(state)
    assert torch.equal(seen[-1], optimizer.theta)  # the hook came after the load
    assert bits(other_batches.params) == bits(batches.params)


@pytest.mark.parametrize("make", MAKERS)
def test_a_hook_that_breaks_a_state_changes_nothing(make: Any) -> None:
    batches, optimizer = made(make)
    optimizer.step(batches.forward(0))
    state, before = optimizer.state_dict(), bits(batches.params)

    def without_theta(_: Any, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "subspace": {k: v for k, v in state["subspace"].items() if k != "theta"}}

    for broken, message in ((without_theta, "keys"), (lambda *_: [1], "expected what")):
        handle = optimizer.register_load_state_dict_pre_hook(broken)
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(state)
        handle.remove()
    assert bits(batches.params) == before
    optimizer.load_state_dict(state)


@pytest.mark.parametrize("make", MAKERS)
def test_state_dict_is_the_same_twice_and_survives_weights_only(make: Any, tmp_path: Any) -> None:
    batches, optimizer = made(make)
    for step in range(3):
        optimizer.step(batches.forward(step))
    first, second = optimizer.state_dict(), optimizer.state_dict()
    torch.save(first, tmp_path / "state.pt")
    loaded = torch.load(tmp_path / "state.pt", weights_only=True)
    for state in (second, loaded):
        assert state["param_groups"] == first["param_groups"]
        for key, value in first["subspace"].items():
            other = state["subspace"][key]
            assert torch.equal(value, other) if torch.is_tensor(value) else value == other


@pytest.mark.parametrize("make", MAKERS)
def test_hooks_and_history_of_copies(make: Any) -> None:
    batches, optimizer = made(make)
    optimizer.register_step_post_hook(lambda *_: None)
    optimizer.step(batches.forward(0))
    for other_batches, other in (
        copy.deepcopy((batches, optimizer)),
        pickle.loads(pickle.dumps((batches, optimizer))),
    ):
        assert repr(other.history) == repr(optimizer.history)
        other.step(other_batches.forward(1))
        assert len(other.history) == 2 and len(optimizer.history) == 1
        other.register_step_post_hook(lambda *_: None)
        other.register_state_dict_post_hook(lambda *_: None)
        other.load_state_dict(optimizer.state_dict())
    assert type(pickle.loads(pickle.dumps(optimizer.history[0]))) is type(optimizer.history[0])


@pytest.mark.parametrize("make", MAKERS)
def test_copies_under_a_schedule_step_themselves(make: Any) -> None:
    """A schedule wraps `step` in the optimizer itself: of a copy it would be that one's."""
    batches, optimizer = made(make)
    schedule = lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step(batches.forward(0))
    schedule.step()
    copies = copy.deepcopy((batches, optimizer)), pickle.loads(pickle.dumps((batches, optimizer)))
    before = bits(batches.params)
    for other_batches, other in copies:
        other.step(other_batches.forward(1))
        assert len(other.history) == 2 and bits(batches.params) == before
    optimizer.step(batches.forward(1))
    assert bits(batches.params) == bits(copies[0][0].params) == bits(copies[1][0].params)


@pytest.mark.parametrize("make", MAKERS)
def test_a_compiled_loop_steps_as_it_stands(make: Any) -> None:
    (batches, optimizer), (others, other) = made(make), made(make)

    @torch.compile(backend="eager")
    def loop() -> None:
        optimizer.step(batches.forward(0))

    for _ in range(2):
        loop()
        other.step(others.forward(0))
    assert bits(batches.params) == bits(others.params)


@pytest.mark.parametrize("make", MAKERS)
def test_what_would_drop_theta_may_not_save(make: Any) -> None:
    model = nn.Linear(3, 2)
    optimizer = make(model.parameters(), Subspace.random(model.parameters(), 2))
    optimizer.step(lambda: model(torch.ones(4, 3)).square().sum())
    before = optimizer.state_dict()
    for save in (get_optimizer_state_dict, FSDP.optim_state_dict):
        with pytest.raises(ValueError, match=r"state_dict: .* drops theta .* dldr_ext.dcp.statef"):
            save(model, optimizer)
    assert torch.equal(optimizer.theta, before["subspace"]["theta"].float())
    optimizer.zero_grad()
    if make is PBFGS:  # it is asked for a step without gradients
        with pytest.raises(TypeError, match=r"get_optimizer_state_dict dldr_ext.dcp.stateful"):
            get_optimizer_state_dict(model, optimizer)


def test_threads_train_models_of_their_own() -> None:
    """An optimizer that one of them makes is in the way of no backward pass of another."""
    params, interval = [nn.Parameter(torch.ones(1))], sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(1) as other:
            made = other.submit(lambda: [GradientWatch(params) for _ in range(2000)])
            watch = GradientWatch(params)
            while not made.done():
                with watch.own_backward():
                    pass
    finally:
        sys.setswitchinterval(interval)
    assert len(made.result()) == 2000


@pytest.mark.parametrize("make", MAKERS)
def test_no_gradients_and_zero_gradients_move_nothing(make: Any) -> None:
    batches, optimizer = made(make)
    before = bits(batches.params)
    if make is PSGD:
        optimizer.step()
        assert optimizer.status is Status.NO_GRADIENT
    optimizer.step(lambda: sum(p.sum() for p in batches.params) * 0.0)
    assert bits(batches.params) == before


@pytest.mark.parametrize("make", MAKERS)
def test_parameters_without_elements(make: Any) -> None:
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(0)), nn.Parameter(torch.ones(2))]
    optimizer = make(params, random_subspace(params, 2, torch.float32), lr=0.1)
    losses = [float(optimizer.step(lambda: sum(p.square().sum() for p in params))) for _ in "abc"]
    assert losses[2] < losses[0]


@pytest.mark.parametrize("make", MAKERS)
def test_zero_grad_add_param_group_and_repr(make: Any) -> None:
    batches, optimizer = made(make)
    optimizer.step(batches.forward(0))
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is None or not p.grad.any() for p in batches.params)
    optimizer.zero_grad()
    assert all(p.grad is None for p in batches.params)
    assert "weight_decay: 0.0" in repr(optimizer)
    with pytest.raises(ValueError, match="add_param_group"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


@pytest.mark.parametrize("make", MAKERS)
def test_step_enables_gradients_and_leaves_the_mode(make: Any) -> None:
    batches, optimizer = made(make)
    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            optimizer.step(batches.forward(0))
            assert torch.is_grad_enabled() is enabled and optimizer.status is Status.ACCEPTED


@pytest.mark.parametrize("make", MAKERS)
def test_resumes_with_random_numbers_that_the_user_puts_back(make: Any) -> None:
    def build() -> tuple[list[nn.Parameter], Any, Any]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        params, x = list(model.parameters()), torch.randn(16, 6)
        optimizer = make(params, Subspace.random(params, 4), lr=0.1)
        return params, optimizer, lambda: model(x).square().mean()

    params, optimizer, closure = build()
    for step in range(6):
        if step == 3:
            state, random = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
        optimizer.step(closure)
    again, resumed, other = build()
    resumed.load_state_dict(state)
    torch.set_rng_state(random)
    for _ in range(3):
        resumed.step(other)
    assert bits(again) == bits(params)


@pytest.mark.parametrize("make", MAKERS)
def test_named_parameters(make: Any) -> None:
    batches = Batches(0)
    optimizer = make(batches.model.named_parameters(), random_subspace(batches.params, 4), lr=0.1)
    optimizer.step(batches.forward(0))
    assert optimizer.status is Status.ACCEPTED


@pytest.mark.parametrize("make", MAKERS)
def test_unknown_options_name_the_nearest(make: Any) -> None:
    batches = Batches(0)
    subspace = random_subspace(batches.params, 4)
    before = bits(batches.params)
    misspelt = {
        PBFGS: {"line_serch_fn": "line_search_fn", "weight_deacy": "weight_decay", "tol": None},
        PSGD: {"momentun": "momentum", "nesterov": None},
    }[make]
    for name, meant in misspelt.items():
        with pytest.raises(TypeError, match=f"{make.__name__}: {name}: expected one of") as error:
            make(batches.params, subspace, **{name: 1})
        if meant is not None:
            assert f"did you mean '{meant}'?" in str(error.value)
    if make is PBFGS:
        for name, value, meant in (
            ("line_search_fn", "strong_wolf", "strong_wolfe"),
            ("curvature", "same-batch", "same_batch"),
        ):
            with pytest.raises(ValueError, match=f"{name}: expected .* did you mean '{meant}'"):
                make(batches.params, subspace, **{name: value})
    assert bits(batches.params) == before


@pytest.mark.parametrize("make", MAKERS)
def test_signature_stays_readable(make: Any) -> None:
    import inspect

    names = list(inspect.signature(make).parameters)
    assert names[:3] == ["params", "subspace", "lr"] and "weight_decay" in names
    assert "options" not in names


def test_frozen_parameters_beside_trained_ones() -> None:
    batches = Batches(0)
    batches.params[0].requires_grad_(False)
    kept = bits(batches.params[:1])
    subspace = random_subspace(batches.params[1:], 4)
    optimizer = PBFGS(batches.model.parameters(), subspace, weight_decay=0.1)
    losses = [float(optimizer.step(batches.forward(0))) for _ in range(5)]
    assert losses[-1] < losses[0] and bits(batches.params[:1]) == kept


def test_a_closure_is_kept_alive_by_nothing() -> None:
    import weakref

    batches, optimizer = made(PBFGS)

    class Closure:
        def __call__(self) -> Tensor:
            return batches.forward(0)()

    closure = Closure()
    optimizer.step(closure)
    reference = weakref.ref(closure)
    del closure
    assert reference() is None
