"""What several benchmarks need: where they ran, memory, fresh processes, a closure for steps."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from . import ROOT


def output(*command: str) -> str | None:
    """First line that a command prints; None if it cannot be run or fails."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def commit() -> str | None:
    """Of the sources; a copy without its repository is told it by the environment."""
    return os.environ.get("DLDR_COMMIT") or output("git", "describe", "--always", "--dirty")


def processor() -> str:
    """Its name."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def resident(key: str) -> int:
    """Bytes of this process in memory: now ("VmRSS"), or at most so far ("VmHWM"). Linux only."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return 1024 * int(line.split()[1])
    raise LookupError(key)


def fresh(module: str, *arguments: str) -> dict[str, Any]:
    """Run a module in a process of its own; returns the JSON in the last line that it prints."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def save(path: Path | None, sizes: dict[str, Any], results: dict[str, Any]) -> None:
    """Write sizes, machine and results as JSON, where a path is given."""
    machine = f"{platform.machine()}, {os.cpu_count()} CPUs"
    about = sizes | {"machine": machine, "torch": torch.__version__, "results": results}
    if path:
        path.write_text(json.dumps(about, indent=1) + "\n")


class Objective:
    """Gradients made beforehand and a loss that falls enough for every first trial to pass.

    However large the inverse Hessian becomes: random gradients tell it of curvature that is hardly
    there.
    """

    def __init__(self, params) -> None:
        self.params = params
        self.sets = [[torch.randn_like(p) for p in params] for _ in range(4)]
        self.calls = 0

    def _next(self) -> float:
        self.calls += 1
        return -1e30 * self.calls

    def backward(self) -> None:
        for param, gradient in zip(self.params, self.sets[self.calls % 4], strict=True):
            param.grad = gradient

    def item(self) -> float:
        return self._next()

    def closure(self) -> float:
        """For PBFGS: sets the gradients, returns the loss."""
        self.backward()
        return self._next()

    def forward(self):
        """For the published algorithm: has backward() and item(), as a loss tensor has."""
        return self
