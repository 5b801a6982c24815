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
from dldr_ext.optim.step.plateau import Plateau

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
