"""How long reading and recording weights takes, beside reading the same bytes.

``python -m benchmarks.scaling.checkpoint_time --folder FOLDER --output FILE``. Writes 40
checkpoints of ResNet-18's shapes (float32, 11.2M numbers, 1.8 GB) and removes them at the end. In
each round the files are dropped from the page cache ("cold") or read once ("cached"), then read by
`cat`, by `Trajectory.from_checkpoints`, and by `dldr analyze` as a whole process: with a subspace
and without; beside them what importing its code takes. Last, `Trajectory.record` of the same
shapes in bfloat16, over the time that a read of as many bytes takes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from dldr_ext import Trajectory
from dldr_ext.performance.roofline import resnet18_sizes
from dldr_ext.performance.timing import Spread, reader, seconds

from ..measure import save

NUMEL, COUNT = 11_200_000, 40


def write(folder: Path) -> list[Path]:
    """A random walk, a file at each step."""
    torch.manual_seed(0)
    weights = {f"p{i}": torch.randn(size) for i, size in enumerate(resnet18_sizes(NUMEL))}
    paths = [folder / f"step_{t:03}.safetensors" for t in range(COUNT)]
    for path in paths:
        for tensor in weights.values():
            tensor.add_(torch.randn_like(tensor), alpha=0.01)
        save_file(weights, path)
    return paths


def drop(paths: list[Path]) -> None:
    """Take files out of the page cache."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        os.fdatasync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def read(paths: list[Path]) -> None:
    with open(os.devnull, "wb") as nowhere:
        subprocess.run(["cat", *map(str, paths)], stdout=nowhere, check=True)


def process(*arguments: str) -> None:
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)


def reading(folder: Path, rounds: int) -> dict:
    """Seconds of each way, medians and quartiles over rounds, cold and cached."""
    paths = write(folder)
    sizes = enumerate(resnet18_sizes(NUMEL))
    model = nn.ParameterDict({f"p{i}": nn.Parameter(torch.empty(size)) for i, size in sizes})
    analyze = ("-m", "dldr_ext", "analyze", *map(str, paths), "--output", str(folder / "out"))

    def from_checkpoints() -> None:
        Trajectory.from_checkpoints(paths, model).gram  # noqa: B018  (made when it is asked for)

    ways = {
        "cat": lambda: read(paths),
        "from_checkpoints and gram": from_checkpoints,
        "import": lambda: process("-c", "import dldr_ext.analysis.analysis"),
        "analyze --no-subspace": lambda: process(*analyze, "--no-subspace"),
        "analyze": lambda: process(*analyze),
    }
    found: dict = {}
    for state, prepare in (("cold", drop), ("cached", read)):
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, work in ways.items():
                shutil.rmtree(folder / "out", ignore_errors=True)
                prepare(paths)
                times[way].append(seconds(work))
        found[state] = {way: vars(Spread.of(row)) for way, row in times.items()}
    return found


def recording(rounds: int) -> dict:
    """Time of `record` over that of a read of the bytes that it must move, by rows before it."""
    params = [nn.Parameter(torch.randn(size)) for size in resnet18_sizes(NUMEL)]
    probe = torch.randn(COUNT * NUMEL // 2)
    ceiling = reader(probe)
    shares: list[list[float]] = [[] for _ in range(COUNT)]
    for _ in range(rounds):
        trajectory = Trajectory(params, capacity=COUNT, dtype=torch.bfloat16)
        for t in range(COUNT):
            with torch.no_grad():
                torch._foreach_add_(params, 0.01)
            before = seconds(ceiling)
            elapsed = seconds(trajectory.record)
            best = probe.nbytes / min(before, seconds(ceiling))
            # Weights, anchor, the row itself, and the rows before it.
            shares[t].append(elapsed / ((4 + 4 + 2 + 2 * t) * NUMEL / best))
    return {"rows_before": list(range(COUNT)), "of_bytes": [vars(Spread.of(row)) for row in shares]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where the files go; the system's otherwise")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        results = {"seconds": reading(Path(folder), options.rounds)}
    results["record"] = recording(options.rounds)
    sizes = {"numel": NUMEL, "count": COUNT, "threads": torch.get_num_threads()}
    save(options.output, sizes, results)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
