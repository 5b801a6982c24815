"""One file for every finished run, so that a killed command goes on where it was."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .progress import Progress
from .settings import Settings

# What the run of SGD depends on.
_OF_SGD = (
    "epochs",
    "batch",
    "optimizer",
    "lr",
    "momentum",
    "weight_decay",
    "bfloat16",
    "milestones",
    "sampled",
    "snapshots",
)


@dataclass(frozen=True)
class Cell:
    """One run: a method on a problem, for one seed."""

    experiment: str
    data: str
    network: str
    method: str
    dim: int | None  # None where all parameters are trained
    noise: float
    seed: int

    @property
    def name(self) -> str:
        """Name of its file, without the folder."""
        parts = [self.experiment, self.data, self.network, self.method]
        parts += [] if self.dim is None else [f"d{self.dim}"]
        parts += [f"n{round(100 * self.noise)}", f"s{self.seed}"]
        return "-".join(parts)


class Store:
    """The folder of the files; each is complete or not there.

    Parameters
    ----------
    folder : created where missing
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "cells").mkdir(parents=True, exist_ok=True)
        (folder / "leads").mkdir(exist_ok=True)

    def load(self, cell: Cell, settings: Settings) -> dict[str, Any] | None:
        """The result of a finished run; None if it was not run, or with other settings."""
        path = self._path(cell)
        if not path.exists():
            return None
        saved = json.loads(path.read_text())
        return saved["result"] if saved["settings"] == plain(settings) else None

    def save(self, cell: Cell, settings: Settings, result: dict[str, Any]) -> None:
        """Write a result; a kill at any moment leaves no half of it under the final name."""
        content = {"cell": asdict(cell), "settings": plain(settings), "result": result}
        unfinished = self._path(cell).with_suffix(".part")
        unfinished.write_text(json.dumps(content) + "\n")
        unfinished.replace(self._path(cell))

    def save_other(self, name: str, result: dict[str, Any]) -> None:
        """Keep a measurement that is no training run, under a name of its own."""
        (self.folder / f"{name}.json").write_text(json.dumps(result) + "\n")

    def other(self, name: str) -> dict[str, Any] | None:
        """What `save_other` kept under a name."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path.exists() else None

    def all(self) -> list[dict[str, Any]]:
        """The content of all files, the newest last."""
        found = (self.folder / "cells").glob("*.json")
        paths = sorted(found, key=lambda path: (path.stat().st_mtime_ns, path.name))
        return [json.loads(path.read_text()) for path in paths]

    def lead(self, cell: Cell, settings: Settings) -> Path:
        """Where the run of SGD is kept that methods of one problem and seed share, no suffix."""
        shared = {name: getattr(settings, name) for name in _OF_SGD}
        about = [cell.data, cell.network, cell.noise, cell.seed, shared]
        digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
        return self.folder / "leads" / f"{cell.data}-{cell.network}-{digest}"

    def progress(self, cell: Cell, settings: Settings) -> Progress:
        """Where an unfinished run is kept."""
        return Progress(self._path(cell).with_suffix(""), plain(settings))

    def _path(self, cell: Cell) -> Path:
        return self.folder / "cells" / f"{cell.name}.json"


def plain(settings: Settings) -> dict[str, Any]:
    """Settings as JSON has them."""
    return json.loads(json.dumps(asdict(settings)))
