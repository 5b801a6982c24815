"""The order in which a run wrote its checkpoints."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

# 10, 0.5, 1e3, 10k. A sign only after "=" or "_"; no decimals after "v" and in dates (v1.10).
_NUMBER = re.compile(
    r"(?:(?<=[=_])-)?"
    r"(?:(?<![a-zA-Z0-9.])\d+(?:\.\d+)?e[+-]?\d+(?![a-zA-Z0-9])"
    r"|(?<![v\d.])\d+\.\d+(?![\d.]*\.\d)|\d+)"
    r"(?:[kKM](?![a-zA-Z0-9]))?"
)
_LABELS = {
    "epoch": re.compile(r"(?<![a-zA-Z])(?:epochs?|ep|e)[-_=. ]*$", re.IGNORECASE),
    "step": re.compile(
        r"(?<![a-zA-Z])(?:(?:global_?)?steps?|iter(?:ation)?s?|it|updates?)[-_=. ]*$", re.IGNORECASE
    ),
}
_FIRST = re.compile(r"(?<![a-z])(?:init|initial|start|random|pretrained|base)(?![a-z])", re.I)
_DAY_FIRST = re.compile(r"(?<!\d)\d{1,2}[-_.]\d{1,2}[-_.](?:19|20)\d\d(?!\d)")  # does not sort
_FACTORS = {"k": 1e3, "K": 1e3, "M": 1e6}


def natural_key(path: str | os.PathLike[str]) -> list[tuple[int, float, str]]:
    """Return a sort key by which 2 comes before 10, 500k before 1M."""
    text, key, at = os.fspath(path), [], 0
    for found in _NUMBER.finditer(text):
        if found.start() > at:
            key.append((1, 0.0, text[at : found.start()]))
        key.append((0, _value(found[0]), ""))
        at = found.end()
    return [*key, (1, 0.0, text[at:])]


def named_progress(name: str) -> dict[str, float]:
    """Return the "epoch" and "step" that a name such as epoch=3-step=300 tells."""
    told: dict[str, float] = {}
    for found in _NUMBER.finditer(name):
        for what, label in _LABELS.items():
            if label.search(name[: found.start()].removesuffix("-") or name):
                told.setdefault(what, _value(found[0]))
    return told


def in_order(
    paths: Sequence[Path], stored: Sequence[Mapping[str, float]] | None = None
) -> tuple[list[int], list[str]]:
    """Return the order of checkpoints, as places in the list, and notes on how it was found.

    Parameters
    ----------
    paths : sequence of Path
        The files or folders in the folder of a run that stand for them.
    stored : sequence of mapping, optional
        The "epoch" and "step" that each has stored.
    """
    names = _relative(paths)
    by_name, notes = _by_name(paths, names)
    keys = None if stored is None else _comparable(stored)
    if keys is None:
        return by_name, notes
    order = sorted(by_name, key=lambda i: keys[i])
    if len(set(keys)) < len(keys):
        return order, notes
    if order == by_name or notes:
        return order, []
    return order, ["in the order of the steps in the files, which is not that of their names"]


def _by_name(paths: Sequence[Path], names: Sequence[str]) -> tuple[list[int], list[str]]:
    """Return the order by what names say; by time, if they say nothing."""
    places = range(len(paths))
    natural = sorted(places, key=lambda i: (natural_key(names[i]), names[i]))
    keys = _comparable([named_progress(name) for name in names])
    if keys is not None:
        return sorted(natural, key=lambda i: keys[i]), []
    unnumbered = [i for i in natural if not re.search(r"\d", names[i])]
    if all(map(_DAY_FIRST.search, names)):
        unnumbered = natural
    if not unnumbered or len(paths) == 1:
        return natural, []
    first = [i for i in unnumbered if _FIRST.search(names[i])]
    last = sorted(set(unnumbered).difference(first), key=lambda i: (_time(paths[i]), names[i]))
    apart = set(unnumbered)
    numbered = [i for i in natural if i not in apart]
    listed = ", ".join(names[i] for i in last[:5])
    if not last:
        notes = []
    elif numbered:
        notes = [f"at the end, without a number: {listed}"]
    else:
        notes = ["in the order of their times, as neither names nor contents tell epoch or step"]
    return first + numbered + last, notes


def _comparable(told: Sequence[Mapping[str, float]]) -> list[tuple[float, ...]] | None:
    """Return what all tell as keys; None if that does not tell them apart."""
    common = [what for what in ("epoch", "step") if all(what in one for one in told)]
    keys = [tuple(one[what] for what in common) for one in told]
    return keys if len(set(keys)) > 1 else None


def _relative(paths: Sequence[Path]) -> list[str]:
    """Return the paths from the deepest folder that all are in."""
    whole = [Path(os.path.abspath(path)) for path in paths]
    folder = Path(os.path.commonpath([path.parent for path in whole])) if whole else Path()
    return [os.fspath(path.relative_to(folder)) for path in whole]


def _time(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _value(text: str) -> float:
    if text.isdecimal():
        return int(text)
    return float(text.rstrip("kKM")) * _FACTORS.get(text[-1], 1.0)
