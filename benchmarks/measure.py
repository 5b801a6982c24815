"""What the benchmarks share with the package, where they ran, and a closure for whole steps."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

import torch

from dldr_ext.performance.roofline import resnet18_sizes
from dldr_ext.performance.timing import Spread, paired, reader, seconds

__all__ = [
    "Objective", "Spread", "commit", "paired", "processor", "reader", "resnet18_sizes", "seconds",
]  # fmt: skip


def commit() -> str:
    """Of the sources."""
    done = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def processor() -> str:
    """Its name."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


class Objective:
    """Gradients made beforehand and a loss that falls enough for every first trial to pass.

    However large B becomes: random gradients tell it of curvature that is hardly there.
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
