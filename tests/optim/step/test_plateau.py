"""A run that makes no progress says so once."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_problems import Batches, random_subspace, whole_space
from torch import nn

from dldr_ext import PBFGS, PSGD, InSubspace
from dldr_ext.optim.step.plateau import Agreement, Plateau

MAKERS: dict[str, Callable[..., Any]] = {
    "pbfgs": PBFGS,
    "psgd": lambda p, s, **k: PSGD(p, s, lr=0.05, **k),
    "adam": lambda p, s: InSubspace(p, s, torch.optim.Adam, lr=0.02),
}


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [text for text in caplog.messages if "no progress" in text]


@pytest.mark.parametrize("make", MAKERS)
def test_a_plateau_is_named_once(make: str, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    x = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = MAKERS[make]([x], whole_space([x]))
    noise = torch.randn(100)
    with caplog.at_level(logging.WARNING, "dldr_ext"):
        for step in range(100):
            optimizer.step(lambda step=step: 2.3 + 0.01 * noise[step] + 0.0 * x.sum())
            assert len(said(caplog)) == (step >= 39)
    assert type(optimizer).__name__ in said(caplog)[0]
    assert all(word in said(caplog)[0] for word in ("metric=", "Adam", 'start="mean"'))


@pytest.mark.parametrize("make", MAKERS)
def test_progress_says_nothing(make: str, caplog: pytest.LogCaptureFixture) -> None:
    batches = Batches(0)
    optimizer = MAKERS[make](batches.params, random_subspace(batches.params, 20))
    with caplog.at_level(logging.WARNING, "dldr_ext"):
        for step in range(60):
            optimizer.step(batches.forward(step))
    assert not said(caplog)


def test_many_iterations_that_soon_converge_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    x = nn.Parameter(torch.linspace(1.0, 900.0, 40, dtype=torch.float64))
    optimizer = PBFGS([x], whole_space([x]), max_iter=200)
    with caplog.at_level(logging.WARNING, "dldr_ext"):
        optimizer.step(lambda: (x.square() * torch.arange(1, 41)).sum())
    assert len(optimizer.history) > 40 and not said(caplog)


def test_small_batches_that_come_down_in_ten_steps_say_nothing() -> None:
    """One pass of Adam in batches of 32, as on the page that a newcomer reads."""
    first = [0.63, 0.68, 0.64, 0.58, 0.41, 0.44, 0.4, 0.41, 0.28, 0.16, 0.19, 0.35]
    rest = [0.24, 0.28, 0.17, 0.22, 0.37, 0.42, 0.72] * 4  # one is above the first
    plateau = Plateau()
    assert not any(plateau.see(loss, False) for loss in first + rest)


def test_what_is_maximised_should_go_up() -> None:
    up, down = Plateau(), Plateau()
    told = [(up.see(float(i), True), down.see(float(-i), True)) for i in range(50)]
    assert all(first is None for first, _ in told)
    assert [i for i, (_, second) in enumerate(told) if second] == [39]
    assert "first 20 was -9.5, of the others -29.5" in str(told[39][1])


def test_losses_that_are_no_numbers_do_not_count() -> None:
    plateau = Plateau()
    values = [float("nan") if i % 2 else 1.0 for i in range(90)]
    assert [i for i, value in enumerate(values) if plateau.see(value, False)] == [78]


def test_a_resumed_run_has_left_its_start(caplog: pytest.LogCaptureFixture) -> None:
    x = nn.Parameter(torch.ones(3, dtype=torch.float64))
    first = PSGD([x], whole_space([x]), lr=0.05)
    first.step(lambda: x.square().sum())
    second = PSGD([x], first.subspace, lr=0.05)
    second.load_state_dict(first.state_dict())
    with caplog.at_level(logging.WARNING, "dldr_ext"):
        for _ in range(50):
            second.step(lambda: 1.0 + 0.0 * x.sum())
    assert not said(caplog)


# Losses that change by other than the gradients say.


def last_of(count: int) -> Callable[[Batches, int], torch.Tensor]:
    """Gradients of the mean of micro-batches, and the loss of the last of them."""

    def closure(batches: Batches, step: int) -> torch.Tensor:
        batches.model.zero_grad()
        i = step % len(batches.inputs)
        parts = batches.inputs[i].chunk(count), batches.targets[i].chunk(count)
        for inputs, targets in zip(*parts, strict=True):
            loss = nn.functional.cross_entropy(batches.model(inputs), targets) / count
            loss.backward()
        return loss

    return closure


def clipped_by_hooks(batches: Batches, step: int) -> torch.Tensor:
    loss = batches.forward(step)()
    handles = [p.register_hook(lambda g: g.clamp(-1e-4, 1e-4)) for p in batches.params]
    batches.model.zero_grad()
    loss.backward()
    for handle in handles:
        handle.remove()
    return loss


@pytest.mark.parametrize(
    ("closure", "told"),
    [
        (last_of(4), True),
        (last_of(8), True),
        (clipped_by_hooks, True),
        (lambda batches, step: batches.usual(step)(), False),
        (lambda batches, step: batches.forward(step)(), False),
    ],
)
def test_gradients_of_another_loss_are_noticed(
    closure: Any, told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    batches = Batches(0)
    optimizer = PBFGS(batches.params, random_subspace(batches.params, 12))
    for step in range(60):
        optimizer.step(lambda: closure(batches, step))  # noqa: B023
    found = [text for text in caplog.messages if "times what its gradients say" in text]
    assert len(found) == told
    if told:
        assert found[0].startswith("PBFGS: in 20 steps the loss has changed by 0.") or (
            closure is clipped_by_hooks
        )


def test_agreement_is_that_of_a_parabola() -> None:
    agreement = Agreement()
    for _ in range(40):  # steps along x^2 from 1, by changing lengths
        for length in (0.3, 1.0, 1.7):
            end = 1.0 - length
            change, slopes = end**2 - 1.0, -2.0 + -2.0 * end
            assert agreement.see(change, 0.5 * length * slopes, 1.0) is None
            assert agreement.see(change, 0.0, 1.0) is None
            assert agreement.see(-5e-3, 1e-3, 1.0) is None  # rounding
    told = [agreement.see(-0.1, -1.0, 1.0) for _ in range(60)]
    assert [text is not None for text in told].count(True) == 1
    assert "changed by 0.1 times what its gradients say" in next(filter(None, told))


@pytest.mark.parametrize("options", [{"weight_decay": 0.5}, {"maximize": True}, {"max_iter": 5}])
def test_the_agreement_is_of_the_objective(
    options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    batches = Batches(0)
    optimizer = PBFGS(batches.params, random_subspace(batches.params, 12), **options)
    sign = -1.0 if "maximize" in options else 1.0
    for step in range(40):
        optimizer.step(lambda: sign * batches.forward(step)())  # noqa: B023
    assert not [text for text in caplog.messages if "gradients say" in text]
