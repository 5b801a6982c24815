"""Collective transactions: calls that succeed on all ranks or on none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from .process_group import Ranks


class RankErrors:
    """How an error of one rank is told to the others, and raised on all of them."""

    def told(self, error: Exception) -> dict[str, Any]:
        """Return what the other ranks are told, as JSON can hold it."""
        return {"error": str(error), "disk": isinstance(error, OSError)}

    def raised(self, call: str, rank: int, details: dict[str, Any]) -> Exception:
        """Return the error to raise; ``call`` names the call and its owner."""
        kind = OSError if details["disk"] else ValueError
        return kind(f"{call}: rank {rank}: {details['error']}")


@contextmanager
def all_or_none(
    ranks: Ranks,
    what: str,
    length: Callable[[], int],
    undo: Callable[[], None] | None = None,
    sample: int = 0,
    errors: RankErrors | None = None,
) -> Iterator[None]:
    """Do what is inside on all ranks or, if one of them fails, on none.

    The ranks tell each other three numbers; more only where they differ.

    Parameters
    ----------
    ranks : Ranks
    what : str
        The call, for messages.
    length : callable
        The number of snapshots afterwards: the same on every rank.
    undo : callable, optional
        For a rank that did not fail where another one did.
    sample : int
        Of the weights: the same on every rank.
    errors : RankErrors, optional
        By default OSError where the error was one, else ValueError.

    Raises
    ------
    OSError, ValueError
        On every rank, naming the one that failed; or what ``errors`` makes.
    """
    failed: Exception | None = None
    try:
        yield
    except Exception as error:
        failed = error
    numbers = [int(failed is not None), -1 if failed is not None else length(), sample]
    gathered = ranks.gathered(torch.tensor(numbers, device=ranks.device), what)
    table = torch.stack(gathered).cpu()
    if not bool(table[:, 0].any()) and bool((table == table[0]).all()):
        return
    if failed is None and undo is not None:
        undo()
    _raise(ranks, what, failed, table[:, 1].tolist(), errors or RankErrors())


def _raise(
    ranks: Ranks, what: str, failed: Exception | None, lengths: list[int], errors: RankErrors
) -> NoReturn:
    call = f"{ranks.owner}: {what}"
    for rank, details in enumerate(ranks.exchange(errors.told(failed) if failed else {}, what)):
        if details:
            raise errors.raised(call, rank, details) from failed
    if len(set(lengths)) > 1:
        raise ValueError(f"{call}: expected the same calls on every rank, got {lengths} snapshots")
    raise ValueError(
        f"{call}: expected the same weights on every rank, got others on some: record where ranks "
        "have the same, or pass DTensors"
    )
