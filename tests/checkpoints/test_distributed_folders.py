"""Folders of torch.distributed.checkpoint, written by one rank or several, are read in pieces."""

from __future__ import annotations

import os
import pickle
import shutil
import warnings
from contextlib import suppress

import pytest
import torch
import torch.distributed.checkpoint as dcp
from checkpoint_files import Tied, states
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dldr_ext import Trajectory
from dldr_ext.checkpoints import CheckpointError, Series, reader
from dldr_ext.checkpoints.reader import CheckpointReader

CASES = 20_000 if os.environ.get("DLDR_EVERY_CASE") else 200


def save(saved, folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is one process
        dcp.save(saved, checkpoint_id=folder)


def row(series, t=0):
    out = torch.empty(series.numel)
    with CheckpointReader() as read:
        for begin in range(0, series.numel, 7):
            series.read(read, t, begin, out[begin : begin + 7])
    return out


def test_a_run_of_them_is_the_trajectory(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "_BUFFER", 64)
    model, found, expected = states(4)
    optimizer = torch.optim.Adam(model.parameters())
    for i, state in enumerate(found):
        saved = {"model": state, "optimizer": optimizer.state_dict(), "epoch": 10 - i, "args": "x"}
        save(saved, tmp_path / f"step-{i}")
    with torch.device("meta"):
        hollow = Tied()
    series = Series(tmp_path)
    assert [path.name for path in series.paths] == [f"step-{3 - i}" for i in range(4)]  # by epoch
    assert series.contents[0].progress == {"epoch": 7}
    assert series.notes.count("left out (not floating-point): norm.num_batches_tracked") == 1
    paths = [tmp_path / f"step-{i}" for i in range(4)]
    result = Trajectory.from_checkpoints(paths, hollow, dtype=torch.float32)
    assert torch.equal(result.snapshots, expected.snapshots)
    assert torch.equal(result.gram, expected.gram)


def test_what_was_saved_in_it(tmp_path):
    wide = torch.randn(6, 10)
    saved = {
        "net": {
            "weight": wide.T,
            "half": wide[2:, 3:].half(),
            "scalar": torch.tensor(2.5),
            "empty": torch.ones(0, 4),
        },
        "ema": [{"weight": wide + 1}, torch.ones(3)],
    }
    save(saved, tmp_path)
    series = Series(tmp_path)
    assert (
        series.names == ["weight", "half", "scalar", "empty"]
        and series.dtypes(0)[1] == torch.float16
    )
    assert torch.equal(row(series), torch.cat([t.reshape(-1) for t in saved["net"].values()]))
    assert series.decisions == [
        "weights taken from 'net', not under 'ema', 'ema.0'; the key names another"
    ]
    assert torch.equal(row(Series(tmp_path, key="ema.0")), (wide + 1).view(-1))
    save(nn.Linear(2, 3).state_dict(), tmp_path / "bare")
    assert Series(tmp_path / "bare").names == ["weight", "bias"]


def saves_shards(folder):
    from torch.distributed.tensor import DeviceMesh, Replicate, Shard, distribute_tensor

    ranks = torch.distributed.get_world_size()
    mesh = DeviceMesh("cpu", range(ranks))
    model = {}
    for name, shape, placement in (
        ("rows", (7, 3), Shard(0)),
        ("columns", (5, 9), Shard(1)),
        ("middle", (2, 5, 3), Shard(1)),
        ("few", (1, 4), Shard(0)),
        ("vector", (11,), Shard(0)),
        ("whole", (2, 2), Replicate()),
    ):
        numbers = torch.arange(float(torch.Size(shape).numel())).view(shape)
        model[name] = distribute_tensor(numbers, mesh, [placement])
    dcp.save({"model": model}, checkpoint_id=folder)
    return None


@pytest.mark.parametrize("size", [2, 4])
def test_shards_are_put_together(tmp_path, rank_groups, size):
    rank_groups(size).all(saves_shards, tmp_path / "run" / "step-1")
    series = Series(tmp_path / "run")
    shapes = {"rows": (7, 3), "columns": (5, 9), "middle": (2, 5, 3), "few": (1, 4)}
    shapes |= {"vector": (11,), "whole": (2, 2)}
    assert dict(zip(series.names, series.shapes, strict=True)) == shapes
    wanted = [torch.arange(float(torch.Size(shape).numel())) for shape in shapes.values()]
    assert torch.equal(
        row(series), torch.cat([wanted[list(shapes).index(n)] for n in series.names])
    )
    assert len(series.contents[0].files) == 1 + size
    next((tmp_path / "run" / "step-1").glob(f"__{size - 1}_*")).unlink()
    with pytest.raises(CheckpointError, match=rf"__{size - 1}_0.distcp: not found"):
        Series(tmp_path / "run")


class Evil:
    def __reduce__(self):
        return (open, ("/nonexistent/evil", "w"))


def test_damaged_ones_are_named(tmp_path):
    folder = tmp_path / "step-1"
    save({"model": {"w": torch.ones(9)}}, folder)
    (data,) = folder.glob("*.distcp")
    whole, metadata = data.read_bytes(), (folder / ".metadata").read_bytes()
    data.write_bytes(whole[:-100])
    with pytest.raises(CheckpointError, match=r"truncated or corrupt: model.w"):
        Series(folder)
    data.write_bytes(whole)
    for damaged in (b"", metadata[:-10], pickle.dumps(Evil()), pickle.dumps({"a": 1})):
        (folder / ".metadata").write_bytes(damaged)
        with pytest.raises(CheckpointError, match="metadata: truncated or corrupt"):
            Series(folder)
    (folder / ".metadata").unlink()
    with pytest.raises(
        CheckpointError, match=r"torch.distributed.checkpoint without its file .metad"
    ):
        Series(tmp_path)
    (folder / ".metadata").write_bytes(metadata.replace(b"__0_0.distcp", b"../../x.dist"))
    with pytest.raises(
        CheckpointError, match=r"expected the name of a file beside .metadata, found"
    ):
        Series(folder)


@settings(max_examples=CASES, deadline=None)
@given(st.data())
def test_any_damaged_folder_is_read_or_refused(tmp_path_factory, data):
    """Bytes changed or cut off: never another error, nothing read outside the files."""
    folder = tmp_path_factory.getbasetemp() / "whole"
    if not folder.exists():
        save(
            {"model": {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5).half()}, "epoch": 3},
            folder,
        )
    damaged = folder.with_name("damaged")
    shutil.rmtree(damaged, ignore_errors=True)
    shutil.copytree(folder, damaged)
    path = data.draw(st.sampled_from(sorted(damaged.iterdir())))
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: len(whole) - data.draw(st.integers(0, 40))])
    with suppress(CheckpointError):
        row(Series(damaged))
