"""The metric of the recorded trajectory: units of PBFGS, PSGD and InSubspace."""

from __future__ import annotations

import copy
import logging
import math
from typing import Any

import pytest
import torch
from optim_problems import Batches, bits, flat, random_subspace
from torch import Tensor, nn

from dldr_ext import PBFGS, PSGD, GroupedSubspace, InSubspace, Subspace, Trajectory
from dldr_ext.optim.step import line_trials
from dldr_ext.optim.step.line_trials import Trials

MAKERS: dict[str, Any] = {
    "pbfgs": PBFGS,
    "psgd": lambda p, s, **k: PSGD(p, s, lr=0.05, **k),
    "adam": lambda p, s, **k: InSubspace(p, s, torch.optim.Adam, lr=0.1, **k),
}


def recorded(batches: Batches, dim: int = 4, count: int = 9) -> Subspace:
    """The principal directions of some steps of SGD, from the weights before them."""
    start = copy.deepcopy(batches.model.state_dict())
    sgd = torch.optim.SGD(batches.params, lr=0.5)
    trajectory = Trajectory(batches.params, capacity=count, dtype=torch.float64)
    trajectory.record()
    for step in range(count - 1):
        batches.usual(step)()
        sgd.step()
        trajectory.record()
    batches.model.load_state_dict(start)
    sgd.zero_grad()
    return trajectory.subspace(dim)


def without_mean(subspace: Subspace) -> Subspace:
    """The same, where nobody knows where the mean of the snapshots is."""
    return subspace.with_origin(subspace.origin)


def plain(subspace: Subspace, scale: Tensor | None = None) -> Subspace:
    """The same directions with nothing known of them, of length ``scale`` each."""
    rows = subspace.basis if scale is None else subspace.basis * scale[:, None]
    return Subspace(rows, subspace.origin, shapes=subspace.shapes)


def test_spread_is_the_standard_deviation_of_the_snapshots() -> None:
    params = [nn.Parameter(torch.randn(5, 4, dtype=torch.float64))]
    trajectory, seen = Trajectory(params, capacity=7, dtype=torch.float64), []
    for _ in range(7):
        with torch.no_grad():
            params[0].add_(torch.randn(5, 4, dtype=torch.float64))
        trajectory.record()
        seen.append(flat(params))
    subspace = trajectory.subspace(dim=3)
    weights = torch.stack(seen)
    expected = ((weights - weights.mean(0)) @ subspace.basis.T).std(0, correction=0)
    for space in (
        subspace,
        subspace.to(dtype=torch.float32),
        subspace.quantize("int8"),
        subspace.with_origin(params),
        Subspace.from_snapshots([[w] for w in seen], 3),
        trajectory.subspace(dim=3, materialize=False),
        GroupedSubspace([subspace]),
    ):
        torch.testing.assert_close(space.spread, expected, rtol=1e-6, atol=0.0)
    assert random_subspace(params, 3).spread is None
    by_hand = Subspace(subspace.basis, subspace.origin, singular_values=[6.0, 4.0, 2.0])
    torch.testing.assert_close(by_hand.spread, torch.tensor([3.0, 2.0, 1.0]).double())


def test_spread_outlives_a_file(tmp_path) -> None:
    subspace = recorded(Batches(0))
    subspace.save(tmp_path / "subspace.safetensors")
    assert torch.equal(Subspace.load(tmp_path / "subspace.safetensors").spread, subspace.spread)


@pytest.mark.parametrize("how", MAKERS)
def test_auto_is_the_trajectory_where_the_subspace_knows_it(how: str) -> None:
    """And plain coordinates where it does not, to the bit."""
    results = {}
    for known in (True, False):
        for metric in ("auto", "trajectory", None):
            if metric == "trajectory" and not known:
                continue
            batches = Batches(3)
            subspace = recorded(batches)
            optimizer = MAKERS[how](
                batches.params, subspace if known else plain(subspace), metric=metric
            )
            for step in range(6):
                optimizer.step(batches.forward(step))
            results[known, metric] = bits(batches.params)
    assert results[True, "auto"] == results[True, "trajectory"] != results[True, None]
    assert results[False, "auto"] == results[False, None] == results[True, None]


def length_to_lr(batches: Batches, subspace: Subspace, length: float) -> float:
    """The lr whose first trial, from an H at the metric, is of this length in it."""
    gradients = torch.autograd.grad(batches.forward(0)(), batches.params)
    return length / float((subspace.project(list(gradients)) * subspace.spread).norm())


@pytest.mark.parametrize("max_iter", [1, 3])
@pytest.mark.parametrize("lr", [1.0, 0.1])
@pytest.mark.parametrize("flatter", [1.0, 1e-6])
def test_the_first_trial_of_a_run_goes_as_far_as_the_snapshots(
    flatter: float, lr: float, max_iter: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is sqrt(d) standard deviations long, however flat the loss; a resumed run has had it."""
    batches, tried = Batches(1), []
    subspace, loss = without_mean(recorded(batches)), Trials.loss

    def trial(self: Trials, alpha: float, graph: bool) -> float:
        tried.append(alpha)
        return loss(self, alpha, graph)

    monkeypatch.setattr(Trials, "loss", trial)
    optimizer = PBFGS(batches.params, subspace, lr, max_iter=max_iter)
    expected = lr * length_to_lr(batches, subspace, 2.0) / flatter
    optimizer.step(lambda: flatter * batches.forward(0)())
    assert tried[0] == pytest.approx(expected, rel=1e-5)
    resumed = PBFGS(batches.params, subspace, lr, theta0=optimizer.theta)
    resumed.load_state_dict(optimizer.state_dict())
    tried.clear()
    resumed.step(lambda: flatter * batches.forward(1)())
    assert tried[0] == lr if max_iter == 1 else tried[0] <= lr


def away(batches: Batches) -> Subspace:
    """Recorded directions, seen from a point with a higher loss than the mean of the snapshots."""
    subspace = recorded(batches)
    theta = 4.0 * subspace.spread * torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    start = subspace.with_origin(subspace.reconstruct(theta))
    start.mean = subspace.mean - theta
    losses = []
    with torch.no_grad():
        for place in (start.mean, torch.zeros(4, dtype=torch.float64)):
            start.reconstruct_(batches.params, place)
            losses.append(float(batches.forward(0)()))
    assert losses[0] < losses[1]
    return start


def test_a_run_begins_at_the_mean_of_the_snapshots_where_the_loss_is_lower() -> None:
    one, other = Batches(1), Batches(1)
    subspace = away(one)
    optimizer = PBFGS(one.params, subspace)
    before = float(one.forward(0)().detach())
    assert float(optimizer.step(one.forward(0))) == pytest.approx(before)
    torch.testing.assert_close(optimizer.theta, subspace.mean)
    first = optimizer.history[0]
    assert (first.status.name, first.trials, first.alpha) == ("ACCEPTED", 1, 1.0)
    assert first.loss_after < first.loss and optimizer.closure_calls == 2
    assert first.step_length == pytest.approx(float(subspace.mean.norm()))
    # It has taught H nothing: the next step is the first of a run from there.
    there = PBFGS(other.params, without_mean(subspace), theta0=subspace.mean)
    for step in (1, 2):
        optimizer.step(one.forward(step))
        there.step(other.forward(step))
        torch.testing.assert_close(optimizer.theta, there.theta, rtol=1e-6, atol=1e-9)


def test_a_step_to_the_mean_is_an_iteration_among_others_and_can_be_resumed_at() -> None:
    batches = Batches(1)
    subspace = away(batches)
    many = PBFGS(batches.params, subspace, max_iter=3)
    many.step(batches.forward(0))
    assert many.history[0].step_length == pytest.approx(float(subspace.mean.norm()))
    assert [record.curvature for record in many.history] == ["none", "none", "updated"]
    ends = []
    for resumes in (False, True):
        optimizer = PBFGS(batches.params, subspace)
        optimizer.step(batches.forward(0))
        if resumes:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = PBFGS(batches.params, subspace)
            optimizer.load_state_dict(state)
        for step in (1, 2, 3):
            optimizer.step(batches.forward(step))
        ends.append(bits(batches.params))
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    "options",
    [
        {"metric": None},
        {"line_search_fn": None, "lr": 0.1},
        {"lr": 0.0},
        {"residual_lr": 0.1},
        {"curvature": "consecutive", "damping": None},
        {"theta0": "mean"},
    ],
)
def test_it_does_not_where_it_is_not_asked_to(options: dict[str, Any]) -> None:
    batches, options = Batches(1), dict(options)
    subspace = away(batches)
    if options.get("theta0") == "mean":  # less than a standard deviation from it
        options = {"theta0": subspace.mean + 0.4 * subspace.spread}
    ended = options.pop("lr") if options.get("lr") == 0.0 else None  # as a schedule may end
    optimizer = PBFGS(batches.params, subspace, **options)
    if ended is not None:
        optimizer.param_groups[0]["lr"] = ended
    optimizer.step(batches.forward(0))
    assert not torch.allclose(optimizer.theta, subspace.mean, rtol=1e-3)


def test_a_mean_of_a_higher_loss_costs_one_trial() -> None:
    one, other = Batches(1), Batches(1)
    subspace = away(one)
    # Seen from the mean, the start away from it has the higher loss.
    low = subspace.with_origin(subspace.reconstruct(subspace.mean))
    low.mean = -subspace.mean
    ours = PBFGS(one.params, low)
    theirs = PBFGS(other.params, without_mean(low))
    for step in range(3):
        ours.step(one.forward(step))
        theirs.step(other.forward(step))
    assert torch.equal(ours.theta, theirs.theta) and bits(one.params) == bits(other.params)
    trials = [[r.trials for r in o.history] for o in (ours, theirs)]
    assert trials[0] == [trials[1][0] + 1, *trials[1][1:]]


@pytest.mark.parametrize("how", MAKERS)
def test_a_metric_is_a_basis_of_that_spread(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps in theta / s are those of a basis with rows s_i P_i, without a metric.

    But for the first search of PBFGS, which the metric tells how far to go.
    """
    monkeypatch.setattr(line_trials, "C2_FIRST", line_trials.C2)
    one, other = Batches(1), Batches(1)
    subspace = without_mean(recorded(one))
    scaled = plain(subspace, subspace.spread)
    ours = MAKERS[how](one.params, subspace)
    theirs = MAKERS[how](other.params, scaled, metric=None)
    for step in range(8):
        if how == "pbfgs":
            theirs.param_groups[0]["lr"] = length_to_lr(one, subspace, 2.0) if step == 0 else 1.0
        ours.step(one.forward(step))
        theirs.step(other.forward(step))
        assert ours.status is theirs.status
        torch.testing.assert_close(ours.theta / subspace.spread, theirs.theta, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(flat(one.params), flat(other.params), rtol=1e-8, atol=1e-9)
    assert ours.closure_calls == theirs.closure_calls


def test_the_inverse_hessian_starts_at_the_squared_spread() -> None:
    batches = Batches(0)
    subspace = recorded(batches)
    optimizer = PBFGS(batches.params, subspace, line_search_fn=None, lr=0.01)
    state = optimizer.state_dict()["subspace"]["inverse_hessian"]
    assert torch.equal(state, torch.diag(subspace.spread**2))
    c = subspace.basis @ flat(torch.autograd.grad(batches.forward(0)(), batches.params))
    optimizer.step(batches.forward(0))
    torch.testing.assert_close(optimizer.theta, -0.01 * subspace.spread**2 * c)
    plain_start = PBFGS(batches.params, subspace, metric=None).state_dict()["subspace"]
    assert torch.equal(plain_start["inverse_hessian"], torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("metric", [None, "trajectory"])
def test_lbfgs_evaluates_where_its_variable_is(metric: Any) -> None:
    """An optimizer that moves its variable between evaluations finds the loss of those weights."""
    batches = Batches(2)
    subspace = recorded(batches)
    optimizer = InSubspace(
        batches.params, subspace, torch.optim.LBFGS, metric=metric, line_search_fn="strong_wolfe"
    )
    first = float(optimizer.step(batches.forward(0)))
    assert batches.forward(0)().item() < first
    torch.testing.assert_close(flat(batches.params), subspace.reconstruct(optimizer.theta))


@pytest.mark.parametrize("how", MAKERS)
def test_resumes_bit_for_bit(how: str) -> None:
    batches = Batches(0)
    subspace = recorded(batches)
    optimizer = MAKERS[how](batches.params, subspace)
    for step in range(5):
        optimizer.step(batches.forward(step))
    state = copy.deepcopy(optimizer.state_dict())
    again = Batches(0)
    resumed = MAKERS[how](again.params, subspace, metric=None)  # the saved option counts
    resumed.load_state_dict(state)
    copied = copy.deepcopy([batches, optimizer])
    for step in range(5, 12):
        optimizer.step(batches.forward(step))
        resumed.step(again.forward(step))
        copied[1].step(copied[0].forward(step))
    assert bits(batches.params) == bits(again.params) == bits(copied[0].params)
    assert torch.equal(optimizer.theta, resumed.theta)


@pytest.mark.parametrize("how", MAKERS)
def test_another_subspace_has_its_own_spread(how: str) -> None:
    batches = Batches(4)
    subspace = recorded(batches)
    for metric in ("auto", "trajectory"):
        optimizer = MAKERS[how](batches.params, subspace, theta0="current", metric=metric)
        optimizer.step(batches.forward(0))
        before = bits(batches.params)
        if metric == "trajectory":
            with pytest.raises(ValueError, match="metric: 'trajectory' expects a subspace with"):
                optimizer.change_subspace(plain(subspace))
            assert bits(batches.params) == before and optimizer.subspace is subspace
        else:
            optimizer.change_subspace(plain(subspace).with_origin(batches.params))
            torch.testing.assert_close(optimizer._units(), torch.ones(4).double())
        other = recorded(batches, dim=3).with_origin(batches.params)
        optimizer.change_subspace(other)
        torch.testing.assert_close(optimizer._units(), other.spread)
        optimizer.step(batches.forward(1))


BAD: dict[str, tuple[Any, str]] = {
    "unknown": (lambda s: plain(s), r"got one without; pass metric=None, or singular_values="),
    "zero": (
        lambda s: Subspace(s.basis, s.origin, singular_values=[1.0, 0.5, 0.0, 0.0]),
        r"all finite and > 0, got 0 for direction 2; pass metric=None, or leave",
    ),
    "nan": (
        lambda s: Subspace(s.basis, s.origin, singular_values=[1.0, math.nan, 0.5, 0.1]),
        r"all finite and > 0, got nan for direction 1",
    ),
    "infinite": (
        lambda s: Subspace(s.basis, s.origin, singular_values=[math.inf, 1.0, 0.5, 0.1]),
        r"all finite and > 0, got inf for direction 0",
    ),
    "rescaled": (
        lambda s: Subspace(3.0 * s.basis, s.origin, singular_values=s.singular_values),
        r"and orthonormal rows, got rows of length 3 or so; pass metric=None",
    ),
}


@pytest.mark.parametrize("how", MAKERS)
@pytest.mark.parametrize("what", BAD)
def test_a_metric_that_cannot_be_is_refused(what: str, how: str, caplog) -> None:
    make, message = BAD[what]
    batches = Batches(0)
    subspace = make(recorded(batches).with_origin(flat(batches.params) + 1.0))
    before = bits(batches.params)
    with pytest.raises(ValueError, match=r"metric: 'trajectory' expects .*" + message):
        MAKERS[how](batches.params, subspace, metric="trajectory")
    assert bits(batches.params) == before
    # By itself it is left alone, which is said where the subspace seems to know its spread.
    with caplog.at_level(logging.WARNING, "dldr_ext"):
        optimizer = MAKERS[how](batches.params, subspace)
    said = [text for text in caplog.messages if "'auto' is None here" in text]
    assert len(said) == (what != "unknown")
    assert torch.equal(optimizer._units(), torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize("how", MAKERS)
def test_a_misspelt_metric_is_named(how: str) -> None:
    batches = Batches(0)
    with pytest.raises(ValueError, match=r"metric: expected one of .*'trajectory'.* did you mean"):
        MAKERS[how](batches.params, recorded(batches), metric="trajectry")


def test_the_published_rule_does_not_lengthen() -> None:
    """Where each trial is accepted at once, the published search tries no more than that."""
    x = nn.Parameter(torch.tensor([3.0, -1.0], dtype=torch.float64))
    calls = []
    for published in (True, False):
        rule = {"curvature": "consecutive", "damping": None} if published else {}
        space = Subspace(torch.eye(2, dtype=torch.float64), torch.tensor([3.0, -1.0]).double())
        optimizer = PBFGS([x], space, metric=None, **rule)
        optimizer.step(lambda: 0.01 * x.square().sum())
        calls.append(optimizer.history[0].trials)
    assert calls == [1, 3]  # 1, 10, 50: the minimiser
