"""Which checkpoints a list of files and folders stands for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from .errors import CheckpointError, reason

SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors")
INDEX_SUFFIXES = (".safetensors.index.json", ".bin.index.json")
# One model in a folder, as Hugging Face's libraries write it; optimizer.pt and others lie beside.
_ONE_MODEL = ("model.safetensors", "pytorch_model.bin")


def find(paths: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """The checkpoints that files and folders stand for, in order.

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
        Each a file, a shard index among them.

    Raises
    ------
    CheckpointError
        A folder without checkpoints, or one that cannot be listed.
    ValueError
        No path at all.
    """
    if isinstance(paths, (str, os.PathLike)):
        paths = [paths]
    result = [found for path in paths for found in _under(Path(path))]
    if not result:
        raise ValueError("checkpoints: expected at least one file or folder, got none")
    return result


def natural(path: str | os.PathLike[str]) -> list[tuple[int, int, str]]:
    """A sort key by which 2 comes before 10."""
    parts = re.findall(r"\d+|\D+", os.fspath(path))
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts]


def _under(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    try:
        inside = sorted(path.iterdir(), key=natural)
    except OSError as error:
        raise CheckpointError(path, reason(error)) from error
    one = _one_model(inside)
    if one is not None:
        return [one]
    files = [p for p in inside if p.suffix in SUFFIXES and p.is_file()]
    numbered = [p for p in files if p.stem.isdecimal()]
    if files:
        return numbered or files
    result = []
    for folder in (p for p in inside if p.is_dir()):
        one = _one_model(folder.iterdir())
        result += [] if one is None else [one]
    if not result:
        raise CheckpointError(
            path,
            f"expected a folder with checkpoints ({', '.join(SUFFIXES)} or an index of shards), "
            f"found {len(inside)} other entries",
        )
    return result


def _one_model(inside: Iterable[Path]) -> Path | None:
    names = {p.name: p for p in inside}
    for suffix in INDEX_SUFFIXES:
        for name, path in sorted(names.items()):
            if name.endswith(suffix):
                return path
    return next((names[name] for name in _ONE_MODEL if name in names), None)
