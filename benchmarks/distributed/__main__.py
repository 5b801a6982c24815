"""What ranks send and how long a step takes, beside DDP and the published way.

``python -m benchmarks.distributed``. ResNet-18 for 32 x 32 images (11,173,962 weights in 62
tensors), d = 40 directions of a trajectory of SGD, 8 images a step; one rank has all of them, two
have 4 each. Ranks are processes of this machine with one thread each, over gloo on the loopback
interface. Bytes are those that ring algorithms send, of the arguments of collectives and of a
communication hook of DDP; and those that the system saw a process write into sockets. Needs 6 GB;
writes benchmarks/results/distributed.json.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel
from wire import Wire, system

from dldr_ext import PBFGS, PSGD, ShardedSubspace, Subspace, Trajectory
from dldr_ext.performance.timing import Spread

from .. import RESULTS
from ..experiments.networks import ResidualBlock
from ..measure import commit, processor

D, SNAPSHOTS, IMAGES, BATCHES = 40, 45, 8, 4
WARM, STEPS = 2, 12


class Block(ResidualBlock):
    """With a convolution in the shortcut where the shape changes (option B)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__(inputs, outputs, stride)
        self.across = nn.Sequential()
        if stride > 1 or inputs != outputs:
            across = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.across = nn.Sequential(across, nn.BatchNorm2d(outputs))

    def shortcut(self, x: Tensor) -> Tensor:
        return self.across(x)


def resnet18() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    for stage in range(4):
        width = 64 << stage
        layers += [Block(64 if stage == 0 else width // 2, width, 2 if stage else 1)]
        layers += [Block(width, width, 1)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 10))


class Run:
    """One rank's network, data and subspace, and what is counted of steps."""

    def __init__(self, rank: int, size: int) -> None:
        torch.manual_seed(0)
        self.network = resnet18()
        self.params = list(self.network.parameters())
        self.numel = sum(p.numel() for p in self.params)
        images = torch.randn(BATCHES, IMAGES, 3, 32, 32)
        labels = torch.randint(10, (BATCHES, IMAGES))
        self.batches = [
            (x.chunk(size)[rank].contiguous(), y.chunk(size)[rank])
            for x, y in zip(images, labels, strict=True)
        ]
        self.size, self.sent = size, 0
        # Statistics of batch-norm stay each rank's own: DDP would send them with every forward.
        self.ddp = DistributedDataParallel(self.network, broadcast_buffers=False)
        self.ddp.register_comm_hook(None, self._hook)
        self.whole = self._subspace()

    def _hook(self, state, bucket):  # torch reads annotations
        self.sent += bucket.buffer().nbytes
        mean = bucket.buffer().div_(self.size)
        work = dist.distributed_c10d._get_default_group().allreduce([mean])
        return work.get_future().then(lambda f: f.value()[0])

    def loss(self, step: int) -> Tensor:
        images, labels = self.batches[step % BATCHES]
        return cross_entropy(self.ddp(images), labels)

    def _subspace(self) -> Subspace:
        sgd = torch.optim.SGD(self.params, lr=0.02, momentum=0.9)
        trajectory = Trajectory(self.params, capacity=SNAPSHOTS, dtype=torch.bfloat16)
        for step in range(SNAPSHOTS):
            trajectory.record()
            sgd.zero_grad()
            self.loss(step).backward()
            sgd.step()
        return trajectory.subspace(dim=D)

    def measure(self, step: Callable[[int], Any]) -> dict[str, Any]:
        """Medians and quartiles of seconds, and bytes of a step, all sent by this rank."""
        for i in range(WARM):
            step(i)
        seconds, self.sent, before = [], 0, 0
        with Wire() as wire:
            for i in range(STEPS):
                dist.barrier()
                start, begin = system(), time.perf_counter()
                step(WARM + i)
                seconds.append(time.perf_counter() - begin)
                before += system() - start
        ring = wire.bytes + 2 * (self.size - 1) / self.size * self.sent
        return {
            "seconds": vars(Spread.of(seconds)),
            "ring_bytes": ring / STEPS,
            "system_bytes": before / STEPS,
            "collectives": len(wire.calls) / STEPS,
        }

    def cases(self) -> Iterator[tuple[str, dict[str, Any]]]:
        self.whole.reconstruct_(self.params, torch.zeros(D))
        sgd = torch.optim.SGD(self.params, lr=0.001)

        def ordinary(i: int) -> None:
            sgd.zero_grad()
            self.loss(i).backward()
            sgd.step()

        yield "DDP, SGD", self.measure(ordinary)
        yield "DDP and the published way", self.measure(self._published())
        columns = ShardedSubspace(self.whole, "world")
        for kind, subspace in (("whole", self.whole), ("sharded columns", columns)):
            for name, make in (
                ("PSGD", lambda s: PSGD(self.params, s, lr=0.001, process_group=self.ddp)),
                ("PBFGS consecutive", lambda s: self._pbfgs(s, "consecutive")),
                ("PBFGS", lambda s: self._pbfgs(s, "same_batch")),
            ):
                yield f"{name}, {kind}", self._of_optimizer(make(subspace))

    def _pbfgs(self, subspace: Any, curvature: str) -> PBFGS:
        return PBFGS(self.params, subspace, curvature=curvature, process_group=self.ddp)

    def _of_optimizer(self, optimizer: Any) -> dict[str, Any]:
        found = self.measure(lambda i: optimizer.step(lambda: self.loss(i)))
        last = list(optimizer.history)[-STEPS:]
        found["statuses"] = sorted({record.status.name for record in last})
        found["trials"] = sum(record.trials for record in last) / STEPS
        gradients = 2 if getattr(optimizer, "defaults", {}).get("curvature") == "same_batch" else 1
        return found | {"gradients": gradients}

    def _published(self) -> Callable[[int], None]:
        """DDP sums the gradient, n numbers; each rank has some rows; P P^T g is summed again."""
        mine = self.whole.basis[dist.get_rank() :: self.size].contiguous()
        rows = Subspace(mine, torch.zeros(self.numel))

        def step(i: int) -> None:
            for p in self.params:
                p.grad = None
            self.loss(i).backward()
            moved = rows.reconstruct(rows.project([p.grad for p in self.params]))
            dist.all_reduce(moved)
            with torch.no_grad():
                pieces = moved.split([p.numel() for p in self.params])
                for p, piece in zip(self.params, pieces, strict=True):
                    p.sub_(piece.view(p.shape), alpha=0.001)

        return step


def work(rank: int, size: int, file: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    logging.getLogger("dldr_ext").setLevel(logging.ERROR)  # weights are moved back all the time
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    run, found = Run(rank, size), {}
    for name, case in run.cases():
        found[name] = case
        if rank == 0:
            print(f"{size} ranks, {name}: {json.dumps(case)}", flush=True)
    if rank == 0:
        pipe.send((run.numel, len(run.params), found))
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    context = multiprocessing.get_context("spawn")
    about = {
        "machine": {"processor": processor(), "cores": os.cpu_count(), "threads_of_a_rank": 1},
        "torch": torch.__version__,
        "commit": commit(),
        "d": D,
        "basis": "bfloat16",
        "images": IMAGES,
        "steps": STEPS,
        "ranks": {},
    }
    for size in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            here, there = context.Pipe()
            file = str(Path(folder, "store"))
            ranks = [context.Process(target=work, args=(r, size, file, there)) for r in range(size)]
            for process in ranks:
                process.start()
            about["n"], about["tensors"], found = here.recv()
            for process in ranks:
                process.join()
        ddp = found["DDP, SGD"]
        for case in found.values() if size > 1 else ():
            case["ddp_over_ours"] = ddp["ring_bytes"] / case["ring_bytes"]
            # A step with two gradients beside two of DDP.
            case["ddp_over_ours_by_gradient"] = case["ddp_over_ours"] * case.get("gradients", 1)
        about["ranks"][str(size)] = found
    (RESULTS / "distributed.json").write_text(json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    main()
