"""Checkpoints of every format give the trajectory that recording the same weights gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoint_files import WRITERS, Tied, states, write

from dldr_ext import Trajectory
from dldr_ext.checkpoints import CheckpointError, Series, reader
from dldr_ext.checkpoints.discovery import find_checkpoints
from dldr_ext.checkpoints.reader import CheckpointReader


@pytest.mark.parametrize("writer", WRITERS)
def test_every_format_records_the_same_trajectory(tmp_path, monkeypatch, writer):
    monkeypatch.setattr(reader, "_BUFFER", 64)  # several pieces for each tensor
    monkeypatch.setattr("dldr_ext.trajectory.from_checkpoints.PIECE", 37)
    model, found, expected = states()
    folder = write(tmp_path / "run", found, writer)
    with torch.device("meta"):
        hollow = Tied()
    result = Trajectory.from_checkpoints(folder, hollow, dtype=torch.float32)
    assert len(result) == len(found) and result.names == expected.names
    assert torch.equal(result.anchor, expected.anchor)
    assert torch.equal(result.snapshots, expected.snapshots)
    assert torch.equal(result.gram, expected.gram)
    assert torch.equal(result.subspace(3).basis, expected.subspace(3).basis)
    assert model.conv.weight.device.type == "cpu"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("stored", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_dtypes(tmp_path, dtype, stored):
    model, found, _ = states(4)
    folder = write(tmp_path / "run", [{k: v.to(stored) for k, v in s.items()} for s in found])
    model.to(stored)
    expected = Trajectory(model.named_parameters(), 4, dtype)
    for state in found:
        model.load_state_dict(state)
        expected.record()
    result = Trajectory.from_checkpoints(folder, model, dtype=dtype)
    assert torch.equal(result.snapshots, expected.snapshots)
    assert torch.equal(result.gram, expected.gram)


@pytest.mark.parametrize("storage", ["host", "disk"])
def test_storage(tmp_path, monkeypatch, storage):
    monkeypatch.setattr("dldr_ext.trajectory.from_checkpoints.PIECE", 64)
    monkeypatch.setattr("dldr_ext.trajectory.stores.disk.PIECE", 64)
    model, found, expected = states()
    folder = write(tmp_path / "run", found)
    options = {"path": tmp_path / "rows"} if storage == "disk" else {}
    result = Trajectory.from_checkpoints(
        folder, model, dtype=torch.float32, storage=storage, **options
    )
    assert torch.equal(result.snapshots[:], expected.snapshots)
    assert torch.equal(result.gram, expected.gram)
    result.close()
    if storage == "disk":
        again = Trajectory.load(tmp_path / "rows", model.named_parameters())
        assert torch.equal(again.gram, expected.gram)


@pytest.mark.parametrize("at", range(1, 5))
def test_an_interrupted_recording_goes_on(tmp_path, at):
    model, found, expected = states()
    folder = write(tmp_path / "run", found)
    options = {"dtype": torch.float32, "storage": "disk", "path": tmp_path / "rows"}

    def stop(read, total):
        if 5 * read == at * total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trajectory.from_checkpoints(folder, model, resume=True, progress=stop, **options)
    with pytest.raises(ValueError, match="path: expected a new or an empty folder"):
        Trajectory.from_checkpoints(folder, model, **options)
    seen = []
    result = Trajectory.from_checkpoints(
        folder, model, resume=True, progress=lambda *a: seen.append(a), **options
    )
    assert len(seen) == 5 - at and len({total for _, total in seen}) == 1
    assert seen[-1][0] == seen[-1][1]
    assert torch.equal(result.gram, expected.gram)
    result.close()
    for other in ({"dtype": torch.bfloat16}, {"capacity": 9}):
        with pytest.raises(ValueError, match="path: expected the folder of a trajectory of"):
            Trajectory.from_checkpoints(folder, model, resume=True, **options | other)
    found[0], found[4] = found[4], found[0]
    with pytest.raises(ValueError, match="of these checkpoints in this order, got Trajectory"):
        Trajectory.from_checkpoints(
            write(tmp_path / "others", found), model, resume=True, **options
        )
    with pytest.raises(ValueError, match="resume: expected storage='disk' and a path, got 'dev"):
        Trajectory.from_checkpoints(folder, model, resume=True)


def test_recording_goes_on_after_the_checkpoints(tmp_path):
    model, found, expected = states()
    folder = write(tmp_path / "run", found[:3])
    result = Trajectory.from_checkpoints(folder, model, dtype=torch.float32, capacity=5)
    for state in found[3:]:
        model.load_state_dict(state)
        result.record()
    assert torch.equal(result.gram, expected.gram)


def test_without_a_model_all_weights_count_once(tmp_path):
    _, found, _ = states(2)
    series = Series(write(tmp_path / "run", found))
    assert series.names == [
        "conv.weight",
        "norm.weight",
        "norm.bias",
        "frozen.weight",
        "frozen.bias",
        "embed.weight",
        "head.bias",
    ]
    notes = "\n".join(series.notes)
    assert "tied to another tensor, which counts): head.weight" in notes
    assert "batch norm, not weights): norm.running_mean, norm.running_var" in notes
    assert "not floating-point): norm.num_batches_tracked" in notes
    row = torch.empty(series.numel)
    with CheckpointReader() as reader:
        series.read(reader, 1, 0, row)
    assert torch.equal(row, torch.cat([found[1][name].reshape(-1) for name in series.names]))


def test_patterns(tmp_path):
    model, found, _ = states(2)
    folder = write(tmp_path / "run", found)
    options = {"include": ["norm.*", "head.*"], "exclude": "*.bias"}
    assert Series(folder, **options).names == ["norm.weight", "head.weight"]
    trajectory = Trajectory.from_checkpoints(folder, model, **options)
    assert trajectory.names == ["norm.weight"]  # the model's head is its embedding
    with pytest.raises(ValueError, match="include, exclude: expected patterns that let"):
        Trajectory.from_checkpoints(folder, model, include="nothing")
    with pytest.raises(CheckpointError, match="expected floating-point tensors, found none"):
        Series(folder, include="nothing")


def test_key(tmp_path):
    model, found, _ = states(2)
    for i, state in enumerate(found):
        saved = {"ema": {"w": state}, "student": state, "net": {n: t + 1 for n, t in state.items()}}
        torch.save(saved, tmp_path / f"{i}.pt")
    with pytest.raises(CheckpointError, match="several under 'student', 'net': name one as the"):
        Series(tmp_path, model)
    assert len(Series(tmp_path, model, key="ema.w")) == 2
    with pytest.raises(CheckpointError, match=r"expected the key 'ema.x', found a dict"):
        Series(tmp_path, model, key="ema.x")


def test_folders(tmp_path):
    for name in ("10.pt", "2.pt", "best.pt", "notes.txt"):
        (tmp_path / name).touch()
    assert [p.name for p in find_checkpoints(tmp_path)] == ["2.pt", "10.pt"]
    for step in (500, 1000, 90):
        folder = tmp_path / "runs" / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        for name in ("model.safetensors", "optimizer.pt"):
            (folder / name).touch()
    found = find_checkpoints([tmp_path / "runs", Path("x.pt")])
    assert [p.parent.name for p in found[:-1]] == [f"checkpoint-{s}" for s in (90, 500, 1000)]
    assert found[-1] == Path("x.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="expected a folder with checkpoints"):
        find_checkpoints(tmp_path / "empty")
    with pytest.raises(ValueError, match="expected at least one file or folder, got none"):
        find_checkpoints([])
