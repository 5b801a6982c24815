"""Names of parameters: another order than the subspace's is refused, by the first that differs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_problems import bits
from torch import distributed as dist
from torch import nn

from dldr_ext import (
    PBFGS,
    PSGD,
    GroupedSubspace,
    InSubspace,
    LocalSubspace,
    ShardedSubspace,
    Subspace,
    Trajectory,
    weight_averaging_subspace,
)

MAKERS: dict[str, Any] = {
    "PBFGS": PBFGS,
    "PSGD": PSGD,
    "InSubspace": lambda params, subspace, **options: InSubspace(
        params, subspace, torch.optim.Adam, **options
    ),
}


def square_layers() -> nn.Module:
    """All of one shape: only names tell them apart."""
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(4, 4, bias=False) for _ in range(3)))


def recorded(model: nn.Module, **options: Any) -> Any:
    trajectory = Trajectory(model.named_parameters())
    for _ in range(4):
        trajectory.record()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(torch.randn_like(p))
    return trajectory.subspace(dim=2, **options)


KINDS: dict[str, Callable[[nn.Module], Any]] = {
    "dense": lambda m: Subspace.random(m.named_parameters(), 3),
    "recorded": recorded,
    "implicit": lambda m: recorded(m, materialize=False),
    "grouped": lambda m: GroupedSubspace.random(m.named_parameters(), 2, [1, 2]),
    "int8": lambda m: Subspace.random(m.named_parameters(), 3).quantize("int8"),
    "averaging": lambda m: weight_averaging_subspace(
        [{k: torch.randn_like(v) for k, v in m.state_dict().items()} for _ in range(3)], m
    ),
}


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("kind", KINDS)
def test_optimizers_refuse_another_order(kind: str, make: Any) -> None:
    model = square_layers()
    subspace = KINDS[kind](model)
    zero, one, two = model.named_parameters()
    before = bits(model.parameters())
    expected = r"params\[1\]: expected the name 1.weight, as in the subspace, got 2.weight"
    for given in ([zero, two, one], [{"params": [zero]}, {"params": [two, one]}]):
        with pytest.raises(ValueError, match=expected):
            make(given, subspace)
    assert bits(model.parameters()) == before
    make([zero, one, two], subspace)
    make([p for _, p in (zero, one, two)], subspace)  # without names there is nothing to compare


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize("named", [True, False])
def test_another_order_is_refused_in_the_next_subspace(make: Any, named: bool) -> None:
    """Parameters without names have those of the first subspace that has some."""
    model = square_layers()
    first, others = KINDS["dense"](model), list(model.named_parameters())[::-1]
    optimizer = make(model.named_parameters() if named else model.parameters(), first)
    before = bits(model.parameters())
    with pytest.raises(ValueError, match=r"params\[0\]: expected the name 2.weight.*got 0.weight"):
        optimizer.change_subspace(Subspace.random(others, 2))
    assert optimizer.subspace is first and bits(model.parameters()) == before
    optimizer.change_subspace(Subspace.random(model.named_parameters(), 2))
    optimizer.change_subspace(Subspace.random(list(model.parameters()), 2))


def test_names_that_differ_by_wrappers_or_a_module_around_are_the_same() -> None:
    model = square_layers()
    subspace = KINDS["dense"](model)
    for prefix in ("module.", "_orig_mod.", "model.", "module._orig_mod."):
        named = [(prefix + name, p) for name, p in model.named_parameters()]
        for make in MAKERS.values():
            make(named, subspace)
        with pytest.raises(ValueError, match=r"expected the name 0.weight"):
            PSGD(named[::-1], subspace)


def test_a_sharded_subspace_knows_the_order_too() -> None:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = square_layers()
        subspace = ShardedSubspace(KINDS["dense"](model), "world")
        with pytest.raises(ValueError, match="expected the name 0"):
            PSGD(list(model.named_parameters())[::-1], subspace, process_group="world")
    finally:
        dist.destroy_process_group()


def test_shards_know_the_order_too(tmp_path: Path) -> None:
    tensor = pytest.importorskip("torch.distributed.tensor")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        model = square_layers()
        whole = Subspace.random(model.named_parameters(), 3)
        whole.save(tmp_path / "subspace.safetensors")
        named = [
            (name, nn.Parameter(tensor.distribute_tensor(p.detach(), mesh, [tensor.Shard(0)])))
            for name, p in model.named_parameters()
        ]
        local = LocalSubspace.of(whole, named)
        theta = torch.zeros(3)
        local.reconstruct_(named, theta)
        PSGD(named, local, process_group="world")
        for call in (
            lambda params: LocalSubspace.of(whole, params),
            lambda params: LocalSubspace.load(tmp_path / "subspace.safetensors", params),
            local.coordinates,
            lambda params: local.reconstruct_(params, theta),
            lambda params: PSGD(params, local, process_group="world"),
        ):
            with pytest.raises(ValueError, match=r"params\[0\]: expected the name 0"):
                call(named[::-1])
    finally:
        dist.destroy_process_group()
