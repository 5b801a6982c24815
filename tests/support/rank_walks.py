"""Networks that ranks hold whole or in shards, and one random walk of their weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DeviceMesh, distribute_tensor

STEPS = 6


def network(mode: str = "whole", small: bool = False) -> nn.Module:
    """963 weights, or 19: in the latter most ranks have none of a whole vector."""
    torch.manual_seed(0)
    sizes = (3, 2, 3) if small else (20, 40, 3)
    model = nn.Sequential(nn.Linear(*sizes[:2]), nn.Tanh(), nn.Linear(*sizes[1:]))
    if mode != "whole":
        size = dist.get_world_size()
        shape = (2, size // 2) if mode == "hybrid" else (size,)
        names = ("replicate", "shard")[-len(shape) :]
        mesh = DeviceMesh("cpu", torch.arange(size).view(shape), mesh_dim_names=names)
        fully_shard(model, mesh=mesh)
    return model


def walk(model: nn.Module, first: int = 0, last: int = STEPS) -> Any:
    """The same weights everywhere, however they are cut."""
    plain = network(small=sum(p.numel() for p in model.parameters()) < 100)
    for t in range(last):
        generator = torch.Generator().manual_seed(t)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            with torch.no_grad():
                q += 0.1 * torch.randn(q.shape, generator=generator)
                full = q
                if hasattr(p, "device_mesh"):
                    full = distribute_tensor(q.detach(), p.device_mesh, p.placements).to_local()
                    p = p.to_local()
                p.copy_(full)
        if t >= first:
            yield t
