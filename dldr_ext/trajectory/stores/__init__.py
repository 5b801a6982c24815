"""Where the snapshots of a trajectory are kept: a kind of store for each module."""

from __future__ import annotations

from .base import RecordingCost, Store, StoreSpec
from .creation import check_storage, multiplies_at_once, new_store
from .disk import DiskStore
from .host import HostStore
from .lock import FolderLock
from .memory import EmptyStore, MemoryStore
from .sharded import ShardedStore, rank_folder

__all__ = [
    "DiskStore",
    "EmptyStore",
    "FolderLock",
    "HostStore",
    "MemoryStore",
    "RecordingCost",
    "ShardedStore",
    "Store",
    "StoreSpec",
    "check_storage",
    "multiplies_at_once",
    "new_store",
    "rank_folder",
]
