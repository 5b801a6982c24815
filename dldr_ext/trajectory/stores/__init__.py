"""Where the snapshots of a trajectory are kept: one tier for each module."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .base import RecordingCost, Store
from .disk import DiskStore
from .host import HostStore
from .lock import FolderLock
from .memory import MemoryStore
from .spent import SpentStore

__all__ = [
    "DiskStore",
    "FolderLock",
    "HostStore",
    "MemoryStore",
    "RecordingCost",
    "SpentStore",
    "Store",
    "check_storage",
    "new_store",
]

_STORAGES = ("device", "host", "disk")


def check_storage(storage: str, path: str | os.PathLike[str] | None) -> None:
    """Checks the arguments of `Trajectory` that choose a store."""
    if storage not in _STORAGES:
        raise ValueError(f"storage: expected one of {list(_STORAGES)}, got {storage!r}")
    if (path is not None) != (storage == "disk"):
        wanted = "a folder" if storage == "disk" else "None"
        raise ValueError(f"path: expected {wanted} with storage={storage!r}, got {path!r}")


def new_store(
    storage: str,
    path: str | os.PathLike[str] | None,
    sizes: tuple[int, int, torch.dtype, torch.device],
    metadata: Mapping[str, Any],
) -> Store:
    """An empty store of ``sizes``: numel, capacity, dtype, device; ``metadata`` goes to disk."""
    if path is not None:
        return DiskStore.create(Path(path), *sizes, metadata)
    if storage == "host" and sizes[3].type != "cpu":
        return HostStore(*sizes)
    return MemoryStore(*sizes)  # memory of the host is where parameters on the CPU are
