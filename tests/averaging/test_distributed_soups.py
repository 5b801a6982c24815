"""Averages of folders of torch.distributed.checkpoint, which it loads itself."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.checkpoint import CheckpointException

from dldr_ext.averaging.soup_files import verify_mean, write_greedy_soup, write_mean
from dldr_ext.checkpoints import CheckpointError, Series


def weights(value: float) -> dict[str, torch.Tensor]:
    return {
        "layer.weight": torch.full((3, 4), value),
        "half": torch.full((5,), value, dtype=torch.bfloat16),
        "complex": torch.full((2,), 1j * value),
        "scalar": torch.tensor(value),
        "empty": torch.ones(0, 4),
        "count": torch.tensor(int(value)),
    }


def save(saved, folder) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is one process
        dcp.save(saved, checkpoint_id=folder)


def load(into, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(into, checkpoint_id=folder)
    return into


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for i in range(3):
        saved = {"model": weights(2.0 * i), "optimizer": {"m": torch.ones(3)}, "epoch": i}
        save(saved, tmp_path / "run" / f"step-{i}")
    return tmp_path / "run"


@pytest.mark.parametrize("greedy", [False, True])
def test_it_loads_what_loads_the_checkpoints(run, greedy):
    series = Series(run, rows=False)
    if greedy:  # of the last alone
        soup = write_greedy_soup(series, run / "mean", lambda state: float(state["scalar"] > 3))
        members, value = soup.members, 4.0
        assert members == [2]
    else:
        notes = write_mean(series, run / "mean")
        members, value = [0, 1, 2], 2.0
        assert notes == ["not averaged, but as in the last one: count"]
    found = load({"model": weights(-1.0)}, run / "mean")["model"]
    expected = weights(value) | {"count": torch.tensor(4)}
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    assert verify_mean(series, run / "mean", members, [1 / len(members)] * len(members)) <= 1
    with pytest.raises(
        CheckpointException, match=r"Missing key in checkpoint state_dict: optimizer\.m"
    ):
        load({"model": weights(0.0), "optimizer": {"m": torch.ones(3)}}, run / "mean")


def test_names_are_those_of_the_checkpoints(tmp_path):
    """In nested dicts and lists, or at the root; wrappers' prefixes too."""
    for i in range(2):
        save({"nets": [{"_orig_mod.w": torch.ones(2) * i}]}, tmp_path / f"a-{i}")
        save({"w": torch.ones(2) * i}, tmp_path / f"b-{i}")
    first = Series([tmp_path / "a-0", tmp_path / "a-1"], rows=False)
    write_mean(first, f"{tmp_path}/a/")
    nested = {"nets": [{"_orig_mod.w": torch.zeros(2)}]}
    assert load(nested, tmp_path / "a")["nets"][0]["_orig_mod.w"].tolist() == [0.5, 0.5]
    write_mean(Series([tmp_path / "b-0", tmp_path / "b-1"], rows=False), f"{tmp_path}/b/")
    assert load({"w": torch.zeros(2)}, tmp_path / "b")["w"].tolist() == [0.5, 0.5]


def test_what_was_averaged_is_beside_it(run, tmp_path):
    write_mean(Series(run, rows=False), run / "mean", "1-sqrt")
    facts = json.loads((run / "mean" / "dldr_ext.json").read_text())["metadata"]
    assert facts["checkpoints"] == [str(run / f"step-{i}") for i in range(3)]
    assert sum(facts["weights"]) == pytest.approx(1) and facts["weights"][0] > 0.5
    assert str(run / "step-1" / ".metadata") in facts["sha256"]
    again = Series(run, rows=False)  # it does not count among those that it is of
    assert [path.name for path in again.paths] == ["step-0", "step-1", "step-2"]
    named = Series(run / "mean", rows=False)
    assert named.decisions == [f"{run / 'mean'} is an average itself, and counts as one"]
    write_mean(again, tmp_path / "mean.safetensors", "1-sqrt")
    other = load_file(tmp_path / "mean.safetensors")
    found = load({"model": {"layer.weight": torch.zeros(3, 4)}}, run / "mean")
    assert torch.equal(found["model"]["layer.weight"], other["layer.weight"])


def test_nothing_is_left_of_one_that_failed(run):
    (data,) = (run / "step-2").glob("*.distcp")
    whole = data.read_bytes()
    half = torch.full((5,), 4.0, dtype=torch.bfloat16).view(torch.uint8).numpy().tobytes()
    assert whole.count(half) == 1  # the second tensor of the average
    data.write_bytes(whole.replace(half, b"\xff" * len(half)))  # NaN
    with pytest.raises(CheckpointError, match="half: expected finite values"):
        write_mean(Series(run, rows=False), run / "mean")
    assert sorted(path.name for path in run.iterdir()) == ["step-0", "step-1", "step-2"]


def saves_shards(folder: Path) -> None:
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    mesh = DeviceMesh("cpu", range(torch.distributed.get_world_size()))
    for i in range(2):
        rows = torch.arange(21.0).view(7, 3) + i
        model = {"rows": distribute_tensor(rows, mesh, [Shard(0)])}
        dcp.save({"model": model}, checkpoint_id=folder / f"step-{i}")


def loads_shards(folder: Path) -> torch.Tensor:
    from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor

    mesh = DeviceMesh("cpu", range(torch.distributed.get_world_size()))
    rows = distribute_tensor(torch.zeros(7, 3), mesh, [Shard(1)])
    dcp.load({"model": {"rows": rows}}, checkpoint_id=folder)
    return rows.full_tensor()


def test_ranks_load_the_parts_that_they_have(tmp_path, rank_groups):
    """Saved by rows on two ranks, loaded by columns."""
    rank_groups(2).all(saves_shards, tmp_path)
    write_mean(Series(tmp_path, rows=False), tmp_path / "mean")
    for found in rank_groups(2).all(loads_shards, tmp_path / "mean"):
        assert torch.equal(found, torch.arange(21.0).view(7, 3) + 0.5)
