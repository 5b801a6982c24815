"""Device time of work, turn by turn with its peers and with the memory's own speed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

Work = Callable[[], object]

# Written before each measurement: takes the place of everything in the L2 cache, and while it is on
# its way the host queues the work itself, so that no launch is waited for.
_FLUSH_BYTES = 1 << 30
# A ceiling's buffer; large beside any cache.
_CEILING_BYTES = 5 << 30
_CALLS = 20  # of one captured graph


class Clock:
    """Times work on one device; on the CPU (to try the code out) by the wall clock."""

    def __init__(self, device: torch.device, ceiling_bytes: int = _CEILING_BYTES) -> None:
        self.cuda = device.type == "cuda"
        self.device = device
        if self.cuda:
            self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device)
        size = ceiling_bytes if self.cuda else 1 << 20
        self.ceilings = self._measure_ceilings(size)

    def rounds(self, works: Sequence[Work], count: int) -> list[list[float]]:
        """Seconds of each work in each of `count` rounds, all works within a round in turn."""
        for work in works:
            work()
        return [self._round(works) for _ in range(count)]

    def looped(self, work: Work, loops: int = 100) -> float:
        """Seconds a call of many calls in a row: for short work, as the host can queue it."""

        def calls() -> None:
            for _ in range(loops):
                work()

        work()
        return self._plain(calls) / loops

    def graphed(self, work: Work, loops: int = 10) -> float:
        """The same where the host only replays a captured graph."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            work()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(_CALLS):
                work()
        return self.looped(graph.replay, loops) / _CALLS

    def _round(self, works: Sequence[Work]) -> list[float]:
        if not self.cuda:
            return [self._plain(work) for work in works]
        marks = []
        for work in works:
            self._flush.zero_()
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            before.record()
            work()
            after.record()
            marks.append((before, after))
        torch.cuda.synchronize()
        return [before.elapsed_time(after) / 1e3 for before, after in marks]

    def _plain(self, work: Work) -> float:
        self._wait()
        start = time.perf_counter()
        work()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def _measure_ceilings(self, size: int) -> dict[str, float]:
        """Bytes a second of plain reads and copies; the best of torch's own kernels counts."""
        data = torch.zeros(size, dtype=torch.uint8, device=self.device)
        numbers, words = data.view(torch.float32), data.view(torch.int64)
        reads = {"sum float32": numbers.sum, "sum int64": words.sum, "amax float32": numbers.amax}
        target = torch.empty_like(data)
        works = [*reads.values(), lambda: target.copy_(data)]
        times = [median(column) for column in zip(*self.rounds(works, 7), strict=True)]
        speeds = dict(zip((*reads, "copy"), (size / seconds for seconds in times), strict=True))
        speeds["copy"] *= 2
        self.kernels = speeds
        # A copy that moves more bytes a second than a read is a better measure of the memory.
        return {"read": max(speeds.values()), "copy": speeds["copy"]}

    def raise_ceilings(self, sweep: dict[str, dict[str, float]]) -> None:
        """Takes the plain kernels of `sweep.cu` in, where they are faster."""
        for found in sweep.values():
            for name in ("read", "copy"):
                self.kernels[f"{name} of 16 bytes"] = found[name]
                self.ceilings[name] = max(self.ceilings[name], found[name])
        self.ceilings["read"] = max(self.ceilings.values())

    def multiply_rate(self, size: int = 8192) -> float:
        """float32 operations a second of torch's matrix product: a multiplication counts as one,
        an addition too."""
        size = size if self.cuda else 64
        a = torch.randn(size, size, device=self.device)
        seconds = median(times[0] for times in self.rounds([lambda: a @ a], 5))
        return 2 * size**3 / seconds
