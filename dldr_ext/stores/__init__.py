"""Where the snapshots of a trajectory are kept: one tier for each module."""

from .base import RecordingCost, Store
from .disk import DiskStore
from .host import HostStore
from .lock import FolderLock
from .memory import MemoryStore

__all__ = ["DiskStore", "FolderLock", "HostStore", "MemoryStore", "RecordingCost", "Store"]
