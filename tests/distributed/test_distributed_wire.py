"""Bytes on the wire against those of data parallelism, and against what `dldr plan` says."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from rank_group import RankGroup
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from wire import Wire, system, system_counts

from dldr_ext import PBFGS, PSGD, ShardedSubspace, Subspace, shard_if_needed
from dldr_ext.collectives.partition import cut
from dldr_ext.performance.roofline import resnet18_sizes
from dldr_ext.plan.costs import Job, plan
from dldr_ext.plan.devices import TABLE

EVERY = os.environ.get("DLDR_EVERY_CASE") == "1"
# (n, d); ResNet-18 for CIFAR has 11,173,962 weights in 62 tensors.
SMALL, RESNET18 = (262_144, 8), (11_173_962, 40)
SIZE = RESNET18 if EVERY else SMALL


@pytest.fixture(scope="module")
def two():
    group = RankGroup(2)
    yield group
    group.close()


class Quadratic(nn.Module):
    """62 tensors in the proportions of ResNet-18, each with a curvature of its own."""

    def __init__(self, numel: int, dtype: torch.dtype) -> None:
        super().__init__()
        sizes = resnet18_sizes(numel)
        self.weights = nn.ParameterList(torch.randn(size).to(dtype) for size in sizes)
        self.curvature = torch.logspace(-1, 1, len(sizes)).tolist()

    def forward(self, target: float) -> torch.Tensor:
        pairs = zip(self.curvature, self.weights, strict=True)
        return sum(h * (w.double() - target).square().sum() for h, w in pairs)  # type: ignore[return-value]


def directions(numel: int, dim: int) -> torch.Tensor:
    """Rows that share no element: orthonormal."""
    basis = torch.zeros(dim, numel, dtype=torch.bfloat16)
    basis.view(-1)[torch.arange(numel) + numel * (torch.arange(numel) % dim)] = (
        torch.randn(numel).sign().mul((dim / numel) ** 0.5).bfloat16()
    )
    return basis


# A step that reaches the minimum leaves less to gain than the rounding of bfloat16 weights.
SHORT: dict[str, Any] = {"lr": 0.1, "max_ls": 1}
MAKE: dict[str, Any] = {
    "psgd": lambda p, s, g: PSGD(p, s, lr=0.01, process_group=g),
    "psgd decay": lambda p, s, g: PSGD(p, s, lr=0.01, weight_decay=0.01, process_group=g),
    "consecutive": lambda p, s, g: PBFGS(p, s, curvature="consecutive", process_group=g, **SHORT),
    "default": lambda p, s, g: PBFGS(p, s, process_group=g, lr=0.01, max_ls=1),
}


def three_steps(how: str, columns: bool, dtype: torch.dtype, size: tuple[int, int]) -> Any:
    """Bytes of DDP and of the published way for a gradient, and of three of our steps."""
    n, d = size
    model = Quadratic(n, dtype)
    ddp, target = DistributedDataParallel(model), 1.0 + dist.get_rank()
    sent: list[int] = []

    def hook(state, bucket):  # torch reads annotations
        sent.append(bucket.buffer().nbytes)
        work = dist.distributed_c10d._get_default_group().allreduce([bucket.buffer()])
        return work.get_future().then(lambda f: f.value()[0])

    ddp.register_comm_hook(None, hook)
    before = system() if system_counts() else 0
    ddp(target).backward()
    middle = system() if system_counts() else 0
    dist.all_reduce(torch.zeros(n, dtype=dtype))  # the published way sums P P^T g too
    theirs = {"ddp": sum(sent), "ddp system": middle - before}
    theirs["published system"] = (system() if system_counts() else 0) - before
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    subspace: Any = Subspace(directions(n, d), flat, singular_values=torch.ones(d))
    if columns:
        subspace = ShardedSubspace(subspace, "world")
    optimizer = MAKE[how](model.parameters(), subspace, ddp)
    optimizer.step(lambda: ddp(target))  # a first one: later ones bring the last one's pair
    before, calls = system() if system_counts() else 0, optimizer.closure_calls
    with Wire() as wire:
        for i in range(3):
            optimizer.step(lambda i=i: ddp(target + i + 1))
    after = system() if system_counts() else 0
    assert {r.status.name for r in optimizer.history} == {"ACCEPTED"}
    ours = {"ring": wire.bytes, "system": after - before, "calls": wire.calls}
    return theirs, ours, optimizer.closure_calls - calls - 3


def share() -> float:
    return 0.5  # (ranks - 1) / ranks of two


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_cut_basis_moves_half_of_what_the_published_way_moves(two: RankGroup, dtype: Any) -> None:
    n, _ = SMALL
    for how in ("consecutive", "psgd", "psgd decay"):
        for theirs, ours, trials in two.all(three_steps, how, True, dtype, SMALL):
            # A gradient scattered in its dtype, a direction (or the weights) gathered as float32.
            moved = [c for c in ours["calls"] if c[1] > 100]
            assert moved == 3 * [("all_to_all_single", n), ("all_gather", n)]
            wide = 3 * share() * n * (dtype.itemsize + 4)
            assert 0 <= ours["ring"] - wide <= 2 * share() * 8 * (3 * 20 + trials)
            both = 3 * 2 * 2 * share() * theirs["ddp"]
            assert ours["ring"] <= (0.5 if dtype == torch.float32 else 0.75) * both + 1000
            if system_counts():
                assert theirs["ddp system"] == pytest.approx(2 * share() * theirs["ddp"], rel=0.02)
                assert ours["system"] == pytest.approx(ours["ring"], rel=0.02)


def test_the_second_gradient_is_scattered_too(two: RankGroup) -> None:
    n, _ = SMALL
    for _, ours, _ in two.all(three_steps, "default", True, torch.float32, SMALL):
        moved = [c for c in ours["calls"] if c[1] > 100]
        assert moved == 3 * [*2 * [("all_to_all_single", n)], ("all_gather", n)]


@pytest.mark.parametrize("how", ["psgd", "consecutive", "default"])
def test_a_whole_basis_sends_numbers_by_the_dozen(two: RankGroup, how: str) -> None:
    """100,000 times fewer than DDP for as many gradients of ResNet-18's size (DLDR_EVERY_CASE)."""
    n, d = SIZE
    for theirs, ours, trials in two.all(three_steps, how, False, torch.float32, SIZE):
        gradients = 6 if how == "default" else 3
        lists = gradients * d + 3
        trials = 0 if how == "psgd" else trials
        assert ours["ring"] == 2 * share() * 8 * (lists + trials)
        assert theirs["ddp"] == 4 * n
        fewer = gradients * theirs["ddp"] / ours["ring"]
        assert fewer > (100_000 if EVERY else 5_000)
        if system_counts():  # headers of short messages included
            assert ours["system"] < theirs["ddp system"] / 100


def planned(columns: bool, dtype: str) -> dict[str, float]:
    n, d = SMALL
    job = Job(n, d, 20, param_dtype=dtype, ranks=2, shard="basis" if columns else "none")
    return {m.name: m.bytes for m in plan(job, TABLE["h100"]).messages}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plan_says_what_is_counted(two: RankGroup, dtype: torch.dtype) -> None:
    """To the byte, by ring algorithms, whose factors the system's own count confirms above."""
    said = planned(False, str(dtype).split(".")[1])
    sums = said["a gradient's coordinates and loss"]
    for theirs, ours, trials in two.all(three_steps, "consecutive", False, dtype, SMALL):
        assert said["DDP: the gradient"] == 2 * share() * theirs["ddp"]
        assert ours["ring"] == 3 * sums + trials * said["a trial's loss"]
    for _, ours, trials in two.all(three_steps, "default", False, dtype, SMALL):
        more = (trials - 3) * said["a trial's loss"]
        assert ours["ring"] == 3 * said["a P-BFGS step"] + more
    for _, ours, trials in two.all(three_steps, "consecutive", True, dtype, SMALL):
        cut_up = said["basis sharded: a gradient scattered"] + said["basis sharded: u gathered"]
        assert ours["ring"] == 3 * (sums + cut_up) + trials * said["a trial's loss"]


def chosen(limits: list[float | None], cut_up: bool) -> str:
    """Both kinds give the same steps; the optimizer takes whichever it gets."""
    torch.manual_seed(0)
    model, rank = Quadratic(3000, torch.float32), dist.get_rank()
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    subspace = Subspace(directions(3000, 4), flat)
    found = shard_if_needed(subspace, "world", memory=limits[rank % len(limits)])
    assert (found is subspace) == (not cut_up) == isinstance(found, Subspace)
    optimizer = PBFGS(model.parameters(), found, process_group="world")
    for _ in range(3):
        optimizer.step(lambda: model(1.0))
    return str(optimizer.theta.tolist())


def test_whole_where_it_fits_on_every_rank(ranks: RankGroup) -> None:
    need = 4 * 3000 * 2 + 5 * 4 * 3000  # the basis, and five flat vectors
    results = set()
    for limits, cut_up in (([None], False), ([need], False), ([need - 1], True),
                           ([1e12, need - 1], True)):  # fmt: skip
        results.update(ranks.all(chosen, limits, cut_up))
    assert len(results) == 2  # the sums over columns have another order
    theta = [torch.tensor(eval(r)) for r in sorted(results)]
    torch.testing.assert_close(*theta, rtol=1e-4, atol=1e-4)


def crowded(free: int) -> str:
    """What is free on a device is shared by the ranks on it."""
    from dldr_ext.distributed import sharded

    before, sharded.free_memory = sharded.free_memory, lambda device: free
    try:
        subspace = Subspace(directions(3000, 4), torch.zeros(3000))
        return type(shard_if_needed(subspace, "world")).__name__
    finally:
        sharded.free_memory = before


def test_ranks_on_one_device_share_its_memory(ranks: RankGroup) -> None:
    need = (4 * 3000 * 2 + 5 * 4 * 3000) * len(ranks.processes)
    assert set(ranks.all(crowded, need)) == {"Subspace"}
    assert set(ranks.all(crowded, need - 1)) == {"ShardedSubspace"}


def refused(what: str) -> str:
    odd = dist.get_rank() == 1
    subspace: Any = Subspace(directions(3000, 4 - (what == "dim" and odd)), torch.zeros(3000))
    memory: Any = "much" if what == "memory" and odd else 1e9
    with pytest.raises((TypeError, ValueError)) as error:
        shard_if_needed(3 if what == "type" and odd else subspace, "world", memory=memory)
    return str(error.value)


def test_what_cannot_be_decided(two: RankGroup) -> None:
    said = two.all(refused, "dim")
    assert said[0] == said[1]
    assert "shard_if_needed: process_group: dim: expected 4, as on rank 0, got 3 on" in said[0]
    said = two.all(refused, "memory")
    assert "rank 1 failed: ValueError: shard_if_needed: memory: expected a number" in said[0]
    assert said[1].endswith("memory: expected a number of bytes or None, got 'much'")
    assert (
        "rank 1 failed: TypeError: shard_if_needed: subspace: expected a Subspace"
        in (two.all(refused, "type")[0])
    )


def on_a_group_of_gpus() -> list[str]:
    """A group whose backend carries CUDA tensors alone, as NCCL's does, and weights on the CPU."""
    group = dist.new_group(backend="cuda:gloo")
    weights = torch.randn(10, requires_grad=True)
    subspace = Subspace(directions(10, 2), torch.zeros(10))
    said = []
    for build in (
        lambda: PBFGS([weights], subspace, process_group=group),
        lambda: PSGD([weights], subspace, process_group=group),
        lambda: ShardedSubspace(subspace, group),
        lambda: shard_if_needed(subspace, group),
    ):
        with pytest.raises(ValueError) as error:
            build()
        said.append(str(error.value))
    assert weights.norm() > 0  # nothing has moved
    return said


def test_cpu_weights_on_a_group_of_gpus(two: RankGroup) -> None:
    for said in two.all(on_a_group_of_gpus):
        for owner, message in zip(
            ("PBFGS", "PSGD", "ShardedSubspace", "shard_if_needed"), said, strict=True
        ):
            assert message == (
                f"{owner}: process_group: expected a group that carries tensors of the device "
                "cpu, got one of backend cuda:gloo"
            )


def scattered_mean(numel: int, dtype: torch.dtype) -> None:
    """Of gradients in 16 bits, whose sum would be infinite or lose digits in 16 bits."""
    rank, size = dist.get_rank(), dist.get_world_size()
    ours = ShardedSubspace(Subspace(torch.eye(2, numel), torch.zeros(numel)), "world")
    gradient = torch.full((numel,), 39_936.0 + 256 * rank).to(dtype)
    whole = sum((39_936.0 + 256 * r) for r in range(size)) / size
    begin, end = cut(numel, rank, size)
    assert torch.equal(
        ours._scattered_mean([gradient[:5], gradient[5:]]), torch.full((end - begin,), whole)
    )


def test_sixteen_bits_are_summed_in_thirty_two(ranks: RankGroup) -> None:
    for numel in (100, 256, 1500):
        ranks.all(scattered_mean, numel, torch.bfloat16)
        ranks.all(scattered_mean, numel, torch.float16)
