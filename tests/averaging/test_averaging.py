"""Soups of checkpoints and trainable weight averaging."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim.swa_utils import update_bn

from dldr_ext import PSGD, GroupedSubspace, InSubspace, Subspace, Trajectory, layer_groups
from dldr_ext.averaging.soups import greedy_soup, uniform_soup, weight_averaging_subspace


class Net(nn.Module):
    """Batch norm, a frozen layer and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.tied = nn.Linear(3, 3, bias=False)
        self.tied.weight = self.frozen.weight
        self.other = nn.Linear(8, 8, bias=False)
        self.same = nn.Linear(8, 8, bias=False)
        self.same.weight = self.other.weight

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(x)))
        return self.tied(self.frozen(self.last(self.same(torch.tanh(self.other(x))))))


def task() -> tuple[Tensor, Tensor]:
    inputs = torch.randn(64, 5)
    return inputs, (inputs @ torch.randn(5, 3)).argmax(1)


def trained(steps: int = 12, lr: float = 0.3) -> tuple[Net, list[dict[str, Tensor]], Any]:
    torch.manual_seed(3)
    net, (inputs, labels) = Net(), task()
    sgd = torch.optim.SGD(net.parameters(), lr=lr)
    states = []
    for batch in torch.randint(64, (steps, 16)):
        sgd.zero_grad()
        functional.cross_entropy(net(inputs[batch]), labels[batch]).backward()
        sgd.step()
        states.append({name: value.clone() for name, value in net.state_dict().items()})
    return net, states, (inputs, labels)


def test_uniform_soup_is_the_mean() -> None:
    net, states, _ = trained()

    def one_at_a_time() -> Iterator[dict[str, Tensor]]:
        yield from states

    for soup in (uniform_soup(states), uniform_soup(one_at_a_time())):
        for name, value in soup.items():
            stacked = torch.stack([state[name] for state in states])
            if value.is_floating_point():
                torch.testing.assert_close(value, stacked.double().mean(0).float(), rtol=0, atol=0)
            else:
                assert torch.equal(value, stacked[-1])
        net.load_state_dict(soup)
        assert torch.equal(soup["same.weight"], soup["other.weight"])
    half = uniform_soup([{"a": torch.tensor([1.0, 2.0]).half()}, {"a": torch.ones(2).half()}])
    assert half["a"].dtype == torch.float16 and half["a"].tolist() == [1.0, 1.5]


def test_a_trajectory_is_its_snapshots() -> None:
    net, states, _ = trained()
    trajectory = Trajectory(net.named_parameters(), dtype=torch.float32)
    for state in states:
        net.load_state_dict(state)
        trajectory.record()
    soup, expected = uniform_soup(trajectory), uniform_soup(states)
    assert list(soup) == [name for name, p in net.named_parameters() if p.requires_grad]
    for name, value in soup.items():
        torch.testing.assert_close(value, expected[name])
    spaces = [weight_averaging_subspace(one, net) for one in (trajectory, states)]
    torch.testing.assert_close(spaces[0].origin, spaces[1].origin)
    seen: list[Any] = []
    greedy_soup(trajectory, lambda state: seen.append(state) or 0.0)
    assert len(seen) == 2 * len(states) - 1
    torch.testing.assert_close(seen[4]["last.bias"], states[4]["last.bias"])


def test_greedy_soup_by_hand() -> None:
    """Score: minus the distance from 3, of a single number."""
    states = [{"w": torch.tensor(value)} for value in (0.0, 4.0, 3.5, 9.0, 2.0)]
    asked: list[float] = []

    def score(state: dict[str, Tensor]) -> float:
        asked.append(float(state["w"]))
        return -abs(asked[-1] - 3.0)

    soup = greedy_soup(states, score)
    # 3.5 alone; with 4: 3.75, worse; with 2: 2.75, better; with 0, 9: worse.
    assert soup.members == [2, 4] and float(soup.state_dict["w"]) == 2.75
    assert soup.score == pytest.approx(-0.25)
    assert asked[5:] == pytest.approx([3.75, 2.75, 5.5 / 3, 14.5 / 3])
    assert [float(state["w"]) for state in states] == [0.0, 4.0, 3.5, 9.0, 2.0]


def test_greedy_soup_is_at_least_as_good_as_the_best() -> None:
    net, states, (inputs, labels) = trained(steps=30, lr=3.0)

    def score(state: dict[str, Tensor]) -> float:
        net.load_state_dict(state)
        update_bn([inputs], net)
        net.eval()
        return -functional.cross_entropy(net(inputs), labels).item()

    soup = greedy_soup(states, score)
    assert soup.score >= max(map(score, states)) and len(soup.members) > 1
    assert soup.score == pytest.approx(score(soup.state_dict))


@pytest.mark.parametrize("layers", [False, True])
def test_every_average_is_in_the_subspace(layers: bool) -> None:
    net, states, _ = trained()
    groups = layer_groups(net) if layers else None
    space = weight_averaging_subspace(states, net, groups=groups)
    assert isinstance(space, GroupedSubspace if layers else Subspace)
    names = [name for name, p in net.named_parameters() if p.requires_grad]
    assert space.names == names and "frozen.weight" not in names
    mean = uniform_soup(states)
    assert torch.equal(space.origin, torch.cat([mean[name].reshape(-1) for name in names]))
    for state in states:
        weights = torch.cat([state[name].reshape(-1) for name in names])
        theta = space.coordinates(weights)
        torch.testing.assert_close(space.reconstruct(theta), weights, rtol=1e-4, atol=1e-5)
    # Each layer of another checkpoint: an average only layer by layer.
    mixed = torch.cat([states[i][name].reshape(-1) for i, name in enumerate(names)])
    distance = (space.reconstruct(space.coordinates(mixed)) - mixed).norm()
    assert (distance < 1e-3) == layers or groups == [1] * len(names)


@pytest.mark.parametrize("layers", [False, True])
@pytest.mark.parametrize("adam", [False, True])
def test_trainable_weight_averaging(layers: bool, adam: bool) -> None:
    """Better than the mean of the checkpoints, after the mean's statistics were re-estimated."""
    net, states, (inputs, labels) = trained(lr=1.0)
    net.load_state_dict(uniform_soup(states))
    groups = layer_groups(net) if layers else None
    space = weight_averaging_subspace(states, net, groups=groups)
    if adam:
        optimizer: Any = InSubspace(net.parameters(), space, torch.optim.Adam, lr=0.05)
    else:
        optimizer = PSGD(net.parameters(), space, lr=0.1)

    def loss() -> float:
        update_bn([inputs], net)
        net.eval()
        result = functional.cross_entropy(net(inputs), labels).item()
        net.train()
        return result

    before = loss()
    for _ in range(30):
        optimizer.step(lambda: functional.cross_entropy(net(inputs), labels))
    assert loss() < 0.8 * before


def test_bad_input() -> None:
    net, states, _ = trained(steps=3)
    with pytest.raises(ValueError, match="checkpoints: expected at least one, got none"):
        uniform_soup([])
    with pytest.raises(ValueError, match="checkpoints: expected at least one, got none"):
        greedy_soup([], lambda _: 0.0)
    with pytest.raises(TypeError, match="checkpoints: expected a list of state dicts"):
        uniform_soup(states[0])
    with pytest.raises(TypeError, match=r"checkpoints\[1\]: expected a state dict, got int"):
        uniform_soup([states[0], 3])
    other = {name: value for name, value in states[1].items() if name != "last.bias"}
    with pytest.raises(ValueError, match=r"checkpoints\[1\]: .* difference in last.bias"):
        uniform_soup([states[0], other])
    with pytest.raises(ValueError, match=r"last.bias: expected shape \(3,\), .* got \(4,\)"):
        uniform_soup([states[0], {**other, "last.bias": torch.zeros(4)}])
    with pytest.raises(ValueError, match="score: expected a number, got NaN"):
        greedy_soup(states, lambda _: float("nan"))
    with pytest.raises(ValueError, match=r"checkpoints\[1\]: expected the parameter last.bias"):
        weight_averaging_subspace([states[0], other], net)
    with pytest.raises(ValueError, match="checkpoints: expected at least two, got 1"):
        weight_averaging_subspace(states[:1], net)
    with pytest.raises(ValueError, match="groups: expected 7 parameters in all, got 2"):
        weight_averaging_subspace(states, net, groups=[1, 1])
    trajectory = Trajectory(net.parameters(), dtype=torch.float32)
    trajectory.record()
    with pytest.raises(ValueError, match="record with Trajectory"):
        uniform_soup(trajectory)
    zero = [{"weight": torch.zeros(2, 2), "bias": torch.rand(2)} for _ in range(3)]
    with pytest.raises(ValueError, match=r"groups\[0\]: snapshots: the snapshots are all zero"):
        weight_averaging_subspace(zero, nn.Linear(2, 2), groups=[1, 1])
