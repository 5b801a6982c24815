"""Averages of checkpoints as a file, streamed: see `dldr_ext.averaging`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from ..checkpoints.formats import Entry
from ..checkpoints.reader import CheckpointReader
from ..checkpoints.series import STATISTICS, Series, abridged, finite
from ..files.partial import PartialFile
from .soups import Soup, greedy_soup

Progress = Callable[[int, int], None]
_WINDOW = 1 << 20  # elements averaged at a time
_KIND, _VERSION = "soup", 1


def soup(
    series: Series,
    path: Path,
    weights: Sequence[float] | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Writes the mean of checkpoints as a safetensors file; the memory is a few windows.

    Parameters
    ----------
    series : Series
    path : Path
        An earlier file is replaced once all is written.
    weights : sequence of float, optional
        One for each checkpoint in the list that the series was made of, divided by their sum.
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
    shares = _shares(series, weights)
    rows = [_matching(series, t) for t in range(len(series))]
    tensors = {}
    for name, first, last in zip(series.contents[0].entries, rows[0], rows[-1], strict=True):
        dtype = first.dtype if first.dtype.is_floating_point else last.dtype
        tensors[name] = torch.empty(first.shape, dtype=dtype, device="meta")
    total, done = sum(entry.nbytes() for row in rows for entry in row), 0
    facts = {"checkpoints": [str(path) for path in series.paths], "weights": shares}
    with CheckpointReader() as pieces, PartialFile(path, _KIND, _VERSION, tensors, facts) as file:
        try:
            for i, (name, tensor) in enumerate(tensors.items()):
                for begin in range(0, tensor.numel(), _WINDOW):
                    size = min(_WINDOW, tensor.numel() - begin)
                    entries = [row[i] for row in rows]
                    file.write(
                        name, begin, _mean(series, pieces, entries, name, begin, size, shares)
                    )
                    done += sum(size * entry.dtype.itemsize for entry in entries)
                    if progress is not None:
                        progress(done, total)
            file.finish()
        except BaseException:
            file.discard()
            raise
    return _notes(tensors)


def greedy(series: Series, path: Path, score: Callable[[dict[str, Any]], float]) -> Soup:
    """Writes the greedy soup (see `greedy_soup`): one checkpoint and the sums are in memory."""
    found = greedy_soup(States(series), score)
    facts = {"checkpoints": [str(series.paths[t]) for t in found.members], "weights": None}
    state = found.state_dict
    with PartialFile(path, _KIND, _VERSION, state, facts) as file:
        try:
            for name, tensor in state.items():
                file.write(name, 0, tensor)
            file.finish()
        except BaseException:
            file.discard()
            raise
    return found


class States(Sequence[dict[str, Tensor]]):
    """The state dicts of a series, each read when it is asked for."""

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
        result = {}
        with CheckpointReader() as pieces:
            for name, entry in self._series.contents[index].entries.items():
                result[name] = torch.empty(entry.shape, dtype=entry.dtype, device="cpu")
                pieces.read(entry, 0, result[name].view(-1))
        return result


def _mean(
    series: Series,
    pieces: CheckpointReader,
    entries: list[Entry],
    name: str,
    begin: int,
    size: int,
    shares: list[float] | None,
) -> Tensor:
    """Part of the mean, or of the last one if it is not floating-point."""
    first, last = entries[0], entries[-1]
    if not first.dtype.is_floating_point:
        out = torch.empty(size, dtype=last.dtype, device="cpu")
        pieces.read(last, begin, out)
        return out
    sums = torch.zeros(size, dtype=torch.float64, device="cpu")
    value = torch.empty_like(sums)
    for t, entry in enumerate(entries):
        pieces.read(entry, begin, value)
        if not finite(value):
            raise series.error(t, f"{name}: expected finite values, got NaN or Inf")
        sums.add_(value, alpha=1.0 if shares is None else shares[t])
    return (sums / len(entries) if shares is None else sums).to(first.dtype)


def _matching(series: Series, t: int) -> list[Entry]:
    """The entries of one checkpoint in the order of the first."""
    first, own = series.contents[0].entries, series.contents[t].entries
    if own.keys() != first.keys():
        differing = ", ".join(sorted(own.keys() ^ first.keys())[:5])
        raise series.error(
            t, f"expected the tensors of the first checkpoint, differs in {differing}"
        )
    for name, entry in first.items():
        if own[name].shape != entry.shape:
            raise series.error(
                t, f"{name}: expected shape {entry.shape}, as in the first, got {own[name].shape}"
            )
        if own[name].dtype.is_floating_point != entry.dtype.is_floating_point:
            raise series.error(t, f"{name}: expected {entry.dtype}, got {own[name].dtype}")
    return [own[name] for name in first]


def _shares(series: Series, weights: Sequence[float] | None) -> list[float] | None:
    if weights is None:
        return None
    given = len(series) + len(series.skipped)
    if len(weights) != given:
        raise ValueError(
            f"weights: expected {given} numbers, one for each checkpoint, got {len(weights)}"
        )
    kept = [float(weights[index]) for index in series.indices]
    if not all(map(math.isfinite, kept)) or sum(kept) == 0:
        raise ValueError(f"weights: expected finite numbers whose sum is not 0, got {kept}")
    return [weight / sum(kept) for weight in kept]


def _notes(tensors: dict[str, Tensor]) -> list[str]:
    whole = [name for name, tensor in tensors.items() if not tensor.dtype.is_floating_point]
    notes = [f"not averaged, but as in the last one: {abridged(whole)}"] if whole else []
    if any(name.rpartition(".")[2] in STATISTICS for name in tensors):
        notes.append(
            "batch-norm statistics were averaged, which is only a guess: estimate them anew with "
            "torch.optim.swa_utils.update_bn(loader, model)"
        )
    return notes
