"""The programs of docs/distributed.md run as written, on two ranks."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

from dldr_ext import PBFGS, ShardedSubspace, Subspace, Trajectory
from dldr_ext.distributed.checkpoint import stateful

PAGE = Path(__file__).resolve().parents[2] / "docs" / "distributed.md"


def runs(programs: list[str], folder: Path) -> list[Any]:
    rank = torch.distributed.get_rank()
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, 1))
    inputs = torch.randn(64, 8)
    targets = inputs[:, :1].sin()
    my_inputs, my_targets = inputs[rank::2], targets[rank::2]
    names: dict[str, Any] = {
        "dist": SimpleNamespace(init_process_group=lambda: None),  # it is
        "network": network,
        "subspace": Subspace.random(network.parameters(), 10),
        "loss_fn": mse_loss,
        "my_inputs": my_inputs,
        "my_targets": my_targets,
        "my_batches": [(my_inputs, my_targets)] * 31,
        "sgd": torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9),
        "folder": folder,
        "dcp": dcp,
    }
    for known in (DistributedDataParallel, PBFGS, ShardedSubspace, Trajectory, stateful):
        names[known.__name__] = known
    exec(programs[0], names)
    exec(programs[1], names)
    found = names["optimizer"]
    losses = [float(found.step(lambda: mse_loss(names["model"](my_inputs), my_targets)))]
    for _ in range(5):
        losses += [float(found.step(lambda: mse_loss(names["model"](my_inputs), my_targets)))]
    assert isinstance(names["subspace"], ShardedSubspace) and losses[-1] < 0.9 * losses[0]
    before, weights = found.theta, [p.detach().clone() for p in network.parameters()]
    exec(programs[2], names)
    exec(programs[3], names)
    assert names["optimizer"] is not found and torch.equal(names["optimizer"].theta, before)
    assert all(torch.equal(a, b) for a, b in zip(weights, network.parameters(), strict=True))
    return losses


@pytest.mark.skipif(not PAGE.exists(), reason="beside an installed wheel there are no pages")
def test_every_program_runs(rank_groups: Any, tmp_path: Path) -> None:
    programs = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(programs) == 4
    one, other = rank_groups(2).all(runs, programs, tmp_path / "checkpoint")
    assert one == other
