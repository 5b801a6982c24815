"""Misspelt public names and wrong options fail under mypy and under pyright; right ones pass."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """\
import torch

import dldr_ext
import dldr_ext.optim
from dldr_ext import PBFGS, Subspace, Trajectory
from dldr_ext.ops import project
from dldr_ext.ops import projct  # wrong
from dldr_ext.subspace import Subspce  # wrong
from dldr_ext import Trajectry  # wrong

params = [torch.zeros(9, requires_grad=True)]
trajectory = Trajectory(params, capacity=3, dtype=torch.bfloat16)
trajectory.record()
trajectory.recrd()  # wrong
subspace: Subspace = trajectory.subspace(dim=2)
coordinates: torch.Tensor = project(subspace.basis, params)
optimizer: torch.optim.Optimizer = PBFGS(params, subspace, lr=1.0, line_search_fn="armijo")
PBFGS(params, subspace, max_lineserch=3)  # wrong
PBFGS(params, subspace, line_search_fn="armjo")  # wrong
PBFGS(params, subspace, max_ls="many")  # wrong
dldr_ext.PBFGS(params, subspace).step(lambda: params[0].sum())
dldr_ext.PBFG  # wrong
dldr_ext.optim.PBFGS
dldr_ext.optim.PBFG  # wrong
"""
WRONG = [i for i, line in enumerate(PROGRAM.splitlines(), 1) if line.endswith("# wrong")]


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return path


def run(*command: object, **environment: str) -> str:
    """What a type checker prints; it finds something wrong."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, command)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    return done.stdout


def test_mypy(program: Path) -> None:
    pytest.importorskip("mypy")
    printed = run("mypy", program, MYPYPATH=str(ROOT))
    found = re.findall(r"program\.py:(\d+): error", printed)
    assert [int(line) for line in found] == WRONG, printed


def test_pyright(program: Path) -> None:
    pytest.importorskip("basedpyright", reason="basedpyright (pyright with its own Node)")
    config = {"extraPaths": [str(ROOT)], "typeCheckingMode": "basic"}
    (program.parent / "pyrightconfig.json").write_text(json.dumps(config))
    options = ["--outputjson", "--pythonpath", sys.executable, "--project", program.parent]
    printed = run("basedpyright", *options)
    errors = [e for e in json.loads(printed)["generalDiagnostics"] if e["severity"] == "error"]
    assert sorted({1 + e["range"]["start"]["line"] for e in errors}) == WRONG, printed
