"""What the benchmarks share with the package, and a closure for whole steps."""

from __future__ import annotations

import torch

from dldr_ext._measure import Spread, paired, reader, seconds
from dldr_ext.bench import resnet18_sizes

__all__ = ["Objective", "Spread", "paired", "reader", "resnet18_sizes", "seconds"]


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
