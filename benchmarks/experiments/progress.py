"""How far a run has come, on disk: a killed run goes on from there, bit for bit."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

_SECONDS = 20.0  # between two writes: short runs write nothing


class Progress:
    """The files of one run, one for each of its stages.

    Parameters
    ----------
    path : without a suffix; None keeps nothing
    about : what the run depends on; what another one left is not taken up
    seconds : at least so many between two writes
    """

    def __init__(
        self, path: Path | None = None, about: Any = None, seconds: float = _SECONDS
    ) -> None:
        self._path, self._about, self._seconds = path, about, seconds
        self._last = time.monotonic()

    def load(self, stage: str) -> dict[str, Any] | None:
        """What the stage saved last; None if it did not come to that."""
        if self._path is None or not self._file(stage).exists():
            return None
        saved = torch.load(self._file(stage), weights_only=True)
        return saved["state"] if saved["about"] == self._about else None

    def save(self, stage: str, state: Callable[[], dict[str, Any]]) -> None:
        """Write what ``state`` returns, if the last write was long ago."""
        if self._path is None or time.monotonic() - self._last < self._seconds:
            return
        unfinished = self._file("part")
        torch.save({"about": self._about, "state": state()}, unfinished)
        unfinished.replace(self._file(stage))
        self._last = time.monotonic()

    def clear(self) -> None:
        """Forget the run, which has ended."""
        if self._path is not None:
            for path in self._path.parent.glob(f"{self._path.name}.*.progress"):
                path.unlink()

    def _file(self, stage: str) -> Path:
        assert self._path is not None
        return self._path.with_name(f"{self._path.name}.{stage}.progress")
