"""What to change in a run that does not fit, as little as helps."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from .costs import ITEMSIZE, STORAGES, Job, Plan, plan
from .devices import Device

_NARROW = ("bfloat16", "int8")
_MOST_RANKS = 4096


def remedies(job: Job, device: Device) -> list[Plan]:
    """Return runs that fit a device, nearest to one that does not.

    Parameters
    ----------
    job : Job
    device : Device

    Returns
    -------
    list of Plan
        Of each change that helps the smallest one: the storage; the dtype; if neither does, both
        (int8, on disk), with fewer directions if need be; the number of snapshots, or if that does
        not help of directions, with snapshots in proportion; the number of ranks, which then share
        out all. Empty if the job fits, or nothing of this helps.

    See Also
    --------
    plan : works out what a run takes.

    Examples
    --------
    >>> from dldr_ext.plan import TABLE, Job, remedies
    >>> from dldr_ext.plan.remedies import changes
    >>> job = Job(7_000_000_000, dim=40, snapshots=80, ranks=8, shard="all")
    >>> [changes(planned.job, job) for planned in remedies(job, TABLE["h200"])]
    [{'storage': 'host'}, {'dtype': 'int8'}, {'snapshots': 48, 'dim': 24}, {'ranks': 13}]
    """
    if _fits(job, device):
        return []
    stores = STORAGES[STORAGES.index(job.storage) + 1 :]
    if device.link is None:  # the host's memory is the device's
        stores = tuple(store for store in stores if store == "disk")
    width = ITEMSIZE[job.dtype]
    single: list[Iterable[Job]] = [
        (replace(job, storage=store) for store in stores),
        (replace(job, dtype=dtype) for dtype in _NARROW if ITEMSIZE[dtype] < width),
        _largest(device, range(job.dim + 1, job.snapshots), partial(_with, job, job.dim)),
        _largest(device, range(1, job.dim), partial(_smaller, job)),
    ]
    found = [next((one for one in jobs if _fits(one, device)), None) for jobs in single]
    if found[2] is not None:
        found[3] = None  # no direction need go
    if not any(found[:2]):
        small = replace(job, storage="disk", dtype="int8" if width >= 2 else job.dtype)
        found[:2] = _largest(device, range(1, job.dim + 1), partial(_smaller, small))
    found += _more_ranks(job, device)
    return [plan(one, device) for one in found if one is not None]


def changes(job: Job, original: Job) -> dict[str, Any]:
    """Return the fields in which a job differs from another."""
    names = ("storage", "dtype", "snapshots", "dim", "ranks", "shard")
    return {
        name: getattr(job, name) for name in names if getattr(job, name) != getattr(original, name)
    }


def _fits(job: Job, device: Device) -> bool:
    return plan(job, device).peak <= device.memory


def _with(job: Job, dim: int, snapshots: int) -> Job:
    return replace(job, dim=dim, snapshots=snapshots)


def _smaller(job: Job, dim: int) -> Job:
    """Return the job with fewer directions, and fewer snapshots in proportion."""
    return _with(job, dim, max(dim + 1, job.snapshots * dim // job.dim))


def _largest(device: Device, sizes: range, job_of: Callable[[int], Job]) -> Iterator[Job]:
    """Yield the largest job that fits, if one does."""
    falling = sizes[::-1]
    place = bisect_left(falling, True, key=lambda size: _fits(job_of(size), device))
    if place < len(falling):
        yield job_of(falling[place])


def _more_ranks(job: Job, device: Device) -> Iterator[Job]:
    """Yield the job with the fewest more ranks that fit, which share out all."""

    def on(ranks: int) -> Job:
        return replace(job, ranks=ranks, shard="all")

    more = range(job.ranks + 1, _MOST_RANKS + 1)
    place = bisect_left(more, True, key=lambda ranks: _fits(on(ranks), device))
    if place < len(more):
        yield on(more[place])
