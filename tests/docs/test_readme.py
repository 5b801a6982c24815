"""The examples in the README and on the pages run as written and show what they are there for."""

from __future__ import annotations

import re
from pathlib import Path

import torch


def test_the_usage_example_runs(capsys, caplog):
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert len(names["trajectory"]) == 61
    assert names["optimizer"].status.moved
    losses = [float(line) for line in capsys.readouterr().out.split()]
    assert len(losses) == 10 and 0.5 < losses[0] < 1 and losses[-1] < 0.15
    assert not caplog.records  # nothing to worry about on the way that the page shows
    # What the comment at its end says.
    model, trajectory = names["model"], names["trajectory"]
    weights = trajectory.anchor + trajectory.snapshots[-1]
    torch.nn.utils.vector_to_parameters(weights, model.parameters())
    with torch.no_grad():
        sgd = torch.nn.functional.cross_entropy(model(names["data"]), names["labels"])
    assert names["loss"] < 0.6 * sgd


def test_the_page_on_the_optimizers_runs():
    page = (Path(__file__).resolve().parents[2] / "docs" / "optimizers.md").read_text()
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for code in blocks[:1]:
        exec(code, names)
    first = names["optimizer"]
    losses = [record.loss for record in first.history]
    assert len(losses) == 5 and losses == sorted(losses, reverse=True)
    for code in blocks[1:]:
        exec(code, names)
    assert names["optimizer"] is not first and names["optimizer"].status.moved
    assert names["network"].training and not names["network"][1].running_mean.any()
