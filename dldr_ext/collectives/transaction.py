"""Calls that succeed on all ranks or on none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from .process_group import Ranks


@contextmanager
def all_or_none(
    ranks: Ranks,
    what: str,
    length: Callable[[], int],
    undo: Callable[[], None] | None = None,
    mark: int = 0,
) -> Iterator[None]:
    """What is done inside counts only if no rank failed; ranks tell each other three numbers.

    Parameters
    ----------
    ranks : Ranks
    what : str
        The call, for messages.
    length : callable
        The number of snapshots afterwards: the same on every rank.
    undo : callable, optional
        For a rank that did not fail where another one did.
    mark : int
        Of the weights: the same on every rank.

    Raises
    ------
    OSError, ValueError
        On every rank, naming the one that failed. OSError if that was one.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    own = [int(failed is not None), -1 if failed is not None else length(), mark]
    told = torch.stack(ranks.gathered(torch.tensor(own, device=ranks.device), what)).cpu()
    if not bool(told[:, 0].any()) and bool((told == told[0]).all()):
        return
    if failed is None and undo is not None:
        undo()
    _raise(ranks, what, failed, told[:, 1].tolist())


def _raise(ranks: Ranks, what: str, failed: Exception | None, lengths: list[int]) -> NoReturn:
    own: dict[str, Any] = {}
    if failed is not None:
        own = {"error": str(failed), "disk": isinstance(failed, OSError)}
    for rank, one in enumerate(ranks.exchange(own, what)):
        if "error" in one:
            kind = OSError if one["disk"] else ValueError
            raise kind(f"{ranks.owner}: {what}: rank {rank}: {one['error']}") from failed
    if len(set(lengths)) > 1:
        raise ValueError(
            f"{ranks.owner}: {what}: expected the same calls on every rank, got {lengths} snapshots"
        )
    raise ValueError(
        f"{ranks.owner}: {what}: expected the same weights on every rank, got others on some: "
        "record where ranks have the same, or pass DTensors"
    )
