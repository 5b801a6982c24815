"""The one error that reading checkpoints raises."""

from __future__ import annotations

import os
from pathlib import Path


class CheckpointError(ValueError):
    """A checkpoint that cannot be used.

    Attributes
    ----------
    path : Path
        Of the checkpoint, or of the file in it that is to blame.
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
        """Return the same error with the index of its checkpoint.

        Parameters
        ----------
        index : int

        Returns
        -------
        CheckpointError
        """
        return CheckpointError(self.path, self.problem, index)


def reason(error: OSError) -> str:
    """Say in a few words why a file could not be opened or read."""
    if isinstance(error, FileNotFoundError):
        return "not found"
    if isinstance(error, PermissionError):
        return "no permission to read it"
    return f"cannot be read ({error.strerror or error})"
