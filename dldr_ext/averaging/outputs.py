"""Where an average is written: a file in the format that its name says, or a folder of a model."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..checkpoints.discovery import is_own
from ..checkpoints.formats import Contents
from ..checkpoints.series import Series
from ..files.artifacts import sync_folder
from ..files.partial import PartialFile
from ..files.torch_file import TorchFile
from ..tensors.formats import SAFETENSORS_NAMES
from ..tensors.parameters import dtype_name

SAFETENSORS, TORCH, FOLDER = "safetensors", "torch.save", "folder"
_SUFFIXES = {
    SAFETENSORS: (".safetensors", ".st"),
    TORCH: (".pt", ".pth", ".ckpt", ".bin", ".pth.tar"),
}
_KIND, _VERSION = "soup", 1
_SHARD = 5_000_000_000  # bytes of a file in a folder, as transformers has it
# What a folder of a model has beside its weights: configuration, tokenizer, code.
_CONFIGS = ("config.json", "adapter_config.json")
_COMPANIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".bpe", ".codes", ".py")
_OF_TRAINING = ("trainer_state.json", "zero_to_fp32.py", "_results.json", ".index.json")
_BASES = ("adapter_model", "diffusion_pytorch_model")
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


def parse_output(output: str | os.PathLike[str], of_models: bool = True) -> Output:
    """Find out what to write, and whether it can be written.

    Parameters
    ----------
    output : path
        Its suffix says the format; a folder ends with a slash, or is there already.
    of_models : bool
        The checkpoints are folders of a model: a name without suffix is that of a folder too.

    Raises
    ------
    ValueError
        An unknown suffix; no folder to write it in, or no permission; something else in the way.
    """
    text = os.fspath(output)
    path = Path(os.path.realpath(text))
    form = next((f for f, known in _SUFFIXES.items() if text.lower().endswith(known)), None)
    bare = of_models and not Path(text).suffix
    if text.endswith(os.sep) or (form is None and (bare or path.is_dir())):
        form = FOLDER
    if form is None:
        listed = "; ".join(f"{', '.join(known)} ({f})" for f, known in _SUFFIXES.items())
        raise ValueError(
            f"output: expected a name that ends with one of {listed}, or with / for a folder that "
            f"transformers or PEFT loads, got {text!r}"
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


def check_tensors(output: Output, tensors: Mapping[str, Tensor]) -> None:
    """Check that the format has the dtypes of tensors.

    Raises
    ------
    TypeError
        It has not.
    """
    for name, tensor in tensors.items() if output.form != TORCH else ():
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
    check_tensors(output, tensors)
    if output.form == FOLDER:
        opened: Any = _Folder(output.path, tensors, facts, like)
    else:
        kind = TorchFile if output.form == TORCH else PartialFile
        opened = kind(output.path, _KIND, _VERSION, tensors, facts)
    with opened as writer:
        try:
            yield writer
            writer.finish()
        except BaseException:
            writer.discard()
            raise


class _Folder(ExitStack):
    """A folder of a model: its weights in one file, or in shards with an index, and companions."""

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, Tensor],
        facts: Mapping[str, Any],
        like: Contents,
    ) -> None:
        super().__init__()
        self.path, self.temporary = path, path.with_name(f".{path.name}.part")
        self._like = like
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir()
        base = _base(like)
        shards = _shards(tensors, _limit(base, like))
        self._files: list[PartialFile] = []
        self._file_of: dict[str, PartialFile] = {}
        try:
            for i, names in enumerate(shards):
                end = "" if len(shards) == 1 else f"-{i + 1:05d}-of-{len(shards):05d}"
                place = self.temporary / f"{base}{end}.safetensors"
                part = {name: tensors[name] for name in names}
                file = self.enter_context(PartialFile(place, _KIND, _VERSION, part, facts))
                self._files.append(file)
                self._file_of |= dict.fromkeys(names, file)
        except BaseException:
            self.close()
            self.discard()
            raise
        if len(shards) > 1:
            index = {
                "metadata": {"total_size": sum(tensor.nbytes for tensor in tensors.values())},
                "weight_map": {name: self._file_of[name].path.name for name in tensors},
            }
            text = json.dumps(index, indent=2)
            (self.temporary / f"{base}.safetensors.index.json").write_text(text)

    def write(self, name: str, begin: int, values: Tensor) -> None:
        self._file_of[name].write(name, begin, values)

    def finish(self) -> None:
        for file in self._files:
            file.finish()
        for companion in companions(self._like):
            shutil.copyfile(companion, self.temporary / companion.name)
        os.replace(self.temporary, self.path)
        sync_folder(self.path.parent)

    def discard(self) -> None:
        shutil.rmtree(self.temporary, ignore_errors=True)


def is_of_model(like: Contents) -> bool:
    """Tell whether a checkpoint is the folder of a model, as transformers and PEFT write it."""
    return any((like.files[0].parent / name).is_file() for name in _CONFIGS)


def companions(like: Contents) -> list[Path]:
    """Return the files beside a checkpoint that its folder needs to be loaded as a model."""
    if not is_of_model(like):
        return []
    folder = like.files[0].parent
    return sorted(
        path
        for path in folder.iterdir()
        if path.is_file()
        and path.suffix in _COMPANIONS
        and not path.name.startswith(".")
        and not path.name.endswith(_OF_TRAINING)
    )


def folder_notes(output: Output, members: list[Contents]) -> list[str]:
    """Say what a folder lacks, or has of one checkpoint alone."""
    if output.form != FOLDER:
        return []
    configs = {name: members[0].files[0].parent / name for name in _CONFIGS}
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


def _base(like: Contents) -> str:
    """Return how the weights of a folder are called, without suffix."""
    file = like.files[0]
    if (file.parent / "adapter_config.json").is_file():
        return "adapter_model"
    return next((base for base in _BASES if file.name.startswith(base)), "model")


def _limit(base: str, like: Contents) -> int | None:
    """Return the bytes of the largest shard; None for one file whatever its size."""
    if base == "adapter_model":  # PEFT knows no shards
        return None
    return max(file.stat().st_size for file in like.files[1:]) if like.files[1:] else _SHARD


def _shards(tensors: Mapping[str, Tensor], limit: int | None) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if limit is not None and shards[-1] and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.nbytes
    return shards


def hollow(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """Return a tensor of a shape and a dtype, without values."""
    return torch.empty(shape, dtype=dtype, device="meta")
