"""Report of the microbenchmarks: a readable table and one JSON file."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

import dldr_ext
from benchmarks import ROOT
from benchmarks.measure import commit, processor
from benchmarks.micro import history
from dldr_ext.performance.timing import Spread, paired

ROWS: list[dict] = []


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=2, help="torch threads")
    parser.addoption("--rounds", type=int, default=9, help="paired rounds a case")
    parser.addoption("--json", default=None, help="where the results go")
    parser.addoption("--history", default=ROOT / ".benchmarks", help="folder of all runs")


@pytest.fixture(autouse=True)
def _threads(request):
    torch.set_num_threads(request.config.getoption("--threads"))
    torch.manual_seed(0)


@pytest.fixture
def compare(request, benchmark):
    """compare(name, op, bytes, peer, ceiling, ceiling_bytes): measures and notes one case."""

    def run(name, op, op_bytes, peer, ceiling, ceiling_bytes, **extra):
        rounds = request.config.getoption("--rounds")
        found = paired(op, op_bytes, peer, ceiling, ceiling_bytes, rounds)
        row = {"case": name, "bytes": op_bytes, **extra}
        for key, values in found.items():
            if values:
                row[key] = vars(Spread.of(values))
        ROWS.append(row)
        benchmark.extra_info.update(row)
        benchmark.pedantic(op, rounds=3, iterations=1)

    return run


@pytest.fixture
def note():
    """Notes a row that another kind of measurement made."""
    return ROWS.append


def pytest_terminal_summary(terminalreporter, config):
    if not ROWS:
        return
    write = terminalreporter.write_line
    write("")
    write(f"{'case':58} {'of the ceiling, %':>24} {'against plain torch':>26}")
    for row in ROWS:
        ceiling, peer = row.get("of_ceiling"), row.get("against_torch")
        shown = Spread(**{k: 100 * v for k, v in ceiling.items()}).show() if ceiling else ""
        write(f"{row['case']:58} {shown:>24} {Spread(**peer).show('x') if peer else '':>26}")
    write("medians [quartiles] over rounds in which all sides were timed back to back")
    report = {
        "machine": {
            "processor": processor(),
            "cores": os.cpu_count(),
            "threads": config.getoption("--threads"),
        },
        "torch": torch.__version__,
        "commit": commit(),
        "build": dldr_ext.build_info(),
        "results": ROWS,
    }
    folder = Path(config.getoption("--history"))
    earlier = history.latest(folder, report)
    if earlier is not None:
        fallen = history.worse(report, earlier)
        write(f"more than a tenth below the run of {earlier['commit']}: {len(fallen)} figures")
        for line in fallen:
            write(f"  {line}")
    write(f"kept as {history.keep(folder, report)}")
    if path := config.getoption("--json"):
        Path(path).write_text(json.dumps(report, indent=1) + "\n")
