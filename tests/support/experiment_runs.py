"""Parts of the experiments' problems and settings that take no time."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from benchmarks.experiments import data, settings


def first(count: int, problem: data.Problem) -> data.Problem:
    train = data.Part(problem.train.inputs[:count], problem.train.labels[:count])
    return replace(problem, train=train)


def quick(**options) -> settings.Settings:
    known = settings.settings("compare", "digits", "mlp", 4, Path("nowhere"))
    return replace(known, **({"dim": 6, "subspace_batch": 50, "last_batch": 50} | options))


def table_rows(folder: Path, experiment: str) -> list[str]:
    parts = re.split(r"^### ", (folder / "tables.md").read_text(), flags=re.MULTILINE)
    (part,) = [part for part in parts if part.startswith(f"{experiment}:")]
    return [line for line in part.splitlines() if line.startswith("| ")][1:]
