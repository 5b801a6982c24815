"""What a saved trajectory says of itself, checked: its file may be anything that has a checksum."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._params import DTYPES, check_matches, dtype_name
from .storage import Reader

_MOST_SNAPSHOTS = 1 << 20


class Description(NamedTuple):
    shapes: list[tuple[int, ...]]
    names: list[str] | None
    dtype: torch.dtype
    capacity: int


def description(file: Reader) -> Description:
    """The fields that every saved trajectory has.

    Raises
    ------
    ValueError
        One is missing or not what it should be.
    """
    dtypes = {dtype_name(dtype): dtype for dtype in DTYPES}
    shapes, names = _field(file, "shapes"), _field(file, "names")
    if not isinstance(shapes, list) or not all(map(_is_shape, shapes)):
        raise _wrong(file, "shapes", "a list of shapes", shapes)
    if names is not None and not _are_names(names, len(shapes)):
        raise _wrong(file, "names", f"{len(shapes)} names", names)
    dtype = _field(file, "dtype")
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise _wrong(file, "dtype", f"one of {', '.join(dtypes)}", dtype)
    capacity = _count(file, "capacity", 1, _MOST_SNAPSHOTS)
    return Description([tuple(shape) for shape in shapes], names, dtypes[dtype], capacity)


def length(file: Reader) -> int:
    """The number of snapshots in a file that `Trajectory.save` has written."""
    return _count(file, "length", 1, description(file).capacity)


def with_id(file: Reader) -> dict[str, Any]:
    """The metadata of a folder, with the mark that its snapshots carry."""
    if not isinstance(_field(file, "id"), str):
        raise _wrong(file, "id", "a string", file.metadata["id"])
    return file.metadata


def check_parameters(
    path: Path, saved: Description, params: Sequence[Tensor], names: Sequence[str] | None
) -> None:
    """Checks the parameters that a saved trajectory is loaded onto."""
    check_matches(params, saved.shapes, saved.names, f"trajectory {path}")
    if names is None or saved.names is None:
        return
    for i, (name, expected) in enumerate(zip(names, saved.names, strict=True)):
        if name != expected:
            raise ValueError(
                f"params[{i}]: expected the name {expected}, as in the trajectory {path}, got "
                f"{name}"
            )


def _field(file: Reader, name: str) -> Any:
    if name not in file.metadata:
        raise file.error(f"expected the field '{name}', found {sorted(file.metadata)}")
    return file.metadata[name]


def _count(file: Reader, name: str, least: int, most: int) -> int:
    value = _field(file, name)
    if type(value) is not int or not least <= value <= most:
        raise _wrong(file, name, f"a number from {least} to {most}", value)
    return value


def _is_shape(shape: Any) -> bool:
    return isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)


def _are_names(names: Any, count: int) -> bool:
    return (
        isinstance(names, list)
        and len(names) == count
        and all(isinstance(name, str) for name in names)
    )


def _wrong(file: Reader, name: str, expected: str, found: Any) -> ValueError:
    return file.error(f"{name}: expected {expected}, found {str(found)[:60]!r}")
