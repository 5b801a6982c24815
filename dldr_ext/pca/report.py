"""What a subspace remembers of how its directions were chosen, in words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..tensors.parameters import dtype_name

# What a subspace keeps of the choice, in this order.
FIELDS: dict[str, tuple[type, ...]] = {
    "snapshots": (int,),
    "rank": (int,),
    "asked": (str,),
    "why": (str,),
    "walk": (float, type(None)),
}


def checked_facts(facts: Any) -> dict[str, Any] | None:
    """Check the choice of a number of components as it comes from a constructor or a file."""
    if facts is None:
        return None
    if not isinstance(facts, Mapping) or set(facts) != set(FIELDS):
        raise ValueError(f"choice: expected the fields {sorted(FIELDS)}, got {str(facts)[:60]!r}")
    for name, kinds in FIELDS.items():
        if type(facts[name]) not in kinds:
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ValueError(f"choice: {name}: expected {expected}, got {str(facts[name])[:60]!r}")
    return {name: facts[name] for name in FIELDS}


def described(
    dim: int,
    numel: int,
    dtype: torch.dtype,
    facts: Mapping[str, Any] | None,
    ratio: Tensor | None,
) -> dict[str, str]:
    """Return what `dldr_ext.Subspace.report` says, each line under a word."""
    lines = {"subspace": f"{_directions(dim)} of {numel:,} numbers each, {dtype_name(dtype)}"}
    if facts is None:
        lines["kept"] = "all of them; how they were chosen is not known"
    else:
        length, walk = facts["snapshots"], facts["walk"]
        directions = length if walk is None else length - 1
        lines["from"] = f"{length} snapshots{'' if walk is None else ', centred'}"
        lines["asked for"] = facts["asked"]
        lines["kept"] = f"{dim} of {_directions(facts['rank'])}: {facts['why']}"
        if facts["rank"] < directions:
            lines["rank guard"] = (
                f"{_directions(directions - facts['rank'])} that rounding made: dropped"
            )
    if ratio is not None:
        lines["explained"] = f"{_percent(float(ratio.sum()))} of the variance"
        if facts is not None and facts["walk"] is not None:
            lines["explained"] += (
                f"; of a random walk of {facts['snapshots']} snapshots, {_percent(facts['walk'])}"
            )
    return lines


def report(*known: Any) -> str:
    """Return the same as text; arguments as of `described`."""
    return "\n".join(f"{name:<11} {text}" for name, text in described(*known).items())


def _directions(count: int) -> str:
    return f"{count} direction{'s' * (count != 1)}"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
