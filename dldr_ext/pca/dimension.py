"""Which of the directions of a spectrum are kept, why, and the report that says so."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from ..tensors.constants import MAX_DIM
from .random_walk import SHORTEST, left_over, supported, walk_spectrum
from .report import _FIELDS
from .spectrum import Spectrum


class Choice(NamedTuple):
    """How many directions, what the subspace remembers of it, and what is worth a warning."""

    dim: int
    facts: dict[str, Any]
    warning: str | None


def choose(
    found: Spectrum,
    length: int,
    most: int,
    dim: int | str | None,
    explained: float | None,
    center: bool,
) -> Choice:
    """The directions that were asked for, as far as there are so many.

    Parameters
    ----------
    found : Spectrum
        Of rank 1 or more.
    length : int
        T, the number of snapshots.
    most : int
        From `asked_count`: never more.
    dim, explained, center
        As in `Trajectory.subspace`.
    """
    warning, why = None, "as asked for" if dim is not None else "the default"
    if dim == "auto":
        asked = 'dim = "auto"'
        count, why = supported(found.values[: length - 1], found.rank)
        if count == 0:
            warning = f"{asked}: no direction stands out from noise, kept the first"
            count, why = 1, "no direction stands out from noise"
    elif explained is not None:
        asked = f"explained = {explained:g}"
        count = int((found.explained(found.rank).cumsum(0) < explained).sum()) + 1
        why = "the fewest that explain this share"
    else:
        asked = f"dim = {most}" if dim is not None else "no number"
        count = most
    if count > min(most, found.rank):
        count = min(most, found.rank)
        why = "no more directions are above rounding" if count < most else f"{most} is the limit"
        if isinstance(dim, int):
            warning = (
                f"dim = {dim} is above the numerical rank of the snapshots: kept {count} directions"
            )
    walk = 1 - float(left_over(walk_spectrum(length))[count - 1]) if center else None
    facts = (length, found.rank, asked, why, walk)
    return Choice(count, dict(zip(_FIELDS, facts, strict=True)), warning)


def checked_auto(length: int, center: bool) -> None:
    """That dim="auto" has something to go by."""
    if not center:
        raise ValueError("dim: 'auto' compares centred spectra, got center=False")
    if length < SHORTEST:
        raise ValueError(
            f"dim: 'auto' needs {SHORTEST} snapshots or more to tell a spectrum from noise, got "
            f"{length}"
        )


def checked_dim(dim: int, limit: int, have: str) -> int:
    """``dim`` as an int, if 1 <= dim <= min(limit, 1024); ``have`` says where the limit is from."""
    result = operator.index(dim)
    limit = min(limit, MAX_DIM)
    if not 1 <= result <= limit:
        raise ValueError(f"dim: expected 1 <= dim <= {limit} ({have}), got {result}")
    return result


_DEFAULT_DIM = 40


def asked_count(length: int, dim: int | str | None, explained: float | None, center: bool) -> int:
    """The most directions of ``length`` snapshots that the arguments ask for."""
    if dim is not None and explained is not None:
        raise ValueError(f"expected dim or explained, got both: {dim} and {explained}")
    if explained is not None and not 0 < explained <= 1:
        raise ValueError(f"explained: expected 0 < explained <= 1, got {explained}")
    limit = length - 1 if center else length
    if isinstance(dim, str):
        if dim != "auto":
            raise ValueError(f"dim: expected a number or 'auto', got {dim!r}")
        checked_auto(length, center)
        return min(limit, MAX_DIM)
    if dim is None:
        return min(limit, MAX_DIM if explained is not None else _DEFAULT_DIM)
    return checked_dim(dim, limit, f"{length} {'centred ' * center}snapshots")
