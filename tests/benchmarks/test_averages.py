"""Fixed and learned averages of checkpoints."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from benchmarks.experiments import averages, data
from benchmarks.experiments.settings import settings
from benchmarks.experiments.training import Task


@pytest.fixture(scope="module")
def text() -> data.Problem:
    problem = data.load("text")
    cut = {
        name: data.Part(getattr(problem, name).inputs[:96], getattr(problem, name).labels[:96])
        for name in ("train", "validation", "test")
    }
    return replace(problem, **cut)


def test_all_start_from_one_run_and_the_test_part_chooses_nothing(text, monkeypatch) -> None:
    task = Task(text, "chars", replace(settings("real", "text", "chars", 4), snapshots=2), 0)
    found = averages.run(task)
    assert len(found) == 7 and all(0 < loss < 10 for loss in found.values())
    assert averages.run(task) == found
    other = data.Part(text.test.inputs.flip(0), text.test.labels)
    blind = Task(replace(text, test=other), "chars", task.settings, 0)
    seen: list[torch.Tensor] = []
    learned = averages.learned
    monkeypatch.setattr(
        averages, "learned", lambda *arguments: seen.append(learned(*arguments)) or seen[-1]
    )
    averages.run(task)
    averages.run(blind)
    assert torch.equal(*seen)


def test_the_command_goes_on_where_it_was(tmp_path, monkeypatch, capsys, text) -> None:
    made: list[int] = []

    def run(task):
        made.append(task.seed)
        return {"rate along a cosine": 1.0 + task.seed, "mean": 1.5 + task.seed}

    monkeypatch.setattr(averages, "run", run)
    monkeypatch.setattr(averages.data, "load", lambda *_: text)
    path = tmp_path / "averages.json"
    for seeds in ("1", "2"):
        command = ["averages", "--data", "text", "--network", "chars", "--seeds", seeds]
        monkeypatch.setattr("sys.argv", [*command, "--output", str(path)])
        averages.main()
    assert made == [0, 1] and len(json.loads(path.read_text())) == 2
    assert "| mean | 2.0000 ± 0.7071 | 0.5000 ± 0.0000 |" in capsys.readouterr().out
