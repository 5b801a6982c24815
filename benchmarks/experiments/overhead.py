"""What a step of P-BFGS costs besides its closure, beside a forward and backward pass."""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch
from torch.nn import functional

from dldr_ext import PBFGS, Subspace

from . import networks
from .cells import Store
from .data import Part, Problem
from .plans import Say

FILE = "overhead"


def run(options: argparse.Namespace, store: Store, say: Say) -> None:
    """Measure and keep the result in the store."""
    for name in ("batch", "size", "dim", "rounds", "threads"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(options, name)}")
    result = measure(
        options.network, options.batch, options.size, options.dim, options.rounds, options.threads
    )
    store.save_other(FILE, result)
    say(f"step without closure calls / forward + backward: {100 * result['median']:.2f} %")


def measure(
    network: str, batch: int, size: int, dim: int, rounds: int, threads: int
) -> dict[str, Any]:
    """Time a step and a forward + backward of the same network on the same batch, turn by turn.

    The closure's own calls, trials and backward passes included, are timed inside the step and
    taken off: what is left is the optimizer's.

    Returns
    -------
    dict
        The ratio of each round, their median and quartiles, and what was measured.
    """
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, size, size, generator=generator)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,), generator=generator)
    part = Part(images, labels)
    model = networks.build(network, Problem("random", part, part, part, classes=10), seed=0)
    parameters = list(model.parameters())
    subspace = Subspace.random(parameters, dim, generator=generator)
    optimizer = PBFGS(parameters, subspace, buffers=model)
    inside = 0.0

    def forward_backward() -> torch.Tensor:
        for p in parameters:
            p.grad = None
        with torch.enable_grad():
            loss = functional.cross_entropy(model(images), labels)
            loss.backward()
        return loss

    def closure() -> torch.Tensor:
        nonlocal inside
        start = time.perf_counter()
        loss = forward_backward()
        inside += time.perf_counter() - start
        return loss

    ratios, steps, calls = [], [], []
    forward_backward(), optimizer.step(closure)
    for _ in range(rounds):
        inside, before = 0.0, optimizer.closure_calls
        start = time.perf_counter()
        optimizer.step(closure)
        own = time.perf_counter() - start - inside
        start = time.perf_counter()
        forward_backward()
        ratios.append(own / (time.perf_counter() - start))
        steps.append(own)
        calls.append(optimizer.closure_calls - before)
    return {
        "network": network,
        "numel": subspace.numel,
        "batch": batch,
        "size": size,
        "dim": dim,
        "threads": threads,
        "ratios": ratios,
        "closure_calls": calls,
        "own_seconds": statistics.median(steps),
        "median": statistics.median(ratios),
    }
