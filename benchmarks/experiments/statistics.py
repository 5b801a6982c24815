"""Runs in groups, and what their spread says."""

from __future__ import annotations

import statistics
from collections import defaultdict
from typing import Any

Run = dict[str, Any]


def groups(runs: list[Run], *keys: str) -> dict[tuple, list[Run]]:
    """Runs by the values of some keys, in the order of their first appearance."""
    found: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        found[tuple(run[key] for key in keys)].append(run)
    return dict(found)


def mean_and_spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, 0 for a single value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def paired(runs: list[Run], others: list[Run], key: str = "test_accuracy") -> list[float]:
    """Differences in percentage points between runs of the same seed and noise."""
    base = {(run["seed"], run["noise"]): run[key] for run in others}
    return [
        100 * (run[key] - base[run["seed"], run["noise"]])
        for run in runs
        if (run["seed"], run["noise"]) in base
    ]
