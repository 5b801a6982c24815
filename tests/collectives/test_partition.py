"""Bases cut over ranks: shards of FSDP2, and columns where the weights are whole."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from rank_group import RankGroup
from rank_problem import MAKE, closure_of, part, problem, train
from rank_walks import network
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor

from dldr_ext import Trajectory
from dldr_ext.collectives.dtensors import local_columns, local_shards
from dldr_ext.collectives.partition import ColumnShard, cut, runs_of
from dldr_ext.distributed.local import LocalSubspace
from dldr_ext.distributed.sharded import ShardedSubspace

HOWS = ["default", "wolfe", "decay", "residual", "psgd", "adam"]


def sharded(how: str, mode: str) -> dict[str, Any]:
    """As `train`, with a basis that no rank has all of."""
    model, subspace, data = problem()
    rank, size = dist.get_rank(), dist.get_world_size()
    data = part(data, rank, size)
    if mode == "columns":
        over: Any = ShardedSubspace(subspace, "world")
        optimizer = MAKE[how](model.parameters(), over, process_group="world")
    else:
        shape = (2, size // 2) if mode == "hybrid" else (size,)
        names = ("replicate", "shard")[-len(shape) :]
        mesh = DeviceMesh("cpu", torch.arange(size).view(shape), mesh_dim_names=names)
        for layer in model if mode == "layers" else []:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        over = LocalSubspace.of(subspace, model.parameters())
        optimizer = MAKE[how](model.parameters(), over, process_group=model)
    losses = [float(optimizer.step(closure_of(model, data))) for _ in range(6)]
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return {
        "losses": losses,
        "theta": optimizer.theta.tolist(),
        "weights": torch.cat([p.detach().reshape(-1) for p in whole]).tolist(),
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["columns", "root", "layers", "hybrid"])
def test_as_one_process_with_the_whole_basis(ranks: RankGroup, mode: str) -> None:
    for how in HOWS if mode in ("columns", "layers") else HOWS[:1]:
        alone, found = train(how, "alone"), ranks.all(sharded, how, mode)
        assert all(one == found[0] for one in found)
        for key, value in found[0].items():
            torch.testing.assert_close(value, alone[key], rtol=1e-8, atol=1e-9)


def random_shards() -> torch.Tensor:
    model, _, _ = problem(torch.float32)
    fully_shard(model, mesh=DeviceMesh("cpu", range(dist.get_world_size())))
    subspace = LocalSubspace.random(model.named_parameters(), 5, seed=3)
    for i in range(5):
        c = subspace.project_many([[subspace.direction(i)]])[0]
        torch.testing.assert_close(c, torch.eye(5)[i], rtol=0, atol=1e-5)
    return subspace.coordinates(model.parameters()).detach()


def test_random_directions_are_orthonormal_across_shards(ranks: RankGroup) -> None:
    assert all(torch.equal(c, torch.zeros(5)) for c in ranks.all(random_shards))


def shards_in_8_bits() -> torch.Tensor:
    model, _, _ = problem(torch.float32)
    fully_shard(model, mesh=DeviceMesh("cpu", range(dist.get_world_size())))
    shards = local_shards(model.parameters())
    trajectory = Trajectory(model.named_parameters(), 5, torch.int8, process_group=model)
    for _ in range(5):
        trajectory.record()
        with torch.no_grad():
            for shard in shards:
                shard.add_(torch.randn_like(shard))
    subspace = trajectory.subspace(3)
    assert isinstance(subspace, LocalSubspace)
    assert subspace.local is not None and subspace.local.dtype == torch.int8
    rows = [subspace.project_many([[subspace.direction(i)]])[0] for i in range(3)]
    return torch.stack(rows)


def test_shards_recorded_in_8_bits(ranks: RankGroup) -> None:
    for products in ranks.all(shards_in_8_bits):
        torch.testing.assert_close(products, torch.eye(3), rtol=0, atol=0.01)


@given(st.integers(1, 5000), st.integers(1, 9))
def test_pieces_cover_every_column_once(numel: int, size: int) -> None:
    pieces = [cut(numel, rank, size) for rank in range(size)]
    assert [i for begin, end in pieces for i in range(begin, end)] == list(range(numel))
    assert (
        len({end - begin for begin, end in (cut(numel, r, size, pad=True) for r in range(size))})
        == 1
    )


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1), st.data())
def test_a_shard_knows_its_columns(pairs: Any, data: Any) -> None:
    """Runs with gaps; `global_runs` and `local_runs` against plain indices."""
    shard, at, mine = object.__new__(ColumnShard), 0, []
    shard.runs = []
    for gap, length in pairs:
        shard.runs.append((at + gap, at + gap + length))
        at += gap + length
        mine += range(at - length, at)
    shard.index()
    assert shard.numel == len(mine)
    begin = data.draw(st.integers(0, len(mine)))
    end = data.draw(st.integers(begin, len(mine)))
    found = [-1] * (end - begin)
    for place, (low, high) in shard.global_runs(begin, end):
        found[place] = range(low, high)
    assert found == mine[begin:end]
    first = data.draw(st.integers(0, at))
    last = data.draw(st.integers(first, at))
    pieces = [(list(range(len(mine))[own]), run) for own, run in shard.local_runs(first, last)]
    assert [mine[i] for own, _ in pieces for i in own] == [i for i in mine if first <= i < last]
    assert [i for _, run in pieces for i in range(*run)] == [i for i in mine if first <= i < last]


def runs_as_columns() -> None:
    """Of every placement of a mesh of two dimensions, and of FSDP2."""
    size = dist.get_world_size()
    mesh = DeviceMesh("cpu", torch.arange(size).view(2, size // 2))
    placements = [Replicate(), Shard(0), Shard(1), Shard(2)]
    for pair in itertools.product(placements, repeat=2):
        tensors = [torch.zeros(5, 3, 4), torch.zeros(2, 2, 2), torch.zeros(1, 7, 3)]
        shards = [distribute_tensor(t, mesh, pair, src_data_rank=None) for t in tensors]
        found = [i for begin, end in runs_of(shards) for i in range(begin, end)]
        assert found == local_columns(shards).tolist(), pair
    for params in (network("sharded").parameters(), network("sharded", True).parameters()):
        listed = list(params)
        found = [i for begin, end in runs_of(listed) for i in range(begin, end)]
        assert found == local_columns(listed).tolist()


def test_runs_are_the_columns_of_local_shards(ranks: RankGroup) -> None:
    ranks.all(runs_as_columns)
