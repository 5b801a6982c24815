"""Peak memory and speed of a subspace formed, implicit and in place, each in its own process.

    python -m benchmarks.scaling.basis_memory --output result.json

Records ``--count`` snapshots of ``--millions`` million parameters in ``--dtype``, makes a subspace
of ``--dim`` directions and projects and reconstructs with it. The figure is the peak of the
resident memory of a fresh process (VmHWM) beyond what it was when the last snapshot was recorded;
what the snapshots took is beside it. Times are medians of calls made in turn, in one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dldr_ext import Subspace, Trajectory

from ..measure import fresh, resident, save

WAYS: dict[str, Callable[[Trajectory, int], Any]] = {
    "formed": lambda trajectory, dim: trajectory.subspace(dim),
    "implicit": lambda trajectory, dim: trajectory.subspace(dim, materialize=False),
    "in_place": lambda trajectory, dim: trajectory.into_subspace(dim),
}


def recorded(numel: int, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, Trajectory]:
    """A random walk whose steps become smaller."""
    weights = torch.randn(numel).mul_(0.02)
    trajectory = Trajectory([weights], capacity=count, dtype=dtype)
    for t in range(count):
        trajectory.record()
        for piece in weights.split(1 << 20):  # no second vector of n
            piece.add_(torch.randn_like(piece), alpha=1e-3 / (t + 1))
    return weights, trajectory


def speed(numel: int, count: int, dim: int, dtype: torch.dtype) -> dict[str, float]:
    """Median seconds of a pass, formed and implicit by turns."""
    weights, trajectory = recorded(numel, count, dtype)
    calls: dict[str, Callable[[], object]] = {}
    for way in ("formed", "implicit"):
        space, theta = WAYS[way](trajectory, dim), torch.randn(dim)
        calls[f"{way} project"] = partial(space.project, [weights])
        calls[f"{way} reconstruct_"] = partial(space.reconstruct_, [weights], theta)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(15):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def measure(way: str, numel: int, count: int, dim: int, dtype: torch.dtype) -> dict[str, float]:
    """In this process; meant to be a fresh one."""
    torch.manual_seed(0)
    Subspace.random([torch.zeros(5000)], 2).project([torch.zeros(5000)])  # allocated once
    empty = resident("VmHWM")
    _, trajectory = recorded(numel, count, dtype)
    before, start = resident("VmHWM"), time.perf_counter()
    subspace = WAYS[way](trajectory, dim)
    seconds = time.perf_counter() - start
    assert subspace.dim == dim
    return {
        "peak_bytes": resident("VmHWM") - before,
        "recorded_bytes": before - empty,
        "make_seconds": seconds,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--millions", type=float, default=20)
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--dim", type=int, default=20)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--one", choices=(*WAYS, "speed"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    numel = int(options.millions * 1e6)
    if options.one:
        dtype = getattr(torch, options.dtype)
        sizes = numel, options.count, options.dim, dtype
        found = speed(*sizes) if options.one == "speed" else measure(options.one, *sizes)
        print(json.dumps(found))
        return
    results = {}
    for way in (*WAYS, "speed"):
        results[way] = fresh(__spec__.name, *sys.argv[1:], "--one", way)
        print(way, results[way], flush=True)
    sizes = {"numel": numel, "snapshots": options.count}
    save(options.output, sizes | {"dim": options.dim, "dtype": options.dtype}, results)


if __name__ == "__main__":
    main()
