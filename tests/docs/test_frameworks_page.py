"""The programs of docs/frameworks.md run as written, where their frameworks are installed."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from optim_problems import one_thread  # noqa: F401  (a fixture)

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "frameworks.md").read_text()
SECTIONS = {
    section.partition("\n")[0]: re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    for section in TEXT.split("\n## ")[1:]
}


def run(section: str, names: dict[str, Any]) -> dict[str, Any]:
    """What the names of the section's programs stand for, after another's."""
    for program in SECTIONS[section]:
        exec(program, names)
    return names


@pytest.mark.filterwarnings("ignore")
def test_transformers_and_peft(one_thread: None, capsys: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    pytest.importorskip("accelerate")
    pytest.importorskip("transformers")
    names = run("transformers", {})
    assert len(names["trainer"].subspace_optimizer.history) == 10
    assert improved(names["trainer"]) > 0.5
    pytest.importorskip("peft")
    adapted = run("PEFT", names)["trainer"]
    assert adapted.subspace_optimizer.subspace.numel == 2 * (8 + 24)
    assert improved(adapted) > 0.0


def improved(trainer: Any) -> float:
    history = trainer.subspace_optimizer.history
    return history[0].loss - history[-1].loss


@pytest.mark.filterwarnings("ignore")
def test_skorch(one_thread: None) -> None:  # noqa: F811
    pytest.importorskip("skorch")
    names = run("skorch", {})
    assert len(names["trajectory"]) == 48
    assert names["net"].history[-1, "train_loss"] < 0.25


@pytest.mark.filterwarnings("ignore")
def test_keras(
    one_thread: None,  # noqa: F811
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    pytest.importorskip("keras")
    run("Keras 3", {})
    assert float(capsys.readouterr().out.split()[-1]) < 0.25
