"""The checkpoints that a list of files and folders stands for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from .errors import CheckpointError, reason

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
# A folder of one model, as Hugging Face's libraries write it: optimizer.pt and others lie beside.
_MODEL_FILES = ("model.safetensors", "pytorch_model.bin")


def find_checkpoints(
    paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
) -> list[Path]:
    """List the checkpoints that files and folders stand for, in order.

    Parameters
    ----------
    paths : path or iterable of paths
        A file is a checkpoint. A folder is one checkpoint if it holds an index of shards or
        ``model.safetensors`` or ``pytorch_model.bin``; else it stands for the checkpoint files in
        it, or else for the checkpoint folders in it, in natural order (2 before 10). Where some of
        the files are named by a number alone (``0.pt``, ``1.pt``, ...), only these count.

    Returns
    -------
    list of Path
        One file for each checkpoint: the index, if it consists of shards.

    Raises
    ------
    CheckpointError
        A folder without checkpoints, or one that cannot be listed.
    ValueError
        No path at all.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    checkpoints = [checkpoint for path in paths for checkpoint in _expanded(Path(path))]
    if not checkpoints:
        raise ValueError("checkpoints: expected at least one file or folder, got none")
    return checkpoints


def natural_key(path: str | os.PathLike[str]) -> list[tuple[int, int, str]]:
    """Return a sort key by which 2 comes before 10."""
    parts = re.findall(r"\d+|\D+", os.fspath(path))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _expanded(path: Path) -> list[Path]:
    """Return the checkpoints in a folder; a file stands for itself."""
    if not path.is_dir():
        return [path]
    try:
        inside = sorted(path.iterdir(), key=natural_key)
    except OSError as error:
        raise CheckpointError(path, reason(error)) from error
    model = _model_file(inside)
    if model is not None:
        return [model]
    files = [p for p in inside if p.suffix in SUFFIXES and p.is_file()]
    numbered = [p for p in files if p.stem.isdecimal()]
    if files:
        return numbered or files
    models = [_model_file(folder.iterdir()) for folder in inside if folder.is_dir()]
    checkpoints = [model for model in models if model is not None]
    if not checkpoints:
        raise CheckpointError(
            path,
            f"expected a folder with checkpoints ({', '.join(SUFFIXES)} or an index of shards), "
            f"found {len(inside)} other entries",
        )
    return checkpoints


def _model_file(inside: Iterable[Path]) -> Path | None:
    """Return the file that a folder of one model is read from, None for another folder."""
    names = {p.name: p for p in inside}
    for suffix in INDEX_SUFFIXES:
        for name, path in sorted(names.items()):
            if name.endswith(suffix):
                return path
    return next((names[name] for name in _MODEL_FILES if name in names), None)
