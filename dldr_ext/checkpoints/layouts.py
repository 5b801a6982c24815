"""Which tensors of a checkpoint make up a row: those of a model, or of the first file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from ..tensors.names import plain_names
from ..tensors.parameters import DTYPES, dtype_name, dtype_names, named_parameters
from . import state_dicts
from .errors import CheckpointError
from .formats import Contents, Entry, abridged

#: Why a tensor was left out.
TIED = "tied to another tensor, which counts"
STATISTICS = ("running_mean", "running_var")


class Layout(NamedTuple):
    """The tensors that make up a row, in order, and all names that a file may use for each."""

    names: list[str]
    shapes: list[tuple[int, ...]]
    aliases: list[list[str]]


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


def layout_of_model(model: nn.Module, include: list[str], exclude: list[str]) -> Layout:
    """Return the layout of the parameters of a model that the patterns let through."""
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


def layout_of_file(
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
            left_out.setdefault(TIED, []).append(name)
        else:
            seen[entry.place()] = name
            kept[name] = entry
    if not any(entry.nbytes() for entry in kept.values()):
        what = f"; left out: {abridged(list(contents.entries))}" if contents.entries else ""
        raise CheckpointError(path, f"expected floating-point tensors, found none{what}")
    shapes = [entry.shape for entry in kept.values()]
    return Layout(list(kept), shapes, [[name] for name in kept]), left_out


def copy_notes(names: Iterable[str]) -> list[str]:
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


def check_no_more(path: Path, in_file: Layout, layout: Layout) -> None:
    """Check that a checkpoint has no tensors that the first one lacks."""
    more = sorted(set(in_file.names) - set(layout.names))
    if more:
        raise CheckpointError(
            path, f"expected the tensors of the first checkpoint, found {abridged(more)} as well"
        )


def row_of(
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


def fits_model(tensors: Mapping[str, Tensor], layout: Layout) -> bool:
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


def placed_in(
    path: Path, entries: dict[str, Entry], layout: Layout
) -> tuple[Layout, str, list[str]]:
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
