"""Which of the directions of a spectrum are kept, why, and the report that says so."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _pca
from ._params import dtype_name
from ._random_walk import SHORTEST, left_over, supported, walk_spectrum

# What a subspace keeps of the choice, in this order.
_FIELDS: dict[str, tuple[type, ...]] = {
    "snapshots": (int,),
    "rank": (int,),
    "asked": (str,),
    "why": (str,),
    "walk": (float, type(None)),
}


class Choice(NamedTuple):
    """How many directions, what the subspace remembers of it, and what is worth a warning."""

    dim: int
    facts: dict[str, Any]
    warning: str | None


def choose(
    found: _pca.Spectrum,
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


def checked_facts(facts: Any) -> dict[str, Any] | None:
    """What `choose` knew, as it comes from the constructor or a file."""
    if facts is None:
        return None
    if not isinstance(facts, Mapping) or set(facts) != set(_FIELDS):
        raise ValueError(f"choice: expected the fields {sorted(_FIELDS)}, got {str(facts)[:60]!r}")
    for name, kinds in _FIELDS.items():
        if type(facts[name]) not in kinds:
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"choice: {name}: expected {expected}, got {str(facts[name])[:60]!r}")
    return {name: facts[name] for name in _FIELDS}


def described(
    dim: int,
    numel: int,
    dtype: torch.dtype,
    facts: Mapping[str, Any] | None,
    ratio: Tensor | None,
) -> dict[str, str]:
    """What `Subspace.report` says, each under a word."""
    lines = {"subspace": f"{_directions(dim)} of {numel:,} numbers each, {dtype_name(dtype)}"}
    if facts is None:
        lines["kept"] = "all of them; how they were chosen is not known"
    else:
        length, walk = facts["snapshots"], facts["walk"]
        there = length if walk is None else length - 1
        lines["from"] = f"{length} snapshots{'' if walk is None else ', centred'}"
        lines["asked for"] = facts["asked"]
        lines["kept"] = f"{dim} of {_directions(facts['rank'])}: {facts['why']}"
        if facts["rank"] < there:
            lines["rank guard"] = (
                f"{_directions(there - facts['rank'])} that rounding made: dropped"
            )
    if ratio is not None:
        lines["explained"] = f"{_percent(float(ratio.sum()))} of the variance"
        if facts is not None and facts["walk"] is not None:
            lines["explained"] += (
                f"; of a random walk of {facts['snapshots']} snapshots, {_percent(facts['walk'])}"
            )
    return lines


def report(*known: Any) -> str:
    """The same as text; arguments as in `described`."""
    return "\n".join(f"{name:<11} {text}" for name, text in described(*known).items())


def _directions(count: int) -> str:
    return f"{count} direction{'s' * (count != 1)}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
