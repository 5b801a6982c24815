"""What several ranks send and how long a step takes, beside DDP: python benchmarks/distributed.py

Weights of the size of ResNet-18 (11.7 million; or as many as the argument says), d = 40, 1 and 2
ranks of this machine over gloo on the loopback interface. Sends are counted by wrappers around the
collectives and by a communication hook of DDP; the closure is as cheap as can be, so that the times
are those of the step itself. Writes benchmarks/results/distributed.json.
"""

import json
import multiprocessing
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from measure import resnet18_sizes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dldr_ext import PBFGS, PSGD, ShardedSubspace, Subspace

D, N, STEPS = 40, int(sys.argv[1]) if len(sys.argv) > 1 else 11_689_512, 4
RESULTS = Path(__file__).parent / "results" / "distributed.json"


class Weights(nn.Module):
    """A quadratic function of as many weights as ResNet-18 has."""

    def __init__(self):
        super().__init__()
        self.weights = nn.ParameterList(torch.zeros(size) for size in resnet18_sizes(N))

    def forward(self, target):
        return sum((w - target).square().sum() for w in self.weights) / N


class Wire:
    """Counts the bytes that this rank puts into the collectives of `torch.distributed`."""

    def __init__(self):
        self.bytes, self.calls = 0, 0
        for name in ("all_reduce", "reduce_scatter_single", "all_gather_single"):
            whole = 0 if name == "all_reduce" else 1
            self._wrap(dist if whole == 0 else __import__("dldr_ext._ranks")._ranks, name, whole)

    def _wrap(self, module, name, whole):
        known = {"reduce_scatter_single": "_reduce_scatter", "all_gather_single": "_all_gather"}
        name = known.get(name, name)
        inner = getattr(module, name)

        def counted(*args, **options):
            self.bytes += args[whole].nbytes
            self.calls += 1
            return inner(*args, **options)

        setattr(module, name, counted)


def work(rank, size, file, pipe):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=size)
    torch.manual_seed(0)
    model, target, found = Weights(), 1.0 + rank, {}
    row = torch.randn(N).div_(N**0.5).to(torch.bfloat16)
    basis = torch.stack([row.roll(977 * i) for i in range(D)])  # orthonormal but for rounding
    subspace, wire = Subspace(basis, torch.zeros(N)), Wire()
    ddp, sent = DistributedDataParallel(model), []

    def hook(state, bucket):
        sent.append(bucket.buffer().nbytes)
        work = dist.distributed_c10d._get_default_group().allreduce([bucket.buffer()])
        return work.get_future().then(lambda f: f.value()[0])

    ddp.register_comm_hook(None, hook)
    sgd = torch.optim.SGD(ddp.parameters(), lr=0.1)

    def ordinary():
        sgd.zero_grad()
        ddp(target).backward()
        sgd.step()

    def measured(step, total):
        step()
        times, before = [], (total(), wire.calls)
        for _ in range(STEPS):
            dist.barrier()
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
        return {
            "seconds_per_step": statistics.median(times),
            "bytes_per_step": (total() - before[0]) / STEPS,
            "collectives_per_step": (wire.calls - before[1]) / STEPS,
        }

    def steps_of(optimizer):
        case = measured(lambda: optimizer.step(lambda: ddp(target)), lambda: wire.bytes)
        case["gradients_per_step"] = optimizer.gradient_calls / len(optimizer.history)
        return case

    found["ddp_sgd"] = measured(ordinary, lambda: sum(sent))
    cases = {
        "psgd": lambda s: PSGD(model.parameters(), s, lr=0.1, process_group=ddp),
        "pbfgs_consecutive": lambda s: PBFGS(
            model.parameters(), s, curvature="consecutive", process_group=ddp
        ),
        "pbfgs_default": lambda s: PBFGS(model.parameters(), s, process_group=ddp),
    }
    for name, make in cases.items():
        for kind in ("whole", "columns") if name == "pbfgs_default" else ("whole",):
            used = subspace if kind == "whole" else ShardedSubspace(subspace, "world")
            found[f"{name}, {kind}"] = steps_of(make(used))
            del used
    if rank == 0:
        pipe.send(found)
    dist.barrier()


def main():
    context = multiprocessing.get_context("spawn")
    results = {"d": D, "n": N, "torch": torch.__version__, "basis": "bfloat16", "ranks": {}}
    for size in (1, 2):
        with tempfile.TemporaryDirectory() as folder:
            here, there = context.Pipe()
            file = Path(folder, "store")
            ranks = [context.Process(target=work, args=(r, size, file, there)) for r in range(size)]
            for process in ranks:
                process.start()
            found = here.recv()
            for process in ranks:
                process.join()
        ddp = found["ddp_sgd"]["bytes_per_step"]
        for name, case in found.items():
            if name != "ddp_sgd":
                case["ddp_bytes_over_ours"] = ddp / case["bytes_per_step"]
        results["ranks"][size] = found
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
