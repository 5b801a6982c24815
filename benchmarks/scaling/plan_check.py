"""The formulas of `dldr plan` against this machine: peak memory, and time at its bandwidth.

``python -m benchmarks.scaling.plan_check``. Memory is the peak of the resident set, phase by phase
in a process of its own, above what torch and the package take. A time is predicted as `dldr plan`
does it: from a smaller problem, here timed just before in each round. Both are taken beside reads
of a large buffer. So a memory that changes its speed does not count as an error.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch

from dldr_ext import PBFGS, Trajectory
from dldr_ext.performance.roofline import resnet18_sizes
from dldr_ext.performance.timing import Spread, multiply_rate
from dldr_ext.plan.calibration import (
    FallingLoss,
    smaller,
    speedometer,
    timed,
    works,
)
from dldr_ext.plan.costs import Job, plan
from dldr_ext.plan.devices import Device, measure

from .. import RESULTS
from ..measure import fresh, resident

RESULT = RESULTS / "plan_check.json"
WITHIN = 0.15
# Any will do where only memory is asked for.
NOWHERE = Device("none", 1e12, 1e9, 1e9, 1e9, 1e9, None, None, 1e9, "none")


class Peak:
    """Peak of the resident set since the last look, in bytes. Linux only."""

    def __init__(self) -> None:
        self._base = resident("VmRSS")

    def __call__(self) -> int:
        found = resident("VmHWM") - self._base
        Path("/proc/self/clear_refs").write_text("5")
        return found


def run(job: Job, look: Callable[[], int]) -> dict[str, int]:
    """Records, forms the basis and trains, with the weights and gradients of a model."""
    sizes = resnet18_sizes(job.numel)
    params = [torch.full((size,), 1.0, requires_grad=True) for size in sizes]
    closure = FallingLoss(params)
    trajectory = Trajectory(params, capacity=job.snapshots, dtype=getattr(torch, job.dtype))
    found = {}
    torch.manual_seed(0)
    for _ in range(job.snapshots):
        with torch.no_grad():
            for p in params:
                p.view(-1)[:64].add_(torch.randn(min(64, p.numel())))
        trajectory.record()
    found["recording"] = look()
    subspace = trajectory.subspace(dim=job.dim)
    found["forming the basis"] = look()
    del trajectory
    look()
    optimizer = PBFGS(params, subspace)
    for _ in range(4):
        optimizer.step(closure)
    assert optimizer.status.moved
    found["P-BFGS"] = look()
    return found


def memory_here(job: Job) -> dict[str, int]:
    """`run`, in this process; a small one before it loads what torch loads late."""
    run(Job(20_000, 2, 4, job.dtype), lambda: 0)
    return run(job, Peak())


def memory(job: Job) -> dict:
    """Measured and predicted bytes of each phase."""
    measured = fresh(__spec__.name, "--memory", json.dumps(asdict(job)))
    phases = {
        found.phase: {"measured": measured[found.phase], "predicted": found.device}
        for found in plan(job, NOWHERE).memory
    }
    for found in phases.values():
        found["ratio"] = found["measured"] / found["predicted"]
        found["within"] = abs(found["ratio"] - 1) <= WITHIN
    return {"job": asdict(job), "phases": phases}


def times(job: Job, device: Device, rounds: int) -> dict:
    """Measured over predicted seconds of each step, quartiles over rounds."""
    small = smaller(job)
    read = speedometer(torch.ones(1 << 27, dtype=torch.int64))
    steps, basis = dict(works(job)), dict(works(small))
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    took: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(-1, rounds):  # the first is not counted
        for name, work in steps.items():
            before, least = timed(name, basis[name], small, device, read)
            own, floor = timed(name, work, job, device, read)
            if turn >= 0:
                ratios[name].append(own / (floor * before / least))
                took[name].append(own)
    found = {}
    for name, values in ratios.items():
        spread = Spread.of(values)
        found[name] = {
            "ratio": vars(spread),
            "seconds": vars(Spread.of(took[name])),
            "within": abs(spread.median - 1) <= WITHIN,
        }
    return {"job": asdict(job), "from": small.numel, "steps": found}


MEMORY = [
    Job(1_000_000, 40, 81),
    Job(4_000_000, 40, 81),
    Job(10_000_000, 40, 81),
    Job(4_000_000, 16, 41, "float32"),
    Job(4_000_000, 100, 120),
    Job(4_000_000, 40, 81, "int8"),
]
TIMES = [
    Job(10_000_000, 48, 50, "bfloat16"),
    Job(8_000_000, 24, 30, "float32"),
    Job(32_000_000, 32, 36, "int8"),
    Job(20_000_000, 20, 24, "bfloat16"),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    parser.add_argument("--only", choices=("memory", "times"))
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if options.memory:
        print(json.dumps(memory_here(Job(**json.loads(options.memory)))))
        return 0
    result = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    if options.only != "times":
        result["memory"] = [memory(job) for job in MEMORY]
    if options.only != "memory":
        device = measure()
        wide = max(multiply_rate(torch.float64, torch.device("cpu")) for _ in range(2))
        device = replace(device, float64=wide)
        result |= {"device": asdict(device), "torch": torch.__version__, "times": []}
        for job in TIMES:
            result["times"].append(times(job, device, options.rounds))
            RESULT.write_text(json.dumps(result, indent=1) + "\n")
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    show(result)
    return 0


def show(result: dict) -> None:
    for kind, key in (("memory", "phases"), ("times", "steps")):
        for row in result.get(kind, []):
            job = row["job"]
            print(f"{kind}: n={job['numel']:,} d={job['dim']} T={job['snapshots']} {job['dtype']}")
            for name, found in row[key].items():
                ratio = found["ratio"]
                shown = Spread(**ratio).show() if isinstance(ratio, dict) else f"{ratio:.3f}"
                print(f"  {name:20} measured / predicted {shown}{'' if found['within'] else '  *'}")


if __name__ == "__main__":
    sys.exit(main())
