"""Checkpoints in a series that hold the same numbers: a copy counts twice in an average."""

from __future__ import annotations

import torch

from ..checkpoints.formats import Entry
from ..checkpoints.reader import CheckpointReader
from ..checkpoints.series import Series

_SAMPLED, _SAMPLE = 256, 16  # tensors, and elements of each, that are compared first
_WINDOW = 1 << 20  # elements


def copy_notes(series: Series) -> list[str]:
    """Name the checkpoints whose tensors are all those of an earlier one, to the bit.

    Only what looks the same in a small sample is read whole.
    """
    notes = []
    seen: dict[object, list[int]] = {}
    with CheckpointReader() as reader:
        for t in range(len(series)):
            entries = _readable(series, t)
            step = -(-len(entries) // _SAMPLED)
            some = [entries[name] for name in sorted(entries)[::step]]
            shapes = tuple((name, entry.dtype, entry.shape) for name, entry in entries.items())
            sample = tuple(_bytes(reader, entry, 0, _SAMPLE) for entry in some)
            alike = seen.setdefault((frozenset(shapes), sample), [])
            for first in alike:
                if _same(reader, _readable(series, first), entries):
                    notes.append(
                        f"{series.paths[t]} holds the same numbers as {series.paths[first]}: both "
                        "count"
                    )
                    break
            else:
                alike.append(t)
    return notes


def _readable(series: Series, t: int) -> dict[str, Entry]:
    return {name: entry for name, entry in series.tensors(t).items() if entry.problem is None}


def _same(reader: CheckpointReader, first: dict[str, Entry], other: dict[str, Entry]) -> bool:
    return all(
        _bytes(reader, first[name], begin, _WINDOW) == _bytes(reader, entry, begin, _WINDOW)
        for name, entry in other.items()
        for begin in range(0, _numel(entry), _WINDOW)
    )


def _bytes(reader: CheckpointReader, entry: Entry, begin: int, most: int) -> bytes:
    out = torch.empty(min(most, _numel(entry) - begin), dtype=entry.dtype, device="cpu")
    if len(out):
        reader.read(entry, begin, out)
    return bytes(out.view(torch.uint8).numpy())


def _numel(entry: Entry) -> int:
    return entry.nbytes() // entry.dtype.itemsize
