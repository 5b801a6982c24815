"""Checkpoints of one model as rows of numbers, of which any columns can be read."""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import foreign, state_dicts
from .discovery import Found, discover
from .distributed import read_folder
from .errors import CheckpointError
from .formats import Contents, Entry, abridged, read_contents, status_of
from .layouts import (
    TIED,
    Layout,
    check_no_more,
    copy_notes,
    fits_model,
    layout_of_file,
    layout_of_model,
    placed_in,
    row_of,
    selected,
)
from .order import in_order, natural_key
from .reader import CheckpointReader
from .state_dicts import is_logged


class Series:
    """Checkpoints with the same tensors: opened, not read yet.

    Parameters
    ----------
    paths : path or iterable of paths
        Files and folders, as `Trajectory.from_checkpoints` takes them.
    model : nn.Module, optional
        Its trainable parameters make up a row, in its order; it may be on the meta device. Without
        one a row is all dense floating-point tensors of the first checkpoint, in the order of its
        file, tied ones once, without the running statistics of batch norm.
    include, exclude : str or sequence of str
        Patterns of names (``encoder.*``): those that match an ``include``, if there is any, and no
        ``exclude``.
    key : str, optional
        Where the state dict is in a file, nested keys joined by dots; or what precedes the names
        of its tensors.
    skip_bad : bool
        Go on without checkpoints that cannot be used; they are then in `skipped`.
    as_given : bool
        Keep the order of ``paths``, and put in order only what is in one folder: by the epoch and
        the step that files store, then by the numbers in names, then by time. False: put all in
        order.
    rows : bool
        False: no row is made up, and `tensors` alone is asked for.

    Attributes
    ----------
    paths : list of Path
        The checkpoints in use, T of them.
    indices : list of int
        The place of each in the list that was given, each folder in the place of its checkpoints.
    arguments : list of int
        For each place in that list the place of the path, file or folder, that it came from.
    repeats : dict of int to int
        Places in that list of the same files once more, which do not count, and of the first.
    include, exclude, key
        As given.
    folders : set of Path
        Those that the checkpoints lie in.
    contents : list of Contents
        All tensors in each.
    names : list of str
        Of the tensors in a row.
    shapes : list of tuple of int
        Of the same tensors.
    numel : int
        Elements in a row, n.
    notes : list of str
        What was left out, and other things worth knowing.
    decisions : list of str
        Those of the notes that say which files, or tensors in them, were not taken although they
        might have been meant, and by what the others were put in order.
    skipped : list of CheckpointError
        One for each checkpoint that is not used.

    Raises
    ------
    CheckpointError
        Missing, truncated, corrupt, without the tensors of the first one (or of the model) or with
        other shapes: with its index and path.
    ValueError
        No checkpoint is left; no tensor matches the patterns.

    See Also
    --------
    dldr_ext.Trajectory.from_checkpoints : records a trajectory from them.

    Examples
    --------
    >>> import os, tempfile, torch
    >>> folder = tempfile.mkdtemp()
    >>> for epoch in range(3):
    ...     torch.save({"weight": torch.ones(2, 3) * epoch}, os.path.join(folder, f"{epoch}.pt"))
    >>> series = Series(folder)
    >>> len(series), series.numel, series.names
    (3, 6, ['weight'])
    """

    def __init__(
        self,
        paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
        model: nn.Module | None = None,
        *,
        include: str | Sequence[str] = (),
        exclude: str | Sequence[str] = (),
        key: str | None = None,
        skip_bad: bool = False,
        as_given: bool = True,
        rows: bool = True,
    ) -> None:
        include = [include] if isinstance(include, str) else list(include)
        exclude = [exclude] if isinstance(exclude, str) else list(exclude)
        self.include, self.exclude, self.key = include, exclude, key
        self.skip_bad = skip_bad
        self.notes: list[str] = []
        self.skipped: list[CheckpointError] = []
        self.paths: list[Path] = []
        self.contents: list[Contents] = []
        self.indices: list[int] = []
        self._rows: list[list[Entry]] = []
        found, self.decisions = discover(paths)
        self.folders = {folder for one in found for folder in (one.path.parent, one.entry.parent)}
        self.arguments = [one.argument for one in found]
        self.repeats = {i: one.same for i, one in enumerate(found) if one.same is not None}
        layout = None if model is None else layout_of_model(model, include, exclude)
        if not rows:
            layout = Layout([], [], [])
        copies = False  # what the first checkpoint has
        first_left_out: dict[str, list[str]] = {}
        fits = None if model is None or layout is None else partial(fits_model, layout=layout)
        for index, one in enumerate(found):
            if one.same is not None:
                continue
            path = one.path
            try:
                if problem := foreign.of_path(path):
                    raise CheckpointError(path, problem)
                read = read_folder if path.is_dir() else read_contents
                contents = read(path, key, fits)
                statuses = [status_of(file) for file in contents.files]
                contents = contents._replace(statuses=statuses)
                if model is None:
                    contents = _without_logged(contents)
                if contents.kind == "soup":
                    self.decisions.append(f"{path} is an average itself, and counts as one")
                elif contents.kind is not None:
                    raise CheckpointError(
                        path, f"expected a checkpoint, found a {contents.kind} saved by dldr_ext"
                    )
                if model is None and rows:
                    in_file, left_out = layout_of_file(path, contents, include, exclude)
                    if layout is None:
                        layout, first_left_out = in_file, left_out
                    layout = self._untied(layout, in_file, first_left_out)
                    check_no_more(path, in_file, layout)
                assert layout is not None
                placed, prefix, is_copy = layout, "", contents.is_copy
                if model is not None:
                    placed, prefix, notes = placed_in(path, contents.entries, layout)
                    self.decisions += notes
                    is_copy = is_copy or state_dicts.is_copy(prefix)
                row = row_of(path, contents, placed, prefix, model is not None)
                if self.paths and is_copy != copies:
                    one_kind, other = ("a copy (EMA, teacher, ...)", "weights in training")
                    raise CheckpointError(
                        path,
                        f"expected {one_kind if copies else other}, as in the first checkpoint, "
                        f"found {other if copies else one_kind}: name with the key what to take",
                    )
                copies = is_copy
            except CheckpointError as error:
                if not skip_bad:
                    raise error.at(index) from error.__cause__
                self.skipped.append(error.at(index))
                continue
            self._rows.append(row)
            self.notes += [note for note in contents.notes if note not in self.notes]
            self.decisions += contents.passed_over
            self.paths.append(path)
            self.contents.append(contents)
            self.indices.append(index)
        if layout is None or not self.paths:
            raise ValueError(f"checkpoints: none can be used; the first: {self.skipped[0]}")
        self.notes = [
            *(f"left out ({why}): {abridged(names)}" for why, names in first_left_out.items()),
            *(copy_notes(layout.names) if model is None else ()),
            *self.notes,
        ]
        self._put_in_order(found, as_given)
        self.decisions = list(dict.fromkeys(self.decisions))
        self.notes += self.decisions
        self.names, self.shapes = layout.names, layout.shapes
        sizes = [math.prod(shape) for shape in self.shapes]
        self._starts = [0, *accumulate(sizes)]
        self.numel = self._starts[-1]

    def _untied(self, layout: Layout, other: Layout, left_out: dict[str, list[str]]) -> Layout:
        """Return the layout with what is tied in all checkpoints so far, and not in another."""
        tied = left_out.get(TIED, [])
        apart = set(other.names) & set(tied)
        if not apart or not self.contents:
            return layout
        if not all(apart <= contents.entries.keys() for contents in self.contents):
            return layout
        entries = self.contents[0].entries
        kept = [name for name in entries if name in apart or name in layout.names]
        layout = Layout(kept, [entries[name].shape for name in kept], [[name] for name in kept])
        rows = zip(self.paths, self.contents, strict=True)
        self._rows = [row_of(path, contents, layout, "", False) for path, contents in rows]
        left_out[TIED] = [name for name in tied if name not in apart]
        if not left_out[TIED]:
            del left_out[TIED]
        return layout

    def _put_in_order(self, found: list[Found], as_given: bool) -> None:
        """Sort the checkpoints of each run by the steps that they tell."""
        runs: dict[object, list[int]] = {}
        for t, index in enumerate(self.indices):
            run = found[index].argument if as_given else found[index].entry.parent
            runs.setdefault(run, []).append(t)
        blocks = list(runs.values())
        if not as_given:
            if all(len(block) == 1 for block in blocks):
                blocks = [list(range(len(self)))]
            blocks.sort(key=lambda block: natural_key(self.paths[block[0]].parent))
        order: list[int] = []
        for block in blocks:
            entries = [found[self.indices[t]].entry for t in block]
            stored = [_stored_progress(self.paths[t], self.contents[t]) for t in block]
            places, notes = in_order(entries, stored)
            order += [block[i] for i in places]
            self.decisions += notes
            if len({found[self.indices[t]].argument for t in block}) == 1:
                # Of a folder: its checkpoints have their places in it from now on.
                in_folder = [self.indices[t] for t in block]
                for t, i in zip((block[i] for i in places), in_folder, strict=True):
                    self.indices[t] = i
        self._keep(order)

    def _keep(self, places: Sequence[int]) -> None:
        """Go on with the checkpoints at some places, in their order."""
        lists: tuple[list[Any], ...] = (self.paths, self.contents, self.indices, self._rows)
        for of_each in lists:
            of_each[:] = [of_each[t] for t in places]

    def __len__(self) -> int:
        """Return the number of checkpoints, T."""
        return len(self.paths)

    def tensors(self, t: int) -> dict[str, Entry]:
        """Return the tensors of checkpoint ``t`` that the patterns let through, of any kind.

        Parameters
        ----------
        t : int

        Returns
        -------
        dict of str to Entry
        """
        entries = self.contents[t].entries
        patterns = (self.include, self.exclude)
        return {name: entry for name, entry in entries.items() if selected(name, *patterns)}

    def match(self, other: Series) -> None:
        """Put the tensors of the rows in the order of another series, which must have the same.

        Parameters
        ----------
        other : Series

        Raises
        ------
        CheckpointError
            Checkpoints of another architecture: with the first tensor that differs.
        """
        mine = dict(zip(self.names, self.shapes, strict=True))
        theirs = dict(zip(other.names, other.shapes, strict=True))
        what = None
        for name, shape in theirs.items():
            if name not in mine:
                what = f"the tensor {name}, found none of this name"
            elif mine[name] != shape:
                what = f"{name} of shape {shape}, got {mine[name]}"
            if what is not None:
                break
        more = [name for name in mine if name not in theirs]
        if what is None and more:
            what = f"no other tensors, found {abridged(more)}"
        if what is not None:
            raise self.error(0, f"expected the architecture of {other.paths[0]}: {what}")
        places = [self.names.index(name) for name in other.names]
        self._rows = [[row[i] for i in places] for row in self._rows]
        self.names, self.shapes = list(other.names), list(other.shapes)
        self._starts = list(other._starts)

    def dtypes(self, t: int) -> list[torch.dtype]:
        """Return the dtypes of the tensors in row ``t`` as they are stored.

        Parameters
        ----------
        t : int

        Returns
        -------
        list of torch.dtype
        """
        return [entry.dtype for entry in self._rows[t]]

    def row_bytes(self, t: int) -> int:
        """Return the bytes that row ``t`` takes in its files.

        Parameters
        ----------
        t : int

        Returns
        -------
        int
        """
        return sum(entry.nbytes() for entry in self._rows[t])

    def identity(self) -> list[list[Any]]:
        """Return what tells whether a file was touched since another series was opened.

        Returns
        -------
        list of [str, int, int]
            Path, size and time of change of every file, as they were when it was opened.
        """
        return [
            [str(file.absolute()), *status]
            for contents in self.contents
            for file, status in zip(contents.files, contents.statuses, strict=True)
        ]

    def check_unchanged(self, rows: Iterable[int] | None = None) -> None:
        """Check that no file was touched since it was opened: after what was read of it.

        Parameters
        ----------
        rows : iterable of int, optional
            Whose files to look at; by default all.

        Raises
        ------
        CheckpointError
            One was, or is gone.
        """
        for t in range(len(self)) if rows is None else rows:
            contents = self.contents[t]
            for file, status in zip(contents.files, contents.statuses, strict=True):
                try:
                    same = status_of(file) == status
                except CheckpointError as error:
                    raise self.error(t, error.problem) from error
                if not same:
                    name = "it" if file == self.paths[t] else file.name
                    raise self.error(
                        t,
                        f"expected {name} to stay as it was when it was opened, found it changed "
                        "while it was read: is a run still writing there?",
                    )

    def read(self, reader: CheckpointReader, t: int, begin: int, out: Tensor) -> None:
        """Read the columns ``begin``, ``begin + 1``, ... of row ``t``, all of them finite.

        Parameters
        ----------
        reader : CheckpointReader
        t : int
        begin : int
        out : Tensor, shape (k,)
            Filled with k numbers in its dtype.

        Raises
        ------
        CheckpointError
            The file cannot be read; a value is NaN or Inf: with the name of the tensor.
        """
        self.fill(reader, t, begin, out)
        if not finite(out):
            at = begin + int(out.isfinite().logical_not().nonzero()[0])
            name = self.names[bisect_right(self._starts, at) - 1]
            raise self.error(
                t, f"{name}: expected finite values, got NaN or Inf; exclude leaves a tensor out"
            )

    def fill(self, reader: CheckpointReader, t: int, begin: int, out: Tensor) -> None:
        """Read as `read` does, for a caller that sees by itself whether all values are finite.

        Parameters
        ----------
        reader : CheckpointReader
        t : int
        begin : int
        out : Tensor, shape (k,)

        Raises
        ------
        CheckpointError
            The file cannot be read.
        """
        end = begin + len(out)
        i = bisect_right(self._starts, begin) - 1
        try:
            while self._starts[i] < end and i < len(self.names):
                first, last = max(begin, self._starts[i]), min(end, self._starts[i + 1])
                reader.read(
                    self._rows[t][i], first - self._starts[i], out[first - begin : last - begin]
                )
                i += 1
        except CheckpointError as error:
            raise self.error(t, error.problem) from error

    def error(self, t: int, problem: str) -> CheckpointError:
        """Return an error that names the checkpoint of row ``t``.

        Parameters
        ----------
        t : int
        problem : str
            What was expected and what was found.

        Returns
        -------
        CheckpointError
        """
        return CheckpointError(self.paths[t], problem, self.indices[t])

    def drop(self, error: CheckpointError) -> None:
        """Go on without the checkpoint that an error names.

        Parameters
        ----------
        error : CheckpointError

        Raises
        ------
        CheckpointError
            The same one, if no checkpoint would be left.
        """
        if len(self) == 1:
            raise error
        t = self.indices.index(error.index)  # type: ignore[arg-type]
        self.skipped.append(error)
        self._keep([i for i in range(len(self)) if i != t])

    def thin(self, last: int | None = None, every: int = 1) -> None:
        """Go on with some checkpoints alone: the last one, and those at a stride before it.

        Parameters
        ----------
        last : int, optional
            Of that many at the end; by default of all.
        every : int
            The stride, 1 for all of them.

        Raises
        ------
        ValueError
            There are not as many.
        """
        if last is not None and last > len(self):
            raise ValueError(f"last: expected at most {len(self)}, the checkpoints, got {last}")
        self._keep(range(len(self))[::-1][:last:every][::-1])


def _without_logged(contents: Contents) -> Contents:
    """Leave out single numbers that scripts log (loss), if others are there."""
    numbers = [n for n, e in contents.entries.items() if not e.shape and e.dtype.is_floating_point]
    logged = [name for name in numbers if is_logged(name)]
    if len(logged) in (0, len(contents.entries)):
        return contents
    note = f"left out (logged values, not weights): {abridged(logged)}"
    kept = {name: entry for name, entry in contents.entries.items() if name not in logged}
    return contents._replace(entries=kept, notes=[*contents.notes, note])


def _stored_progress(path: Path, contents: Contents) -> Mapping[str, float]:
    """Return the epoch and step that a checkpoint tells; transformers has them beside it."""
    try:
        state = json.loads((path.parent / "trainer_state.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return contents.progress
    return {**state_dicts.progress(state, lambda _: None), **contents.progress}


def finite(values: Tensor) -> bool:
    """Tell whether all values are finite."""
    # Their sum is finite only if they are, and takes less time.
    return math.isfinite(float(values.sum())) or bool(values.isfinite().all())
