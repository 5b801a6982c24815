"""What is minimised: weight decay, maximisation, batches in parts, scaled and half gradients."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_problems import Batches, bits, flat, random_subspace
from torch import Tensor, nn

from dldr_ext import PBFGS, PSGD, Status, virtual_batch

CASES: list[tuple[Any, dict[str, Any]]] = [
    (PBFGS, {}),
    (PBFGS, {"line_search_fn": "strong_wolfe"}),
    (PBFGS, {"curvature": "consecutive"}),
    (PBFGS, {"max_iter": 2}),
    (PBFGS, {"residual_lr": 0.05}),
    (PBFGS, {"line_search_fn": None, "lr": 0.1}),
    (PSGD, {"lr": 0.1}),
]


@pytest.mark.parametrize("style", ["forward", "usual"])
@pytest.mark.parametrize(("make", "options"), CASES)
def test_weight_decay_is_a_term_of_the_loss(make: Any, options: dict[str, Any], style: str) -> None:
    """The same steps as with the term written into the closure, but for rounding."""
    ours, theirs, decay = Batches(1), Batches(1), 0.3
    subspace = random_subspace(ours.params, 5)
    optimizer = make(ours.params, subspace, weight_decay=decay, **options)
    plain = make(theirs.params, subspace, **options)

    def penalised(step: int) -> Callable[[], Tensor]:
        forward = theirs.forward(step)
        squares = lambda: sum(p.square().sum() for p in theirs.params)  # noqa: E731
        return lambda: forward() + 0.5 * decay * squares()

    for step in range(12):
        loss = optimizer.step(getattr(ours, style)(step))
        expected = theirs.forward(step)().item()  # the closure's own
        plain.step(penalised(step))
        assert float(loss) == pytest.approx(expected, rel=1e-6)
        assert optimizer.status is plain.status
        torch.testing.assert_close(flat(ours.params), flat(theirs.params), rtol=1e-6, atol=1e-7)
    if style == "forward":
        assert optimizer.closure_calls == plain.closure_calls


@pytest.mark.parametrize(("make", "options"), CASES)
def test_maximize_is_minimising_the_negative(make: Any, options: dict[str, Any]) -> None:
    ours, theirs = Batches(1), Batches(1)
    subspace = random_subspace(ours.params, 5)
    optimizer = make(ours.params, subspace, maximize=True, weight_decay=0.1, **options)
    plain = make(theirs.params, subspace, weight_decay=0.1, **options)
    for step in range(10):
        value = optimizer.step(lambda: -ours.forward(step)())  # noqa: B023
        loss = plain.step(theirs.forward(step))
        assert float(value) == -float(loss)
        assert bits(ours.params) == bits(theirs.params)
    assert optimizer.history[-1].loss == -plain.history[-1].loss


def test_psgd_in_the_whole_space_decays_as_torchs_sgd() -> None:
    ours, theirs = Batches(0), Batches(0)
    subspace = random_subspace(ours.params, sum(p.numel() for p in ours.params))
    optimizer = PSGD(ours.params, subspace, lr=0.1, weight_decay=0.2, maximize=True)
    reference = torch.optim.SGD(
        theirs.params, lr=0.1, momentum=0.9, weight_decay=0.2, maximize=True
    )
    for step in range(10):
        for batches, one in ((ours, optimizer), (theirs, reference)):
            batches.usual(step)()
            one.step()
        torch.testing.assert_close(flat(ours.params), flat(theirs.params), rtol=1e-8, atol=1e-9)


# Virtual batches.


def parts(batches: Batches, sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
    inputs, targets = batches.inputs[0], batches.targets[0]
    return list(zip(inputs.split(sizes), targets.split(sizes), strict=True))


def loss_of(batches: Batches) -> Callable[[Any], Tensor]:
    return lambda part: nn.functional.cross_entropy(batches.model(part[0]), part[1])


@pytest.mark.parametrize(("make", "options"), CASES)
def test_virtual_batch_is_the_whole_batch(make: Any, options: dict[str, Any]) -> None:
    ours, theirs = Batches(1), Batches(1)
    subspace = random_subspace(ours.params, 5)
    optimizer = make(ours.params, subspace, **options)
    plain = make(theirs.params, subspace, **options)
    closure = virtual_batch(loss_of(ours), parts(ours, [10, 10, 10, 2]))
    for _ in range(8):
        loss = optimizer.step(closure)
        whole = plain.step(theirs.forward(0))
        assert not loss.requires_grad and float(loss) == pytest.approx(float(whole), rel=1e-9)
        torch.testing.assert_close(flat(ours.params), flat(theirs.params), rtol=1e-6, atol=1e-7)
    assert optimizer.closure_calls == plain.closure_calls


def test_trials_of_a_virtual_batch_only_run_forward() -> None:
    batches = Batches(0)
    enabled: list[bool] = []
    loss_fn = loss_of(batches)
    closure = virtual_batch(
        lambda part: enabled.append(torch.is_grad_enabled()) or loss_fn(part),
        parts(batches, [16, 16]),
    )
    optimizer = PBFGS(batches.params, random_subspace(batches.params, 4), curvature="consecutive")
    optimizer.step(closure)
    assert enabled[:2] == [True] * 2 and not any(enabled[2:]) and len(enabled) > 2
    assert optimizer.gradient_calls == 1


def test_no_two_parts_of_a_virtual_batch_are_held_at_once() -> None:
    """Each part's graph is gone before the next part's forward."""
    batches = Batches(0)
    alive: list[Any] = []

    class Tracked(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            assert not alive
            alive.append(1)
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            alive.clear()
            return grad

    loss_fn = loss_of(batches)
    closure = virtual_batch(lambda part: Tracked.apply(loss_fn(part)), parts(batches, [8] * 4))
    with torch.enable_grad():
        loss = closure()
    assert not loss.requires_grad
    whole = torch.autograd.grad(batches.forward(0)(), batches.params)
    torch.testing.assert_close([p.grad for p in batches.params], list(whole))


def test_weights_and_kinds_of_micro_batches() -> None:
    mean = lambda part: part.mean()  # noqa: E731
    a, b = torch.tensor([1.0, 3.0]), torch.tensor([8.0])
    assert float(virtual_batch(mean, [a, b])()) == pytest.approx(4.0)
    assert float(virtual_batch(mean, [a, b], weights=[1, 1])()) == pytest.approx(5.0)
    assert float(virtual_batch(mean, iter([a, b]))()) == pytest.approx(4.0)
    again = virtual_batch(mean, itertools.islice([a, b, a], 2))
    assert float(again()) == float(again()) == pytest.approx(4.0)
    named = virtual_batch(lambda part: part["x"].mean(), [{"n": 1, "x": a}, {"n": 1, "x": b}])
    assert float(named()) == pytest.approx(4.0)
    loader = torch.utils.data.DataLoader(torch.arange(10.0), batch_size=4)
    assert float(virtual_batch(mean, loader)()) == pytest.approx(4.5)
    numbers = virtual_batch(lambda part: torch.tensor(float(part)), [1, 2])
    assert float(numbers()) == pytest.approx(1.5)
    half = virtual_batch(lambda part: part.mean().half(), [a, b])
    assert half().dtype == torch.float32


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((1, [torch.ones(2)]), TypeError, "loss_fn: expected a callable, got 1"),
        ((torch.sum, torch.ones(2)), TypeError, "batches: expected an iterable .* got Tensor"),
        ((torch.sum, 3), TypeError, "batches: expected an iterable of micro-batches, got int"),
        ((torch.sum, []), ValueError, "batches: expected at least one micro-batch"),
        ((torch.sum, [torch.ones(0)]), ValueError, "weights: expected positive"),
    ],
)
def test_bad_virtual_batches(arguments: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"virtual_batch: {message}"):
        virtual_batch(*arguments)


def test_virtual_batch_whose_parts_give_no_loss() -> None:
    for returned in (torch.ones(2), None, 1.0, torch.tensor(1j)):
        closure = virtual_batch(lambda _, r=returned: r, [torch.ones(2)])
        with pytest.raises(TypeError, match="loss_fn: expected it to return the mean loss"):
            closure()
    with pytest.raises(ValueError, match="zip"):
        virtual_batch(torch.mean, [torch.ones(2)], weights=[1, 1])()


# Half precision.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("make", "options"), CASES)
def test_half_models_train_with_a_float32_origin(
    make: Any, options: dict[str, Any], dtype: torch.dtype
) -> None:
    batches = Batches(0, dtype=dtype)
    subspace = random_subspace(batches.params, 8, dtype=torch.float32)
    optimizer = make(batches.params, subspace, weight_decay=1e-4, **options)
    losses = [float(optimizer.step(batches.forward(0))) for _ in range(25)]
    assert losses[-1] < losses[0] - 0.05
    assert subspace.origin.dtype == torch.float32
    assert {p.dtype for p in batches.params} == {dtype}
    if "residual_lr" not in options:
        there = subspace.reconstruct(optimizer.theta).to(dtype)
        close = {torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(flat(batches.params).to(dtype), there, rtol=close, atol=close)


@pytest.mark.parametrize("style", ["forward", "usual", "parts"])
@pytest.mark.parametrize("options", [options for make, options in CASES if make is PBFGS])
def test_gradient_scaler_and_autocast(options: dict[str, Any], style: str) -> None:
    """Powers of two change no bit of the gradients, so that the steps are the same."""
    ours, theirs = (Batches(1, dtype=torch.float32) for _ in range(2))
    subspace = random_subspace(ours.params, 5, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
    optimizer = PBFGS(ours.params, subspace, grad_scaler=scaler, **options)
    plain = PBFGS(theirs.params, subspace, **options)

    def forward(batches: Batches, part: Any = None) -> Tensor:
        inputs, targets = part or (batches.inputs[0], batches.targets[0])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return nn.functional.cross_entropy(batches.model(inputs), targets)

    def usual() -> Tensor:
        ours.model.zero_grad()
        loss = forward(ours)
        scaler.scale(loss).backward()
        return loss

    inputs, targets = ours.inputs[0], ours.targets[0]
    halves = list(zip(inputs.split(16), targets.split(16), strict=True))
    in_parts = [virtual_batch(lambda p, b=b: forward(b, p), halves) for b in (ours, theirs)]
    whole = lambda: forward(theirs)  # noqa: E731
    closure, same = {
        "forward": (lambda: forward(ours), whole),
        "usual": (usual, whole),
        "parts": in_parts,
    }[style]
    for _ in range(9):
        optimizer.step(closure)
        plain.step(same)
        torch.testing.assert_close(flat(ours.params), flat(theirs.params), rtol=1e-5, atol=1e-6)
    assert scaler.get_scale() == 2.0**12  # two times four steps without an overflow


def test_an_overflow_makes_the_scale_smaller_and_nothing_else() -> None:
    batches = Batches(0, dtype=torch.float16)
    subspace = random_subspace(batches.params, 5, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=100)
    optimizer = PBFGS(batches.params, subspace, grad_scaler=scaler)
    for _ in range(4):
        optimizer.step(batches.forward(0))
    assert optimizer.status is Status.ACCEPTED
    before = bits(batches.params)
    learnt = optimizer.state_dict()["subspace"]["inverse_hessian"]
    scaler.update(2.0**40)
    for power in (39, 38):
        optimizer.step(batches.forward(0))
        assert optimizer.status is Status.NON_FINITE_GRADIENT and bits(batches.params) == before
        assert scaler.get_scale() == 2.0**power
    assert torch.equal(optimizer.state_dict()["subspace"]["inverse_hessian"], learnt)
    while not optimizer.status.moved:
        optimizer.step(batches.forward(0))
        assert scaler.get_scale() >= 2.0**10
    assert optimizer.status is Status.ACCEPTED and scaler.get_scale() < 2.0**30


def test_the_scaler_is_saved_in_two_places_and_resumes() -> None:
    batches = Batches(0, dtype=torch.float32)
    subspace = random_subspace(batches.params, 5, dtype=torch.float32)
    scales = []
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=3)
    optimizer = PBFGS(batches.params, subspace, grad_scaler=scaler)
    for step in range(8):
        if step == 4:
            saved = optimizer.state_dict(), scaler.state_dict()
        optimizer.step(batches.forward(0))
        scales.append(scaler.get_scale())
    scaler = torch.amp.GradScaler("cpu", growth_interval=3)
    optimizer = PBFGS(batches.params, subspace, grad_scaler=scaler)
    optimizer.load_state_dict(saved[0])
    scaler.load_state_dict(saved[1])
    for step in range(4, 8):
        optimizer.step(batches.forward(0))
        assert scaler.get_scale() == scales[step]


def test_a_scaler_that_is_none() -> None:
    batches = Batches(0)
    subspace = random_subspace(batches.params, 4)
    with pytest.raises(TypeError, match="grad_scaler: expected a torch"):
        PBFGS(batches.params, subspace, grad_scaler=2.0)
    disabled = PBFGS(
        batches.params, subspace, grad_scaler=torch.amp.GradScaler("cpu", enabled=False)
    )
    disabled.step(batches.forward(0))
    assert disabled.status is Status.ACCEPTED


def test_psgd_works_in_the_usual_scaling_recipe() -> None:
    ours, theirs = (Batches(1, dtype=torch.float32) for _ in range(2))
    subspace = random_subspace(ours.params, 5, dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizer, plain = PSGD(ours.params, subspace, lr=0.1), PSGD(theirs.params, subspace, lr=0.1)
    for step in range(6):
        optimizer.zero_grad()
        loss = ours.forward(step)()
        scaler.scale(loss * (float("inf") if step == 3 else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        if step != 3:
            plain.step(theirs.forward(step))
        torch.testing.assert_close(flat(ours.params), flat(theirs.params), rtol=1e-5, atol=1e-6)
    assert scaler.get_scale() == 2.0**9
