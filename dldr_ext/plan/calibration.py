"""The share of its floor that each step of a plan reaches on this machine: a small run, timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median

import torch

from .. import ops
from ..optim import PBFGS
from ..pca.form_basis import formed
from ..pca.gram import column_step, exact_gram
from ..performance.roofline import Problem, resnet18_sizes
from ..performance.timing import Work, reader, seconds
from ..subspace.dense import Subspace
from ..tensors.formats import wide_dtype
from ..tensors.matrices import scaled
from ..tensors.memory import free_memory
from .costs import ITEMSIZE, Job, plan
from .devices import Device

# Bytes of the stored rows: far beyond a cache, and read in some ten milliseconds.
_ROWS = 1 << 29
_ROUNDS = 5


class FallingLoss:
    """A closure with one fixed gradient and a loss so low that every first trial is accepted."""

    def __init__(self, params: list[torch.Tensor]) -> None:
        self.params = params
        self.gradients = [torch.full_like(p, 1e-3) for p in params]
        self.calls = 0

    def __call__(self) -> float:
        """Set the gradients and return a loss lower than any before."""
        self.calls += 1
        for param, gradient in zip(self.params, self.gradients, strict=True):
            param.grad = gradient
        return -1e30 * self.calls


def works(job: Job, device: torch.device | str = "cpu") -> Iterator[tuple[str, Work]]:
    """Make the steps of `plan` by name, as the package runs them, on random numbers."""
    dtype = getattr(torch, job.dtype)
    problem = Problem(resnet18_sizes(job.numel), job.snapshots, device)
    rows, scale = problem.stored(dtype)
    del problem.basis
    wide = wide_dtype(dtype)
    origin, theta = problem.origin.to(wide), problem.theta[: job.dim].to(wide)
    basis, basis_scale = rows[: job.dim], None if scale is None else scale[: job.dim]
    gram = rows.new_zeros(len(rows), len(rows), dtype=torch.float64)

    def record() -> None:
        for t in range(len(rows)):
            ops.gram_append_(rows, gram, t, problem.gradients, origin, scale=scale)

    yield "project", lambda: ops.project(basis, problem.gradients, scale=basis_scale)
    yield (
        "reconstruct_",
        lambda: ops.reconstruct_(problem.params, origin, basis, theta, scale=basis_scale),
    )
    yield "record", record
    snapshots = scaled(rows, scale)
    c = torch.randn(job.dim, job.snapshots, dtype=torch.float64, device=rows.device)
    yield "gram", lambda: exact_gram(snapshots)
    yield "form_basis", lambda: formed(snapshots, c, dtype, column_step(snapshots))
    params = [torch.zeros_like(p).requires_grad_() for p in problem.params]
    optimizer = PBFGS(params, Subspace(basis, torch.zeros_like(origin), scale=basis_scale))
    closure = FallingLoss(params)
    for _ in range(2):  # from the third on there is a curvature pair
        optimizer.step(closure)
    yield "P-BFGS step", lambda: optimizer.step(closure)
    direction = torch.randn_like(origin)
    yield "line-search trial", lambda: ops.trial_(problem.params, origin, direction, 0.3)


def with_shares(device: Device, job: Job, where: torch.device | str = "cpu") -> Device:
    """Measure the share of its floor that each step of a job reaches.

    It is timed with the job's d, T and format, and as many parameters as make its snapshots half a
    gigabyte: all costs are proportional to n. Takes about 20 seconds, and up to half of the free
    memory.

    Parameters
    ----------
    device : Device
        As `measure` returned it.
    job : Job
    where : torch.device or str
        The device that was measured.

    Returns
    -------
    Device
        The same with its ``shares``.
    """
    return replace(device, shares=dict(_ratios(smaller(job, where), device, where)))


def smaller(job: Job, where: torch.device | str = "cpu") -> Job:
    """Return the run of the same d, T and format that is timed in the job's place."""
    return replace(job, numel=_fitting(job, where), ranks=1, shard="none", storage="device")


def timed(
    name: str, work: Work, job: Job, device: Device, read: Callable[[], float]
) -> tuple[float, float]:
    """Time one call of a step; return its seconds and its floor at the memory's present speed."""
    before = read()
    elapsed = seconds(work)
    speed = max(before, read())
    here = replace(device, read=speed, copy=speed * device.copy / device.read, shares={})
    step = next(s for s in plan(job, here).steps if s.name == name)
    # The plan has the mean over a whole trajectory, the work records all of it.
    return elapsed, step.floor * (job.snapshots if name == "record" else 1)


def speedometer(data: torch.Tensor) -> Callable[[], float]:
    """Return a function that times a read of a large buffer and returns its bytes a second."""
    work, size = reader(data), data.numel() * data.element_size()
    work()
    return lambda: size / seconds(work)


def _ratios(job: Job, device: Device, where: torch.device | str) -> Iterator[tuple[str, float]]:
    read = speedometer(torch.ones(_ROWS // 8, dtype=torch.int64, device=where))
    steps = dict(works(job, where))
    ratios: dict[str, list[float]] = {name: [] for name in steps}
    # All steps in turn: what else a machine does for a second spoils no step in every round.
    for turn in range(-1, _ROUNDS):  # the first is not counted
        for name, work in steps.items():
            elapsed, floor = timed(name, work, job, device, read)
            if turn >= 0:
                ratios[name].append(floor / elapsed)
    yield from ((name, median(of_step)) for name, of_step in ratios.items())


def _fitting(job: Job, where: torch.device | str) -> int:
    """Return the number of parameters of the small run."""
    row = ITEMSIZE[job.dtype]
    # rows made in float32 first, the basis, and flat vectors
    need = job.snapshots * (4 + row) + job.dim * row + 80
    most = max(1, (free_memory(where) // 2 - _ROWS) // int(need + 1))
    return max(1, min(job.numel, int(_ROWS / (job.snapshots * row)), most))
