"""Checkpoints of one model as rows of numbers, of which any columns can be read."""

from __future__ import annotations

import json
import math
import os
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..tensors.names import plain_names
from ..tensors.parameters import DTYPES, dtype_name, dtype_names, named_parameters
from . import foreign, state_dicts
from .discovery import Found, discover
from .distributed import read_folder
from .errors import CheckpointError
from .formats import Contents, Entry, abridged, read_contents
from .order import in_order, natural_key
from .reader import CheckpointReader
from .state_dicts import is_logged

_TIED = "tied to another tensor, which counts"
STATISTICS = ("running_mean", "running_var")


class Layout(NamedTuple):
    """The tensors that make up a row, in order, and all names that a file may use for each."""

    names: list[str]
    shapes: list[tuple[int, ...]]
    aliases: list[list[str]]


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
    include, exclude : list of str
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
        self.include, self.exclude = include, exclude
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
        layout = None if model is None else _layout_of_model(model, include, exclude)
        if not rows:
            layout = Layout([], [], [])
        copies = False  # what the first checkpoint has
        first_left_out: dict[str, list[str]] = {}
        fits = None if model is None or layout is None else partial(_fits, layout=layout)
        for index, one in enumerate(found):
            if one.same is not None:
                continue
            path = one.path
            try:
                if problem := foreign.of_path(path):
                    raise CheckpointError(path, problem)
                read = read_folder if path.is_dir() else read_contents
                contents = read(path, key, fits)
                if model is None:
                    contents = _without_logged(contents)
                if contents.kind == "soup":
                    self.decisions.append(f"{path} is an average itself, and counts as one")
                elif contents.kind is not None:
                    raise CheckpointError(
                        path, f"expected a checkpoint, found a {contents.kind} saved by dldr_ext"
                    )
                if model is None and rows:
                    in_file, left_out = _layout_of_file(path, contents, include, exclude)
                    if layout is None:
                        layout, first_left_out = in_file, left_out
                    layout = self._untied(layout, in_file, first_left_out)
                    _check_no_more(path, in_file, layout)
                assert layout is not None
                placed, prefix, is_copy = layout, "", contents.is_copy
                if model is not None:
                    placed, prefix, notes = _placed(path, contents.entries, layout)
                    self.decisions += notes
                    is_copy = is_copy or state_dicts.is_copy(prefix)
                row = _row(path, contents, placed, prefix, model is not None)
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
            *(_copy_notes(layout.names) if model is None else ()),
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
        tied = left_out.get(_TIED, [])
        apart = set(other.names) & set(tied)
        if not apart or not self.contents:
            return layout
        if not all(apart <= contents.entries.keys() for contents in self.contents):
            return layout
        entries = self.contents[0].entries
        kept = [name for name in entries if name in apart or name in layout.names]
        layout = Layout(kept, [entries[name].shape for name in kept], [[name] for name in kept])
        rows = zip(self.paths, self.contents, strict=True)
        self._rows = [_row(path, contents, layout, "", False) for path, contents in rows]
        left_out[_TIED] = [name for name in tied if name not in apart]
        if not left_out[_TIED]:
            del left_out[_TIED]
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
        self.paths = [self.paths[t] for t in order]
        self.contents = [self.contents[t] for t in order]
        self.indices = [self.indices[t] for t in order]
        self._rows = [self._rows[t] for t in order]

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
        """Return what tells whether a file was touched.

        Returns
        -------
        list of [str, int, int]
            Path, size and time of change of every file.
        """
        files = [file for contents in self.contents for file in contents.files]
        statuses = [file.stat() for file in files]
        return [
            [str(file.absolute()), status.st_size, status.st_mtime_ns]
            for file, status in zip(files, statuses, strict=True)
        ]

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
        for of_each in (self.paths, self.contents, self.indices, self._rows):
            del of_each[t]

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
        kept = range(len(self))[::-1][:last:every][::-1]
        self.paths = [self.paths[t] for t in kept]
        self.contents = [self.contents[t] for t in kept]
        self.indices = [self.indices[t] for t in kept]
        self._rows = [self._rows[t] for t in kept]


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


def selected(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    """Tell whether the patterns let a name through."""
    return (not include or any(fnmatchcase(name, pattern) for pattern in include)) and not any(
        fnmatchcase(name, pattern) for pattern in exclude
    )


def model_parameters(
    model: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[str, Tensor]:
    """Return the trainable parameters that the patterns let through, by plain name.

    Raises
    ------
    TypeError
        Not a module.
    ValueError
        No parameter is let through.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model).__name__}")
    tensors, names = named_parameters(model.named_parameters(), "model")
    assert names is not None
    pairs = zip(plain_names(names), tensors, strict=True)
    parameters = {name: tensor for name, tensor in pairs if selected(name, include, exclude)}
    if not parameters:
        raise ValueError(
            f"include, exclude: expected patterns that let a parameter through, got {include} and "
            f"{exclude} for {abridged(names)}"
        )
    return parameters


def _layout_of_model(model: nn.Module, include: list[str], exclude: list[str]) -> Layout:
    parameters = model_parameters(model, include, exclude)
    every = list(model.named_parameters(remove_duplicate=False))
    aliases: dict[int, list[str]] = {}
    for name, (_, tensor) in zip(plain_names([name for name, _ in every]), every, strict=True):
        aliases.setdefault(id(tensor), []).append(name)
    saved = Counter(other for name in parameters for other in state_dicts.saved_names(name))
    for name, parameter in parameters.items():  # a name that two adapters may have is of neither
        own = [other for other in state_dicts.saved_names(name) if saved[other] == 1]
        aliases[id(parameter)] += own
    return Layout(
        list(parameters),
        [tuple(tensor.shape) for tensor in parameters.values()],
        [aliases[id(tensor)] for tensor in parameters.values()],
    )


def _layout_of_file(
    path: Path, contents: Contents, include: list[str], exclude: list[str]
) -> tuple[Layout, dict[str, list[str]]]:
    """Return the layout of all weights in a checkpoint, and the names left out for each reason."""
    kept: dict[str, Entry] = {}
    seen: dict[Any, str] = {}
    left_out: dict[str, list[str]] = {}
    for name, entry in contents.entries.items():
        if not selected(name, include, exclude):
            left_out.setdefault("by the patterns", []).append(name)
        elif entry.problem is not None:
            left_out.setdefault(entry.problem, []).append(name)
        elif not entry.dtype.is_floating_point:
            left_out.setdefault("not floating-point", []).append(name)
        elif entry.dtype not in DTYPES:
            left_out.setdefault(f"of dtype {dtype_name(entry.dtype)}", []).append(name)
        elif name.rpartition(".")[2] in STATISTICS:
            left_out.setdefault("statistics of batch norm, not weights", []).append(name)
        elif entry.place() in seen and entry.nbytes():
            left_out.setdefault(_TIED, []).append(name)
        else:
            seen[entry.place()] = name
            kept[name] = entry
    if not any(entry.nbytes() for entry in kept.values()):
        what = f"; left out: {abridged(list(contents.entries))}" if contents.entries else ""
        raise CheckpointError(path, f"expected floating-point tensors, found none{what}")
    shapes = [entry.shape for entry in kept.values()]
    return Layout(list(kept), shapes, [[name] for name in kept]), left_out


def _copy_notes(names: Iterable[str]) -> list[str]:
    """Say which of the names are of a copy (EMA, teacher) of tensors that are there as well."""
    inside: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for i in (1, 2):
            inside.setdefault(".".join(parts[:i]), set()).add(".".join(parts[i:]))
    copies = [prefix for prefix in inside if state_dicts.is_copy(prefix)]
    return [
        f"{copy}.* looks like a copy of {other}.*: exclude '{copy}.*' leaves it out"
        for copy in copies
        for other in inside
        if other not in copies and len(inside[copy]) > 1 and inside[other] == inside[copy]
    ]


def _check_no_more(path: Path, in_file: Layout, layout: Layout) -> None:
    more = sorted(set(in_file.names) - set(layout.names))
    if more:
        raise CheckpointError(
            path, f"expected the tensors of the first checkpoint, found {abridged(more)} as well"
        )


def _row(
    path: Path, contents: Contents, layout: Layout, prefix: str, of_model: bool
) -> list[Entry]:
    """Return the tensors of a checkpoint that make up its row."""
    entries = contents.entries
    whose = "model" if of_model else "first checkpoint"
    row = []
    for names, shape in zip(layout.aliases, layout.shapes, strict=True):
        entry = next((entries[prefix + name] for name in names if prefix + name in entries), None)
        if entry is None:
            raise CheckpointError(
                path,
                f"expected the tensor {names[0]} of the {whose}, which is not among "
                f"{abridged(list(entries))}",
            )
        if entry.problem is not None:
            raise CheckpointError(
                path, f"{names[0]}: expected a tensor of numbers, found {entry.problem}"
            )
        if entry.shape != shape:
            raise CheckpointError(
                path,
                f"{names[0]}: expected shape {shape}, as in the {whose}, got {entry.shape}",
            )
        if entry.dtype not in DTYPES:
            raise CheckpointError(
                path, f"{names[0]}: expected {dtype_names(DTYPES)}, got {dtype_name(entry.dtype)}"
            )
        row.append(entry)
    return row


def _fits(tensors: Mapping[str, Tensor], layout: Layout) -> bool:
    """Tell whether the tensors of a file are those of a model, whatever precedes their names."""
    try:
        names = plain_names(list(tensors))
    except ValueError:
        return False
    shapes = {
        name: tuple(tensor.shape) for name, tensor in zip(names, tensors.values(), strict=True)
    }
    return bool(_whole(shapes, layout)) or _inner(shapes, layout) is not None


def _whole(shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> list[str]:
    """Return what precedes all names of the model in a file: once, or several times."""
    return [prefix for prefix in _prefixes(shapes, layout) if _matches(shapes, layout, prefix)]


def _inner(shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> Layout | None:
    """Return the layout of what a model wraps, if the file is of that alone."""
    inner = layout
    while all("." in name for names in inner.aliases for name in names):
        parts = [[name.partition(".") for name in names] for names in inner.aliases]
        if len({first for names in parts for first, _, _ in names}) > 1:
            return None
        inner = inner._replace(aliases=[[rest for _, _, rest in names] for names in parts])
        if _matches(shapes, inner, ""):
            return inner
    return None


def _prefixes(names: Iterable[str], layout: Layout) -> list[str]:
    """Return what may precede every name of the model in a file (Lightning: "model.")."""
    ends = tuple(layout.aliases[0])
    before = [name.removesuffix(end) for name in names for end in ends if name.endswith(end)]
    return ["", *dict.fromkeys(prefix for prefix in before if prefix.endswith("."))]


def _matches(shapes: Mapping[str, tuple[int, ...]], layout: Layout, prefix: str) -> bool:
    return all(
        any(shapes.get(prefix + name) == shape for name in names)
        for names, shape in zip(layout.aliases, layout.shapes, strict=True)
    )


def _placed(path: Path, entries: dict[str, Entry], layout: Layout) -> tuple[Layout, str, list[str]]:
    """Return the layout of the model in a file, what precedes its names, notes on other choices."""
    shapes = {name: entry.shape for name, entry in entries.items()}
    whole = _whole(shapes, layout)
    if "" in whole or len(whole) == 1:
        return layout, ("" if "" in whole else whole[0]), []
    if not whole:
        inner = _inner(shapes, layout)
        if inner is not None:
            return inner, "", []
        # The one with most of the names: for an error that says what is missing.
        prefixes = _prefixes(entries, layout)
        found = {p: sum(any(p + n in shapes for n in names) for names in layout.aliases)
                 for p in prefixes}  # fmt: skip
        return layout, max(prefixes, key=lambda prefix: found[prefix]), []
    listed = ", ".join(repr(prefix.removesuffix(".")) for prefix in whole)
    originals = [prefix for prefix in whole if not state_dicts.is_copy(prefix)]
    if len(originals) != 1:
        raise CheckpointError(
            path,
            f"expected the model's tensors once, found them under each of {listed}: name one as "
            'the key (in Python key="...", for the commands --key)',
        )
    return (
        layout,
        originals[0],
        [f"weights taken from {originals[0]}* among {listed}; the key names another"],
    )
