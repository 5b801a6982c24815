"""The runs of `make bench` on one machine: each is kept, and compared with the one before it."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

#: Shares and ratios that were measured within one process: more is better.
FIGURES = {"of_ceiling": "of the ceiling", "against_torch": "against plain torch"}
WORSE = 0.10


def latest(folder: Path, report: dict[str, Any]) -> dict[str, Any] | None:
    """The last report of the same machine and torch, if there is one."""
    for path in sorted(folder.glob("*.json"), reverse=True):
        earlier = json.loads(path.read_text())
        if all(earlier[key] == report[key] for key in ("machine", "torch")):
            return earlier
    return None


def keep(folder: Path, report: dict[str, Any]) -> Path:
    """Write a report under the time and its commit: names are in the order of time."""
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S.%f")
    path = folder / f"{now}-{report['commit'] or 'unknown'}.json"
    path.write_text(json.dumps(report, indent=1) + "\n")
    return path


def worse(report: dict[str, Any], earlier: dict[str, Any]) -> list[str]:
    """A line for each figure whose median fell by more than a tenth, below its earlier quartiles.

    What memory does from minute to minute stays within the quartiles.
    """
    known = {row["case"]: row for row in earlier["results"]}
    lines = []
    for row in report["results"]:
        for key, name in FIGURES.items():
            now, before = row.get(key), known.get(row["case"], {}).get(key)
            if not now or not before:
                continue
            change = now["median"] / before["median"] - 1
            if change < -WORSE and now["median"] < before["low"]:
                lines.append(
                    f"{row['case']}: {name} {now['median']:.2f}, was {before['median']:.2f} "
                    f"({100 * change:+.0f} %)"
                )
    return lines
