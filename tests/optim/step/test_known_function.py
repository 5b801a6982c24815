"""Steps that see the function that the step before has seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_problems import Batches, bits, random_subspace, whole_space
from torch import Tensor, nn

from dldr_ext import PBFGS
from dldr_ext.optim.step import line_trials


class Search(list[float]):
    """The trials of a search, and its slope."""

    slope = 0.0


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[Search]:
    found: list[Search] = []
    search, loss = line_trials.search, line_trials.Trials.loss

    def searched(trials: Any, group: Any, loss: float, slope: float, **options: Any) -> Any:
        found.append(Search())
        found[-1].slope = slope
        return search(trials, group, loss, slope, **options)

    def tried(self: line_trials.Trials, alpha: float, graph: bool) -> float:
        found[-1].append(alpha)
        return loss(self, alpha, graph)

    monkeypatch.setattr("dldr_ext.optim.pbfgs.search", searched)
    monkeypatch.setattr(line_trials.Trials, "loss", tried)
    return found


CURVED = torch.tensor([1.0, 100.0], dtype=torch.float64)


def steps(optimizer: PBFGS, x: Tensor, values: list[float]) -> None:
    for value in values:  # the same function, or one that is everywhere higher
        optimizer.step(lambda value=value: 0.5 * (CURVED * x.square()).sum() + value)


def test_the_first_trial_follows_from_the_last_decrease(trials: list[Search]) -> None:
    x = nn.Parameter(torch.tensor([10.0, 1.0], dtype=torch.float64))
    optimizer = PBFGS([x], whole_space([x]), lr=10.0, metric=None)
    steps(optimizer, x, [0.0, 0.0, 1.0])
    first, again, other = trials
    assert first[0] == 10.0 and other[0] == 10.0  # nothing is known of the function
    decrease = optimizer.history[0].loss - optimizer.history[0].loss_after
    assert again[0] == pytest.approx(2.02 * decrease / -again.slope) and again[0] < 10.0


def test_another_batch_starts_at_lr(trials: list[Search]) -> None:
    batches = Batches(0)
    optimizer = PBFGS(batches.params, random_subspace(batches.params, 4), lr=0.5)
    for step in range(8):
        optimizer.step(batches.forward(step))
    assert all(search[0] == 0.5 for search in trials)


@pytest.mark.parametrize("forget", ["change_subspace", "resync", "load_state_dict"])
def test_what_is_known_is_forgotten_with_the_place_and_kept_with_the_state(
    forget: str, trials: list[Search]
) -> None:
    x = nn.Parameter(torch.tensor([10.0, 1.0], dtype=torch.float64))
    optimizer = PBFGS([x], whole_space([x]), lr=10.0, metric=None)
    steps(optimizer, x, [0.0])
    if forget == "change_subspace":
        optimizer.change_subspace(whole_space([x]))
    elif forget == "resync":
        optimizer.resync()
    else:
        optimizer.load_state_dict(optimizer.state_dict())
    steps(optimizer, x, [0.0])
    assert (trials[1][0] < 10.0) == (forget == "load_state_dict")


def test_the_published_rule_knows_nothing(trials: list[Search]) -> None:
    x = nn.Parameter(torch.tensor([10.0, 1.0], dtype=torch.float64))
    rule = {"curvature": "consecutive", "damping": None, "c1": 0.4, "backtrack": 0.4}
    optimizer = PBFGS([x], whole_space([x]), metric=None, max_iter=6, **rule)
    steps(optimizer, x, [0.0, 0.0])
    for search in trials:
        expected = [0.4**m for m in range(len(search))]
        assert [round(alpha, 12) for alpha in search] == [round(alpha, 12) for alpha in expected]


def test_without_slopes_every_search_starts_at_lr(trials: list[Search]) -> None:
    """Between batches no gradient is wanted at the accepted point: no step could get longer."""
    x = nn.Parameter(torch.tensor([10.0, 1.0], dtype=torch.float64))
    optimizer = PBFGS([x], whole_space([x]), metric=None, curvature="consecutive")
    steps(optimizer, x, [0.0, 0.0, 0.0])
    assert [search[0] for search in trials] == [1.0, 1.0, 1.0]


def test_the_first_of_many_iterations_is_of_length_one(trials: list[Search]) -> None:
    x = nn.Parameter(torch.tensor([10.0, 1.0], dtype=torch.float64))
    optimizer = PBFGS([x], whole_space([x]), metric=None, max_iter=50, tolerance_grad=1e-9)
    steps(optimizer, x, [0.0])
    length = trials[0][0] * (CURVED * torch.tensor([10.0, 1.0])).norm()
    assert float(length) == pytest.approx(1.0)
    assert optimizer.history[-1].gradient_norm <= 1e-9


def test_a_graph_that_is_used_twice_gives_the_same_bits() -> None:
    """The slope of an accepted trial and the gradient there come from one backward pass."""
    one, many = Batches(3), Batches(3)
    subspace = random_subspace(one.params, 5)
    forward, usual = PBFGS(one.params, subspace), PBFGS(many.params, subspace)
    for _ in range(6):
        forward.step(one.forward(0))
        usual.step(many.usual(0))
    assert bits(one.params) == bits(many.params)
    assert forward.gradient_calls <= forward.closure_calls


@pytest.mark.parametrize("kind", ["armijo", "strong_wolfe"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_the_minimum_a_search_ends_at_what_the_losses_can_show(kind: str, dtype: Any) -> None:
    """In float32 the loss, about 1000, is known to 3e-5: 20 trials would find no more."""
    x = nn.Parameter(torch.ones(6, dtype=dtype))
    scale = torch.logspace(0, 3, 6, dtype=dtype)
    optimizer = PBFGS([x], whole_space([x]), line_search_fn=kind, metric=None)
    for _ in range(60):
        optimizer.step(lambda: 1000 + (scale * (x - 0.1).square()).sum())
    failed = [record for record in optimizer.history if record.status == "LINE_SEARCH_FAILED"]
    if dtype == torch.float32:
        assert len(failed) > 10 and max(record.trials for record in failed) <= 6
    assert optimizer.history[-1].loss == pytest.approx(1000, rel=1e-7)


def test_the_published_search_asks_for_no_resolution() -> None:
    x = nn.Parameter(torch.full((3,), 1e-4))
    published = {"c1": 0.4, "backtrack": 0.4, "curvature": "consecutive", "damping": None}
    optimizer = PBFGS([x], whole_space([x]), metric=None, **published)
    optimizer.step(lambda: 1000 + x.square().sum())
    assert optimizer.history[0].trials == 20
