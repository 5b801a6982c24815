"""Averages of checkpoint files, streamed into a file: see `dldr_ext.averaging`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from ..checkpoints.formats import Entry, abridged
from ..checkpoints.reader import CheckpointReader
from ..checkpoints.series import STATISTICS, Series, finite
from ..files.partial import PartialFile
from .soups import Soup, greedy_soup

Progress = Callable[[int, int], None]
_WINDOW = 1 << 20  # elements averaged at a time
_KIND, _VERSION = "soup", 1


def write_mean(
    series: Series,
    path: Path,
    weights: Sequence[float] | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Write the mean of checkpoints as a safetensors file; the memory is a few windows.

    Parameters
    ----------
    series : Series
    path : Path
        An earlier file is replaced once all is written.
    weights : sequence of float, optional
        As for `normalized_weights`.
    progress : callable, optional
        Called with the bytes read so far and in all.

    Returns
    -------
    list of str
        Notes: what is not a mean, and batch-norm statistics that must be estimated anew.

    Raises
    ------
    CheckpointError
        A tensor that a checkpoint lacks, or of another shape, or not finite.
    ValueError
        Weights that do not fit.
    """
    factors = None if weights is None else normalized_weights(series, weights)
    rows = [_matching_entries(series, t) for t in range(len(series))]
    tensors = {}
    for name, first, last in zip(series.contents[0].entries, rows[0], rows[-1], strict=True):
        dtype = first.dtype if first.dtype.is_floating_point else last.dtype
        tensors[name] = torch.empty(first.shape, dtype=dtype, device="meta")
    total, done = sum(entry.nbytes() for row in rows for entry in row), 0
    facts = {"checkpoints": [str(path) for path in series.paths], "weights": factors}
    with CheckpointReader() as reader, _new_file(path, tensors, facts) as file:
        for i, (name, tensor) in enumerate(tensors.items()):
            entries = [row[i] for row in rows]
            for begin in range(0, tensor.numel(), _WINDOW):
                size = min(_WINDOW, tensor.numel() - begin)
                window = _mean(series, reader, entries, name, begin, size, factors)
                file.write(name, begin, window)
                done += sum(size * entry.dtype.itemsize for entry in entries)
                if progress is not None:
                    progress(done, total)
    return _notes(tensors)


def write_greedy_soup(series: Series, path: Path, score: Callable[[dict[str, Any]], float]) -> Soup:
    """Write the greedy soup of checkpoints: one checkpoint and the sums are in memory.

    Parameters
    ----------
    series : Series
    path : Path
        An earlier file is replaced once all is written.
    score : callable
        As for `greedy_soup`.

    Returns
    -------
    Soup
        Its members are places in the series.
    """
    soup = greedy_soup(States(series), score)
    facts = {"checkpoints": [str(series.paths[t]) for t in soup.members], "weights": None}
    with _new_file(path, soup.state_dict, facts) as file:
        for name, tensor in soup.state_dict.items():
            file.write(name, 0, tensor)
    return soup


@contextmanager
def _new_file(
    path: Path, tensors: dict[str, Tensor], facts: dict[str, Any]
) -> Iterator[PartialFile]:
    """Open the file of a soup; it is there at the end, or nothing is."""
    with PartialFile(path, _KIND, _VERSION, tensors, facts) as file:
        try:
            yield file
            file.finish()
        except BaseException:
            file.discard()
            raise


class States(Sequence[dict[str, Tensor]]):
    """The state dicts of a series, each read from its file when it is asked for."""

    def __init__(self, series: Series) -> None:
        self._series = series

    def __len__(self) -> int:
        return len(self._series)

    @overload
    def __getitem__(self, index: int) -> dict[str, Tensor]: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[dict[str, Tensor]]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[t] for t in range(len(self))[index]]
        state = {}
        with CheckpointReader() as reader:
            for name, entry in self._series.contents[index].entries.items():
                state[name] = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
                reader.read(entry, 0, state[name].view(-1))
        return state


def _mean(
    series: Series,
    reader: CheckpointReader,
    entries: list[Entry],
    name: str,
    begin: int,
    size: int,
    factors: list[float] | None,
) -> Tensor:
    """Average a window of a tensor; of one that is not floating-point return the last."""
    first, last = entries[0], entries[-1]
    if not first.dtype.is_floating_point:
        out = torch.empty(size, dtype=last.dtype, device="cpu")
        reader.read(last, begin, out)
        return out
    sums = torch.zeros(size, dtype=torch.float64, device="cpu")
    value = torch.empty_like(sums)
    for t, entry in enumerate(entries):
        reader.read(entry, begin, value)
        if not finite(value):
            raise series.error(t, f"{name}: expected finite values, got NaN or Inf")
        sums.add_(value, alpha=1.0 if factors is None else factors[t])
    return (sums / len(entries) if factors is None else sums).to(first.dtype)


def _matching_entries(series: Series, t: int) -> list[Entry]:
    """Return the entries of one checkpoint in the order of the first."""
    first, entries = series.contents[0].entries, series.contents[t].entries
    if entries.keys() != first.keys():
        differing = ", ".join(sorted(entries.keys() ^ first.keys())[:5])
        raise series.error(
            t, f"expected the tensors of the first checkpoint, differs in {differing}"
        )
    for name, expected in first.items():
        entry = entries[name]
        if entry.shape != expected.shape:
            raise series.error(
                t, f"{name}: expected shape {expected.shape}, as in the first, got {entry.shape}"
            )
        if entry.dtype.is_floating_point != expected.dtype.is_floating_point:
            raise series.error(t, f"{name}: expected {expected.dtype}, got {entry.dtype}")
    return [entries[name] for name in first]


def normalized_weights(series: Series, weights: Sequence[float]) -> list[float]:
    """Return the weight of each checkpoint in a mean.

    Parameters
    ----------
    series : Series
    weights : sequence of float
        One for each path that the series was made of, those in a folder in the order of the series.
        A file that was given twice has the sum of both.
    """
    given = len(series) + len(series.skipped) + len(series.repeats)
    if len(weights) != given:
        raise ValueError(
            f"weights: expected {given} numbers, one for each checkpoint, got {len(weights)} for "
            f"{abridged([str(path) for path in series.paths])}"
        )
    totals = list(map(float, weights))
    for repeat, first in series.repeats.items():
        totals[first] += totals[repeat]
    kept = [totals[index] for index in series.indices]
    if not all(map(math.isfinite, kept)) or sum(kept) == 0:
        raise ValueError(f"weights: expected finite numbers whose sum is not 0, got {kept}")
    return [weight / sum(kept) for weight in kept]


def _notes(tensors: dict[str, Tensor]) -> list[str]:
    not_averaged = [name for name, tensor in tensors.items() if not tensor.dtype.is_floating_point]
    notes = (
        [f"not averaged, but as in the last one: {abridged(not_averaged)}"] if not_averaged else []
    )
    if any(name.rpartition(".")[2] in STATISTICS for name in tensors):
        notes.append(
            "batch-norm statistics were averaged, which is only a guess: estimate them anew with "
            "torch.optim.swa_utils.update_bn(loader, model)"
        )
    return notes
