"""Peak memory and speed of reading many checkpoints of a large model, each way in its own process.

    python -m benchmarks.scaling.checkpoint_memory --folder /tmp/checkpoints --output result.json

Writes ``--count`` checkpoints of ``--millions`` million parameters (a plain transformer's shapes)
in ``--dtype`` and removes them at the end. The figure is the peak of the resident memory of a fresh
process (VmHWM) less what it was once torch and dldr_ext were imported.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import torch
from torch import nn

from dldr_ext import Trajectory
from dldr_ext.analysis.analysis import Analysis
from dldr_ext.averaging.soup_files import write_mean
from dldr_ext.checkpoints import Series

from ..measure import fresh, resident, save

WAYS = ("analyze", "soup", "disk", "disk_subspace")


def model(millions: float) -> nn.Module:
    """Blocks of width 768 on the meta device, and an embedding that makes up the number."""
    width, block = 768, 12 * 768 * 768
    count = max(1, int(millions * 0.7e6 / block))
    rows = int((millions * 1e6 - count * block) / width)
    with torch.device("meta"):
        blocks = [
            nn.ModuleDict(
                {
                    "qkv": nn.Linear(width, 3 * width, bias=False),
                    "out": nn.Linear(width, width, bias=False),
                    "up": nn.Linear(width, 4 * width, bias=False),
                    "down": nn.Linear(4 * width, width, bias=False),
                }
            )
            for _ in range(count)
        ]
        return nn.ModuleDict({"embed": nn.Embedding(rows, width), "blocks": nn.ModuleList(blocks)})


def write(folder: Path, count: int, millions: float, dtype: torch.dtype) -> int:
    """A random walk of a few directions and noise; returns the bytes written."""
    torch.manual_seed(0)
    shapes = {name: p.shape for name, p in model(millions).named_parameters()}
    state = {name: torch.randn(shape).mul_(0.02) for name, shape in shapes.items()}
    way = {name: torch.randn(shape).mul_(0.001) for name, shape in shapes.items()}
    folder.mkdir(parents=True)
    for t in range(count):
        for name, tensor in state.items():
            tensor.add_(way[name], alpha=1 / (t + 1)).add_(torch.randn(()), alpha=1e-4)
            row = tensor.view(-1)
            row[t :: count + 1] += 1e-3
        torch.save({k: v.to(dtype) for k, v in state.items()}, folder / f"{t}.pt")
    return sum(p.stat().st_size for p in folder.iterdir())


def measure(
    way: str, folder: Path, work: Path, millions: float, dim: int | None
) -> dict[str, float]:
    """In this process; meant to be a fresh one."""
    hollow = model(millions)
    torch.ones(64, 64) @ torch.ones(64, 64)  # what torch allocates once
    before, start = resident("VmHWM"), time.perf_counter()
    if way == "analyze":
        Analysis(Series(folder), work, dim=dim).run()
    elif way == "soup":
        work.mkdir()
        write_mean(Series(folder, rows=False), work / "soup.safetensors", "1-sqrt")
    else:
        trajectory = Trajectory.from_checkpoints(folder, hollow, storage="disk", path=work)
        if way == "disk_subspace":
            trajectory.gram.sum()
    return {
        "peak_bytes": resident("VmHWM") - before,
        "base_bytes": before,
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="must not exist")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--count", type=int, default=80)
    parser.add_argument("--millions", type=float, default=100)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--dim", type=int, help="of the subspace: dim n numbers on the disk")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=["analyze", "disk"])
    parser.add_argument("--one", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = options.folder.resolve()
    run, work = folder / "run", folder / "work"
    if options.one:
        print(json.dumps(measure(options.one, run, work, options.millions, options.dim)))
        return
    try:
        size = write(run, options.count, options.millions, getattr(torch, options.dtype))
        results = {}
        for way in options.ways:
            wanted = ["--folder", str(folder), "--millions", str(options.millions)]
            wanted += [] if options.dim is None else ["--dim", str(options.dim)]
            results[way] = fresh(__spec__.name, "--one", way, *wanted)
            print(way, results[way], flush=True)
            shutil.rmtree(work)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sizes = {
        "checkpoints": options.count,
        "numel": sum(p.numel() for p in model(options.millions).parameters()),
        "dtype": options.dtype,
        "dim": options.dim,
        "bytes": size,
    }
    save(options.output, sizes, results)


if __name__ == "__main__":
    main()
