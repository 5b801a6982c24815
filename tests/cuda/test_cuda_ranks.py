"""Ranks with a GPU each, over NCCL; test_distributed*.py try more, over gloo."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_group import RankGroup
from rank_problem import MAKE, closure_of, part, problem
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dldr_ext import PBFGS, LocalSubspace, ShardedSubspace, Subspace, shard_if_needed

pytestmark = pytest.mark.cuda
SIZE = 2
DEVICE = os.environ.get("DLDR_CUDA_TESTS_ON", "cuda")  # as in conftest.py


@pytest.fixture(scope="module")
def ranks():
    real = DEVICE == "cuda"
    if real and torch.cuda.device_count() < SIZE:
        pytest.skip(f"needs {SIZE} GPUs, this machine has {torch.cuda.device_count()}")
    group = RankGroup(SIZE, 120.0, "nccl" if real else "gloo")
    yield group
    group.close()


def on(device: str) -> tuple[Any, Subspace, Any]:
    model, subspace, data = problem()
    return model.to(device), subspace, tuple(x.to(device) for x in data)


def train(how: str, kind: str, device: str) -> dict[str, Any]:
    model, subspace, data = on(device)
    group: Any = None if kind == "alone" else "world"
    over: Any = subspace if kind == "columns" else subspace.to(device)
    if kind != "alone":
        data = part(data, dist.get_rank(), SIZE)
    if kind == "ddp":
        model = group = DistributedDataParallel(model)
    if kind == "columns":  # from the host's memory
        over = shard_if_needed(subspace, "world", device=device, memory=1)
        assert isinstance(over, ShardedSubspace) and over.device.type == device
    if kind == "shards":
        group = fully_shard(model)
        over = LocalSubspace.of(over, model.parameters())
    optimizer = MAKE[how](model.parameters(), over, process_group=group)
    losses = [float(optimizer.step(closure_of(model, data))) for _ in range(6)]
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    flat = torch.cat([p.detach().reshape(-1) for p in whole])
    return {"losses": losses, "theta": optimizer.theta.tolist(), "weights": flat.tolist()}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["plain", "ddp", "columns", "shards"])
@pytest.mark.parametrize("how", ["default", "consecutive", "wolfe", "residual", "psgd", "adam"])
def test_as_one_process_on_the_whole_batch(ranks: RankGroup, how: str, kind: str) -> None:
    alone, found = train(how, "alone", "cpu"), ranks.all(train, how, kind, DEVICE)
    assert all(one == found[0] for one in found)
    for key, value in found[0].items():
        torch.testing.assert_close(value, alone[key], rtol=1e-7, atol=1e-8)


def half(device: str, dtype: torch.dtype) -> None:
    n = 1500
    basis, origin = torch.eye(2, n, device=device), torch.zeros(n, device=device)
    subspace = ShardedSubspace(Subspace(basis, origin), "world")
    gradient = torch.full((n,), 3.0 + dist.get_rank(), device=device, dtype=dtype)
    c = subspace.project_many([[gradient[:7], gradient[7:]]])
    assert torch.equal(c, torch.full((1, 2), 3.5, device=device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_in_sixteen_bits_are_scattered(ranks: RankGroup, dtype: torch.dtype) -> None:
    ranks.all(half, DEVICE, dtype)


def nan_on_one(device: str) -> list[str]:
    model, subspace, data = on(device)
    optimizer = PBFGS(model.parameters(), subspace.to(device), process_group="world")
    fine = closure_of(model, part(data, dist.get_rank(), SIZE))
    optimizer.step(fine)
    optimizer.step(lambda: fine() * (float("nan") if dist.get_rank() == 1 else 1.0))
    optimizer.step(fine)
    return [r.status.name for r in optimizer.history]


def test_nan_on_one_rank_is_seen_by_all(ranks: RankGroup) -> None:
    expected = ["ACCEPTED", "NON_FINITE_LOSS", "ACCEPTED"]
    assert ranks.all(nan_on_one, DEVICE) == [expected] * SIZE


def cpu_weights() -> str:
    model, subspace, _ = problem()
    with pytest.raises(ValueError) as error:
        PBFGS(model.parameters(), subspace, process_group="world")
    return str(error.value)


@pytest.mark.needs_gpu
def test_cpu_weights_are_refused(ranks: RankGroup) -> None:
    for message in ranks.all(cpu_weights):
        assert "expected a group that carries tensors of the device cpu" in message
