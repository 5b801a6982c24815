"""The one error of this package."""

from __future__ import annotations

import os
from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint that cannot be used.

    Attributes
    ----------
    path : Path
    problem : str
        What was expected and what was found.
    index : int or None
        Its place in the list of checkpoints.
    """

    def __init__(
        self, path: str | os.PathLike[str], problem: str, index: int | None = None
    ) -> None:
        self.path, self.problem, self.index = Path(path), problem, index
        where = "" if index is None else f"checkpoints[{index}]: "
        super().__init__(f"{where}{path}: {problem}")

    def at(self, index: int) -> CheckpointError:
        """The same error of the checkpoint with that index."""
        return CheckpointError(self.path, self.problem, index)


def reason(error: OSError) -> str:
    """Why a file could not be opened or read, in a few words."""
    if isinstance(error, FileNotFoundError):
        return "not found"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    return f"cannot be read ({error.strerror or error})"
