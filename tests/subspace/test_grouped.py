"""Subspaces with one basis for each group of parameters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from optim_problems import Batches, bits, one_thread  # noqa: F401  (one_thread is a fixture)
from torch import nn

from dldr_ext import PBFGS, PSGD, GroupedSubspace, Subspace, Trajectory, layer_groups

GROUPS = [1, 2, 1]


def model(dtype: torch.dtype = torch.float64) -> nn.Module:
    return Batches(0, dtype=dtype).model


def grouped(net: nn.Module, dtype: torch.dtype = torch.float64) -> GroupedSubspace:
    return GroupedSubspace.random(net.named_parameters(), 4, GROUPS, dtype=dtype)


def dense(space: GroupedSubspace) -> Subspace:
    """The same subspace with the zeros stored."""
    blocks = [one.to(dtype=torch.float64).basis for one in space.subspaces]
    basis = torch.block_diag(*blocks).to(space.coordinate_dtype)
    return Subspace(basis, space.origin, shapes=space.shapes, names=space.names)


def close(actual: torch.Tensor, expected: torch.Tensor, eps: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=eps, atol=eps)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (PBFGS, {"lr": 1.0}),
        (PBFGS, {"curvature": "consecutive", "residual_lr": 0.05}),
        (PSGD, {"lr": 0.5}),
    ],
)
def test_optimizers_take_the_same_steps(make: Any, options: dict[str, Any]) -> None:
    ours, theirs = Batches(0), Batches(0)
    space = grouped(ours.model)
    first = make(ours.params, space, **options)
    second = make(theirs.params, dense(space), **options)
    before = ours.forward(0)().item()
    for step in range(35):
        first.step(ours.forward(step))
        second.step(theirs.forward(step))
    close(first.theta, second.theta, 1e-7)
    assert ours.forward(0)().item() < 0.9 * before
    # And it resumes.
    state, there = first.state_dict(), bits(ours.params)
    again = make(ours.params, space, **options)
    again.load_state_dict(state)
    assert bits(ours.params) == there


def test_dimensions_of_the_groups() -> None:
    space = grouped(model(torch.float32), torch.float32)
    assert [one.dim for one in space.subspaces] == [4, 4, 3]
    assert "3 groups, dim=11 (4, 4, 3), numel=83" in repr(space)
    assert space.report().count("group") == 3


def test_origin_is_one_vector() -> None:
    space = grouped(model())
    assert space.subspaces[1].origin.data_ptr() == space.origin[48:].data_ptr()


def recorded(names: bool = True) -> tuple[Batches, Trajectory]:
    batches = Batches(0)
    listed = batches.model.named_parameters() if names else batches.params
    trajectory = Trajectory(listed, dtype=torch.float64)
    sgd = torch.optim.SGD(batches.params, lr=0.5)
    for step in range(12):
        trajectory.record()
        batches.usual(step)()
        sgd.step()
    return batches, trajectory


@pytest.mark.parametrize("names", [True, False])
def test_from_a_trajectory(names: bool) -> None:
    batches, trajectory = recorded(names)
    whole = trajectory.grouped_subspace(layer_groups(batches.model), dim=5, start="last")
    # The same as one trajectory for each layer.
    raw = trajectory.anchor + trajectory.snapshots
    for one, columns in zip(whole.subspaces, (slice(0, 56), slice(56, 83)), strict=True):
        alone = Subspace.from_snapshots(raw[:, columns], 5)
        close(one.basis, alone.basis, 1e-7)
        close(one.singular_values, alone.singular_values, 1e-9)
        close(one.origin, raw[-1, columns])
    assert whole.dim == 10 and whole.shapes == trajectory.shapes
    assert whole.names == trajectory.names
    # A small group has as many directions as its rank, without a warning.
    small = trajectory.grouped_subspace([1, 1, 1, 1], dim=10)
    assert [one.dim for one in small.subspaces] == [
        10,
        8,
        10,
        2,
    ]  # softmax: the biases sum to a constant
    some = trajectory.grouped_subspace([2, 2], explained=0.9)
    for one in some.subspaces:
        ratio = one.explained_variance_ratio
        assert ratio.sum() >= 0.9 > ratio[:-1].sum()


def test_layers_of_a_model() -> None:
    net = nn.Sequential(
        nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)), nn.Linear(3, 3)
    )
    assert layer_groups(net) == [2, 2, 2, 2]
    assert layer_groups(net, depth=1) == [2, 4, 2]
    net[2].weight = net[0].weight  # tied: counts once, where it comes first
    net[1][1].weight.requires_grad_(False)
    assert layer_groups(net) == [2, 2, 1, 1]
    assert layer_groups(nn.Linear(2, 2)) == [2]


def test_bad_input() -> None:
    space = grouped(model())
    one = space.subspaces[0]
    with pytest.raises(ValueError, match="subspaces: expected at least one Subspace"):
        GroupedSubspace([])
    with pytest.raises(TypeError, match=r"subspaces\[1\]: expected a Subspace, got int"):
        GroupedSubspace([one, 3])
    with pytest.raises(ValueError, match=r"subspaces\[1\]: .* float32 beside float64"):
        GroupedSubspace([one, one.to(dtype=torch.float32)])
    with pytest.raises(ValueError, match=r"theta: expected shape \(11,\) on cpu, got \(4,\)"):
        space.reconstruct(torch.zeros(4))
    with pytest.raises(TypeError, match="theta: expected a floating-point tensor, got list"):
        space.reconstruct([0.0] * 11)
    with pytest.raises(ValueError, match=r"tensors\[0\] \(0.weight\): expected shape \(8, 6\)"):
        space.project([torch.zeros(82)])
    with pytest.raises(TypeError, match=r"tensors\[0\]: expected a tensor, got None"):
        GroupedSubspace([Subspace(one.basis, one.origin)] * 2).project([None, torch.zeros(48)])
    _, trajectory = recorded()
    for groups, message in (
        ([2, 3], "groups: expected 4 parameters in all, got 5"),
        ([4, 0], r"groups\[1\]: expected a number of parameters, at least 1, got 0"),
        ([2.0, 2], r"groups\[0\]: expected a number of parameters, at least 1, got 2.0"),
    ):
        with pytest.raises(ValueError, match=message):
            trajectory.grouped_subspace(groups)
    with pytest.raises(ValueError, match="depth: expected at least 1, got 0"):
        layer_groups(model(), depth=0)


def test_a_layer_that_did_not_move_is_named() -> None:
    net = model()
    trajectory = Trajectory(net.parameters(), dtype=torch.float32)
    for _ in range(4):
        trajectory.record()
        net[0].weight.data.add_(torch.randn_like(net[0].weight))
    with pytest.raises(ValueError, match=r"groups\[1\]: the 4 snapshots do not differ"):
        trajectory.grouped_subspace([2, 2])


def test_strided_parameters_cannot_be_cut_in_two() -> None:
    blocks = [Subspace(torch.eye(2, 4), torch.zeros(4)) for _ in range(2)]
    space = GroupedSubspace(blocks)
    strided = torch.zeros(2, 4).T
    assert space.project([strided]).shape == (4,)  # reading is no problem
    with pytest.raises(ValueError, match="expected groups that end where parameters end"):
        space.reconstruct_([strided], torch.ones(4))
    assert not strided.any()
    whole = torch.zeros(4, 2, requires_grad=True)
    space.reconstruct_([whole], torch.ones(4))
    assert torch.equal(whole.detach().reshape(-1), space.reconstruct(torch.ones(4)))
