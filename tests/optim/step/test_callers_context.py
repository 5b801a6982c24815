"""Autocast, grad mode and inference mode of the caller."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from optim_problems import bits, flat
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dldr_ext import PBFGS, PSGD, InSubspace, Subspace, virtual_batch

MAKERS: list[Any] = [
    PBFGS,
    lambda params, subspace: PBFGS(params, subspace, curvature="consecutive"),
    lambda params, subspace: PSGD(params, subspace, lr=0.1),
    lambda params, subspace: InSubspace(params, subspace, torch.optim.LBFGS, max_iter=4),
]


def problem() -> tuple[nn.Module, Subspace, Callable[[], Tensor]]:
    torch.manual_seed(1)
    inputs = torch.randn(128, 20)
    labels = (inputs[:, 0] > 0).long()
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 2))
    subspace = Subspace.random(model.parameters(), 20)
    return model, subspace, lambda: nn.functional.cross_entropy(model(inputs), labels)


def bfloat16(enabled: bool = True) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("make", MAKERS)
def test_backward_is_not_under_the_callers_autocast(make: Any, batched: bool) -> None:
    runs = []
    for outer in (False, True):
        model, subspace, loss = problem()
        optimizer = make(model.parameters(), subspace)

        def forward(_: Any = None, loss: Callable[[], Tensor] = loss) -> Tensor:
            with bfloat16(enabled=False):
                return loss()

        closure = virtual_batch(forward, [torch.ones(1)] * 2) if batched else forward
        for _ in range(3):
            with bfloat16(enabled=outer):
                optimizer.step(closure)
        runs.append(bits([p.grad for p in model.parameters()]) + bits(model.parameters()))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("whole_loop", [False, True])
@pytest.mark.parametrize("make", MAKERS)
def test_the_callers_autocast_is_that_of_the_forward_pass(make: Any, whole_loop: bool) -> None:
    """And no evaluation sees casts of the weights of another."""
    runs = []
    for outer in (False, True):
        model, subspace, loss = problem()
        optimizer = make(model.parameters(), subspace)

        def forward(loss: Callable[[], Tensor] = loss, outer: bool = outer) -> Tensor:
            with nullcontext() if outer else bfloat16():
                assert torch.is_autocast_enabled("cpu")
                return loss()

        with bfloat16(enabled=outer) if whole_loop else nullcontext():
            for _ in range(4):
                with bfloat16(enabled=outer) if not whole_loop else nullcontext():
                    optimizer.step(forward)
            with torch.no_grad(), bfloat16(enabled=outer):
                after = forward()
        with torch.no_grad(), bfloat16():
            assert after == loss()  # of the weights as the last step has left them
        assert optimizer.status.moved
        runs.append(bits(model.parameters()))
    assert runs[0] == runs[1]


def test_a_disabled_autocast_of_the_caller_keeps_no_casts() -> None:
    """Any context around the step makes the casts in the closure's own outlive it."""
    model, subspace, loss = problem()
    optimizer = PBFGS(model.parameters(), subspace)

    def closure() -> Tensor:
        with bfloat16():
            return loss()

    with bfloat16(enabled=False):
        losses = [float(optimizer.step(closure)) for _ in range(5)]
    assert losses[-1] < losses[0] and optimizer.status.moved


def test_weights_written_under_autocast_are_those_of_the_next_forward_pass() -> None:
    model, subspace, loss = problem()
    points = [torch.full((20,), a) for a in (0.0, 1.0, 2.0)]
    runs = []
    for around in (True, False):
        seen = []
        with bfloat16() if around else nullcontext(), torch.no_grad():
            for theta in points:
                subspace.reconstruct_(model.parameters(), theta)
                with nullcontext() if around else bfloat16():
                    seen.append(float(loss()))
        runs.append(seen)
    assert runs[0] == runs[1] and len(set(runs[0])) == len(points)


@pytest.mark.parametrize("make", MAKERS)
def test_weights_that_are_computed_once_a_context_are_those_of_the_evaluation(make: Any) -> None:
    """`parametrize.cached` around a step: its trials would see the weights before them."""
    found = []
    for context in (parametrize.cached, nullcontext):
        model, subspace, loss = problem()
        nn.utils.parametrizations.weight_norm(model[0])
        subspace = Subspace.random(model.parameters(), 20)
        optimizer = make(model.parameters(), subspace)
        with context():
            losses = [float(optimizer.step(loss)) for _ in range(3)]
            losses.append(float(loss().detach()))
        found.append(losses)
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "context",
    [torch.no_grad, torch.enable_grad, torch.autograd.detect_anomaly, lambda: torch.device("cpu")],
)
@pytest.mark.parametrize("make", MAKERS)
@pytest.mark.filterwarnings("ignore:Anomaly")
def test_other_contexts_of_the_caller_change_nothing(make: Any, context: Any) -> None:
    runs = []
    for around in (nullcontext, context):
        model, subspace, loss = problem()
        optimizer = make(model.parameters(), subspace)
        for _ in range(3):
            with around():
                optimizer.step(loss)
        runs.append(bits(model.parameters()))
    assert runs[0] == runs[1]


@pytest.mark.parametrize("make", MAKERS)
def test_inference_mode_is_refused(make: Any) -> None:
    model, subspace, loss = problem()
    with torch.inference_mode(), pytest.raises(RuntimeError, match="outside of torch"):
        make(model.parameters(), subspace)
    optimizer = make(model.parameters(), subspace)
    before = flat(model.parameters())
    with torch.inference_mode():
        with pytest.raises(RuntimeError, match="outside of torch"):
            optimizer.step(loss)
        with torch.inference_mode(False):
            optimizer.step(loss)
    assert optimizer.status.moved and not torch.equal(flat(model.parameters()), before)
    optimizer.step(loss)
