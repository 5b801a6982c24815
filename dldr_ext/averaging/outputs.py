"""Where an average is written: a file in the format that its name says, or a folder of a model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..checkpoints.discovery import is_own
from ..checkpoints.formats import Contents
from ..checkpoints.series import Series
from ..files.partial import PartialFile
from ..files.torch_file import TorchFile
from ..tensors.formats import SAFETENSORS_NAMES
from ..tensors.parameters import dtype_name
from .folders import CONFIGS, DistributedFolder, ModelFolder, is_distributed, needs_config

SAFETENSORS, TORCH, FOLDER = "safetensors", "torch.save", "folder"
_SUFFIXES = {
    SAFETENSORS: (".safetensors", ".st"),
    TORCH: (".pt", ".pth", ".ckpt", ".bin", ".pth.tar"),
}
_KIND, _VERSION = "soup", 1
# What may differ between the configurations of checkpoints of one model.
_UNIMPORTANT = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "peft_version"}


class Output(NamedTuple):
    """A place to write to, and how."""

    path: Path  # links are followed
    form: str


class Writer(Protocol):
    """A file or folder that is written tensor by tensor, in pieces, in order."""

    def write(self, name: str, begin: int, values: Tensor) -> None:
        """Write elements ``begin``, ``begin + 1``, ... of a tensor in logical order."""

    def finish(self) -> None:
        """Put it in its place."""

    def discard(self) -> None:
        """Remove what was written."""


def parse_output(output: str | os.PathLike[str], of_folders: bool = True) -> Output:
    """Find out what to write, and whether it can be written.

    Parameters
    ----------
    output : path
        Its suffix says the format; a folder ends with a slash, or is there already.
    of_folders : bool
        The checkpoints are folders: a name without suffix is that of a folder too.

    Raises
    ------
    ValueError
        An unknown suffix; no folder to write it in, or no permission; something else in the way.
    """
    text = os.fspath(output)
    path = Path(os.path.realpath(text))
    form = next((f for f, known in _SUFFIXES.items() if text.lower().endswith(known)), None)
    bare = of_folders and not Path(text).suffix
    if text.endswith(os.sep) or (form is None and (bare or path.is_dir())):
        form = FOLDER
    if form is None:
        listed = "; ".join(f"{', '.join(known)} ({f})" for f, known in _SUFFIXES.items())
        raise ValueError(
            f"output: expected a name that ends with one of {listed}, or with / for a folder that "
            f"transformers, PEFT or diffusers loads, got {text!r}"
        )
    problem = _problem(path, form)
    if problem:
        raise ValueError(f"output: expected {problem}, got {text}")
    return Output(path, form)


def _problem(path: Path, form: str) -> str | None:
    """Say what was expected of a path that cannot be written to."""
    if not path.parent.is_dir():
        return f"a path in a folder that is there, unlike {path.parent}"
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return f"a path in a folder that may be written to, unlike {path.parent}"
    if not path.exists():
        return None
    if form == FOLDER:
        if not path.is_dir():
            return "a folder, where a file is"
        found = len(list(path.iterdir()))
        return f"a new or an empty folder, not one with {found} entries" if found else None
    if path.is_dir():
        return "a file, where a folder is; a / at its end writes into a folder"
    if not path.is_file() or not os.access(path, os.W_OK):
        return "a file that may be written to"
    return None


def check_inputs(output: Output, series: Series) -> None:
    """Check that no checkpoint would be overwritten, under whatever name, counted or not.

    Raises
    ------
    ValueError
        One would be.
    """
    if not output.path.is_file():
        return
    inputs = [file for contents in series.contents for file in contents.files]
    for path in (*inputs, *(error.path for error in series.skipped)):
        if path.exists() and os.path.samefile(path, output.path):
            raise ValueError(
                f"output: expected a path other than those of the checkpoints, got {output.path}, "
                f"which is {path}"
            )
    beside = any(os.path.samefile(folder, output.path.parent) for folder in series.folders)
    if beside and output.path.stat().st_size and not is_own(output.path):
        raise ValueError(
            "output: expected a new file, or an average that dldr wrote, among the checkpoints, "
            f"got {output.path}"
        )


def check_tensors(output: Output, tensors: Mapping[str, Tensor], like: Contents) -> None:
    """Check that the format has the dtypes of tensors; that of a folder is that of a checkpoint.

    Raises
    ------
    TypeError
        It has not.
    """
    if output.form == TORCH or (output.form == FOLDER and is_distributed(like)):
        return
    for name, tensor in tensors.items():
        if tensor.dtype not in SAFETENSORS_NAMES:
            raise TypeError(
                f"{name}: a safetensors file cannot hold {dtype_name(tensor.dtype)}: write a .pt "
                "file, or exclude it"
            )


def check_space(output: Output, size: int) -> None:
    """Check that there is space for a number of bytes.

    Raises
    ------
    OSError
        There is not.
    """
    free = shutil.disk_usage(output.path.parent).free
    if free < size:
        raise OSError(f"{output.path}: needs {size:,} bytes, free are {free:,}")


@contextmanager
def writing(
    output: Output, tensors: Mapping[str, Tensor], facts: Mapping[str, Any], like: Contents
) -> Iterator[Writer]:
    """Open an average for writing; it is there at the end, or nothing is.

    Parameters
    ----------
    output : Output
    tensors : mapping of str to Tensor
        Their dtypes and shapes, in the order in which they are written.
    facts : mapping
        What is kept with it.
    like : Contents
        Of the checkpoint whose folder is the pattern of a new one.
    """
    check_tensors(output, tensors, like)
    what = (output.path, _KIND, _VERSION, tensors, facts)
    opened: Any
    if output.form == FOLDER:
        opened = (DistributedFolder if is_distributed(like) else ModelFolder)(*what, like)
    else:
        opened = (TorchFile if output.form == TORCH else PartialFile)(*what)
    with opened as writer:
        try:
            yield writer
            writer.finish()
        except BaseException:
            writer.discard()
            raise


def folder_notes(output: Output, members: list[Contents]) -> list[str]:
    """Say what a folder lacks, or has of one checkpoint alone."""
    if output.form != FOLDER or not needs_config(members[0]):
        return []
    configs = {name: members[0].files[0].parent / name for name in CONFIGS}
    configs = {name: path for name, path in configs.items() if path.is_file()}
    if not configs:
        beside = members[0].files[0]
        return [f"no config.json beside {beside}: the folder has the weights alone"]
    notes = []
    for name, path in configs.items():
        first = _settings(path)
        others = [_settings(member.files[0].parent / name) for member in members[1:]]
        differing = sorted(
            {key for o in others for key in first | o if first.get(key) != o.get(key)}
        )
        if differing:
            notes.append(
                f"{name} is that of {path.parent}; others differ in {', '.join(differing)}"
            )
    return notes


def _settings(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    kept = found if isinstance(found, dict) else {}
    return {key: value for key, value in kept.items() if key not in _UNIMPORTANT}


def hollow(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """Return a tensor of a shape and a dtype, without values."""
    return torch.empty(shape, dtype=dtype, device="meta")
