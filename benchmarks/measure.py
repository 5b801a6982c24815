"""Paired measurements: the op, plain torch and the memory itself, turn by turn in one process.

Shared machines drift by tens of percent within seconds, so that a ratio of two medians taken one
after the other says little. Each round times all sides back to back; the figures are medians over
rounds of the ratios within a round, with their quartiles.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Work = Callable[[], object]


def seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def reader(data: Tensor) -> Work:
    """Reads every byte of a contiguous tensor once, with torch's own reduction over int64."""
    words = data.reshape(-1).view(torch.int64)
    return lambda: words.sum()


@dataclass
class Spread:
    low: float
    median: float
    high: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        low, median, high = statistics.quantiles(values, n=4)
        return Spread(low, median, high)

    def show(self, unit: str = "") -> str:
        return f"{self.median:.2f}{unit} [{self.low:.2f}, {self.high:.2f}]"


def paired(
    op: Work,
    op_bytes: float,
    peer: Work | None,
    ceiling: Work,
    ceiling_bytes: float,
    rounds: int = 9,
) -> dict[str, list[float]]:
    """Fractions of the ceiling's bandwidth and speed-ups over the peer, one of each a round.

    The ceiling itself, in GB/s, only tells rounds apart in which the memory ran at another speed.
    """
    op(), ceiling(), peer and peer()
    found: dict[str, list[float]] = {
        key: [] for key in ("of_ceiling", "against_torch", "seconds", "ceiling_gb_per_second")
    }
    for _ in range(rounds):
        # the ceiling before and after: the better one counts
        before = seconds(ceiling)
        own = seconds(op)
        after = seconds(ceiling)
        best = ceiling_bytes / min(before, after)
        found["of_ceiling"].append(op_bytes / own / best)
        found["seconds"].append(own)
        found["ceiling_gb_per_second"].append(best / 1e9)
        if peer is not None:
            found["against_torch"].append(seconds(peer) / own)
    return found


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


def resnet18_sizes(total: int) -> list[int]:
    """62 tensor sizes in the proportions of ResNet-18 (torchvision), `total` elements in all."""
    sizes = [9408, 64, 64]
    width = 64
    for stage, planes in enumerate((64, 128, 256, 512)):
        for block in range(2):
            sizes += [width * planes * 9, planes, planes, planes * planes * 9, planes, planes]
            if block == 0 and stage:
                sizes += [width * planes, planes, planes]
            width = planes
    sizes += [512 * 1000, 1000]
    scale = total / sum(sizes)
    scaled = [max(1, round(size * scale)) for size in sizes]
    scaled[-2] += total - sum(scaled)
    return scaled
