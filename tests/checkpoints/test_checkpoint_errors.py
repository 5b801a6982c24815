"""Checkpoints that cannot be used: named, with their index; `skip_bad` goes on without them."""

from __future__ import annotations

import itertools
import json
import os
import pickle

import pytest
import torch
from checkpoint_files import compressed, legacy, plain, safe, sharded, states, untied, write
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from dldr_ext import Trajectory
from dldr_ext.analysis.analysis import Analysis
from dldr_ext.checkpoints import CheckpointError, Series
from dldr_ext.checkpoints.formats import read_contents
from dldr_ext.checkpoints.reader import CheckpointReader

CASES = 20_000 if os.environ.get("DLDR_EVERY_CASE") else 200


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("/nonexistent/evil",))


def change(path, edit):
    state = torch.load(path)
    edit(state)
    torch.save(state, path)


def swap(state):
    state["conv.weight"], state["embed.weight"] = state["embed.weight"], state["conv.weight"]


def nan(state):
    state["norm.bias"][2] = float("nan")


def huge(state):
    state["norm.bias"][2] = 3e38


def missing(path):
    path.unlink()


def empty(path):
    path.write_bytes(b"")


def truncated(path):
    path.write_bytes(path.read_bytes()[:-200])


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def garbage(path):
    path.write_bytes(b"not a checkpoint at all")


def pickled(path):
    path.write_bytes(pickle.dumps(Evil()))


def nothing(path):
    torch.save({"epoch": 3}, path)


def folder_instead(path):
    path.unlink()
    path.mkdir()
    (path / "note.txt").touch()


BAD = [
    (missing, "not found"),
    (empty, "empty: 0 bytes"),
    (truncated, "truncated or corrupt"),
    (half, "truncated or corrupt"),
    (garbage, "truncated or corrupt"),
    (pickled, "expected a file of torch.save, found a pickle of a posix.mkdir"),
    (nothing, "expected a state dict, found a dict with the keys \\['epoch'\\]"),
    (lambda p: change(p, swap), r"conv.weight: expected shape \(4, 3, 3, 3\), as in the .*, got"),
    (lambda p: change(p, lambda s: s.pop("norm.weight")), "expected the tensor norm.weight of the"),
    (lambda p: change(p, nan), "norm.bias: expected finite values, got NaN or Inf"),
]


@pytest.fixture
def run(tmp_path):
    model, found, _ = states(5)
    write(tmp_path / "run", found, first=0)
    return model, [tmp_path / "run" / f"{t}.pt" for t in range(5)]


@pytest.mark.parametrize(("spoil", "message"), BAD)
@pytest.mark.parametrize("index", [0, 2])
@pytest.mark.parametrize("storage", ["device", "disk"])
def test_a_bad_checkpoint_is_named_or_skipped(run, tmp_path, spoil, message, index, storage):
    model, paths = run
    good = Trajectory.from_checkpoints(paths[:index] + paths[index + 1 :], model)
    spoil(paths[index])

    def options(name):
        return {"storage": storage, "path": tmp_path / name} if storage == "disk" else {}

    with pytest.raises(CheckpointError, match=message) as caught:
        Trajectory.from_checkpoints(paths, model, **options("a"))
    assert (caught.value.index, caught.value.path) == (index, paths[index])
    assert str(caught.value).startswith(f"checkpoints[{index}]: {paths[index]}: ")
    with pytest.warns(UserWarning, match=f"left out checkpoints.{index}.: .*{message}"):
        result = Trajectory.from_checkpoints(paths, model, skip_bad=True, **options("b"))
    assert torch.equal(result.gram, good.gram)
    assert torch.equal(result.snapshots[:], good.snapshots)


@pytest.mark.parametrize(("spoil", "message"), BAD)
def test_analysis_names_or_skips_it(run, tmp_path, spoil, message):
    _, paths = run
    good = Analysis(Series(paths[:2] + paths[3:]), tmp_path / "good").run()
    spoil(paths[2])
    with pytest.raises(CheckpointError, match=message) as caught:
        Analysis(Series(paths), tmp_path / "out").run()
    assert caught.value.index == 2
    series = Series(paths, skip_bad=True)
    result = Analysis(series, tmp_path / "out", skip_bad=True).run()
    assert result["gram"] == good["gram"]
    assert [message in error or "2" in error for error in result["skipped"]] == [True]
    assert [error.index for error in series.skipped] == [2]


@pytest.mark.parametrize("index", [0, 3])
def test_a_difference_that_overflows(run, index, tmp_path):
    model, paths = run
    change(paths[3], huge)
    order = [paths[3], *paths[:3], paths[4]] if index == 0 else paths
    with pytest.raises(CheckpointError, match=r"overflows torch.float16"):
        Trajectory.from_checkpoints(order, model, dtype=torch.float16)
    with pytest.raises(CheckpointError, match=r"overflows torch.float16"):
        Analysis(Series(order), tmp_path / "out", dtype=torch.float16).run()


def test_another_architecture(run, tmp_path):
    _, paths = run
    change(paths[4], lambda s: s.update(extra=torch.ones(3)))
    with pytest.raises(CheckpointError, match=r"\[4\].*first checkpoint, found extra as well"):
        Series(paths)
    assert len(Series(paths, skip_bad=True)) == 4
    with pytest.raises(ValueError, match=r"none can be used; the first: checkpoints\[0\]"):
        Series([tmp_path / "a.pt", tmp_path / "b.pt"], skip_bad=True)


def test_no_permission(run, monkeypatch):
    model, paths = run
    opened = open

    def refuse(path, *arguments, **options):
        if str(path) == str(paths[1]):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(CheckpointError, match=r"\[1\].*no permission to read it"):
        Trajectory.from_checkpoints(paths, model)


def test_a_file_that_shrinks_while_it_is_read(run):
    _, paths = run
    series = Series(paths)
    paths[3].write_bytes(paths[3].read_bytes()[:1500])
    with (
        pytest.raises(CheckpointError, match=r"\[3\].*truncated: .* ends early"),
        CheckpointReader() as reader,
    ):
        series.read(reader, 3, 0, torch.empty(series.numel))


def test_a_file_that_is_written_anew_while_others_are_read(run, tmp_path):
    model, paths = run
    times = itertools.count()

    def written(*_):
        os.utime(paths[3], ns=(1, next(times)))

    message = r"\[3\].*expected it to stay as it was .* found it changed while it was read"
    with pytest.raises(CheckpointError, match=message):
        Trajectory.from_checkpoints(paths, model, progress=written)
    with pytest.warns(UserWarning, match=message):
        kept = Trajectory.from_checkpoints(paths, model, progress=written, skip_bad=True)
    assert len(kept) == len(paths) - 1
    with pytest.raises(CheckpointError, match=message):
        Analysis(Series(paths), tmp_path / "out", progress=written).run()
    result = Analysis(Series(paths), tmp_path / "out", progress=written, skip_bad=True).run()
    assert len(result["checkpoints"]) == len(paths) - 1


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="expected a file or a folder, found a device or a p"):
        Series(tmp_path / "x.pt")


def test_truncated_and_corrupt_safetensors(run, tmp_path):
    model, paths = run
    path = tmp_path / "x.safetensors"
    safe(torch.load(paths[0]), path)
    whole = path.read_bytes()
    for data in (whole[:-10], whole[:100], whole[:4], b"\xff" * 8 + whole[8:], whole + b"more"):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match="not a whole safetensors file"):
            Series([path], model)


def test_quantised_weights_are_not_taken_for_numbers(run, tmp_path):
    model, paths = run
    state = untied(torch.load(paths[0]))
    state["conv.weight"] = state["conv.weight"].to(torch.float8_e4m3fn)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"conv.weight: expected float32, .* float8_e4m3fn"):
        Series([tmp_path / "x.safetensors"], model)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "corrupt: not JSON"),
        ("[]", "expected an object with a 'weight_map'"),
        ('{"weight_map": {}}', "expected an object with a 'weight_map'"),
        ('{"weight_map": {"conv.weight": 3}}', "name of a file beside the index, found 3"),
        ('{"weight_map": {"a": "../0.pt"}}', "name of a file beside the index, found '../0.pt'"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "found '/etc/passwd'"),
        ('{"weight_map": {"a": "\\u0000"}}', r"found '.x00'"),
        ('{"weight_map": {"a": "\\ud800"}}', r"found '.ud800'"),
        ('{"weight_map": {"a": "gone.safetensors"}}', "gone.safetensors: not found"),
        ('{"weight_map": {"a": "a.safetensors"}}', "a: expected in a.safetensors, which lacks it"),
    ],
)
def test_bad_indices(run, tmp_path, index, message):
    model, paths = run
    sharded(torch.load(paths[0]), tmp_path / "shards")
    (tmp_path / "shards" / "model.safetensors.index.json").write_text(index)
    with pytest.raises(CheckpointError, match=message) as caught:
        Trajectory.from_checkpoints([paths[0], tmp_path / "shards"], model)
    assert caught.value.index == 1


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)


@settings(max_examples=CASES, deadline=None)
@given(st.binary(max_size=60) | _JSON.map(lambda value: json.dumps(value).encode()) | _JSON)
def test_any_index_is_read_or_refused(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "fuzz.safetensors.index.json"
    text = data if isinstance(data, bytes) else json.dumps({"weight_map": data}).encode()
    path.write_bytes(text)
    with pytest.raises(CheckpointError):
        read_contents(path)


@settings(max_examples=CASES, deadline=None)
@given(st.data())
def test_any_damaged_file_is_read_or_refused(tmp_path_factory, data):
    """Bytes changed, cut off or put in: never another error, nothing read outside the file."""
    folder = tmp_path_factory.getbasetemp()
    writer = data.draw(st.sampled_from([plain, safe, legacy, compressed]))
    suffix = {safe: ".safetensors", legacy: ".pth"}.get(writer, ".pt")
    source = folder / f"whole_{writer.__name__}{suffix}"
    if not source.exists():
        writer({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(5).half()}, source)
    whole = bytearray(source.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(whole) - 1))
        whole[at] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, 40))
    path = folder / f"damaged{source.suffix}"
    path.write_bytes(whole[: len(whole) - cut])
    try:
        series = Series([path])
        with CheckpointReader() as reader:
            series.read(reader, 0, 0, torch.empty(series.numel))
    except CheckpointError:
        pass
