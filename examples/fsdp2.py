"""DLDR and P-BFGS with sharded weights: no rank holds all weights, a snapshot or the basis.

    torchrun --standalone --nproc-per-node 2 examples/fsdp2.py

Each rank records its own shards; the Gram matrices (T x T) are summed. A step of P-BFGS sums d + 1
numbers, beside what FSDP2 itself gathers to run the model.
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss

from dldr_ext import PBFGS, LocalSubspace, Trajectory
from dldr_ext.distributed import local_shards


def main(recorded=30, steps=20, dim=10):
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    inputs = torch.randn(1024, 8)
    targets = torch.sin(inputs @ torch.randn(8, 1))
    inputs, targets = inputs[rank::size], targets[rank::size]
    model = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 1))
    for layer in model:
        fully_shard(layer)
    fully_shard(model)

    trajectory = Trajectory(local_shards(model.parameters()), capacity=recorded)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(recorded):
        trajectory.record()
        sgd.zero_grad()
        mse_loss(model(inputs), targets).backward()
        sgd.step()

    subspace = LocalSubspace.from_trajectory(trajectory, model.named_parameters(), dim)
    optimizer = PBFGS(model.parameters(), subspace, process_group=model)
    losses = [optimizer.step(lambda: mse_loss(model(inputs), targets)) for _ in range(steps)]
    return float(losses[0]), float(losses[-1])


if __name__ == "__main__":
    dist.init_process_group("gloo")
    first, last = main()
    if dist.get_rank() == 0:
        print(first, last)
    # torch's gloo threads may abort a process that ends while they work for a model that is gone.
    sys.stdout.flush()
    dist.barrier()
    os._exit(0)
