"""How close to their floors the steps of a plan come on this machine: a small one, timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median

import torch

from .. import ops
from ..pca.form_basis import formed
from ..pca.gram import column_step, exact_gram
from ..performance.roofline import Problem, resnet18_sizes
from ..performance.timing import Work, reader, seconds
from ..tensors.formats import wide_dtype
from ..tensors.matrices import scaled
from ..tensors.memory import free_memory
from .costs import ITEMSIZE, Job, plan
from .devices import Device

# Bytes of the stored rows: far beyond a cache, and read in some ten milliseconds.
_ROWS = 1 << 29
_ROUNDS = 5


class FallingLoss:
    """A closure with one fixed gradient and no memory of its own, whose first trials all pass."""

    def __init__(self, params: list[torch.Tensor]) -> None:
        self.params = params
        self.gradients = [torch.full_like(p, 1e-3) for p in params]
        self.calls = 0

    def __call__(self) -> float:
        self.calls += 1
        for param, gradient in zip(self.params, self.gradients, strict=True):
            param.grad = gradient
        return -1e30 * self.calls


def works(job: Job, device: torch.device | str = "cpu") -> Iterator[tuple[str, Work]]:
    """The steps of `plan` by name, as the package runs them, on random numbers."""
    from ..optim import PBFGS
    from ..subspace.dense import Subspace

    dtype = getattr(torch, job.dtype)
    problem = Problem(resnet18_sizes(job.numel), job.snapshots, device)
    rows, scale = problem.stored(dtype)
    del problem.basis
    wide = wide_dtype(dtype)
    origin, theta = problem.origin.to(wide), problem.theta[: job.dim].to(wide)
    basis, part = rows[: job.dim], None if scale is None else scale[: job.dim]
    gram = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)

    def record() -> None:
        for t in range(len(rows)):
            ops.gram_append_(rows, gram, t, problem.gradients, origin, scale=scale)

    yield "project", lambda: ops.project(basis, problem.gradients, scale=part)
    yield (
        "reconstruct_",
        lambda: ops.reconstruct_(problem.params, origin, basis, theta, scale=part),
    )
    yield "record", record
    snapshots = scaled(rows, scale)
    c = torch.randn(job.dim, job.snapshots, dtype=torch.float64, device=rows.device)
    yield "gram", lambda: exact_gram(snapshots)
    yield "form_basis", lambda: formed(snapshots, c, dtype, column_step(snapshots))
    params = [torch.zeros_like(p).requires_grad_() for p in problem.params]
    optimizer = PBFGS(params, Subspace(basis, torch.zeros_like(origin), scale=part))
    closure = FallingLoss(params)
    for _ in range(2):  # from the third on there is a pair to learn from
        optimizer.step(closure)
    yield "P-BFGS step", lambda: optimizer.step(closure)
    direction = torch.randn_like(origin)
    yield "line-search trial", lambda: ops.trial_(problem.params, origin, direction, 0.3)


def with_shares(device: Device, job: Job, where: torch.device | str = "cpu") -> Device:
    """The device with the share of its floor that each step of the job reaches, measured now.

    With the job's d, T and format, and as many parameters as make its snapshots half a gigabyte:
    all costs are proportional to n. Takes about 20 seconds, and up to half of the free memory.
    """
    shares = {name: ratio for name, ratio in _ratios(smaller(job, where), device, where)}
    return replace(device, shares=shares)


def smaller(job: Job, where: torch.device | str = "cpu") -> Job:
    """The run of the same d, T and format that is timed in the job's place."""
    return replace(job, numel=_fitting(job, where), ranks=1, shard="none", storage="device")


def timed(
    name: str, work: Work, job: Job, device: Device, read: Callable[[], float]
) -> tuple[float, float]:
    """Seconds of one call of a step, and its floor at the speed that memory has just now."""
    before = read()
    own = seconds(work)
    speed = max(before, read())
    here = replace(device, read=speed, copy=speed * device.copy / device.read, shares={})
    step = next(s for s in plan(job, here).steps if s.name == name)
    # the plan's is the mean of a whole trajectory
    return own, step.floor * (job.snapshots if name == "record" else 1)


def speedometer(data: torch.Tensor) -> Callable[[], float]:
    """Bytes a second of a read of a large buffer, anew at each call."""
    work, size = reader(data), data.numel() * data.element_size()
    work()
    return lambda: size / seconds(work)


def _ratios(job: Job, device: Device, where: torch.device | str) -> Iterator[tuple[str, float]]:
    read = speedometer(torch.ones(_ROWS // 8, dtype=torch.int64, device=where))
    steps = dict(works(job, where))
    found: dict[str, list[float]] = {name: [] for name in steps}
    # All steps in turn: what else a machine does for a second spoils no step in every round.
    for turn in range(-1, _ROUNDS):  # the first is not counted
        for name, work in steps.items():
            own, floor = timed(name, work, job, device, read)
            if turn >= 0:
                found[name].append(floor / own)
    yield from ((name, median(ratios)) for name, ratios in found.items())


def _fitting(job: Job, where: torch.device | str) -> int:
    """Parameters of the small problem."""
    row = ITEMSIZE[job.dtype]
    # rows made in float32 first, the basis, and flat vectors
    need = job.snapshots * (4 + row) + job.dim * row + 80
    most = max(1, (free_memory(where) // 2 - _ROWS) // int(need + 1))
    return max(1, min(job.numel, int(_ROWS / (job.snapshots * row)), most))
