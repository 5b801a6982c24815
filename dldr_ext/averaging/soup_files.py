"""Averages of checkpoint files, streamed into a file: see `dldr_ext.averaging`."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from ..checkpoints.errors import CheckpointError
from ..checkpoints.formats import Entry, abridged
from ..checkpoints.layouts import STATISTICS
from ..checkpoints.reader import CheckpointReader
from ..checkpoints.series import Series, finite
from ..tensors.parameters import dtype_name
from .folders import is_distributed, is_of_model
from .kinds import COMPLEX, FLOAT, INTEGER, OTHER, accumulator, kind_of_dtype
from .outputs import (
    TORCH,
    Output,
    check_inputs,
    check_space,
    check_tensors,
    folder_notes,
    hollow,
    parse_output,
    writing,
)
from .soups import Soup, greedy_soup
from .weights import normalized, schedule_weights

Progress = Callable[[int, int], None]
_WINDOW = 1 << 20  # elements averaged at a time
_FACTORS = ("lora_A", "lora_B")


def write_mean(
    series: Series,
    path: str | os.PathLike[str],
    weights: Sequence[float] | str | None = None,
    progress: Progress | None = None,
) -> list[str]:
    """Write the mean of checkpoints; the memory is a few windows.

    Parameters
    ----------
    series : Series
        All tensors that its patterns let through are averaged.
    path : path
        Its suffix says the format; a folder ends with a slash: see `outputs.parse_output`. An
        earlier file is replaced once all is written.
    weights : sequence of float or str, optional
        As for `normalized_weights`.
    progress : callable, optional
        Called with the bytes read so far and in all.

    Returns
    -------
    list of str
        Notes: what was left out, what is not a mean, and what must be estimated anew.

    Raises
    ------
    CheckpointError
        A tensor that a checkpoint lacks, or of another shape or kind, or not finite; codes (float8,
        quantized, ...) that differ.
    ValueError
        Weights that do not fit; a path that cannot be written to, or is one of the checkpoints.
    """
    output = _checked_output(series, path)
    rows = _matching_rows(series)
    names = list(series.tensors(0))
    factors = normalized_weights(series, weights)
    tensors = _hollow_means(output, names, rows)
    check_tensors(output, tensors, series.contents[0])
    check_space(output, sum(tensor.nbytes for tensor in tensors.values()))
    total, done = sum(entry.nbytes() for row in rows for entry in row), 0
    facts = provenance(series, range(len(series)), factors)
    mean = _Mean(series, None if weights is None else factors)
    written: set[int] = set()
    with (
        CheckpointReader() as reader,
        writing(output, tensors, facts, series.contents[0]) as file,
    ):
        for i, (name, tensor) in enumerate(tensors.items()):
            entries = [row[i] for row in rows]
            new = id(tensor) not in written
            written.add(id(tensor))
            for begin in range(0, tensor.numel(), _WINDOW):
                size = min(_WINDOW, tensor.numel() - begin)
                if new:
                    file.write(name, begin, mean.window(reader, entries, name, begin, size))
                done += sum(size * entry.dtype.itemsize for entry in entries)
                if progress is not None:
                    progress(done, total)
        series.check_unchanged()
    return [*soup_notes(series, output), *mean.notes()]


def write_greedy_soup(
    series: Series, path: str | os.PathLike[str], score: Callable[[dict[str, Any]], float]
) -> Soup:
    """Write the greedy soup of checkpoints: one checkpoint and the sums are in memory.

    Parameters
    ----------
    series : Series
    path : path
        As for `write_mean`.
    score : callable
        As for `greedy_soup`.

    Returns
    -------
    Soup
        Its members are places in the series.
    """
    output = _checked_output(series, path)
    rows = _matching_rows(series)
    tensors = {name: hollow(e.shape, e.dtype) for name, e in series.tensors(0).items()}
    check_tensors(output, tensors, series.contents[0])
    check_space(output, max(sum(entry.nbytes() for entry in row) for row in rows))
    soup = greedy_soup(States(list(tensors), rows), score)
    facts = provenance(series, soup.members, [1 / len(soup.members)] * len(soup.members))
    tensors = {name: hollow(value.shape, value.dtype) for name, value in soup.state_dict.items()}
    with writing(output, tensors, facts, series.contents[soup.members[0]]) as file:
        for name, value in soup.state_dict.items():
            if value.numel():
                file.write(name, 0, value)
        series.check_unchanged()
    return soup


def verify_mean(
    series: Series,
    path: str | os.PathLike[str],
    members: Sequence[int],
    weights: Sequence[float],
) -> float:
    """Read an average back and compare it with one that is computed another way.

    Parameters
    ----------
    series : Series
        What `write_mean` or `write_greedy_soup` was given, afterwards.
    path : path
        Of the average.
    members : sequence of int
        Places of its checkpoints in the series.
    weights : sequence of float
        One for each member; they sum to 1.

    Returns
    -------
    float
        The largest difference, as a share of the rounding that it may have: at most 1.

    Raises
    ------
    CheckpointError
        A tensor is not there, or is another one; a number differs by more than a rounding.
    """
    rows = _matching_rows(series)
    rows = [rows[t] for t in members]
    place = Path(os.path.realpath(path))  # a folder or a file
    result = Series([place], rows=False)
    found, largest = result.contents[0].entries, 0.0
    with CheckpointReader() as reader:
        for i, name in enumerate(series.tensors(0)):
            entries = [row[i] for row in rows]
            shape, numel = entries[0].shape, math.prod(entries[0].shape)
            if name not in found or found[name].shape != shape:
                raise result.error(0, f"{name}: expected it, of shape {shape}, as written")
            for begin in range(0, numel, _WINDOW):
                size = min(_WINDOW, numel - begin)
                error = _error(reader, entries, found[name], weights, begin, size)
                if not error <= 1:
                    problem = f"{name}: expected the mean of the checkpoints, read another back"
                    raise result.error(0, problem)
                largest = max(largest, error)
    return largest


def _error(
    reader: CheckpointReader,
    entries: list[Entry],
    written: Entry,
    weights: Sequence[float],
    begin: int,
    size: int,
) -> float:
    """Return the largest error in a window of a mean, as a share of what rounding may make."""

    def read(entry: Entry, dtype: torch.dtype) -> Tensor:
        out = torch.empty(size, dtype=dtype, device="cpu")
        reader.read(entry, begin, out)
        return out

    if kind_of_dtype(written.dtype) not in (FLOAT, COMPLEX):
        pair = read(entries[-1], entries[-1].dtype), read(written, written.dtype)
        alike = pair[0].dtype == pair[1].dtype
        return 0.0 if alike and torch.equal(*(x.view(torch.uint8) for x in pair)) else math.inf
    mean = torch.zeros(size, dtype=accumulator(written.dtype), device="cpu")
    magnitude = mean.abs()
    for weight, entry in reversed([*zip(weights, entries, strict=True)]):  # the last one first
        value = read(entry, mean.dtype)
        mean += weight * value
        magnitude += abs(weight) * value.abs()
    info, back = torch.finfo(written.dtype), read(written, mean.dtype)
    rounding = info.eps * mean.abs() + info.smallest_normal * info.eps
    rounding += 4 * len(entries) * torch.finfo(torch.float64).eps * magnitude
    constant = (back == value) | (back.isnan() & value.isnan())  # the same in all checkpoints
    errors = ((back - mean).abs() / rounding).masked_fill(~mean.isfinite() & constant, 0)
    return math.inf if errors.isnan().any() else float(errors.max())


def provenance(series: Series, members: Sequence[int], weights: Sequence[float]) -> dict[str, Any]:
    """Return what is kept in an average: its checkpoints, their weights and hashes of their files.

    Parameters
    ----------
    series : Series
    members : sequence of int
        Places in the series.
    weights : sequence of float
        One for each member.
    """
    files = [file for t in members for file in series.contents[t].files]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        digests = threads.map(_sha256, files)
        return {
            "checkpoints": [str(series.paths[t]) for t in members],
            "weights": list(weights),
            "sha256": {str(file): digest for file, digest in zip(files, digests, strict=True)},
        }


def _sha256(path: Path) -> str:
    digest, piece = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(piece):
            digest.update(piece[:size])
    return digest.hexdigest()


def soup_notes(series: Series, output: Output) -> list[str]:
    """Say what an average of checkpoints lacks, and what it is only a guess of.

    Parameters
    ----------
    series : Series
    output : Output
    """
    tensors = series.tensors(0)
    left_out = [name for name in series.contents[0].entries if name not in tensors]
    notes = [f"left out (by the patterns): {abridged(left_out)}"] if left_out else []
    for pattern in (*series.include, *series.exclude):
        if not any(fnmatchcase(name, pattern) for name in series.contents[0].entries):
            notes.append(f"no tensor has a name as {pattern}")
    notes += dict.fromkeys(note for contents in series.contents for note in contents.notes)
    others = (name for t in range(1, len(series)) for name in series.tensors(t))
    if aliases := [name for name in dict.fromkeys(others) if name not in tensors]:
        notes.append(f"left out (tied to another tensor, which is averaged): {abridged(aliases)}")
    if any(name.rpartition(".")[2] in STATISTICS for name in tensors):
        notes.append(
            "batch-norm statistics were averaged, which is only a guess: estimate them anew with "
            "torch.optim.swa_utils.update_bn(loader, model)"
        )
    if len(series) > 1 and all(any(part in name for name in tensors) for part in _FACTORS):
        notes.append(
            "lora_A and lora_B were averaged each: their product is not the mean of the products"
        )
    return notes + folder_notes(output, series.contents)


def _checked_output(series: Series, path: str | os.PathLike[str]) -> Output:
    first = series.contents[0]
    output = parse_output(path, of_folders=is_of_model(first) or is_distributed(first))
    check_inputs(output, series)
    return output


def _hollow_means(output: Output, names: list[str], rows: list[list[Entry]]) -> dict[str, Tensor]:
    """Return the dtypes and shapes of means; of one object where names are tied in all files."""
    tensors = {}
    tied: dict[Any, Tensor] = {}
    for name, *entries in zip(names, *rows, strict=True):
        first, last = entries[0], entries[-1]
        dtype = last.dtype if kind_of_dtype(first.dtype) == INTEGER else first.dtype
        key = tuple(map(_same_tensor, entries)) if output.form == TORCH and first.nbytes() else name
        tensors[name] = tied.setdefault(key, hollow(first.shape, dtype))
    return tensors


class States(Sequence[dict[str, Tensor]]):
    """State dicts in files, each read when it is asked for."""

    def __init__(self, names: list[str], rows: list[list[Entry]]) -> None:
        self._names, self._rows = names, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> dict[str, Tensor]: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[dict[str, Tensor]]: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            return [self[t] for t in range(len(self))[index]]
        with CheckpointReader() as reader:
            return reader.state(dict(zip(self._names, self._rows[index], strict=True)))


class _Mean:
    """The mean of tensors in a series, and what is to be said about it."""

    def __init__(self, series: Series, factors: list[float] | None) -> None:
        self._series, self._factors = series, factors
        self._differing: dict[str, int] = {}  # names, in order, and their dimensions
        self._not_finite: dict[str, None] = {}

    def window(
        self, reader: CheckpointReader, entries: list[Entry], name: str, begin: int, size: int
    ) -> Tensor:
        """Average a window of a tensor; of integers return the last, codes must not differ."""
        if kind_of_dtype(entries[0].dtype) in (FLOAT, COMPLEX):
            return self._numbers(reader, entries, name, begin, size)
        last = torch.empty(size, dtype=entries[-1].dtype, device="cpu")
        reader.read(entries[-1], begin, last)
        value = torch.empty_like(last)
        for t, entry in enumerate(entries[:-1]):
            reader.read(entry, begin, value)
            if torch.equal(value.view(torch.uint8), last.view(torch.uint8)):
                continue
            if kind_of_dtype(entry.dtype) == OTHER:
                raise self._series.error(
                    t,
                    f"{name}: expected the {dtype_name(entry.dtype)} of the last checkpoint, got "
                    "others: codes have no mean; exclude leaves them out",
                )
            self._differing.setdefault(name, len(entry.shape))
        return last

    def _numbers(
        self, reader: CheckpointReader, entries: list[Entry], name: str, begin: int, size: int
    ) -> Tensor:
        sums = torch.zeros(size, dtype=accumulator(entries[0].dtype), device="cpu")
        value = torch.empty_like(sums)
        constant: tuple[Tensor, Tensor] | None = None  # where not finite, and what is there
        for t, entry in enumerate(entries):
            reader.read(entry, begin, value)
            if constant is not None or not _finite(value):
                where = value.isfinite().logical_not()
                if t == 0:
                    constant = where, value[where]
                if constant is None or not _same_values(value, where, constant):
                    raise self._series.error(
                        t,
                        f"{name}: expected finite values, or the same in all checkpoints, got NaN "
                        "or Inf; exclude leaves a tensor out",
                    )
                value[where] = 0
            sums.add_(value, alpha=1.0 if self._factors is None else self._factors[t])
        mean = sums / len(entries) if self._factors is None else sums
        if constant is not None:
            mean[constant[0]] = constant[1]
            self._not_finite[name] = None
        result = mean.to(entries[0].dtype)
        if constant is None and not _finite(result):
            raise self._series.error(
                0, f"{name}: the mean overflows {dtype_name(result.dtype)}, the dtype of this one"
            )
        return result

    def notes(self) -> list[str]:
        """Return what must be known about the mean."""
        notes = []
        if self._differing:
            notes.append(f"not averaged, but as in the last one: {abridged([*self._differing])}")
        if packed := [name for name, dims in self._differing.items() if dims > 1]:
            notes.append(
                f"if integers such as {packed[0]} are packed weights, the average is of no use: "
                "average the weights that they were made of"
            )
        if self._not_finite:
            names = abridged([*self._not_finite])
            notes.append(f"NaN or Inf, the same in every checkpoint, which are kept: {names}")
        return notes


def _finite(values: Tensor) -> bool:
    return finite(torch.view_as_real(values) if values.is_complex() else values)


def _same_values(value: Tensor, where: Tensor, constant: tuple[Tensor, Tensor]) -> bool:
    if not torch.equal(where, constant[0]):
        return False
    found, expected = value[where], constant[1]
    return bool(((found == expected) | (found.isnan() & expected.isnan())).all())


def _matching_rows(series: Series) -> list[list[Entry]]:
    """Return the entries of each checkpoint in the order of the first."""
    if not series.tensors(0):
        names = abridged(list(series.contents[0].entries))
        raise ValueError(f"include, exclude: expected patterns that let a tensor through: {names}")
    rows: list[list[Entry]] = []
    while len(rows) < len(series):
        try:
            rows.append(_matching_entries(series, len(rows)))
        except CheckpointError as error:
            if not series.skip_bad:
                raise
            series.drop(error)
    return rows


def _matching_entries(series: Series, t: int) -> list[Entry]:
    """Return the entries of one checkpoint in the order of the first.

    A name that one of them lacks is that of a tensor which the other has tied to it.
    """
    first, entries = series.tensors(0), series.tensors(t)
    entries |= _aliases(first, entries)
    for name in _aliases(entries, first):
        del entries[name]
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
        problem = expected.problem or entry.problem
        if problem is not None:
            raise series.error(
                t, f"{name}: expected numbers, found {problem}; exclude leaves a tensor out"
            )
        kinds = kind_of_dtype(expected.dtype), kind_of_dtype(entry.dtype)
        if kinds[0] != kinds[1] or (kinds[0] == OTHER and expected.dtype != entry.dtype):
            found = dtype_name(entry.dtype)
            raise series.error(
                t,
                f"{name}: expected {dtype_name(expected.dtype)}, as in the first, or another "
                f"{kinds[0]} dtype, got {found}",
            )
    return [entries[name] for name in first]


def _aliases(entries: dict[str, Entry], others: dict[str, Entry]) -> dict[str, Entry]:
    """Return for names that only ``entries`` has what ``others`` has of tensors tied to them."""
    found: dict[str, Entry] = {}
    if entries.keys() <= others.keys():
        return found
    tied = {_same_tensor(entry): others[name] for name, entry in entries.items() if name in others}
    for name, entry in entries.items():
        if name not in others and entry.nbytes() and _same_tensor(entry) in tied:
            found[name] = tied[_same_tensor(entry)]
    return found


def _same_tensor(entry: Entry) -> tuple[Any, ...]:
    """Return a key that is equal for two names of one tensor, in one layout."""
    return entry.place(), entry.shape, entry.stride


def normalized_weights(series: Series, weights: Sequence[float] | str | None) -> list[float]:
    """Return the weight of each checkpoint in a mean; they sum to 1.

    Parameters
    ----------
    series : Series
    weights : sequence of float or str, optional
        One for each path that the series was made of, those in a folder in the order of the series.
        A file that was given twice has the sum of both. A string: as for `schedule_weights`. By
        default all are equal.
    """
    if weights is None or isinstance(weights, str):
        return schedule_weights(weights or "mean", len(series))
    given = len(series) + len(series.skipped) + len(series.repeats)
    if len(weights) != given:
        raise ValueError(
            f"weights: expected {given} numbers, one for each checkpoint, got {len(weights)} for "
            f"{abridged([str(path) for path in series.paths])}"
        )
    totals = list(map(float, weights))
    for repeat, first in series.repeats.items():
        totals[first] += totals[repeat]
    return normalized([totals[index] for index in series.indices])
