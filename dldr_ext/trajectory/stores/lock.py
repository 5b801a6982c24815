"""One process at a time on a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import weakref
from pathlib import Path

_NAME = "lock"
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
_locks: weakref.WeakSet[FolderLock] = weakref.WeakSet()


class FolderLock:
    """A lock on a folder, held until `close` or until the process ends in whatever way.

    A forked child, as a worker of a data loader is one, does not hold it, nor keep it from being
    given back: that, and the number of the process that holds it, is what it has over the package
    filelock (with whose release 3.20 a child believed that it still held the lock).

    Parameters
    ----------
    folder : Path
    reading : bool
        Open a folder that may not be written to as well: to read, beside others that do.

    Attributes
    ----------
    read_only : bool
        The folder may not be written to; nothing is locked then.

    Raises
    ------
    ValueError
        Another process, or another trajectory of this one, holds it.
    OSError
        The folder is missing, or may not be written to.
    """

    def __init__(self, folder: Path, reading: bool = False) -> None:
        self.folder, self.read_only = folder, False
        try:
            handle = os.open(folder / _NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            if not reading or error.errno not in _NOT_WRITABLE:
                raise
            handle, self.read_only = os.open(folder, os.O_RDONLY | os.O_CLOEXEC), True
            self._close = weakref.finalize(self, os.close, handle)
            return
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(handle, 20).decode("ascii", "replace").strip() or "unknown"
            os.close(handle)
            whose = "this process" if holder == str(os.getpid()) else f"process {holder}"
            raise ValueError(
                f"path: expected a folder that no other trajectory has open, got {folder}, which "
                f"{whose} records to; close() gives it back, and so does the end of the process"
            ) from None
        except BaseException:
            os.close(handle)
            raise
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
        self._close = weakref.finalize(self, os.close, handle)
        _locks.add(self)

    @property
    def held(self) -> bool:
        """Whether this process holds the lock."""
        return self._close.alive and not self.read_only

    def close(self) -> None:
        """Give the folder back."""
        self._close()


def _forget() -> None:
    for lock in list(_locks):
        lock.close()  # the parent's own handle still holds it


os.register_at_fork(after_in_child=_forget)
