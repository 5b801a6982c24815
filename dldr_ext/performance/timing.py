"""Paired measurements: an op, plain torch and the memory itself, in turn in one process.

Shared machines drift by tens of percent within seconds, so that a ratio of two medians taken one
after the other says little. Each round times all of them back to back; the figures are medians over
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
_MULTIPLY = 2048  # rows of the square matrices whose product is timed


def seconds(work: Work) -> float:
    """Time a call in wall-clock seconds; on a GPU until it is done."""
    _wait()
    start = time.perf_counter()
    work()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def reader(data: Tensor) -> Work:
    """Return a call that reads every byte of a contiguous tensor once: torch's sum over int64."""
    words = data.reshape(-1).view(torch.int64)
    return lambda: words.sum()


@dataclass
class Spread:
    """The quartiles of measured values."""

    low: float
    median: float
    high: float

    @staticmethod
    def of(values: list[float]) -> Spread:
        """Return the quartiles of at least two values; none is outside of them."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(low, median, high)

    def show(self, unit: str = "", digits: int = 2) -> str:
        """Format them as median [first quartile, third quartile]."""
        low, median, high = (f"{x:.{digits}f}" for x in (self.low, self.median, self.high))
        return f"{median}{unit} [{low}, {high}]"


def paired(
    op: Work,
    op_bytes: float,
    peer: Work | None,
    ceiling: Work,
    ceiling_bytes: float,
    rounds: int = 9,
) -> dict[str, list[float]]:
    """Time an op, its peer and a ceiling back to back, in several rounds.

    Parameters
    ----------
    op : callable
    op_bytes : float
        Bytes that the op must move (or operations, if those of the ceiling are given).
    peer : callable or None
        What a user would write in plain torch.
    ceiling : callable
        What the op is measured against: a read of the same memory.
    ceiling_bytes : float
        Bytes that the ceiling moves.
    rounds : int

    Returns
    -------
    dict of str to list of float
        One value a round. ``of_ceiling``: the speed of the op over that of the ceiling.
        ``against_torch``: the speed-up over the peer; empty without one. ``seconds`` of the op.
        ``ceiling_gb_per_second``, which tells rounds apart in which the memory ran at another
        speed.
    """
    op(), ceiling(), peer and peer()
    measured: dict[str, list[float]] = {
        key: [] for key in ("of_ceiling", "against_torch", "seconds", "ceiling_gb_per_second")
    }
    for _ in range(rounds):
        # The ceiling before and after: the better one counts.
        before = seconds(ceiling)
        elapsed = seconds(op)
        after = seconds(ceiling)
        best = ceiling_bytes / min(before, after)
        measured["of_ceiling"].append(op_bytes / elapsed / best)
        measured["seconds"].append(elapsed)
        measured["ceiling_gb_per_second"].append(best / 1e9)
        if peer is not None:
            measured["against_torch"].append(seconds(peer) / elapsed)
    return measured


def bandwidth(data: Tensor, rounds: int = 5) -> tuple[list[float], list[float]]:
    """Measure bytes a second, one of each a round: of a read of a buffer, of a copy of half."""
    half = data.reshape(-1)[: data.numel() // 2]
    target, read = torch.empty_like(half), reader(data)
    size, copied = data.numel() * data.element_size(), 2 * half.numel() * half.element_size()

    def copy() -> object:
        return target.copy_(half)

    read(), copy()
    times = [(seconds(read), seconds(copy)) for _ in range(rounds)]
    return [size / a for a, _ in times], [copied / b for _, b in times]


def multiplier(dtype: torch.dtype, device: torch.device) -> tuple[Work, float]:
    """Return a product of two large matrices by torch, and its operations (multiply-add: two)."""
    a = torch.randn(_MULTIPLY, _MULTIPLY, dtype=dtype, device=device)
    out = torch.empty_like(a)
    return lambda: torch.mm(a, a, out=out), 2.0 * _MULTIPLY**3


def multiply_rate(dtype: torch.dtype, device: torch.device, rounds: int = 5) -> float:
    """Measure the operations a second of `multiplier`, the best of all rounds."""
    work, operations = multiplier(dtype, device)
    work()
    return operations / min(seconds(work) for _ in range(rounds))
