"""What optimizers record of their steps."""

from __future__ import annotations

import math

import pytest
import torch
from optim_problems import Batches, flat, random_subspace, whole_space
from torch import nn

from dldr_ext import PBFGS, PSGD, StepRecord


def test_history() -> None:
    batches = Batches(0)
    optimizer = PBFGS(batches.params, random_subspace(batches.params, 4))
    calls = 0
    for step in range(6):
        theta = optimizer.theta
        loss = batches.forward(step)()
        c = optimizer.subspace.basis @ flat(torch.autograd.grad(loss, batches.params))
        returned = optimizer.step(batches.forward(step))
        record = optimizer.history[-1]
        assert record.step == step + 1 and record.status is optimizer.status
        assert record.loss == float(returned) == pytest.approx(loss.item())
        assert record.gradient_norm == pytest.approx(float(c.norm()))
        moved = float((optimizer.theta - theta).norm())
        assert record.step_length == pytest.approx(moved)
        assert record.loss_after == pytest.approx(batches.forward(step)().item())
        assert 1 <= record.trials <= optimizer.closure_calls - calls - 1
        calls = optimizer.closure_calls
        # Though saving the state made the pair count early.
        assert (record.curvature == "none") == (step == 0)
        assert str(record).startswith(f"step {step + 1}: loss {record.loss:.6g}, ")
        assert "accepted" in str(record)
        if step > 1:
            b = optimizer.state_dict()["subspace"]["inverse_hessian"]
            assert record.condition >= 1.0 and torch.linalg.cond(b) > 0
    optimizer.step(lambda: batches.forward(0)() + math.nan)
    last = optimizer.history[-1]
    assert math.isnan(last.loss) and last.trials == 0 and last.step_length == 0.0
    assert len(optimizer.history) == 7 and optimizer.history.maxlen == 1000


def test_condition_is_that_of_h() -> None:
    x = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    scale = torch.tensor([1.0, 100.0], dtype=torch.float64)
    optimizer = PBFGS([x], whole_space([x]), line_search_fn="strong_wolfe")
    for _ in range(12):
        optimizer.step(lambda: 0.5 * (scale * x * x).sum() + 1.0)
    conditions = [r.condition for r in optimizer.history if not math.isnan(r.condition)]
    assert conditions and 20 < max(conditions) < 500


def test_what_became_of_pairs() -> None:
    x = nn.Parameter(torch.tensor([0.1, 0.05], dtype=torch.float64))
    for damping, expected in (("powell", "damped"), (None, "skipped")):
        with torch.no_grad():
            x.copy_(torch.tensor([0.1, 0.05]))
        optimizer = PBFGS([x], whole_space([x]), damping=damping, max_ls=1)
        for _ in range(4):
            optimizer.step(lambda: x.cos().sum())
        assert expected in [record.curvature for record in optimizer.history]


def test_psgd_keeps_a_history_too() -> None:
    batches = Batches(0)
    optimizer = PSGD(batches.params, random_subspace(batches.params, 4), lr=0.1)
    batches.usual(0)()
    optimizer.step()
    assert math.isnan(optimizer.history[0].loss)
    theta = optimizer.theta
    loss = optimizer.step(batches.forward(1))
    record = optimizer.history[1]
    assert isinstance(record, StepRecord) and record.loss == float(loss) and record.alpha == 0.1
    moved = float((optimizer.theta - theta).norm())
    assert record.step_length == pytest.approx(moved) and record.gradient_norm > 0
