"""A new folder with an average in it: of a model as libraries load it, or a distributed one."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.discovery import KIND_RECORD, METADATA
from ..checkpoints.formats import Contents
from ..files.artifacts import sync_folder
from ..files.partial import PartialFile, alone_in
from ..files.torch_file import TorchFile

_SHARD = 5_000_000_000  # bytes of a file in a folder, as transformers has it
# What a folder of a model has beside its weights: configuration, tokenizer, code.
CONFIGS = ("config.json", "adapter_config.json")
_COMPANIONS = (".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".bpe", ".codes", ".py")
_OF_TRAINING = ("trainer_state.json", "zero_to_fp32.py", "_results.json", ".index.json")
_LORA = "pytorch_lora_weights"  # of diffusers; such files need no configuration
_BASES = ("adapter_model", "diffusion_pytorch_model", _LORA)
_ONE_FILE = ("adapter_model", _LORA)  # their libraries know no shards


def is_of_model(like: Contents) -> bool:
    """Tell whether a checkpoint is a folder with a configuration, as libraries write models."""
    return any((like.files[0].parent / name).is_file() for name in CONFIGS)


def is_distributed(like: Contents) -> bool:
    """Tell whether a checkpoint is a folder of torch.distributed.checkpoint."""
    return like.files[0].name == METADATA


def needs_config(like: Contents) -> bool:
    """Tell whether a folder as that of a checkpoint is loaded by its configuration."""
    return not is_distributed(like) and _base(like) != _LORA


class _Folder(ExitStack):
    """A folder beside ``path`` that becomes it at the end; the files that are open in it."""

    def __init__(self, path: Path, like: Contents) -> None:
        super().__init__()
        self.path, self.temporary = path, path.with_name(f".{path.name}.part")
        self._like = like
        self.enter_context(alone_in(self.temporary, path))
        for left in self.temporary.iterdir():  # by a process that was killed
            left.unlink()

    def finish(self) -> None:
        """Put the folder in its place."""
        for companion in _companions(self._like):
            shutil.copyfile(companion, self.temporary / companion.name)
        os.replace(self.temporary, self.path)
        sync_folder(self.path.parent)

    def discard(self) -> None:
        """Remove what was written."""
        shutil.rmtree(self.temporary, ignore_errors=True)


class ModelFolder(_Folder):
    """Weights in one file, or in shards with an index, and what lies beside them.

    Parameters
    ----------
    path : Path
    kind, version, tensors, metadata
        As for `PartialFile`.
    like : Contents
        Of the checkpoint whose folder is the pattern.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        version: int,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        like: Contents,
    ) -> None:
        super().__init__(path, like)
        base = _base(like)
        shards = _shards(tensors, _limit(base, like))
        self._files: list[PartialFile] = []
        self._file_of: dict[str, PartialFile] = {}
        try:
            for i, names in enumerate(shards):
                end = "" if len(shards) == 1 else f"-{i + 1:05d}-of-{len(shards):05d}"
                place = self.temporary / f"{base}{end}.safetensors"
                part = {name: tensors[name] for name in names}
                file = self.enter_context(PartialFile(place, kind, version, part, metadata))
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
        """Write elements ``begin``, ``begin + 1``, ... of a tensor in logical order."""
        self._file_of[name].write(name, begin, values)

    def finish(self) -> None:
        """Put files and folder in their places."""
        for file in self._files:
            file.finish()
        super().finish()


class DistributedFolder(_Folder):
    """What `torch.distributed.checkpoint` loads: a file for each tensor, and what says where it is.

    Names and keys are those of the checkpoint that is the pattern, so that what loads that one
    loads this one. Parameters are those of `ModelFolder`; tensors are written one after the other.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        version: int,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, Any],
        like: Contents,
    ) -> None:
        super().__init__(path, like)
        self._saved = {like.entries[name].name: tensor for name, tensor in tensors.items()}
        self._names = {name: like.entries[name].name for name in tensors}
        self._kind, self._version, self._written = kind, version, dict[str, Path]()
        self._file: TorchFile | None = None
        self._opened = self.enter_context(ExitStack())
        facts = {"dldr_ext.kind": kind, "version": version, "metadata": metadata}
        (self.temporary / KIND_RECORD).write_text(json.dumps(facts))

    def write(self, name: str, begin: int, values: Tensor) -> None:
        """Write elements ``begin``, ``begin + 1``, ... of a tensor in logical order."""
        if begin == 0:
            self._open(self._names[name])
        assert self._file is not None
        self._file.write(self._names[name], begin, values)

    def finish(self) -> None:
        """Write what says where the tensors are, and put the folder in its place."""
        for name in self._saved.keys() - self._written.keys():  # of no elements
            self._open(name)
        self._close()
        (self.temporary / METADATA).write_bytes(self._metadata())
        super().finish()

    def discard(self) -> None:
        """Remove what was written."""
        if self._file is not None:
            self._file.discard()
        super().discard()

    def _open(self, name: str) -> None:
        self._close()
        self._written[name] = self.temporary / f"__0_{len(self._written)}.distcp"
        one = {name: self._saved[name]}
        file = TorchFile(self._written[name], self._kind, self._version, one, {}, bare=True)
        self._file = self._opened.enter_context(file)

    def _close(self) -> None:
        if self._file is not None:
            self._file.finish()
            self._opened.close()
            self._file = None

    def _metadata(self) -> bytes:
        """Return what says where each tensor lies, as `FileSystemWriter` pickles it."""
        from torch.distributed.checkpoint import filesystem
        from torch.distributed.checkpoint import metadata as saved

        kinds: dict[str, Any] = {}
        places = {}
        for name, tensor in self._saved.items():
            begin, file = torch.Size([0] * tensor.dim()), self._written[name]
            kinds[name] = saved.TensorStorageMetadata(
                saved.TensorProperties(dtype=tensor.dtype),
                tensor.shape,
                [saved.ChunkStorageMetadata(begin, tensor.shape)],
            )
            places[saved.MetadataIndex(name, begin)] = filesystem._StorageInfo(
                file.name, 0, file.stat().st_size
            )
        keys = {name: self._like.keys[name] for name in self._saved}
        return pickle.dumps(saved.Metadata(kinds, keys, places))


def _companions(like: Contents) -> list[Path]:
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


def _base(like: Contents) -> str:
    """Return how the weights of a folder are called, without suffix."""
    file = like.files[0]
    if (file.parent / "adapter_config.json").is_file():
        return "adapter_model"
    return next((base for base in _BASES if file.name.startswith(base)), "model")


def _limit(base: str, like: Contents) -> int | None:
    """Return the bytes of the largest shard; None for one file whatever its size."""
    if base in _ONE_FILE:
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
