"""Optimizers and subspaces saved by some ranks, or by one process, and loaded by others."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from rank_problem import closure_of
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DeviceMesh

from dldr_ext import PBFGS, PSGD, LocalSubspace, ShardedSubspace, Subspace
from dldr_ext.collectives.dtensors import local_columns
from dldr_ext.collectives.partition import cut
from dldr_ext.distributed.checkpoint import stateful

D = 5

MAKE = {
    "pbfgs": lambda p, s, **k: PBFGS(p, s, **k),
    "residual": lambda p, s, **k: PBFGS(p, s, residual_lr=1e-2, **k),
    "psgd": lambda p, s, **k: PSGD(p, s, lr=0.3, **k),
}


def network(mode: str) -> tuple[nn.Module, Any, Any, Any]:
    """A model of 963 weights, its data (this rank's), the group, and the whole data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 3)).double()
    inputs = torch.randn(32, 20, dtype=torch.float64)
    data = inputs, (inputs @ torch.randn(20, 3, dtype=torch.float64)).argmax(1)
    if mode == "alone":
        return model, data, None, data
    rank, size = dist.get_rank(), dist.get_world_size()
    part = tuple(x.chunk(size)[rank] for x in data)
    if mode not in ("sharded", "hybrid"):
        return model, part, "world", data
    shape = (2, size // 2) if mode == "hybrid" else (size,)
    names = ("replicate", "shard")[-len(shape) :]
    mesh = DeviceMesh("cpu", torch.arange(size).view(shape), mesh_dim_names=names)
    fully_shard(model, mesh=mesh)
    return model, part, model, data


def subspace_of(mode: str, model: nn.Module, path: Path) -> Any:
    """Loaded from a file or a folder, as the mode wants it."""
    if mode in ("sharded", "hybrid"):
        return LocalSubspace.load(path, model.named_parameters())
    if mode == "columns":
        return ShardedSubspace.load(path, "world")
    return Subspace.load(path)


def steps(mode: str, how: str, path: Path, *, saved: Path | None = None, count: int = 3) -> Any:
    """Some steps from the beginning, or from a checkpoint; then saves another if asked to."""
    model, data, group, _ = network(mode)
    subspace = subspace_of(mode, model, path)
    optimizer = MAKE[how](model.parameters(), subspace, process_group=group)
    if path.is_dir():
        dcp.load({"optimizer": stateful(optimizer)}, checkpoint_id=path)
    before = optimizer.theta.tolist()
    closure = closure_of(model, data)
    for _ in range(count):
        optimizer.step(closure)
    if saved is not None:
        dcp.save(
            {"optimizer": stateful(optimizer), "subspace": stateful(subspace)}, checkpoint_id=saved
        )
    if mode == "sharded":
        model.reshard()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    return {
        "before": before,
        "theta": optimizer.theta.tolist(),
        "steps": optimizer.state_dict()["subspace"]["steps"],
        "weights": torch.cat([p.detach().reshape(-1) for p in whole]).tolist(),
    }


def start(path: Path, dtype: torch.dtype = torch.float64) -> Subspace:
    model = network("alone")[0]
    subspace = Subspace.random(model.named_parameters(), D, dtype=dtype)
    subspace = Subspace(
        subspace.basis, subspace.origin, shapes=subspace.shapes, names=subspace.names,
        singular_values=torch.arange(D, 0, -1), mean=torch.arange(D) / 3,
        explained_variance_ratio=torch.full((D,), 1 / 7),
        choice={"snapshots": 9, "rank": 8, "asked": "dim = 5", "why": "as asked for", "walk": None},
    )  # fmt: skip
    subspace.save(path)
    return subspace


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("mode", ["plain", "columns", "sharded"])
@pytest.mark.parametrize("how", MAKE)
def test_saved_on_four_ranks_and_resumed_on_two_and_one(
    rank_groups: Any, mode: str, how: str, tmp_path: Path
) -> None:
    file, four, two, back = (tmp_path / name for name in ("s.safetensors", "4", "2", "1"))
    start(file)
    straight = steps("alone", how, file, count=9)
    found = rank_groups(4).all(save, mode, how, file, four)
    then = rank_groups(2).all(save, mode, how, four, two)
    assert then[0]["before"] == found[0]["theta"]  # to the bit
    assert Subspace.load(two).choice == Subspace.load(file).choice is not None
    one = steps("alone", how, two, saved=back)
    assert one["before"] == then[0]["theta"] and one["steps"] == 9
    for key in ("theta", "weights"):
        torch.testing.assert_close(one[key], straight[key], rtol=1e-7, atol=1e-8)
    again = rank_groups(4).all(save, mode, how, back, None)
    assert all(r["before"] == one["theta"] for r in again)
    torch.testing.assert_close(again[0]["weights"], again[3]["weights"], rtol=0, atol=0)


def save(mode: str, how: str, path: Path, saved: Path | None) -> Any:
    return steps(mode, how, path, saved=saved)


def held(mode: str, path: Path) -> dict[str, Any]:
    """What a rank reads: its columns of the basis, and how many numbers in all."""
    model, _, _, _ = network(mode)
    with counted() as read:
        subspace = subspace_of(mode, model, path)
    columns = torch.arange(0)
    if subspace.local is not None and mode == "columns":
        columns = torch.arange(*cut(subspace.numel, dist.get_rank(), dist.get_world_size()))
    elif subspace.local is not None:
        columns = local_columns(model.parameters())
    return {
        "basis": None if subspace.local is None else subspace.local.basis,
        "scale": None if subspace.local is None else subspace.local.scale,
        "origin": subspace.origin,
        "columns": columns,
        "read": read[0],
        "values": subspace.singular_values,
        "mean": subspace.mean,
        "ratio": subspace.explained_variance_ratio,
        "names": subspace.names,
        "report": subspace.report(),
        "dim": subspace.dim,
    }


@contextmanager
def counted() -> Any:
    from dldr_ext.distributed import partitioned

    count, before = [0], partitioned.read_columns

    def read(*args: Any) -> torch.Tensor:
        found = before(*args)
        count[0] += found.numel()
        return found

    from dldr_ext.distributed import partitioned

    partitioned.read_columns = read
    try:
        yield count
    finally:
        partitioned.read_columns = before


@pytest.mark.parametrize("mode", ["columns", "sharded", "hybrid"])
def test_a_file_of_one_process_is_read_by_columns(ranks: Any, mode: str, tmp_path: Path) -> None:
    whole = start(tmp_path / "s.safetensors", torch.float32)
    found = ranks.all(held, mode, tmp_path / "s.safetensors")
    for one in found:
        if one["basis"] is not None:
            assert torch.equal(one["basis"], whole.basis[:, one["columns"]])
        expected = whole.origin if mode == "columns" else whole.origin[one["columns"]]
        assert torch.equal(one["origin"], expected)
        assert torch.equal(one["values"], whole.singular_values)
        assert torch.equal(one["mean"], whole.mean)
        assert torch.equal(one["ratio"], whole.explained_variance_ratio)
        assert one["dim"] == D and one["names"] == whole.names and one["report"] == whole.report()
    n = whole.numel * (2 if mode == "hybrid" else 1)
    assert sum(one["read"] for one in found) == (D + 1) * n


def held_of_quantized(file: Path, folder: Path) -> Any:
    subspace = ShardedSubspace.load(file, "world")
    dcp.save({"subspace": stateful(subspace)}, checkpoint_id=folder)
    with pytest.raises(ValueError, match="not quantised, got"):
        LocalSubspace.load(file, network("sharded")[0].parameters())
    return held("columns", file)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_quantised_basis_keeps_its_scales(ranks: Any, tmp_path: Path) -> None:
    whole = start(tmp_path / "s.safetensors", torch.float32).quantize("int8")
    whole.save(tmp_path / "q.safetensors")
    for one in ranks.all(held_of_quantized, tmp_path / "q.safetensors", tmp_path / "dcp"):
        if one["basis"] is not None:
            assert torch.equal(one["basis"], whole.basis[:, one["columns"]])
    again = Subspace.load(tmp_path / "dcp")
    assert torch.equal(again.basis, whole.basis) and torch.equal(again.scale, whole.scale)
    assert torch.equal(again.origin, whole.origin) and again.names == whole.names
    assert again.report() == whole.report()


def saved_with_an_empty_rank(folder: Path) -> list[Any]:
    """32 weights on two ranks: the second has no columns."""
    torch.manual_seed(0)
    whole = Subspace.random([torch.zeros(32)], 3, dtype=torch.bfloat16)
    subspace = ShardedSubspace(whole, "world")
    dcp.save({"subspace": stateful(subspace)}, checkpoint_id=folder)
    again = ShardedSubspace.load(folder, "world")
    return [one.report() == whole.report() for one in (subspace, again)] + [again.local is None]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_rank_without_columns(rank_groups: Any, tmp_path: Path) -> None:
    found = rank_groups(2).all(saved_with_an_empty_rank, tmp_path)
    assert found == [[True, True, False], [True, True, True]]
    torch.manual_seed(0)
    whole = Subspace.random([torch.zeros(32)], 3, dtype=torch.bfloat16)
    assert torch.equal(Subspace.load(tmp_path).basis, whole.basis)


def refused(mode: str, path: Path) -> str:
    model, _, _, _ = network(mode)
    with pytest.raises(ValueError) as error:
        subspace_of(mode, model, path)
    return str(error.value)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_what_is_no_subspace_is_refused_on_all_ranks(rank_groups: Any, tmp_path: Path) -> None:
    file = tmp_path / "s.safetensors"
    start(file)
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    texts = rank_groups(2).all(refused, "columns", file)
    assert all("corrupt" in text for text in texts) and "rank 0 failed" in texts[1]
    small = Subspace.random([torch.zeros(7)], 2)
    small.save(file)
    for text in rank_groups(2).all(refused, "sharded", file):
        assert "params: expected 7 elements in all, as in" in text and "got 963" in text
    with pytest.raises(ValueError, match="path: expected a file, or a folder of"):
        Subspace.load(tmp_path)
    with pytest.raises(TypeError, match="expected an optimizer or a subspace of one basis, got"):
        stateful(nn.Linear(2, 2))
    with pytest.raises(
        ValueError, match=r"expected subspace\.basis in the checkpoint, found \['other'\]"
    ):
        bad = tmp_path / "bad"
        dcp.save({"other": torch.zeros(2)}, checkpoint_id=bad)
        Subspace.load(bad)
