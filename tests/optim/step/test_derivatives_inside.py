"""Closures that take derivatives inside their loss: trials under no_grad are made again with it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from optim_problems import bits
from published import PUBLISHED
from torch import Tensor, nn
from torch.autograd import grad

from dldr_ext import PBFGS, InSubspace, Subspace, virtual_batch

Loss = Callable[[Tensor], Tensor]


def network(out: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, out))


def residual(net: nn.Module) -> Loss:
    """A differential equation, as in physics-informed networks: second derivatives too."""

    def loss(points: Tensor) -> Tensor:
        x = points.clone().requires_grad_()
        u = net(x)
        (du,) = grad(u.sum(), x, create_graph=True)
        (ddu,) = grad(du[:, 0].sum(), x, create_graph=True)
        return (ddu[:, 0] - du[:, 1]).square().mean() + (u - x[:, :1]).square().mean()

    return loss


def gradient_penalty(net: nn.Module) -> Loss:
    def loss(points: Tensor) -> Tensor:
        x = points.detach().requires_grad_(True)
        (slope,) = grad(net(x).sum(), [x], create_graph=True)
        return net(points).mean() + 10.0 * (slope.norm(dim=1) - 1.0).square().mean()

    return loss


def forces(net: nn.Module) -> Loss:
    """Energies and forces, with backward for the inner derivative of another network."""
    other = network()

    def loss(points: Tensor) -> Tensor:
        x = points.clone().requires_grad_()
        energy = net(x)
        if energy.grad_fn.next_functions is None:
            raise AssertionError
        force = -grad(energy.sum(), x, create_graph=True)[0]
        return (force - other(points).detach()).square().mean()

    return loss


def curvature_product(net: nn.Module) -> Loss:
    def loss(points: Tensor) -> Tensor:
        x = points.clone().requires_grad_()
        (slope,) = grad(net(x).square().sum(), x, create_graph=True)
        (hv,) = grad((slope * torch.ones_like(x)).sum(), x, create_graph=True)
        return net(points).square().mean() + hv.square().mean()

    return loss


def functional(net: nn.Module) -> Loss:
    """Needs no grad mode."""

    def loss(points: Tensor) -> Tensor:
        slope = torch.func.vmap(torch.func.grad(lambda x: net(x).sum()))(points)
        return (slope - 1.0).square().mean() + net(points).square().mean()

    return loss


LOSSES = [residual, gradient_penalty, forces, curvature_product, functional]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"curvature": "consecutive"},
    {"curvature": "consecutive", "line_search_fn": "strong_wolfe"},
    {"curvature": "consecutive", "max_iter": 3},
    PUBLISHED,
]


@pytest.mark.parametrize("form", ["forward", "usual", "virtual_batch"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("make_loss", LOSSES)
def test_it_trains(make_loss: Any, options: dict[str, Any], form: str) -> None:
    net, points = network(), torch.rand(16, 2)
    loss = make_loss(net)
    optimizer = PBFGS(net.parameters(), Subspace.random(net.parameters(), 8), **options)

    def usual() -> Tensor:
        net.zero_grad()
        value = loss(points)
        value.backward()
        return value

    forms: dict[str, Any] = {
        "forward": lambda: loss(points),
        "usual": usual,
        "virtual_batch": virtual_batch(loss, points.split(8)),
    }
    losses = [float(optimizer.step(forms[form])) for _ in range(6)]
    assert optimizer.status.moved and losses[-1] < losses[0]


def test_it_is_said_once_and_remembered(caplog: pytest.LogCaptureFixture) -> None:
    net, points = network(), torch.rand(16, 2)
    loss, modes, failed = residual(net), [], []
    optimizer = PBFGS(
        net.parameters(), Subspace.random(net.parameters(), 8), curvature="consecutive"
    )

    def closure() -> Tensor:
        modes.append((torch.is_grad_enabled(), torch.rand(()).item()))
        try:
            return loss(points)
        except RuntimeError:
            failed.append(len(modes))
            raise

    with caplog.at_level(logging.WARNING, logger="dldr_ext"):
        for _ in range(3):
            optimizer.step(closure)
    assert failed == [2] and [mode for mode, _ in modes].count(False) == 1
    assert optimizer.closure_calls == len(modes)
    assert optimizer.gradient_calls == 3  # a trial with grad mode on makes no gradient
    # The trial is made again with the same random numbers.
    assert modes[0][1] == modes[1][1] == modes[2][1]
    assert len(caplog.records) == 1
    assert "PBFGS: the closure takes derivatives inside its loss" in caplog.text


def test_the_steps_are_those_of_a_closure_that_turns_grad_mode_on() -> None:
    runs = []
    for turned_on in (False, True):
        net = network()
        loss, points = residual(net), torch.linspace(0, 1, 32).view(16, 2)
        optimizer = PBFGS(
            net.parameters(), Subspace.random(net.parameters(), 8), curvature="consecutive"
        )

        def closure(loss: Loss = loss, points: Tensor = points, on: bool = turned_on) -> Tensor:
            with torch.set_grad_enabled(torch.is_grad_enabled() or on):
                return loss(points)

        for _ in range(4):
            optimizer.step(closure)
        runs.append(bits(net.parameters()))
    assert runs[0] == runs[1]


def test_a_trial_with_grad_mode_on_leaves_no_gradient_and_no_graph() -> None:
    net, points = network(), torch.rand(16, 2)
    optimizer = PBFGS(
        net.parameters(), Subspace.random(net.parameters(), 8), curvature="consecutive"
    )
    backwards = []
    for p in net.parameters():
        p.register_hook(lambda g: backwards.append(1))
    calls = []
    counted = virtual_batch(lambda part: calls.append(1) or residual(net)(part), points.split(8))
    optimizer.step(counted)
    assert optimizer.gradient_calls == 1 and len(calls) > 4
    assert len(backwards) == 2 * 4  # two parts, once: not those of trials


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (RuntimeError, "boom"),
        (ValueError, "the gradient of my own checks"),
        (RuntimeError, "element 0 of tensors does not require grad"),
        (KeyboardInterrupt, "stopped"),
    ],
)
def test_an_error_of_the_closure_is_the_users(error: type[BaseException], text: str) -> None:
    net, points = network(), torch.rand(16, 2)
    optimizer = PBFGS(
        net.parameters(), Subspace.random(net.parameters(), 8), curvature="consecutive"
    )
    before, calls = bits(net.parameters()), []

    def closure() -> Tensor:
        calls.append(1)
        if len(calls) > 1:
            raise error(text)
        return net(points).square().mean()

    with pytest.raises(error, match=text) as raised:
        optimizer.step(closure)
    assert raised.value.__context__ is None  # none of ours around it
    assert len(calls) == (3 if "grad" in text else 2)
    assert bits(net.parameters()) == before
    optimizer.step(lambda: net(points).square().mean())
    assert optimizer.status.moved


def test_run_ahead(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, on the CPU."""
    monkeypatch.setattr(PBFGS, "_devices_ahead", ("cpu", "cuda"))
    for options in ({}, {"curvature": "consecutive"}):
        net, points = network(), torch.rand(16, 2)
        loss = residual(net)
        subspace = Subspace.random(net.parameters(), 8)
        optimizer = PBFGS(net.parameters(), subspace, lr=0.5, **options)
        losses = [float(optimizer.step(lambda: loss(points))) for _ in range(8)]  # noqa: B023
        assert losses[-1] < losses[0]


def test_an_optimizer_of_torch_that_searches() -> None:
    net, points = network(), torch.rand(16, 2)
    loss = residual(net)
    subspace = Subspace.random(net.parameters(), 8)
    optimizer = InSubspace(
        net.parameters(), subspace, torch.optim.LBFGS, line_search_fn="strong_wolfe"
    )
    losses = [float(optimizer.step(lambda: loss(points))) for _ in range(3)]
    assert losses[-1] < losses[0]
