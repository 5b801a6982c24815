"""Recording, principal directions against float64 and scikit-learn, save and load, bad input."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.decomposition import PCA
from torch import nn
from walks import FLOATS, flat, parameters, recorded, walk

import dldr_ext
from dldr_ext import Subspace, Trajectory
from dldr_ext.pca import dimension


def gram_of(rows):
    return rows.double() @ rows.double().T


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_are_rounded_deltas_and_gram_is_that_of_the_rows(dtype):
    trajectory, _, points = recorded(dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert trajectory.anchor.dtype == wide
    assert torch.equal(trajectory.anchor, points[0].to(wide))
    assert torch.equal(trajectory.snapshots, (points.to(wide) - points[0].to(wide)).to(dtype))
    gram = trajectory.gram
    assert gram.dtype == torch.float64 and torch.equal(gram, gram.T)
    expected = gram_of(trajectory.snapshots)
    tolerance = 1e-14 if dtype == torch.float64 else 2e-7
    assert (gram - expected).abs().max() <= tolerance * expected.max()


def test_indices_length_repr_and_views():
    params = parameters()
    trajectory = Trajectory(params, capacity=4)
    assert len(trajectory) == 0 and trajectory.anchor is None
    assert [trajectory.record() for _ in range(3)] == [0, 1, 2]
    assert len(trajectory) == 3 and trajectory.gram.shape == (3, 3)
    assert trajectory.snapshots.shape == (3, 117)
    assert repr(trajectory) == (
        "Trajectory(3 of 4 snapshots, numel=117, dtype=bfloat16, device=cpu)"
    )
    trajectory.gram.fill_(7)
    assert not trajectory.gram.any()


def test_tied_and_frozen_parameters():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    model[1].bias.requires_grad_(False)
    trajectory = Trajectory(model.named_parameters(), capacity=2)
    assert trajectory.numel == 20 and trajectory.names == ["0.weight", "0.bias"]


@pytest.mark.parametrize("as_list", [False, True])
def test_given_anchor(as_list):
    params = parameters()
    given = [torch.randn_like(p) for p in params]
    anchor = flat(given)
    trajectory = Trajectory(
        params, capacity=2, dtype=torch.float32, anchor=given if as_list else anchor
    )
    trajectory.record()
    assert torch.equal(trajectory.snapshots[0], flat(params) - anchor)
    before = trajectory.anchor.clone()
    anchor.zero_()
    assert torch.equal(trajectory.anchor, before), "the anchor must be a copy"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("center", [True, False])
def test_basis_against_a_float64_decomposition(dtype, center):
    trajectory, _, _ = recorded(dtype=dtype)
    subspace = trajectory.subspace(8, center=center, dtype=torch.float64)
    rows = trajectory.snapshots.double()
    _, sigma, vectors = torch.linalg.svd(rows - rows.mean(0) * center, full_matrices=False)
    overlap = subspace.basis @ vectors[:8].T
    assert (overlap.abs() - torch.eye(8)).abs().max() < 1e-8
    torch.testing.assert_close(subspace.singular_values, sigma[:8], rtol=1e-9, atol=0)
    torch.testing.assert_close(
        subspace.explained_variance_ratio, (sigma**2 / (sigma**2).sum())[:8], rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_basis_is_orthonormal_up_to_its_own_rounding(dtype):
    trajectory, _, _ = recorded(dtype=dtype)
    subspace = trajectory.subspace(11)
    assert subspace.dtype == dtype and subspace.basis.shape == (11, 117)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-6}.get(dtype, torch.finfo(dtype).eps)
    assert (gram_of(subspace.basis) - torch.eye(11)).abs().max() < tolerance


def test_weak_directions_are_as_orthonormal_as_strong_ones(cpu_capability, threads):
    """Sums in float32 would leave the last of these off by 1e-7 * 4^9 = 0.03."""
    threads(1)
    n, count = 20_000, 12
    directions = torch.linalg.qr(torch.randn(n, 10, dtype=torch.float64)).Q.T
    lengths = 2.0 ** -torch.arange(10, dtype=torch.float64)
    points = torch.randn(count, 10, dtype=torch.float64) * lengths @ directions
    param = torch.zeros(n)
    trajectory = Trajectory([param], capacity=count, dtype=torch.float32, anchor=torch.zeros(n))
    for point in points:
        param.copy_(point)
        trajectory.record()
    subspace = trajectory.subspace(10)
    assert (gram_of(subspace.basis) - torch.eye(10)).abs().max() < 1e-6
    components = torch.from_numpy(PCA(10, svd_solver="full").fit(points.numpy()).components_)
    overlap = (subspace.basis.double() @ components.T).abs()
    assert (overlap - torch.eye(10)).abs().max() < 1e-5


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(2, 14),
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=5),
    seed=st.integers(0, 2**16),
    data=st.data(),
)
def test_record_then_subspace_is_principal_component_analysis(count, sizes, seed, data):
    torch.manual_seed(seed)
    params = [torch.randn(size) for size in sizes]
    trajectory = Trajectory(params, capacity=count, dtype=torch.float32)
    points = walk(params, count, trajectory.record, step=1.0).double()
    dim = data.draw(st.integers(1, min(count - 1, sum(sizes))))
    subspace = trajectory.subspace(dim)
    pca = PCA(dim, svd_solver="full").fit(points.numpy())
    ratio = torch.from_numpy(pca.explained_variance_ratio_)
    torch.testing.assert_close(subspace.explained_variance_ratio, ratio, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(
        subspace.singular_values, torch.from_numpy(pca.singular_values_), rtol=1e-4, atol=1e-5
    )
    # Components are unique only where the singular values are apart.
    sigma = torch.linalg.svdvals(points - points.mean(0))
    components = torch.from_numpy(pca.components_)
    for i in range(dim):
        others = [abs(float(sigma[i] - s)) for j, s in enumerate(sigma) if j != i]
        gap = min(others, default=1.0)
        if gap > 1e-2 * float(sigma[0]):
            overlap = abs(float(components[i] @ subspace.basis[i].double()))
            assert overlap == pytest.approx(1, abs=1e-5)


def test_sign_convention_and_determinism():
    trajectory, _, _ = recorded()
    subspace = trajectory.subspace(6)
    again = trajectory.subspace(6)
    assert torch.equal(subspace.basis, again.basis)
    # An eigenvector over the snapshots is the centred snapshots' coordinate, over sigma.
    rows = trajectory.snapshots.double()
    vectors = subspace.basis.double() @ (rows - rows.mean(0)).T
    peaks = vectors.gather(1, vectors.abs().argmax(1, keepdim=True))
    assert (peaks > 0).all()


def test_explained_variance_ratio_of_the_trajectory():
    trajectory, _, points = recorded(dtype=torch.float32)
    ratio = trajectory.explained_variance_ratio()
    sigma = torch.linalg.svdvals(points.double() - points.double().mean(0))[:11]
    assert ratio.dtype == torch.float64 and ratio.shape == (11,)
    torch.testing.assert_close(ratio, sigma**2 / (sigma**2).sum(), rtol=1e-3, atol=1e-7)
    assert (ratio.diff() <= 0).all()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99, 1.0])
def test_dimension_from_the_explained_share(share):
    trajectory, _, _ = recorded()
    sums = trajectory.subspace(11).explained_variance_ratio.cumsum(0)
    dim = trajectory.subspace(explained=share).dim
    assert share == 1 or sums[dim - 1] >= share
    assert dim == 1 or sums[dim - 2] < share


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("start", ["first", "last", "mean", 4, -2])
def test_the_mean_of_the_snapshots_as_seen_from_the_start(start, center):
    trajectory, params, points = recorded(dtype=torch.float64)
    options = {"start": start, "center": center}

    def told(space, exact=False):
        expected = space.project(points.mean(0) - space.origin, exact=exact)
        loose = {"rtol": 0.02, "atol": 0.01} if exact else {"rtol": 1e-7, "atol": 1e-9}
        torch.testing.assert_close(space.mean, expected.double(), **loose)

    space = trajectory.subspace(3, **options)
    told(space)
    told(space.quantize("int8"), exact=True)
    told(trajectory.subspace(3, materialize=False, **options))
    groups = trajectory.grouped_subspace([2, 2], 3, **options)
    told(groups)
    if start == "first" and center:
        told(Subspace.from_snapshots(points, 3))
    told(trajectory.into_subspace(3, **options))
    for made in (space, groups):
        assert torch.equal(made.to(dtype=torch.float32).mean, made.mean)
        moved = made.with_origin(params)
        assert moved.mean is None and moved.to(dtype=torch.float32).mean is None


@pytest.mark.parametrize("start", ["first", "last", "mean", 0, 4, -1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_start(start, dtype):
    trajectory, _, points = recorded(dtype=dtype)
    named = {"first": points[0], "last": points[-1], "mean": points.mean(0)}
    expected = named[start] if isinstance(start, str) else points[start]
    origin = trajectory.subspace(3, start=start).origin
    assert origin.dtype == dtype
    torch.testing.assert_close(origin, expected, rtol=1e-6, atol=1e-6)
    if start == "first":
        assert torch.equal(origin, points[0])


@pytest.mark.parametrize("stored", FLOATS, ids=str)
@pytest.mark.parametrize("wanted", FLOATS, ids=str)
def test_dtype_of_the_basis(stored, wanted):
    trajectory, _, _ = recorded(dtype=stored)
    subspace = trajectory.subspace(4, dtype=wanted)
    assert subspace.dtype == wanted
    assert subspace.origin.dtype == (torch.float64 if wanted == torch.float64 else torch.float32)


def test_default_dimension():
    trajectory, _, _ = recorded(count=12)
    assert trajectory.subspace().dim == 11
    trajectory, _, _ = recorded(count=45)
    assert trajectory.subspace().dim == 40


def rank_three(params, count, dtype, scale):
    """Records points w0 + (a combination of three directions)."""
    start = [p.clone() for p in params]
    directions = [[torch.randn_like(p) for p in params] for _ in range(3)]
    trajectory = Trajectory(params, capacity=count, dtype=dtype)
    for _ in range(count):
        weights = torch.randn(3) * scale
        for p, first, *rest in zip(params, start, *directions, strict=True):
            p.copy_(first + sum(w * d for w, d in zip(weights, rest, strict=True)))
        trajectory.record()
    return trajectory


@pytest.mark.parametrize("n", [100, 5_000, 70_000])
@pytest.mark.parametrize("scale", [1.0, 0.01, 0.001])
def test_more_directions_than_the_rank(n, scale):
    """What the rounding of float32 weights adds is not taken for a direction."""
    trajectory = rank_three([torch.randn(n)], 10, torch.float32, scale)
    with pytest.warns(UserWarning, match=r"dim = 7 is above the numerical rank .*: kept 3"):
        subspace = trajectory.subspace(7)
    assert subspace.dim == 3
    assert (gram_of(subspace.basis) - torch.eye(3)).abs().max() < 1e-6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trajectory.subspace(3).dim == 3
        assert trajectory.subspace().dim == 3
        assert trajectory.subspace(explained=1.0).dim == 3


@pytest.mark.parametrize("n", [100, 4_096, 70_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_of_the_stored_gram_is_not_a_direction(n, dtype, cpu_capability):
    """Combinations of three directions: beyond them the rounding of the sums stands out."""
    directions = torch.randn(3, n, dtype=dtype)
    params = [torch.zeros(n, dtype=dtype)]
    trajectory = Trajectory(params, capacity=20, dtype=dtype)
    for _ in range(20):
        params[0].copy_(torch.randn(3, dtype=dtype) @ directions)
        trajectory.record()
    assert len(trajectory.explained_variance_ratio()) == 3
    with pytest.warns(UserWarning, match="kept 3 directions"):
        assert trajectory.subspace(19).dim == 3


def test_no_direction_at_all():
    params = parameters()
    trajectory = Trajectory(params, capacity=3)
    for _ in range(3):
        trajectory.record()
    assert trajectory.explained_variance_ratio().shape == (0,)
    for options in ({}, {"dim": 1}, {"explained": 0.5}):
        with pytest.raises(ValueError, match="the 3 snapshots do not differ"):
            trajectory.subspace(**options)


def test_the_cut_and_the_threads_do_not_matter(threads):
    n = 50_000
    values = torch.randn(6, n)
    results = []
    for count, cuts in ((1, [n]), (2, [1, 255, n - 4352, 4096]), (2, [n // 2] * 2)):
        threads(count)
        params = list(torch.zeros(n).split(cuts))
        trajectory = Trajectory(params, capacity=6)
        for row in values:
            for p, piece in zip(params, row.split(cuts), strict=True):
                p.copy_(piece)
            trajectory.record()
        results.append((trajectory.gram, trajectory.subspace(5).basis))
    for gram, basis in results[1:]:
        assert torch.equal(gram, results[0][0]) and torch.equal(basis, results[0][1])


def test_chunks_do_not_show(monkeypatch):
    params = [torch.randn(10_000)]
    trajectory = Trajectory(params, capacity=6, dtype=torch.float32)
    walk(params, 6, trajectory.record)
    whole = trajectory.subspace(5).basis
    monkeypatch.setattr("dldr_ext.pca.gram._CHUNK_BYTES", {"cpu": 1})
    assert (trajectory.subspace(5).basis - whole).abs().max() < 1e-7


_MEMORY = """
import torch, dldr_ext

def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 1e3

torch.set_num_threads(1)
n, count = 2_000_000, 32
param = torch.zeros(n)
start = peak()
trajectory = dldr_ext.Trajectory([param], capacity=1000, dtype=torch.float32)
for t in range(count):
    param[:: t + 1] += 1
    trajectory.record()
recorded = peak()
subspace = trajectory.subspace(2)
trajectory.save(PATH)
print(recorded - start, peak() - recorded)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_there_is_never_a_second_array_of_snapshots(tmp_path):
    """256 MB of snapshots: the capacity of 8 GB is not touched, and the 256 MB are not copied."""
    script = _MEMORY.replace("PATH", repr(str(tmp_path / "file")))
    root = str(Path(dldr_ext.__file__).parents[1])
    output = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=True
    ).stdout
    recording, reducing = map(float, output.split())
    assert 256 <= recording < 320
    assert reducing < 192


def test_exports():
    assert dldr_ext.Trajectory is Trajectory and dldr_ext.Subspace is Subspace
    assert dimension._DEFAULT_DIM == 40
