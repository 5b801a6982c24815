"""Which layers move, the plane of two directions, the loss on it, and two runs side by side."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch
from checkpoint_files import Wide, safe, states, untied, walk, write

from dldr_ext.analysis.analysis import Analysis
from dldr_ext.analysis.comparison import compare
from dldr_ext.analysis.loss import GRID, Loss, on_plane
from dldr_ext.checkpoints import CheckpointError, Series
from dldr_ext.reporting.views import fewer_layers


def nothing(*_):
    pass


def run_of(folder, tmp_path, **options):
    return Analysis(Series(folder), tmp_path / "out", keep_basis=False, **options).run()


def saved_in(folder):
    return [torch.load(path) for path in sorted(folder.iterdir(), key=lambda p: int(p.stem))]


def rows_of(folder, names):
    return torch.stack(
        [torch.cat([s[n].double().flatten() for n in names]) for s in saved_in(folder)]
    )


@pytest.mark.parametrize("large", [1, 1 << 14])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int8])
def test_layers(tmp_path, monkeypatch, dtype, large):
    monkeypatch.setattr("dldr_ext.analysis.layers._LARGE", large)
    monkeypatch.setattr("dldr_ext.pca.gram._CHUNK_BYTES", {"cpu": 1})  # several chunks
    folder, model = walk(tmp_path / "run", dtype=torch.float64)
    found = run_of(folder, tmp_path, dtype=dtype, chunk_bytes=1)["layers"]
    assert found["names"] == ["first", "second"]
    assert found["numel"] == [sum(p.numel() for p in m.parameters()) for m in model.children()]
    saved = saved_in(folder)
    for layer, norms in zip(found["names"], found["steps"], strict=True):
        names = [f"{layer}.weight", f"{layer}.bias"]
        steps = [
            math.hypot(*(float((b[n] - a[n]).norm()) for n in names)) for a, b in pairwise(saved)
        ]
        assert norms == pytest.approx(steps, rel=2e-2 if dtype == torch.int8 else 1e-5)


def test_few_layers_are_shown():
    names = [f"block.{i}.{part}" for i in range(8) for part in ("a.x", "a.y", "b.x", "b.y")]
    groups, norms = fewer_layers(names, [[1.0, 0.0]] * 32)
    assert groups == [f"block.{i}.{part}" for i in range(8) for part in "ab"]
    assert norms == [[pytest.approx(2**0.5), 0.0]] * 16
    groups, norms = fewer_layers([f"layer{i}" for i in range(30)], [[float(i)] for i in range(30)])
    assert groups == [*(f"layer{i}" for i in range(7, 30)), "7 others"]
    assert norms[-1] == [pytest.approx(sum(i * i for i in range(7)) ** 0.5)]


def test_the_path_is_the_projection_on_two_directions(tmp_path):
    folder, _ = walk(tmp_path / "run", count=6)
    found = run_of(folder, tmp_path, dtype=torch.float32)
    path = found["path"]
    names = Series(folder).names
    rows = rows_of(folder, names)
    left, sizes, _ = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    points = torch.tensor(path["coordinates"], dtype=torch.float64)
    assert torch.allclose(points.abs(), (left * sizes)[:, :2].abs(), atol=1e-4)
    directions = torch.tensor(path["coefficients"], dtype=torch.float64) @ rows
    assert torch.allclose(directions @ directions.T, torch.eye(2).double(), atol=1e-4)
    assert torch.allclose((rows - rows.mean(0)) @ directions.T, points, atol=1e-4)
    assert path["explained"] == pytest.approx(found["explained_variance_ratio"][:2])


def test_the_number_of_directions_is_chosen_where_there_are_enough(tmp_path):
    few, _ = walk(tmp_path / "few", count=7)
    assert run_of(few, tmp_path)["choice"]["asked"] == "no number"
    many, _ = walk(tmp_path / "many", count=8)
    assert run_of(many, tmp_path)["choice"]["asked"] == 'dim = "auto"'
    assert run_of(many, tmp_path, explained=0.5)["choice"]["asked"] == "explained = 0.5"


@pytest.mark.parametrize("writer", [None, safe])
def test_the_loss_on_the_plane(tmp_path, writer):
    """Of the mean of all weights, which is linear: known at each point. Buffers are the last's."""
    _, found, _ = states(5)
    for t, state in enumerate(found):
        state["norm.running_mean"] = torch.full((4,), float(t))
    if writer is safe:
        found = [untied(state) for state in found]
    folder = write(tmp_path / "run", found, *([] if writer is None else [writer]))
    series = Series(folder)
    seen = []

    def mean(state):
        seen.append(state)
        return sum(state[name].mean() for name in series.names)

    loss = Loss(mean, "--loss my:mean")
    along = list(loss.along(series, nothing).values())
    expected = [float(sum(state[n].mean() for n in series.names)) for state in found]
    assert along == pytest.approx(expected, abs=1e-6)
    path = run_of(folder, tmp_path, dtype=torch.float32)["path"]
    counts = []
    grid = on_plane(
        loss, [series], path["coefficients"], path["coordinates"], lambda *c: counts.append(c)
    )
    assert counts[-1] == (GRID**2, GRID**2) and len(seen) == 5 + GRID**2
    state = seen[-1]
    assert float(state["norm.running_mean"][0]) == 4 and state["norm.num_batches_tracked"] == 0
    if writer is None:
        assert torch.equal(state["head.weight"], state["embed.weight"])  # tied, as they were
    assert state.keys() == found[0].keys()
    slope = torch.tensor(path["coefficients"]) @ torch.tensor(expected)
    end = torch.tensor(path["coordinates"][-1])
    for y, row in zip(grid["y"], grid["loss"], strict=True):
        for x, value in zip(grid["x"], row, strict=True):
            moved = expected[-1] + float((torch.tensor([x, y]) - end) @ slope)
            assert value == pytest.approx(moved, abs=1e-5)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda state: 1 / 0,
            r"--loss m:f: raised ZeroDivisionError: division by zero \(.*:\d+\) at",
        ),
        (lambda state: float("nan"), "--loss m:f: expected a finite number, got nan at .*8.pt"),
        (lambda state: torch.ones(3), r"--loss m:f: expected a number, got Tensor of shape \(3,\)"),
        (lambda state: None, "--loss m:f: expected a number, got NoneType at"),
    ],
)
def test_a_bad_loss_is_named(tmp_path, function, message):
    folder, _ = walk(tmp_path / "run", count=2)
    with pytest.raises(ValueError, match=message):
        Loss(function, "--loss m:f").along(Series(folder), nothing)


def test_checkpoints_without_a_loss_are_left_out_if_they_may_be(tmp_path):
    folder, _ = walk(tmp_path / "run", count=4)
    (folder / "10.pt").write_bytes((folder / "10.pt").read_bytes()[:-9000])
    series = Series(folder, skip_bad=True)
    values = iter([1.0, float("nan"), 3.0, 4.0])
    found = Loss(lambda _: next(values), "f").along(series, nothing)
    assert len(series) == 2 and [found[path] for path in series.paths] == [1.0, 3.0]
    assert any("f: expected a finite number, got nan" in str(e) for e in series.skipped)


def test_holes_in_the_plane(tmp_path):
    folder, _ = walk(tmp_path / "run", count=4)
    path = run_of(folder, tmp_path)["path"]
    values = iter([float("inf"), float("nan"), *[1.0] * GRID**2])
    grid = on_plane(
        Loss(lambda _: next(values), "f"),
        [Series(folder)],
        path["coefficients"],
        path["coordinates"],
        nothing,
    )
    assert grid["loss"][0][:3] == [None, None, 1.0]
    json.dumps(grid, allow_nan=False)


def test_two_runs(tmp_path, monkeypatch):
    monkeypatch.setattr("dldr_ext.pca.gram._CHUNK_BYTES", {"cpu": 1})  # several chunks
    one, _ = walk(tmp_path / "one", count=5, dtype=torch.float64)
    two, _ = walk(tmp_path / "two", count=4, dtype=torch.float64)
    first, second = Series(one), Series(two)
    second.match(first)
    other, together = compare(first, second, 2, double=True, chunk_bytes=1)
    a, b = rows_of(one, first.names), rows_of(two, first.names)
    expected = run_of(two, tmp_path, dtype=torch.float64)
    for key in ("drift", "layers", "explained_variance_ratio", "path", "cosines"):
        same(other[key], expected[key])
    assert together["distance_of_first"] == pytest.approx(float((a[0] - b[0]).norm()))
    assert together["distance_of_last"] == pytest.approx(float((a[-1] - b[-1]).norm()))
    whole = torch.cat([a, b])
    left, sizes, right = torch.linalg.svd(whole - whole.mean(0), full_matrices=False)
    points = torch.tensor(together["path"]["coordinates"], dtype=torch.float64)
    assert torch.allclose(points.abs(), (left * sizes)[:, :2].abs())
    for key, x, y in (("second_in_first", a, b), ("first_in_second", b, a)):
        right = torch.linalg.svd(x - x.mean(0), full_matrices=False)[2][:2]
        moved = y - y.mean(0)
        share = float((moved @ right.T).square().sum() / moved.square().sum())
        assert together[key] == pytest.approx(share, rel=1e-6)


def same(found, expected):
    if isinstance(expected, dict):
        for key, value in expected.items():
            same(found[key], value)
    elif expected and isinstance(expected[0], str):
        assert found == expected
    elif expected and isinstance(expected[0], list):
        for one, other in zip(found, expected, strict=True):
            same(one, other)
    else:
        assert found == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_a_second_run_in_another_order(tmp_path):
    one, _ = walk(tmp_path / "one", count=3)
    two = tmp_path / "two"
    write(two, [dict(reversed(state.items())) for state in saved_in(one)])
    first, second = Series(one), Series(two)
    assert second.names != first.names
    second.match(first)
    _, together = compare(first, second, 2)
    assert together["distance_of_last"] == 0 and together["second_in_first"] == pytest.approx(1)


def test_another_architecture(tmp_path):
    one, _ = walk(tmp_path / "one", count=2)
    state = Wide().state_dict()
    shaped = {**state, "second.bias": torch.zeros(71)}
    more = {**state, "third.bias": torch.zeros(3)}
    less = {name: value for name, value in state.items() if name != "first.bias"}
    for i, (other, message) in enumerate(
        (
            (shaped, r"second.bias of shape \(70,\), got \(71,\)"),
            (more, "no other tensors, found third.bias"),
            (less, "the tensor first.bias, found none of this name"),
        )
    ):
        folder = write(tmp_path / f"other{i}", [other] * 2)
        with pytest.raises(CheckpointError, match=f"expected the architecture of .*one.*{message}"):
            Series(folder).match(Series(one))
