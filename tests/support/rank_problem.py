"""A small problem that ranks share out, and the optimizers that they try on it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from dldr_ext import PBFGS, PSGD, InSubspace, Subspace

D = 6


def problem(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Subspace, Any]:
    """The same on every rank: a network, a subspace and 32 samples of which each takes a part."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)
    subspace = Subspace.random(model.named_parameters(), D, dtype=dtype)
    inputs = torch.randn(32, 6, dtype=torch.float64)
    targets = (inputs @ torch.randn(6, 3, dtype=torch.float64)).argmax(1)
    return model, subspace, (inputs.to(dtype), targets)


def part(data: Any, rank: int, size: int) -> Any:
    return tuple(x.chunk(size)[rank] for x in data)


def closure_of(model: nn.Module, data: Any, usual: bool = False) -> Any:
    def closure() -> torch.Tensor:
        loss = cross_entropy(model(data[0]).double(), data[1])
        if usual and torch.is_grad_enabled():
            model.zero_grad()
            loss.backward()
        return loss

    return closure


def masked(params: Any) -> list[dict[str, Any]]:
    """Groups of which only matrices decay: not in the order of the model."""
    params = list(params)
    return [
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
        {"params": [p for p in params if p.ndim > 1], "weight_decay": 1e-2},
    ]


MAKE = {
    "default": lambda p, s, **k: PBFGS(p, s, **k),
    "consecutive": lambda p, s, **k: PBFGS(p, s, curvature="consecutive", damping=None, **k),
    "wolfe": lambda p, s, **k: PBFGS(p, s, line_search_fn="strong_wolfe", max_iter=3, **k),
    "decay": lambda p, s, **k: PBFGS(masked(p), s, **k),
    "no search": lambda p, s, **k: PBFGS(p, s, lr=0.1, line_search_fn=None, **k),
    "residual": lambda p, s, **k: PBFGS(p, s, residual_lr=0.01, **k),
    "maximize": lambda p, s, **k: PBFGS(p, s, lr=0.01, maximize=True, **k),
    "adam": lambda p, s, **k: InSubspace(p, s, torch.optim.Adam, lr=0.05, **k),
    "torch lbfgs": lambda p, s, **k: InSubspace(p, s, torch.optim.LBFGS, max_iter=3, **k),
    "psgd": lambda p, s, **k: PSGD(p, s, lr=0.3, weight_decay=1e-2, **k),
}


def train(how: str, wrap: str = "plain", steps: int = 6) -> dict[str, Any]:
    """Steps on this rank's part, or, with how "alone", on all of it; "turns": on halves in turn."""
    model, subspace, data = problem()
    alone = wrap == "alone"
    if not alone:
        data = part(data, dist.get_rank(), dist.get_world_size())
    ddp = DistributedDataParallel(model) if "ddp" in wrap else model
    group = None if alone else ddp if wrap == "ddp" else dist.group.WORLD
    optimizer = MAKE[how](model.parameters(), subspace, process_group=group)
    batches = [tuple(x[i::2] for x in data) for i in (0, 1)] if "turns" in wrap else [data]
    closures = [closure_of(ddp, batch, usual="usual" in wrap) for batch in batches]
    losses = [float(optimizer.step(closures[i % len(closures)])) for i in range(steps)]
    flat = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    return {
        "losses": losses,
        "theta": optimizer.theta.tolist(),
        "weights": flat.tolist(),
        "status": [r.status for r in optimizer.history],
        "trials": [r.trials for r in optimizer.history],
    }
