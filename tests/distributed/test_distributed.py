"""Several ranks step together: as one process on all of the batch, with d numbers on the wire."""

from __future__ import annotations

import logging
import os
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from rank_group import RankGroup
from rank_problem import MAKE, D, closure_of, part, problem, train
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from dldr_ext import PBFGS, PSGD, InSubspace, LocalSubspace, Subspace
from dldr_ext.batch_norm import reestimated
from dldr_ext.collectives.consistency import difference, digest


@pytest.mark.parametrize("how", MAKE)
@pytest.mark.filterwarnings("ignore")
def test_as_one_process_on_the_whole_batch(ranks: RankGroup, how: str) -> None:
    alone = train(how, "alone")
    found = ranks.all(train, how)
    assert all(one == found[0] for one in found)  # to the bit
    assert found[0]["status"] == alone["status"] and found[0]["trials"] == alone["trials"]
    for key in ("losses", "theta", "weights"):
        torch.testing.assert_close(found[0][key], alone[key], rtol=1e-8, atol=1e-9)


def train_ahead(how: str) -> dict[str, Any]:
    """As on GPUs, whose numbers the host reads once a trial."""
    before, PBFGS._devices_ahead = PBFGS._devices_ahead, ("cpu",)
    try:
        return train(how, "plain usual turns")
    finally:
        PBFGS._devices_ahead = before


@pytest.mark.parametrize("how", ["default", "consecutive", "residual"])
def test_steps_that_run_ahead_of_the_host(ranks: RankGroup, how: str) -> None:
    plain, found = ranks.all(train, how, "plain usual turns"), ranks.all(train_ahead, how)
    assert all(one == found[0] for one in found)
    assert found[0]["trials"] == plain[0]["trials"]
    torch.testing.assert_close(found[0]["weights"], plain[0]["weights"], rtol=1e-9, atol=1e-10)


def rejected(group: str) -> list[list[float]]:
    """What FSDP2 computes in a step whose trials are all rejected, and after it."""
    model, subspace, (inputs, _) = problem()
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model, mesh=mesh)
    groups = {"module": model, "world": "world", "mesh": mesh}
    sharded = LocalSubspace.of(subspace, model.parameters())
    options = {"curvature": "consecutive", "max_ls": 2, "process_group": groups[group]}
    optimizer = PBFGS(model.parameters(), sharded, **options)
    seen = []

    def closure() -> torch.Tensor:
        outputs = model(inputs)
        seen.append(outputs[0].tolist())
        return outputs.square().mean() + 100.0 * len(seen)

    optimizer.step(closure)
    with torch.no_grad():
        closure()
    return seen


def test_gathered_weights_are_those_of_the_evaluation(ranks: RankGroup) -> None:
    """Without a backward pass FSDP2 keeps them, after the step too."""
    start, first, second, end = ranks.all(rejected, "module")[0]
    assert start == end and first != start and second not in (start, first)
    for group in ("world", "mesh"):
        assert ranks.all(rejected, group)[0] == [start, first, second, end]


@pytest.mark.parametrize("wrap", ["ddp", "ddp usual", "plain usual", "ddp averaged"])
def test_a_model_in_ddp_gives_the_same(ranks: RankGroup, wrap: str) -> None:
    plain, found = ranks.all(train, "default"), ranks.all(train, "default", wrap)
    assert all(one == found[0] for one in found)
    torch.testing.assert_close(found[0]["weights"], plain[0]["weights"], rtol=1e-9, atol=1e-10)


def reestimated_statistics(how: str) -> tuple[list[float], str]:
    """The statistics of each rank's share of the batches, of which they have different numbers."""
    model = DistributedDataParallel(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 1)).double())
    norm, rank = model.module[0], dist.get_rank()
    batches = [torch.full((4, 3), float(rank + k), dtype=torch.float64) for k in range(rank + 1)]
    try:
        with reestimated(model, [] if how == "one has none" and rank == 1 else batches):
            return [*norm.running_mean.tolist(), *norm.running_var.tolist()], ""
    except ValueError as error:
        assert model.training and not norm.running_mean.any()
        return [], str(error)


def test_batch_norm_statistics_are_the_mean_of_the_ranks(ranks: RankGroup) -> None:
    found, size = ranks.all(reestimated_statistics, "all"), len(ranks.processes)
    mean = sum(1.5 * rank for rank in range(size)) / size
    assert found == [([*[mean] * 3, 0.0, 0.0, 0.0], "")] * size
    errors = [error for _, error in ranks.all(reestimated_statistics, "one has none")]
    assert all("expected at least one batch, got none" in error for error in errors)
    assert all("rank 1 failed" in error for rank, error in enumerate(errors) if rank != 1)


def trained_theta() -> tuple[str, list[float], list[float]]:
    """What parametrize says of a model in DDP, and theta of DDP around the module instead."""
    model, subspace, data = problem()
    try:
        subspace.parametrize(DistributedDataParallel(model))
        error = "accepted"
    except ValueError as refused:
        error = str(refused)
    inputs = data[0].to(torch.float64)
    mine = DistributedDataParallel(subspace.parametrize(model))
    loss = mine(part((inputs,), dist.get_rank(), dist.get_world_size())[0]).square().mean()
    loss.backward()
    alone = subspace.parametrize(model)
    alone(inputs).square().mean().backward()
    return error, mine.module.theta.grad.tolist(), alone.theta.grad.tolist()


def test_a_parametrized_model_goes_into_ddp_not_the_other_way(ranks: RankGroup) -> None:
    for error, theta, whole in ranks.all(trained_theta):
        assert "model: expected the module in DistributedDataParallel" in error
        torch.testing.assert_close(theta, whole, rtol=1e-6, atol=1e-9)


def wire(how: str) -> tuple[list[int], int, int, int]:
    """Numbers in each sum of three steps, their trials, and what DDP sends for one gradient."""
    model, subspace, data = problem()
    data = part(data, dist.get_rank(), dist.get_world_size())
    sent: list[int] = []
    ddp = DistributedDataParallel(model)

    def hook(state, bucket):  # torch reads annotations
        sent.append(bucket.buffer().numel())
        return (
            dist.all_reduce(bucket.buffer(), async_op=True)
            .get_future()
            .then(lambda f: f.value()[0])
        )

    ddp.register_comm_hook(None, hook)
    closure_of(ddp, data)().backward()
    theirs, buckets = sum(sent), len(sent)
    optimizer = MAKE[how](model.parameters(), subspace, process_group=ddp)
    sums: list[int] = []
    before = dist.all_reduce
    dist.all_reduce = lambda tensor, **k: (sums.append(tensor.numel()), before(tensor, **k))[1]
    try:
        for _ in range(3):
            optimizer.step(closure_of(ddp, data))
    finally:
        dist.all_reduce = before
    assert len(sent) == buckets  # nothing by DDP in our steps
    return sums, optimizer.closure_calls - 3, theirs, sum(p.numel() for p in model.parameters())


def test_what_goes_over_the_wire(ranks: RankGroup) -> None:
    for sums, trials, theirs, n in ranks.all(wire, "consecutive"):
        assert theirs == n and sums.count(D + 1) == 3 and sums.count(1) == trials == len(sums) - 3
    for sums, trials, _, _ in ranks.all(wire, "default"):  # the pair's gradient comes along
        assert sums[0] == D + 1 and [m for m in sums if m > 1] == [D + 1, 2 * D + 1, 2 * D + 1]
        # Every step sees the same function: slopes of trials that could be taken are summed too.
        assert 3 + trials + 3 <= len(sums) <= 3 + 2 * trials


def nan_on_one(bad: int) -> list[Any]:
    model, subspace, data = problem()
    rank = dist.get_rank()
    optimizer = PBFGS(model.parameters(), subspace, process_group="world")
    fine = closure_of(model, part(data, rank, dist.get_world_size()))
    steps = [optimizer.step(fine)]
    steps.append(optimizer.step(lambda: fine() * (float("nan") if rank == bad else 1.0)))
    steps.append(optimizer.step(fine))
    return [r.status.name for r in optimizer.history] + optimizer.theta.tolist()


def test_nan_on_one_rank_is_seen_by_all(ranks: RankGroup) -> None:
    found = ranks.all(nan_on_one, 1)
    assert all(one == found[0] for one in found)
    assert found[0][:3] == ["ACCEPTED", "NON_FINITE_LOSS", "ACCEPTED"]


def built(what: str) -> None:
    model, subspace, _ = problem()
    params, options, odd = list(model.parameters()), {}, dist.get_rank() == 1
    if what in ("dim", "basis", "origin"):
        subspace = Subspace(subspace.basis, subspace.origin)
    if odd and what == "dim":
        subspace = Subspace(subspace.basis[:5], subspace.origin)
    if odd and what == "basis":
        subspace = Subspace(subspace.basis.roll(1, 1), subspace.origin)
    if odd and what == "origin":
        subspace = Subspace(subspace.basis, subspace.origin + 1)
    if what in ("order", "same shapes"):
        params = [torch.randn(4, 3 + (what == "order") * i, requires_grad=True) for i in range(3)]
        subspace = Subspace(
            torch.eye(2, sum(p.numel() for p in params)),
            torch.zeros(1).expand(sum(p.numel() for p in params)),
        )
        params = params[::-1] if odd else params
    if odd and what == "count":
        params = params[:-1]
    if odd and what == "option":
        options["max_ls"] = 7
    if odd and what == "bad option":
        options["c1"] = -1.0
    if odd and what == "theta0":
        options["theta0"] = torch.ones(D)
    before = [p.detach().clone() for p in params]
    try:
        PBFGS(params, subspace, process_group=dist.group.WORLD, **options)
    finally:
        assert all(torch.equal(a, b) for a, b in zip(before, params, strict=True))


@pytest.mark.parametrize(
    "what, message",
    [
        ("dim", "dim: expected 6, as on rank 0, got 5 on rank 1"),
        ("basis", "basis: expected the same bits"),
        ("origin", "origin: expected the same bits"),
        ("order", r"params\[0\]: expected \(4, 3\) float32, as on rank 0, got \(4, 5\)"),
        ("same shapes", r"same order on every rank, got rank 0's params\[2\] as params\[0\] on r"),
        ("count", "rank 1 failed: ValueError: params: expected 4 tensors"),
        ("option", "max_ls = 20, as on rank 0, got max_ls = 7 on rank 1"),
        ("bad option", "rank 1 failed: ValueError: PBFGS: c1: expected a number in"),
        ("theta0", "theta0: expected None, as on rank 0, got a tensor on rank 1"),
    ],
)
def test_ranks_that_differ_are_refused_on_all(ranks: RankGroup, what: str, message: str) -> None:
    found = ranks.run(built, what)
    assert all(isinstance(error, ValueError) for error in found)
    with pytest.raises(ValueError, match=message):
        raise found[0]


def other_optimizers() -> None:
    model, subspace, _ = problem()
    make = torch.optim.Adam if dist.get_rank() != 1 else torch.optim.AdamW
    options = {"lr": 0.1, "weight_decay": 0.0}
    InSubspace(model.parameters(), subspace, make, process_group="world", **options)


def test_other_optimizers_of_theta_are_refused(ranks: RankGroup) -> None:
    found = ranks.run(other_optimizers)
    message = "optimizer: expected InSubspace of Adam, as on rank 0, got InSubspace of AdamW on"
    assert all(isinstance(error, ValueError) and message in str(error) for error in found)


def groups() -> list[str]:
    model, subspace, _ = problem()
    one = dist.new_group([0])
    found = []
    for group in (3, "wrold", model, *([] if dist.get_rank() == 0 else [one])):
        with pytest.raises((TypeError, ValueError)) as error:
            PBFGS(model.parameters(), subspace, process_group=group)
        found.append(str(error.value))
    return found


def test_other_things_than_a_group(ranks: RankGroup) -> None:
    found = ranks.all(groups)[1]
    assert "'world'" in found[0] and "got int" in found[0] and "got 'wrold'" in found[1]
    assert "plain Sequential" in found[2] and "without rank 1" in found[3]


def test_without_an_initialised_group(caplog: pytest.LogCaptureFixture, monkeypatch: Any) -> None:
    model, subspace, _ = problem()
    with pytest.raises(ValueError, match="expected an initialised group, got 'world' before"):
        PBFGS(model.parameters(), subspace, process_group="world")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with caplog.at_level(logging.WARNING, "dldr_ext"):
        PSGD(model.parameters(), subspace)
    assert "steps alone, though 2 run together" in caplog.text


def resumed() -> list[Any]:
    """Saved by rank 0 alone, loaded by all; then one loads something else."""
    model, subspace, data = problem()
    closure = closure_of(model, part(data, dist.get_rank(), dist.get_world_size()))
    optimizer = PBFGS(model.parameters(), subspace, process_group="world")
    for _ in range(3):
        optimizer.step(closure)
    state = [optimizer.state_dict()]
    for _ in range(3):
        optimizer.step(closure)
    dist.broadcast_object_list(state)
    again = PBFGS(model.parameters(), subspace, process_group="world")
    again.load_state_dict(state[0])
    for _ in range(3):
        again.step(closure)
    assert torch.equal(again.theta, optimizer.theta)
    again.param_groups[0]["lr"] = 1.0 + dist.get_rank()
    with pytest.raises(ValueError, match=r"lr = 1.0, as on rank 0, got lr = 2.0 on rank 1"):
        again.load_state_dict(again.state_dict() if dist.get_rank() else optimizer.state_dict())
    return [state[0], optimizer.theta]


def test_a_state_saved_by_ranks_is_loaded_by_one(ranks: RankGroup) -> None:
    state, theta = ranks.all(resumed)[0]
    model, subspace, data = problem()
    optimizer = PBFGS(model.parameters(), subspace)
    optimizer.load_state_dict(state)
    for _ in range(3):
        optimizer.step(closure_of(model, data))
    torch.testing.assert_close(optimizer.theta, theta, rtol=1e-8, atol=1e-9)


def fails(how: str) -> str:
    model, subspace, data = problem()
    optimizer = PBFGS(model.parameters(), subspace, process_group="world")
    closure = closure_of(model, data)
    optimizer.step(closure)
    if dist.get_rank() == 2:
        if how == "dies":
            os._exit(1)
        time.sleep(3.5)
        return ""
    with pytest.raises(RuntimeError) as error:
        optimizer.step(closure)
    return str(error.value)


@pytest.mark.parametrize("how", ["dies", "hangs"])
def test_a_rank_that_is_gone_is_named(how: str) -> None:
    group = RankGroup(3, seconds=1.0)
    found = group.run(fails, how)
    group.close()
    for rank in (0, 1):
        assert f"failed on rank {rank}: no sign of rank 2, which died, hangs" in found[rank]
        assert "PBFGS: the sum of coordinates and loss over 3 ranks" in found[rank]


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=6), st.data())
def test_parameters_in_another_order_are_told_from_other_weights(values: Any, data: Any) -> None:
    other = data.draw(st.permutations(values))
    found = difference([{"samples": values}, {"samples": list(other)}])
    assert (found is None) == (list(other) == values)
    assert difference([{"samples": values}, {"samples": [*values[1:], "e"]}]) is None


@given(st.integers(1, 300), st.data())
def test_a_digest_sees_every_element(count: int, data: Any) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8]))
    values = torch.randn(2, count).mul(50).to(dtype)
    other = values.clone()
    other[data.draw(st.integers(0, 1)), data.draw(st.integers(0, count - 1))] += 8
    assert digest(values) == digest(values.clone()) != digest(other)
