"""Where construction puts the model, and the arguments that it refuses."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from optim_problems import Batches, bits, flat, random_subspace, two_tensors
from torch import nn

from dldr_ext import PBFGS, PSGD, Subspace


@pytest.mark.parametrize("optimizer", [PBFGS, PSGD])
def test_theta0_stays_the_callers(optimizer: type[PBFGS | PSGD]) -> None:
    batches = Batches(0)
    theta0 = torch.full((4,), 0.1, dtype=torch.float64)
    made = optimizer(batches.params, random_subspace(batches.params, 4), lr=0.1, theta0=theta0)
    made.step(batches.forward(0))
    assert made.status.moved and bool((theta0 == 0.1).all())


def test_construction_says_once_that_it_moved_the_weights(
    caplog: pytest.LogCaptureFixture,
) -> None:
    batches = Batches(0)
    subspace = random_subspace(batches.params, 4)
    for optimizer in (PBFGS, PSGD):
        with caplog.at_level(logging.INFO, logger="dldr_ext"):
            optimizer(batches.params, subspace)
            assert not caplog.records  # it was there already
            with torch.no_grad():
                batches.params[1].add_(1.0)
            optimizer(batches.params, subspace)
        # No warning: it is what is asked for.
        assert [(r.name, r.levelno) for r in caplog.records] == [("dldr_ext", logging.INFO)]
        assert optimizer.__name__ in caplog.text and "moved to the origin" in caplog.text
        assert torch.equal(flat(batches.params), subspace.origin)
        caplog.clear()


@pytest.mark.parametrize("optimizer", [PBFGS, PSGD])
def test_theta0(optimizer: type[PBFGS | PSGD], caplog: pytest.LogCaptureFixture) -> None:
    batches = Batches(0)
    subspace = random_subspace(batches.params, 4)
    theta0 = torch.tensor([1.0, -2.0, 0.5, 0.0], dtype=torch.float64)
    caplog.set_level(logging.INFO, logger="dldr_ext")
    made = optimizer(batches.params, subspace, theta0=theta0)
    assert torch.equal(made.theta, theta0) and "theta0" in caplog.text
    there = subspace.origin + theta0 @ subspace.basis
    torch.testing.assert_close(flat(batches.params), there, rtol=1e-12, atol=1e-12)
    caplog.clear()
    again = optimizer(batches.params, subspace, theta0="current")
    torch.testing.assert_close(again.theta, theta0, rtol=1e-10, atol=1e-10)
    assert not caplog.records
    made.theta.zero_()  # a copy
    assert torch.equal(made.theta, theta0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": 0.0}, ValueError, r"lr: expected a number in \(0, inf\), got 0.0"),
        ({"lr": -1.0}, ValueError, "lr"),
        ({"lr": math.nan}, ValueError, "lr"),
        ({"lr": "1"}, TypeError, "lr: expected a number, got '1'"),
        ({"line_search_fn": "wolfe"}, ValueError, "line_search_fn: expected one of 'armijo'"),
        ({"c1": 0.0}, ValueError, "c1"),
        ({"c1": 1.0}, ValueError, "c1"),
        ({"c1": 0.95, "line_search_fn": "strong_wolfe"}, ValueError, r"c1: .*\(0, 0.9\)"),
        ({"backtrack": 1.0}, ValueError, "backtrack"),
        ({"backtrack": 0.0}, ValueError, "backtrack"),
        ({"max_ls": 0}, ValueError, "max_ls: expected at least 1, got 0"),
        ({"max_ls": 2.0}, TypeError, "max_ls: expected an int"),
        ({"curvature": "other"}, ValueError, "curvature: expected one of 'same_batch'"),
        ({"damping": "lm"}, ValueError, "damping: expected one of 'powell', None"),
        ({"max_iter": 0}, ValueError, "max_iter: expected at least 1"),
        ({"max_iter": 1.5}, TypeError, "max_iter: expected an int"),
        ({"maximize": 1}, TypeError, "maximize: expected True or False, got 1"),
        ({"maximize": None}, TypeError, "maximize: expected True or False"),
        ({"tolerance_grad": -1.0}, ValueError, "PBFGS: tolerance_grad"),
        ({"weight_decay": -1.0}, ValueError, "PBFGS: weight_decay"),
        ({"residual_lr": -0.1}, ValueError, "residual_lr"),
        ({"residual_momentum": 1.0}, ValueError, "residual_momentum"),
        ({"buffers": 3}, TypeError, "buffers: expected a module"),
        ({"buffers": [1]}, TypeError, r"buffers\[0\]: expected a tensor, got int"),
        ({"process_group": object()}, ValueError, "process_group: expected an initialised group"),
        ({"theta0": torch.zeros(4)}, ValueError, r"theta0: .*shape \(3,\), got shape \(4,\)"),
        ({"theta0": torch.zeros(3, dtype=torch.int64)}, ValueError, "theta0"),
        ({"theta0": torch.full((3,), math.inf)}, ValueError, "theta0: expected finite"),
        ({"theta0": "origin"}, TypeError, "theta0"),
        ({"theta0": [0.0, 0.0, 0.0]}, TypeError, "theta0"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    params, subspace = two_tensors()
    before = bits(params)
    with pytest.raises(error, match=message):
        PBFGS(params, subspace, **options)
    assert bits(params) == before


@pytest.mark.parametrize("optimizer", [PBFGS, PSGD])
def test_bad_parameters_and_subspaces(optimizer: type[PBFGS | PSGD]) -> None:
    params, subspace = two_tensors()
    before = bits(params)
    with pytest.raises(TypeError, match=r"dldr_ext.Subspace or GroupedSubspace, got Tensor"):
        optimizer(params, subspace.basis)
    with pytest.raises(ValueError, match=r"params: expected 10 elements .* got 6"):
        optimizer(params[:1], subspace)
    with pytest.raises(ValueError, match="empty"):
        optimizer([], subspace)
    with pytest.raises(TypeError, match="params"):
        optimizer(params[0], subspace)
    with pytest.raises(
        ValueError, match=r"options of single parameter groups but weight_decay, got .'lr'"
    ):
        optimizer([{"params": params[:1], "lr": 1.0}, {"params": params[1:]}], subspace)
    with pytest.raises(ValueError, match="requires_grad"):
        optimizer([p.detach() for p in params], subspace)
    assert bits(params) == before
    made = optimizer([{"params": params[:1]}, {"params": params[1:]}], subspace)
    with pytest.raises(ValueError, match="add_param_group"):
        made.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(made.param_groups) == 1


def test_subspace_of_a_model_of_another_shape() -> None:
    params, _ = two_tensors()
    subspace = Subspace.random(params, 3)
    other = [nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(4))]
    before = bits(other)
    for optimizer in (PBFGS, PSGD):
        with pytest.raises(ValueError, match=r"params\[0\].*expected shape \(3, 2\)"):
            optimizer(other, subspace)
    assert bits(other) == before
