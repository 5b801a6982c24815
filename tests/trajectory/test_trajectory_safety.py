"""Trajectories: bad input leaves them as they were; saved ones go on bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from walks import FLOATS, flat, parameters, recorded, walk

from dldr_ext import Trajectory
from dldr_ext.files import artifacts


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_snapshots(count):
    trajectory = Trajectory(parameters(), capacity=3)
    for _ in range(count):
        trajectory.record()
    message = f"expected at least two snapshots, the trajectory holds {count}"
    with pytest.raises(ValueError, match=message):
        trajectory.subspace(1)
    with pytest.raises(ValueError, match=message):
        trajectory.explained_variance_ratio()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"dim": 12}, ValueError, r"dim: expected 1 <= dim <= 11 \(12 centred snapshots\), got 12"),
        ({"dim": 13, "center": False}, ValueError, r"<= 12 \(12 snapshots\), got 13"),
        ({"dim": 0}, ValueError, "dim: expected 1 <= dim <= 11 .* got 0"),
        ({"dim": 2.5}, TypeError, "float"),
        (
            {"dim": 3, "explained": 0.5},
            ValueError,
            "expected dim or explained, got both: 3 and 0.5",
        ),
        ({"explained": 0.0}, ValueError, "expected 0 < explained <= 1, got 0.0"),
        ({"explained": 1.1}, ValueError, "expected 0 < explained <= 1, got 1.1"),
        ({"explained": float("nan")}, ValueError, "expected 0 < explained <= 1, got nan"),
        ({"start": "middle"}, ValueError, "'last', 'mean' or an index, got 'middle'"),
        ({"start": 12}, ValueError, "expected an index of the 12 snapshots, got 12"),
        ({"start": 1.5}, TypeError, "float"),
        ({"dtype": torch.int16}, ValueError, "int8, float8_e4m3fn, got int16"),
    ],
)
def test_bad_arguments_of_subspace(options, error, message):
    trajectory, _, _ = recorded()
    with pytest.raises(error, match=message):
        trajectory.subspace(**options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"capacity": 0}, ValueError, "capacity: expected at least 1 snapshot, got 0"),
        ({"capacity": 2.5}, TypeError, "float"),
        ({"dtype": torch.int16}, ValueError, "float64, int8, float8_e4m3fn, got int16"),
        ({"dtype": "bfloat16"}, ValueError, "got 'bfloat16'"),
        ({"storage": "tape"}, ValueError, r"storage: expected one of .*'disk'\], got 'tape'"),
        ({"anchor": torch.ones(3)}, ValueError, r"anchor\[0\]: expected shape \(117,\)"),
        ({"anchor": [torch.ones(3)]}, ValueError, r"anchor\[0\]: expected shape \(2, 3, 3, 3\)"),
        ({"anchor": torch.ones(117).int()}, TypeError, "floating-point tensor, got torch.int32"),
        ({"anchor": [None]}, TypeError, "floating-point tensor, got None"),
        ({"anchor": torch.full((117,), torch.nan)}, ValueError, "anchor: expected finite"),
        ({"anchor": torch.ones(117, device="meta")}, ValueError, "expected device cpu, got meta"),
    ],
)
def test_bad_arguments_of_the_constructor(options, error, message):
    with pytest.raises(error, match=message):
        Trajectory(parameters(), **options)


def test_empty_tensors_are_fine_but_not_alone():
    with pytest.raises(ValueError, match="expected at least one element"):
        Trajectory([torch.ones(0)])
    params = [torch.ones(0), torch.randn(9), torch.ones(2, 0)]
    trajectory = Trajectory(params, capacity=3, dtype=torch.float32)
    walk(params, 3, trajectory.record)
    assert trajectory.subspace(2).shapes == [(0,), (9,), (2, 0)]


def state(trajectory):
    return (
        len(trajectory),
        trajectory.gram,
        trajectory.snapshots.clone(),
        trajectory._store._gram.clone(),
        trajectory.anchor,
    )


def assert_same(before, after):
    assert before[0] == after[0]
    for one, other in zip(before[1:], after[1:], strict=True):
        assert torch.equal(one, other)


def test_full():
    trajectory, _, _ = recorded(count=12)
    for _ in range(3):
        trajectory.record()
    before = state(trajectory)
    with pytest.raises(ValueError, match="full: it holds 15 snapshots, its capacity"):
        trajectory.record()
    assert_same(before, state(trajectory))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_snapshot_that_is_not_finite_does_not_count(bad, dtype):
    trajectory, params, _ = recorded(dtype=dtype)
    before = state(trajectory)
    good = params[2][3, 1].item()
    with torch.no_grad():
        params[2][3, 1] = bad
    with pytest.raises(ValueError, match=r"params\[2\]: expected finite values, got NaN or Inf"):
        trajectory.record()
    assert_same(before, state(trajectory))
    with torch.no_grad():
        params[2][3, 1] = good
    assert trajectory.record() == 12
    assert trajectory.gram.isfinite().all()


def test_a_first_snapshot_that_is_not_finite_is_no_anchor():
    params = parameters()
    trajectory = Trajectory(params, capacity=3)
    with torch.no_grad():
        params[1][0] = torch.nan
    with pytest.raises(ValueError, match=r"params\[1\]: expected finite values"):
        trajectory.record()
    assert len(trajectory) == 0 and trajectory.anchor is None
    with torch.no_grad():
        params[1][0] = 1
    trajectory.record()
    assert torch.equal(trajectory.anchor, flat(params))


@pytest.mark.parametrize(
    ("dtype", "value", "limit"),
    [(torch.float16, 1e5, "float16 holds 6.55e.04"), (torch.float32, 1e25, "below 3.4e.38")],
)
def test_a_delta_that_overflows_does_not_count(dtype, value, limit):
    trajectory, params, _ = recorded(dtype=dtype)
    before = state(trajectory)
    with torch.no_grad():
        params[0][0, 0, 0, 0] = value
    with pytest.raises(ValueError, match=f"from the anchor of 1e.* overflows: .*{limit}"):
        trajectory.record()
    assert_same(before, state(trajectory))


def test_a_parameter_that_changed_its_shape():
    trajectory, params, _ = recorded()
    before = state(trajectory)
    params[1].data = torch.randn(8)
    message = r"params\[1\]: expected shape \(7,\), as when the trajectory was made, got \(8,\)"
    with pytest.raises(ValueError, match=message):
        trajectory.record()
    params[1].data = torch.randn(7, 1)
    with pytest.raises(ValueError, match=r"got \(7, 1\)"):
        trajectory.record()
    assert_same(before, state(trajectory))


def test_a_parameter_that_moved():
    trajectory, _, _ = recorded()
    before = state(trajectory)
    trajectory.params[1] = nn.Parameter(torch.ones(7, device="meta"))
    with pytest.raises(ValueError, match=r"params\[1\]: expected device cpu, .* got meta"):
        trajectory.record()
    assert_same(before, state(trajectory))
    with pytest.raises(ValueError, match="meta device"):
        Trajectory([torch.ones(3, device="meta")], capacity=2).record()


def test_a_parameter_that_changed_its_dtype_goes_on():
    trajectory, params, _ = recorded()
    params[0].data = params[0].data.bfloat16()
    trajectory.record()
    expected = flat([p.float() for p in params]) - trajectory.anchor
    assert torch.equal(trajectory.snapshots[-1], expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_save_and_load_go_on_bit_for_bit(tmp_path, dtype):
    trajectory, params, _ = recorded(dtype=dtype)
    trajectory.save(tmp_path / "file")
    other = [nn.Parameter(torch.zeros_like(p)) for p in params]
    loaded = Trajectory.load(tmp_path / "file", other)
    assert_same(state(trajectory)[:3], state(loaded)[:3])
    assert torch.equal(trajectory.anchor, loaded.anchor)
    assert (loaded.capacity, loaded.dtype, loaded.shapes) == (15, dtype, trajectory.shapes)
    for step in range(3):
        with torch.no_grad():
            for p, q in zip(params, other, strict=True):
                p.mul_(1.01 + step)
                q.copy_(p)
        assert trajectory.record() == loaded.record()
    assert_same(state(trajectory), state(loaded))
    assert torch.equal(trajectory.subspace(9).basis, loaded.subspace(9).basis)


def test_names_are_kept_and_checked(tmp_path):
    one, other = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
    model = nn.ModuleDict({"a": one, "b": other})
    trajectory = Trajectory(model.named_parameters(), capacity=3)
    trajectory.record()
    trajectory.save(tmp_path / "file")
    assert Trajectory.load(tmp_path / "file", model.parameters()).names == ["a.weight", "b.weight"]
    swapped = [("b.weight", other.weight), ("a.weight", one.weight)]
    message = r"params\[0\]: expected the name a.weight, as in the trajectory .*, got b.weight"
    with pytest.raises(ValueError, match=message):
        Trajectory.load(tmp_path / "file", swapped)


def test_load_onto_other_parameters(tmp_path):
    trajectory, params, _ = recorded()
    trajectory.save(tmp_path / "file")
    with pytest.raises(ValueError, match=r"expected 4 tensors, as in the trajectory .*, got 3"):
        Trajectory.load(tmp_path / "file", params[:3])
    with pytest.raises(ValueError, match=r"params\[0\]: expected shape \(2, 3, 3, 3\), .*file"):
        Trajectory.load(tmp_path / "file", params[::-1])


def test_damaged_files(tmp_path):
    trajectory, params, _ = recorded()
    path = tmp_path / "file"
    trajectory.save(path)
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"{path}: "):
            Trajectory.load(path, params)
    for place in (3, 20, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=f"{path}: "):
            Trajectory.load(path, params)
    trajectory.subspace(2).save(path)
    with pytest.raises(ValueError, match="expected a trajectory, found a subspace"):
        Trajectory.load(path, params)


def test_an_empty_trajectory_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        Trajectory(parameters()).save(tmp_path / "file")
    assert not list(tmp_path.iterdir())


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    trajectory, params, _ = recorded()
    path = tmp_path / "file"
    trajectory.save(path)
    trajectory.record()

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(artifacts.os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        trajectory.save(path)
    assert len(Trajectory.load(path, params)) == 12 and len(list(tmp_path.iterdir())) == 1
