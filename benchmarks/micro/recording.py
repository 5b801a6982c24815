"""What ``Trajectory.attach`` adds to a step of training: ``python -m benchmarks.micro.recording``.

ResNet-20 on random images of 32 x 32, SGD with momentum, a snapshot at every tenth step; a full
trajectory is thinned out. The time between two hooks, one before the recorder's and one after, is
what it takes.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from dldr_ext import Trajectory

from ..experiments import networks
from ..experiments.data import Part, Problem

EVERY, ROUNDS = 10, 40


def main(batch: int = 64, threads: int = 2) -> None:
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    images, labels = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))
    part = Part(images, labels)
    model = networks.build("resnet20", Problem("random", part, part, part, classes=10), seed=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    trajectory = Trajectory(model.named_parameters(), capacity=20)
    times: list[float] = []

    def note(*_: Any) -> None:
        times.append(time.perf_counter())

    optimizer.register_step_post_hook(note)
    trajectory.record()
    recorder = trajectory.attach(optimizer, every=EVERY)
    optimizer.register_step_post_hook(note)
    shares = []
    for _ in range(ROUNDS):
        times.clear()
        start = time.perf_counter()
        for _ in range(EVERY):
            optimizer.zero_grad()
            cross_entropy(model(images), labels).backward()
            optimizer.step()
        whole = time.perf_counter() - start
        inside = sum(after - before for before, after in zip(times[::2], times[1::2], strict=True))
        shares.append(inside / (whole - inside))
    low, median, high = (100 * q for q in statistics.quantiles(shares, n=4))
    mean, longest = 100 * statistics.fmean(shares), 100 * max(shares)
    print(
        f"recording / training: median {median:.3f} [{low:.3f}, {high:.3f}] %, mean {mean:.3f} %, "
        f"most in ten steps {longest:.3f} %; {len(trajectory)} snapshots, stride {recorder.every}, "
        f"n = {trajectory.numel}, batch {batch}, {1e3 * whole / EVERY:.0f} ms a step"
    )


if __name__ == "__main__":
    main()
