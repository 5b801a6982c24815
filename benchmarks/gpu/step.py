"""A whole P-BFGS step without its closure, against the published algorithm in plain torch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch
from published import PUBLISHED, PublishedPBFGS

from dldr_ext import PBFGS, Subspace
from dldr_ext.performance.roofline import resnet18_sizes
from dldr_ext.performance.timing import Spread

from ..measure import Objective


def steps(device: torch.device, n: int, d: int, rounds: int) -> Iterator[dict]:
    """ResNet-18's tensors; gradients made beforehand, the first trial of each search passes."""
    sizes = resnet18_sizes(n)
    basis = torch.linalg.qr(torch.randn(n, d, device=device))[0].T.contiguous()
    origin = torch.zeros(n, device=device)
    for dtype, wanted in ((torch.float32, 5.0), (torch.bfloat16, 8.0)):
        for name, options in (("published", PUBLISHED), ("default", {})):
            ours, theirs = (
                [torch.zeros(size, device=device, requires_grad=True) for size in sizes]
                for _ in range(2)
            )
            optimizer = PBFGS(ours, Subspace(basis.to(dtype), origin), **options)
            published = PublishedPBFGS(theirs, basis.T.contiguous())
            own, other = Objective(ours), Objective(theirs)
            times = []
            for turn in range(rounds + 5):
                fast = _seconds(lambda: optimizer.step(own.closure), device)  # noqa: B023
                slow = _seconds(lambda: published.step(other.forward), device)  # noqa: B023
                if turn >= 5:
                    times.append((fast, slow))
            peer = "published algorithm, float32"
            yield {
                "case": f"P-BFGS step {str(dtype)[6:]}, {name} options, n = {n:.3g}",
                "seconds": vars(Spread.of([fast for fast, _ in times])),
                "against": {peer: vars(Spread.of([slow / fast for fast, slow in times]))},
                "wanted_against": {peer: wanted},
                "moved": optimizer.status.moved,
            }


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """The host's time: a step waits for the device in its middle."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
