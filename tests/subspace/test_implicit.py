"""Subspaces that read snapshots instead of a basis, and bases written over their snapshots."""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import reference
import torch
from samples import FLOATS, STORAGE, wide
from torch import nn

from dldr_ext import PBFGS, PSGD, GroupedSubspace, ImplicitSubspace, Subspace, Trajectory
from dldr_ext.subspace.base import PER_DIRECTION

OPTIONS = [
    {"dim": 5},
    {"explained": 0.9, "start": "last"},
    {"dim": 3, "start": "mean"},
    {"dim": 4, "center": False, "start": 2},
    {"dim": "auto"},
]


def recorded(dtype=torch.float32, count=9, **options):
    shapes = [(2, 3, 3, 3), (7,), (11, 5), (), (300, 20)]
    params = [nn.Parameter(torch.randn(shape, dtype=wide(dtype))) for shape in shapes]
    names = [f"layer{i}" for i in range(len(params))]
    named = list(zip(names, params, strict=True))
    trajectory = Trajectory(named, capacity=count + 2, dtype=dtype, **options)
    for t in range(count):
        trajectory.record()
        with torch.no_grad():
            for p in params:
                p.add_(torch.randn_like(p), alpha=0.1 / (t + 1))
    return trajectory, params


def close(actual, expected, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def gradients(params):
    return [torch.randn(p.shape, dtype=p.dtype) for p in params]


def pair(dtype=torch.float32, **options):
    """Implicit, and the same with a basis that is not rounded beyond what arithmetic is."""
    trajectory, params = recorded(dtype)
    options = options or {"dim": 5}
    implicit = trajectory.subspace(**options, materialize=False)
    return implicit, trajectory.subspace(**options, dtype=wide(dtype)), params


# Implicit


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_it_is_the_subspace_that_would_be_formed(options):
    implicit, formed, params = pair(**options)
    assert isinstance(implicit, ImplicitSubspace) and implicit.dim == formed.dim
    for name in ("origin", *PER_DIRECTION):
        assert torch.equal(getattr(implicit, name), getattr(formed, name))
    assert (implicit.shapes, implicit.names) == (formed.shapes, formed.names)
    assert torch.equal(implicit.to_dense().basis, formed.basis)
    assert implicit.report() == formed.report() and "kept" in implicit.report()
    close(implicit.coordinates(params), formed.coordinates(params), torch.float32)


def test_small_directions_within_the_error_that_is_documented():
    """Directions that differ by 1e4 in size, against float64 products of the same rows."""
    n, sizes = 50_000, torch.logspace(0, -4, 12)
    params = [nn.Parameter(torch.zeros(n))]
    trajectory = Trajectory(params, capacity=13, dtype=torch.float32)
    for size in sizes:
        trajectory.record()
        params[0].data.add_(size * torch.randn(n))
    space = trajectory.subspace(dim=10, materialize=False)
    rows = space.coefficients @ space.snapshots.double()
    g, theta = torch.randn(n), torch.randn(10)
    ratio = space.singular_values[0] / space.singular_values
    error = (space.project([g]).double() - rows @ g.double()).abs()
    assert ratio[-1] > 1e3 and bool((error < 1e-7 * ratio * g.norm()).all())
    moved = (space.reconstruct(theta).double() - space.origin - theta.double() @ rows).norm()
    assert moved < 1e-6 * ratio[-1] * theta.norm()


def test_exact_and_as_a_reference():
    implicit, _, params = pair()
    exact = implicit.project(params, exact=True)
    close(exact, implicit.project(params), torch.float32)
    assert implicit.quantization_error().spectral < 1e-9
    trajectory, _ = recorded(torch.bfloat16)
    dense = trajectory.subspace(dim=5)
    found = dense.quantize("int8").quantization_error(trajectory.subspace(5, materialize=False))
    assert 1e-6 < 1 - found.captured_variance < 1e-3
    assert (
        found.captured_variance
        < dense.quantization_error(trajectory.subspace(5, materialize=False)).captured_variance
    )


@pytest.mark.parametrize("optimizer", [PBFGS, PSGD])
def test_optimizers_take_the_same_steps(optimizer):
    implicit, formed, params = pair(torch.float64)
    target = gradients(params)
    paths = []
    for space in (implicit, formed):
        found = optimizer(params, space, lr=0.5, metric=None)  # the metric is too long for PSGD
        for _ in range(4):

            def closure(found=found):
                found.zero_grad()
                loss = sum(((p - t) ** 2).sum() for p, t in zip(params, target, strict=True))
                loss.backward()
                return loss

            found.step(closure)
        paths.append(found.theta.clone())
    torch.testing.assert_close(*paths, rtol=1e-9, atol=1e-9)


def test_later_snapshots_do_not_count():
    trajectory, params = recorded()
    implicit = trajectory.subspace(dim=5, materialize=False)
    g = gradients(params)
    before = implicit.project(g)
    trajectory.record()
    trajectory.record()
    assert len(trajectory) == 11 and len(implicit.snapshots) == 9
    assert torch.equal(implicit.project(g), before)


def test_snapshots_are_shared():
    implicit, _, params = pair()
    assert implicit.with_origin(params).snapshots is implicit.snapshots
    assert implicit.to("cpu", torch.float32) is implicit


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_saved_as_the_basis_that_it_stands_for(dtype, tmp_path):
    trajectory, _ = recorded(dtype)
    implicit, formed = trajectory.subspace(dim=6, materialize=False), trajectory.subspace(dim=6)
    implicit.save(tmp_path / "implicit")
    formed.save(tmp_path / "formed")
    assert (tmp_path / "implicit").read_bytes() == (tmp_path / "formed").read_bytes()
    assert torch.equal(Subspace.load(tmp_path / "implicit").basis, formed.basis)


def test_other_dtypes_are_dense():
    implicit, formed, _ = pair()
    for dtype in (torch.bfloat16, torch.float64):
        other = implicit.to(dtype=dtype)
        assert isinstance(other, Subspace) and other.dtype == dtype
        assert other.origin.dtype == other.coordinate_dtype
        close(other.basis, formed.basis.to(dtype), torch.float32)
    quantized = implicit.quantize("int8")
    assert torch.equal(quantized.basis, formed.quantize("int8").basis)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_8_bit_snapshots(dtype, tmp_path):
    trajectory, params = recorded(dtype)
    space = trajectory.subspace(dim=5, materialize=False)
    values = space.coefficients @ reference.decode(space.snapshots, space.scale)
    assert space.dtype == dtype and space.quantization_error().spectral < 1e-9
    g = torch.cat([g.reshape(-1) for g in gradients(params)])
    torch.testing.assert_close(space.project(g).double(), values @ g.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(space._stored_gram(), values @ values.T, rtol=0, atol=1e-12)
    close(space.to_dense().basis, values.float(), torch.float32)
    with pytest.raises(ValueError, match="into_subspace: expected snapshots that nothing else"):
        trajectory.into_subspace(dim=5)
    space.save(tmp_path / "saved")
    assert torch.equal(Subspace.load(tmp_path / "saved").basis, space.to_dense().basis)


def test_what_is_refused(tmp_path):
    trajectory, params = recorded()
    space = trajectory.subspace(dim=5, materialize=False)
    with pytest.raises(ValueError, match=r"theta: expected shape \(5,\) on cpu, got \(4,\) on cpu"):
        space.reconstruct(torch.zeros(4))
    with pytest.raises(
        TypeError, match=r"theta: expected a floating-point tensor, got torch.int64"
    ):
        space.reconstruct(torch.zeros(5, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"params\[4\]"):
        space.coordinates(params[:-1])
    with pytest.raises(TypeError, match=r"subspaces\[0\]: expected a Subspace, got ImplicitSubsp"):
        GroupedSubspace([space])
    with pytest.raises(ValueError, match=r"dtype: expected float32, as the .*, got bfloat16"):
        trajectory.subspace(dim=5, dtype=torch.bfloat16, materialize=False)
    assert repr(space) == (
        f"ImplicitSubspace(dim=5, numel={space.numel}, 9 snapshots in float32, device=cpu)"
    )
    disk, _ = recorded(storage="disk", path=tmp_path / "run")
    with pytest.raises(
        ValueError, match=r"materialize=False: expected snapshots in the memory .* "
    ):
        disk.subspace(dim=5, materialize=False)
    with pytest.raises(ValueError, match=r"into_subspace: expected .* got storage='disk'"):
        disk.into_subspace(dim=5)
    assert disk.subspace(dim=5).dim == 5
    disk.close()


# In place


@pytest.mark.parametrize("dtype", STORAGE, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_in_place_is_to_the_bit_what_is_formed_elsewhere(dtype, options, monkeypatch, device):
    monkeypatch.setattr("dldr_ext.pca.gram._CHUNK_BYTES", {"cpu": 1})  # several chunks
    trajectory, _ = recorded(dtype)
    stored = getattr(trajectory.snapshots, "codes", trajectory.snapshots)  # in 8 bits
    address, gram = stored.data_ptr(), trajectory.gram
    formed = trajectory.subspace(**options)
    spent = trajectory.into_subspace(**options)
    assert spent.dtype == dtype and spent.basis.data_ptr() == address
    assert torch.equal(spent.basis.double(), formed.basis.double())
    assert (spent.scale is None) == (dtype in FLOATS)
    assert spent.scale is None or torch.equal(spent.scale, formed.scale)
    assert torch.equal(spent.origin, formed.origin) and len(gram) == 9
    assert torch.equal(spent.singular_values, formed.singular_values)
    assert (spent.shapes, spent.names) == (formed.shapes, formed.names)


USES = {
    "record": lambda t: t.record(),
    "gram": lambda t: t.gram,
    "snapshots": lambda t: t.snapshots,
    "cost": lambda t: t.cost,
    "len": len,
    "ratio": lambda t: t.explained_variance_ratio(),
    "subspace": lambda t: t.subspace(dim=3),
    "implicit": lambda t: t.subspace(dim=3, materialize=False),
    "again": lambda t: t.into_subspace(dim=3),
    "grouped": lambda t: t.grouped_subspace([2, 3]),
    "save": lambda t: t.save("nowhere"),
}


@pytest.mark.parametrize("use", USES)
def test_a_spent_trajectory_says_so(use):
    trajectory, _ = recorded()
    space = trajectory.into_subspace(dim=5)
    before = space.basis.clone()
    with pytest.raises(ValueError, match=r"the trajectory is consumed: into_subspace\(\) has"):
        USES[use](trajectory)
    assert torch.equal(space.basis, before)
    assert repr(trajectory) == f"Trajectory(consumed, numel={space.numel})"
    trajectory.close()
    assert repr(copy.deepcopy(trajectory)) == repr(trajectory)


def test_an_error_leaves_the_trajectory_as_it_was():
    trajectory, _ = recorded()
    before = trajectory.snapshots.clone()
    for options in ({"dim": 100}, {"start": "middle"}, {"dtype": torch.bfloat16}):
        with pytest.raises(ValueError, match=r"dim|start|dtype"):
            trajectory.into_subspace(**options)
    assert torch.equal(trajectory.snapshots, before) and len(trajectory) == 9
    constant = Trajectory([nn.Parameter(torch.ones(5))])
    constant.record(), constant.record()
    with pytest.raises(ValueError, match="do not differ"):
        constant.into_subspace()
    assert len(constant) == 2


def test_not_while_an_implicit_subspace_reads_the_snapshots():
    trajectory, params = recorded()
    first = trajectory.subspace(dim=5, materialize=False)
    second = trajectory.subspace(dim=2, materialize=False).with_origin(params)
    for space in ("first", "second"):
        with pytest.raises(ValueError, match=r"got an implicit subspace .* of them: delete it"):
            trajectory.into_subspace(dim=5)
        if space == "first":
            del first
        else:
            del second
        gc.collect()
    assert trajectory.into_subspace(dim=5).dim == 5


def test_a_rank_below_dim_is_warned_of_where_it_is_called():
    trajectory, _ = recorded(count=4)
    rows = trajectory.snapshots
    rows[2:] = rows[1]
    for make in (
        trajectory.subspace,
        lambda dim: trajectory.subspace(dim, materialize=False),
        trajectory.into_subspace,
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            assert make(2).dim == 1
        assert [entry.filename for entry in caught] == [__file__]


def test_host_storage_of_cpu_parameters_is_memory():
    trajectory, params = recorded(storage="host")
    assert trajectory.subspace(dim=3, materialize=False).project(params).shape == (3,)
    assert trajectory.into_subspace(dim=3).dim == 3
