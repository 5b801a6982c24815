"""The programs of the pages start, guide, checkpoints and pinn run as written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from optim_problems import one_thread  # noqa: F401  (a fixture)

from dldr_ext.batch_norm import reestimated

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "guide.md").read_text()


def test_every_program_runs_and_trains() -> None:
    pytest.importorskip("rich")
    names: dict[str, Any] = {}
    first, *programs = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(first, names)
    start = names["trajectory"].anchor.clone()
    for program in programs:
        torch.nn.utils.vector_to_parameters(start.clone(), names["model"].parameters())
        with torch.no_grad():
            before = names["loss"]().item()
        exec(program, names)
        with torch.no_grad():
            after = names["loss"]().item()
        assert after < 0.85 * before, program
        if "optimizer.step" in program:
            assert names["optimizer"].status.moved, program
            assert len(names["optimizer"].history) >= 10, program
        if "learned" in program:
            for name, parameter in names["model"].named_parameters():
                rows = torch.stack([state[name] for state in names["checkpoints"]])
                average = torch.tensordot(names["learned"], rows, 1)
                torch.testing.assert_close(average, parameter.detach(), rtol=1e-3, atol=1e-4)


def test_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    text = (ROOT / "docs" / "start.md").read_text()
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for program in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(program, names)
    assert "Trajectory(65 of 81 snapshots, numel=1602" in str(names["trajectory"])
    assert len(names["optimizer"].history) == 0  # resumed: records are not part of a state
    assert names["schedule"].last_epoch == 64
    with reestimated(names["model"], [names["inputs"]]), torch.no_grad():
        right = names["model"](names["inputs"]).argmax(1) == names["labels"]
    assert right.float().mean() > 0.9
    assert not caplog.records  # no warning that a newcomer would stumble over


def test_checkpoints() -> None:
    text = (ROOT / "docs" / "checkpoints.md").read_text()
    names: dict[str, Any] = {}
    for program in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(program, names)
    assert names["subspace"].dim == 5 and len(names["trajectory"]) == 12


def test_pinn() -> None:
    text = (ROOT / "docs" / "pinn.md").read_text()
    names: dict[str, Any] = {}
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(program, names)
    assert names["error"] < 1e-3
