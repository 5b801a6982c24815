"""The usage example of the README runs as written and does what it is there to show."""

from __future__ import annotations

import re
from pathlib import Path

import torch


def test_the_usage_example_runs():
    readme = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    names: dict = {}
    exec(code, names)
    assert len(names["trajectory"]) == 60
    assert names["optimizer"].status.moved
    # What the text below the example says.
    model, trajectory = names["model"], names["trajectory"]
    weights = trajectory.anchor + trajectory.snapshots[-1]
    torch.nn.utils.vector_to_parameters(weights, model.parameters())
    with torch.no_grad():
        sgd = torch.nn.functional.cross_entropy(model(names["data"]), names["labels"])
    assert names["loss"] < 0.6 * sgd
