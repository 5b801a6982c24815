"""Runs of `make bench` are kept and compared with the last one of the same machine."""

from __future__ import annotations

import copy

import pytest

history = pytest.importorskip("benchmarks.micro.history")


def report(commit="one", processor="a", **medians):
    rows = [
        {
            "case": case,
            "of_ceiling": {"low": 0.95 * x, "median": x, "high": 1.05 * x},
            "against_torch": {"low": 1.9 * x, "median": 2 * x, "high": 2.1 * x},
        }
        for case, x in medians.items()
    ]
    machine = {"processor": processor, "cores": 2, "threads": 2}
    return {"machine": machine, "torch": "2.13.0", "commit": commit, "results": rows}


def test_the_last_run_of_the_same_machine_is_compared(tmp_path):
    first = report("one", project=0.9, gram=0.5)
    assert history.latest(tmp_path, first) is None
    history.keep(tmp_path, first)
    history.keep(tmp_path, report("two", project=0.8, gram=0.5))
    history.keep(tmp_path, report("three", processor="b", project=0.1, gram=0.1))
    earlier = history.latest(tmp_path, first)
    assert earlier == report("two", project=0.8, gram=0.5)
    assert len(list(tmp_path.glob("*.json"))) == 3


def test_rows_that_got_worse_are_named():
    before = report(project=0.9, gram=0.5, trial=0.7)
    after = report(project=0.75, gram=0.46, trial=0.9, new=0.1)
    assert history.worse(after, before) == [
        "project: of the ceiling 0.75, was 0.90 (-17 %)",
        "project: against plain torch 1.50, was 1.80 (-17 %)",
    ]
    assert history.worse(before, before) == []
    spread = copy.deepcopy(before)
    for row in spread["results"]:
        row["of_ceiling"]["low"] = row["against_torch"]["low"] = 0.1
    assert history.worse(after, spread) == []
