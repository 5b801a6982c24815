"""The store that a trajectory's arguments ask for."""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...collectives.partition import ColumnShard
from ...collectives.process_group import Ranks
from ...collectives.transaction import all_or_none
from .base import Store, StoreSpec
from .disk import DiskStore
from .host import HostStore
from .memory import EmptyStore, MemoryStore
from .sharded import ShardedStore, rank_folder

_STORAGES = ("device", "host", "disk")


def check_storage(storage: str, path: str | os.PathLike[str] | None) -> None:
    """Check the arguments of `Trajectory` that choose a store."""
    if storage not in _STORAGES:
        raise ValueError(f"storage: expected one of {list(_STORAGES)}, got {storage!r}")
    if (path is not None) != (storage == "disk"):
        wanted = "a folder" if storage == "disk" else "None"
        raise ValueError(f"path: expected {wanted} with storage={storage!r}, got {path!r}")


def new_store(
    storage: str,
    path: str | os.PathLike[str] | None,
    spec: StoreSpec,
    metadata: Mapping[str, Any],
    anchor: Tensor | None = None,
    ranks: Ranks | None = None,
    shard: ColumnShard | None = None,
) -> Store:
    """Return an empty store; over ranks they all call it.

    Parameters
    ----------
    spec : StoreSpec
        Of all columns.
    metadata : mapping
        What goes to the disk with the anchor.
    anchor : Tensor, shape (columns of this process,), optional
    ranks, shard
        The ranks that keep the columns together, and the shard of this one.
    """
    if ranks is None or shard is None:
        return _new_local_store(storage, path, spec, metadata, anchor)
    run = ranks.exchange({"run": secrets.token_hex(8)}, "construction")[0]["run"]
    recording = {"run": run, "ranks": ranks.size}
    metadata = {**metadata, "shapes": shard.shapes, "names": shard.names, "part": recording}
    spec = spec._replace(numel=shard.numel)
    local: Store = EmptyStore(spec, anchor)
    with all_or_none(ranks, "construction", lambda: 0, lambda: local.close()):
        folder = None if path is None else rank_folder(path, ranks)
        if shard.numel:
            local = _new_local_store(storage, folder, spec, metadata, anchor)
    return ShardedStore(ranks, shard, local, multiplies_at_once(storage, spec.device))


def _new_local_store(
    storage: str,
    path: str | os.PathLike[str] | None,
    spec: StoreSpec,
    metadata: Mapping[str, Any],
    anchor: Tensor | None,
) -> Store:
    if path is not None:
        return DiskStore.create(Path(path), spec, metadata, anchor)
    if storage == "host" and spec.device.type != "cpu":
        return HostStore(spec, anchor)
    return MemoryStore(spec, anchor)  # memory of the host is where parameters on the CPU are


def multiplies_at_once(storage: str, device: torch.device) -> bool:
    """Return whether the Gram matrix grows with each row, on every rank."""
    return storage == "device" or (storage == "host" and device.type == "cpu")
