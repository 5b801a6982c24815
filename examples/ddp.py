"""Data-parallel DLDR and P-BFGS that goes on after a process died.

    torchrun --standalone --nproc-per-node 2 --max-restarts 1 examples/ddp.py

Each rank has a part of the data. One gradient takes a sum of d + 1 numbers, one trial of one. With
--die-at a rank dies after that step, once; torchrun starts all again, from the last checkpoint.
"""

import argparse
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from dldr_ext import PBFGS, Subspace, Trajectory


def data(rank, size):
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(1024, 8, generator=generator)
    targets = torch.sin(inputs @ torch.randn(8, 1, generator=generator))
    return inputs[rank::size], targets[rank::size]


def recorded_subspace(model, inputs, targets):
    """A short stretch of ordinary training; all ranks see the same weights."""
    trajectory = Trajectory(model.parameters(), capacity=31)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(30):
        trajectory.record()
        sgd.zero_grad()
        mse_loss(model(inputs), targets).backward()
        sgd.step()
    return trajectory.subspace(dim=10)


def main(folder, steps=20, die_at=None):
    rank, size = dist.get_rank(), dist.get_world_size()
    inputs, targets = data(rank, size)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1)))
    basis, checkpoint = Path(folder, "subspace.safetensors"), Path(folder, "checkpoint.pt")
    if not basis.exists():
        subspace = recorded_subspace(model, inputs, targets)
        if rank == 0:
            subspace.save(basis)
        dist.barrier()
    optimizer = PBFGS(model.parameters(), Subspace.load(basis), process_group=model)
    if checkpoint.exists():
        optimizer.load_state_dict(torch.load(checkpoint))
    for step in range(optimizer.state_dict()["subspace"]["steps"], steps):
        loss = optimizer.step(lambda: mse_loss(model(inputs), targets))
        state = optimizer.state_dict()  # on every rank
        if rank == 0:
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").rename(checkpoint)
            print(f"step {step + 1}: {loss:.6f}", flush=True)
        if step + 1 == die_at and rank == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os._exit(1)
    return optimizer.theta


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--folder", default=Path(tempfile.gettempdir(), "dldr-ddp"), type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--die-at", type=int)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    # A restart must not read the addresses of the processes before it.
    store, rank, size = next(dist.rendezvous("env://"))
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    store = dist.PrefixStore(f"attempt {attempt}", store)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size)
    main(options.folder, options.steps, options.die_at)
    dist.destroy_process_group()
