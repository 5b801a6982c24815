"""Trajectories in int8 and float8_e4m3fn: what is stored, and that every place stores the same."""

from __future__ import annotations

import os

import pytest
import reference
import torch
from checkpoint_files import walk
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from samples import QUANTIZED
from test_trajectory_tiers import TIERS, recorded
from torch import nn

from dldr_ext import Subspace, Trajectory, ops, uniform_soup
from dldr_ext.analysis.analysis import Analysis
from dldr_ext.checkpoints import CheckpointError, Series
from dldr_ext.pca import gram
from dldr_ext.tensors.matrices import ScaledRows
from dldr_ext.trajectory.stores import disk

LARGEST = {torch.int8: 127, torch.float8_e4m3fn: 448}
NAMES = {torch.int8: "int8", torch.float8_e4m3fn: "float8_e4m3fn"}
# Around blocks, tiles and vectors.
WIDTHS = [1, 2, 255, 256, 257, 511, 512, 513, 4095, 4096, 4097]
EXAMPLES = 2000 if os.environ.get("DLDR_EVERY_CASE") else 100

eight_bits = pytest.mark.parametrize("dtype", QUANTIZED, ids=str)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """To the bit, NaN and the sign of zero included."""
    return one.dtype == other.dtype and torch.equal(
        one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8)
    )


def values(trajectory: Trajectory) -> torch.Tensor:
    """The stored numbers in float64, which holds them exactly."""
    rows = trajectory.snapshots
    return reference.decode(rows.codes[:], rows.scale[:])


def blocks_of(row: torch.Tensor) -> list[torch.Tensor]:
    return list(row.split(256))


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    n=st.sampled_from(WIDTHS) | st.integers(1, 1500),
    dtype=st.sampled_from(QUANTIZED),
    size=st.floats(1e-25, 1e15),
    seed=st.integers(0, 1000),
)
def test_a_row_is_the_delta_rounded_block_by_block(n, dtype, size, seed):
    """Against the definition in float64: each number within half a step of the format."""
    torch.manual_seed(seed)
    param = torch.randn(n)
    trajectory = Trajectory([param], 2, dtype, anchor=torch.zeros(n))
    # Blocks of different sizes, one of zeros among them.
    sizes = size * 10.0 ** torch.randint(-3, 4, (-(-n // 256),))
    sizes[torch.randint(len(sizes), ())] *= float(seed % 3 > 0)
    param *= sizes.repeat_interleave(256)[:n]
    trajectory.record()
    rows = trajectory.snapshots
    assert rows.codes.dtype == dtype and rows.codes.shape == (1, n)
    assert rows.scale.dtype == torch.float32 and rows.scale.shape == (1, -(-n // 256))
    delta, stored = param.double(), values(trajectory)[0]
    for k, (wanted, found) in enumerate(zip(blocks_of(delta), blocks_of(stored), strict=True)):
        peak = float(wanted.abs().max())
        assert rows.scale[0, k] == pytest.approx(peak / LARGEST[dtype], rel=2.0**-23)
        step = float(rows.scale[0, k])
        # float8 has four significant bits down to 2^-6, then steps of 2^-9.
        half = 0.5 if dtype == torch.int8 else (wanted / max(step, 1e-300)).abs() * 2.0**-4
        half = torch.as_tensor(half, dtype=torch.float64).clamp_min(2.0**-10)
        assert ((found - wanted).abs() <= step * (half + LARGEST[dtype] * 2.0**-21)).all()
    # The rounding of a basis is the same one.
    rounded = Subspace(param[None], param).quantize(NAMES[dtype])
    assert same(rows.codes, rounded.basis) and same(rows.scale, rounded.scale)


def assert_same_bits(found, expected):
    assert same(found.snapshots.codes[:], expected.snapshots.codes)
    assert same(found.snapshots.scale[:], expected.snapshots.scale)
    assert torch.equal(found.gram, expected.gram)
    assert same(found.subspace(3).basis, expected.subspace(3).basis)


@eight_bits
@pytest.mark.parametrize("n", [257, 20_011])
def test_gram_and_spectrum_are_those_of_the_stored_rows(dtype, n, tmp_path):
    near, _ = recorded("host", tmp_path, n, dtype)
    rows = values(near)
    exact, gram = rows @ rows.T, near.gram
    assert torch.equal(gram, gram.T)
    assert (gram - exact).abs().max() <= 2e-7 * exact.abs().max()
    _, sigma, vectors = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    share = sigma**2 / (sigma**2).sum()
    ratio = near.explained_variance_ratio()
    torch.testing.assert_close(ratio, share[: len(ratio)], rtol=1e-5, atol=1e-7)
    found = near.subspace(5, dtype=torch.float64)
    assert ((found.basis @ vectors[:5].T).abs() - torch.eye(5)).abs().max() < 1e-8
    torch.testing.assert_close(found.singular_values, sigma[:5], rtol=1e-9, atol=0)


@eight_bits
@pytest.mark.parametrize("tier", TIERS)
def test_every_place_has_the_same_numbers(tier, dtype, tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "PIECE", 1 << 12)
    monkeypatch.setattr(gram, "_CHUNK_BYTES", {"cpu": 1})  # pieces of 4,096 columns
    near, far = recorded(tier, tmp_path, dtype=dtype)
    assert same(near.snapshots.codes[:], far.snapshots.codes[:])
    assert same(near.snapshots.scale[:], far.snapshots.scale[:])
    assert torch.equal(near.gram, far.gram)
    assert torch.equal(near.explained_variance_ratio(), far.explained_variance_ratio())
    other = QUANTIZED[dtype == torch.int8]
    for options in ({}, {"dtype": other, "start": "mean"}, {"dtype": torch.bfloat16, "start": 3}):
        one, two = near.subspace(4, **options), far.subspace(4, **options)
        assert one.dtype == options.get("dtype", dtype)
        assert same(one.basis, two.basis) and same(one.origin, two.origin)
        assert one.scale is None or same(one.scale, two.scale)
    one, two = (each.grouped_subspace([1, 1], 3) for each in (near, far))
    for a, b in zip(one.subspaces, two.subspaces, strict=True):
        assert same(a.basis, b.basis) and same(a.scale, b.scale)
    near.save(tmp_path / "near")
    far.save(tmp_path / "far")
    assert (tmp_path / "near").read_bytes() == (tmp_path / "far").read_bytes()


@pytest.mark.parametrize("n", [117, 4_200_001])
@pytest.mark.parametrize("tier", ["disk", "staged"])
def test_the_gram_matrix_for_any_length_of_row(tier, n, tmp_path, cpu_capability):
    """One tile, and more than 1,024: chunks of two."""
    near, far = recorded(tier, tmp_path, n, torch.int8, count=3)
    assert torch.equal(near.gram, far.gram)


@eight_bits
@pytest.mark.parametrize("source", [torch.float32, torch.float64, torch.bfloat16, "same"], ids=str)
def test_a_basis_is_formed_and_rounded_chunk_by_chunk(dtype, source, tmp_path, monkeypatch):
    """Never a second array of more than a chunk; the numbers are those of rounding a whole one."""
    source = dtype if source == "same" else source
    near, _ = recorded("host", tmp_path, dtype=source)
    expected = near.subspace(4, dtype=torch.float32).quantize(NAMES[dtype])
    monkeypatch.setattr(gram, "_CHUNK_BYTES", {"cpu": 1})
    form, sizes = ops.form_basis, []

    def formed(*args, **kwargs):
        result = form(*args, **kwargs)
        sizes.append(result.shape[1])
        return result

    monkeypatch.setattr(ops, "form_basis", formed)
    found = near.subspace(4, dtype=dtype)
    assert max(sizes) == 4096 and sum(sizes) == near.numel
    assert found.dtype == dtype and found.origin.dtype == torch.float32
    assert same(found.basis, expected.basis) and same(found.scale, expected.scale)
    # Orthonormal up to the rounding: steps of 1/127 of a peak, or of 2^-4 of each number.
    rows = reference.decode(found.basis, found.scale)
    assert (rows @ rows.T - torch.eye(4)).abs().max() < 0.02


@eight_bits
def test_a_saved_basis_comes_back(dtype, tmp_path):
    near, _ = recorded("host", tmp_path, dtype=dtype)
    near.subspace(4).save(tmp_path / "basis")
    found, expected = Subspace.load(tmp_path / "basis"), near.subspace(4)
    assert same(found.basis, expected.basis) and same(found.scale, expected.scale)


@eight_bits
@pytest.mark.parametrize("center", [True, False])
def test_groups_that_begin_within_a_block(dtype, center, tmp_path, monkeypatch):
    """Groups of 1, 300, 256, 5 and 9,001 columns: their bases have blocks of their own."""
    monkeypatch.setattr(gram, "_CHUNK_BYTES", {"cpu": 1})
    sizes = [1, 300, 256, 5, 9001]
    params = [torch.randn(size) for size in sizes]
    near = Trajectory(params, 6, dtype)
    far = Trajectory(params, 6, dtype, "disk", tmp_path)
    for _ in range(5):
        near.record(), far.record()
        for p in params:
            p.add_(torch.randn_like(p), alpha=0.1)
    options = {"start": "last", "center": center}
    exact = near.grouped_subspace([1] * 5, 2, dtype=torch.float64, **options)
    eight, other = (t.grouped_subspace([1] * 5, 2, **options) for t in (near, far))
    single = near.grouped_subspace([1] * 5, 2, dtype=torch.float32, **options)
    columns = values(near).split(sizes, 1)
    for i, rows in enumerate(columns):
        centred = rows - rows.mean(0) * center
        _, _, vectors = torch.linalg.svd(centred, full_matrices=False)
        count = exact.subspaces[i].dim
        overlap = (exact.subspaces[i].basis @ vectors[:count].T).abs()
        assert count == min(2, sizes[i]) and (overlap - torch.eye(count)).abs().max() < 1e-8
        expected = single.subspaces[i].quantize(NAMES[dtype])
        for found in (eight.subspaces[i], other.subspaces[i]):
            assert same(found.basis, expected.basis) and same(found.scale, expected.scale)
    assert torch.equal(eight.origin, near.anchor + near.snapshots[-1])


@eight_bits
@pytest.mark.parametrize("form", ["file", "folder"])
def test_loaded_it_goes_on_bit_for_bit(dtype, form, tmp_path):
    near, far = recorded("disk", tmp_path, dtype=dtype)
    far.close()
    path = tmp_path / "rows" if form == "folder" else tmp_path / "file"
    if form == "file":
        near.save(path)
    again = Trajectory.load(path, near.params)
    assert again.dtype == dtype and len(again) == 7 and torch.equal(again.gram, near.gram)
    assert near.record() == again.record() == 7
    assert_same_bits(again, near)


@eight_bits
def test_a_file_of_a_snapshot(dtype, tmp_path):
    """Numbers and scales, which any reader of safetensors finds; bytes are counted with both."""
    near, far = recorded("disk", tmp_path, count=3, dtype=dtype)
    file = load_file(tmp_path / "rows" / "000002.safetensors")
    assert set(file) == {"delta", "scale"}
    assert same(file["delta"], near.snapshots.codes[2])
    assert same(file["scale"], near.snapshots.scale[2])
    assert far.cost.bytes_written == near.cost.bytes_written == 3 * (20_011 + 4 * 79)


def test_a_snapshot_of_another_format_is_left_out(tmp_path):
    _, far = recorded("disk", tmp_path, count=3, dtype=torch.int8)
    metadata = {"of": far._store._metadata["id"]}
    far.close()
    path = tmp_path / "rows" / "000001.safetensors"
    file = load_file(path)
    wrong = [
        ({"delta": file["delta"]}, r"expected the tensors \['delta', 'scale'\], found \['delta'\]"),
        ({**file, "scale": file["scale"][:-1]}, "'scale' of shape .79,. and dtype float32, found"),
        ({**file, "scale": file["scale"].double()}, "and dtype float32, found"),
        ({**file, "delta": file["delta"].view(torch.uint8)}, "and dtype int8, found"),
    ]
    for tensors, message in wrong:
        disk.artifacts.save(path, disk._KIND, disk._VERSION, tensors, metadata)
        with pytest.warns(UserWarning, match=message):
            again = Trajectory.load(tmp_path / "rows", far.params)
        assert len(again) == 2
        again.close()


@eight_bits
@pytest.mark.parametrize("tier", ["device", "staged", "disk"])
def test_what_is_not_finite_is_not_stored(tier, dtype, tmp_path):
    near, far = recorded("disk" if tier == "device" else tier, tmp_path, dtype=dtype)
    far = near if tier == "device" else far
    before, gram = far.snapshots[:], far.gram
    files = sorted(tmp_path.rglob("*"))
    for bad, message in (
        (torch.nan, r"params\[1\]: expected finite values, got NaN or Inf"),
        (-torch.inf, r"params\[1\]: expected finite values, got NaN or Inf"),
        (1e30, "of 1e.30 overflows: its square must stay below 3.4e.38; not recorded"),
    ):
        with torch.no_grad():
            good = far.params[1][-1].item()
            far.params[1][-1] = bad
            with pytest.raises(ValueError, match=message):
                far.record()
            far.params[1][-1] = good
        assert len(far) == 7 and sorted(tmp_path.rglob("*")) == files
        assert torch.equal(far.snapshots[:], before) and torch.equal(far.gram, gram)
    assert far.record() == 7


@eight_bits
@pytest.mark.parametrize("tier", ["device", "disk"])
def test_snapshots_are_like_an_array_of_numbers(tier, dtype, tmp_path):
    near, far = recorded("disk", tmp_path, n=1000, dtype=dtype)
    rows = (near if tier == "device" else far).snapshots
    expected = values(near).float()
    assert isinstance(rows, ScaledRows) and rows.shape == (7, 1000) and len(rows) == 7
    assert rows.dtype == torch.float32 and rows.device.type == "cpu"
    for index in (0, -1, slice(None), slice(2, 5), slice(5, 2)):
        assert torch.equal(rows[index], expected[index])
    for a, b in ((0, 1000), (5, 900), (255, 257), (256, 512), (999, 1000), (-7, None), (9, 9)):
        assert torch.equal(rows[1:3, a:b], expected[1:3, a:b])
        assert torch.equal(rows[2, a:b], expected[2, a:b])
    assert torch.equal(torch.stack(list(rows)), expected)
    part = rows.narrow(100, 700).narrow(200, 500)
    assert part.shape == (7, 300) and torch.equal(part[:], expected[:, 300:600])
    assert repr(rows) == f"ScaledRows(shape=(7, 1000), stored as {dtype}, device=cpu)"
    with pytest.raises(IndexError):
        rows[7]
    with pytest.raises(TypeError, match="columns: expected a slice of step 1"):
        rows[:, 3]


@eight_bits
def test_a_soup_of_snapshots(dtype):
    param = torch.nn.Parameter(torch.randn(700))
    trajectory = Trajectory([("weight", param)], 4, dtype)
    for _ in range(4):
        trajectory.record()
        with torch.no_grad():
            param.add_(torch.randn(700), alpha=0.1)
    mean = trajectory.anchor + values(trajectory).mean(0)
    torch.testing.assert_close(uniform_soup(trajectory)["weight"].double(), mean, rtol=0, atol=1e-6)


@eight_bits
@pytest.mark.parametrize("storage", ["device", "host", "disk"])
def test_checkpoints_are_recorded_like_weights(storage, dtype, tmp_path, monkeypatch):
    """In pieces of four blocks; interrupted on disk, it goes on."""
    monkeypatch.setattr("dldr_ext.trajectory.from_checkpoints.PIECE", 1024)
    monkeypatch.setattr(disk, "PIECE", 1024)
    folder, model = walk(tmp_path / "run")
    expected = Trajectory(model.named_parameters(), 6, dtype)
    for t in range(6):
        model.load_state_dict(torch.load(folder / f"{8 + t}.pt"))
        expected.record()
    options = {"dtype": dtype, "storage": storage}
    if storage == "disk":
        options |= {"path": tmp_path / "rows", "resume": True}

        def stop(read, total):
            if 2 * read >= total:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            Trajectory.from_checkpoints(folder, model, progress=stop, **options)
        with pytest.raises(ValueError, match="path: expected the folder of a trajectory of"):
            Trajectory.from_checkpoints(folder, model, **(options | {"dtype": torch.bfloat16}))
    found = Trajectory.from_checkpoints(folder, model, **options)
    assert_same_bits(found, expected)


@eight_bits
def test_a_difference_of_checkpoints_that_overflows(dtype, tmp_path):
    model = nn.Linear(300, 1)
    for t, value in enumerate((-3e38, 3e38)):
        nn.init.constant_(model.bias, value)
        torch.save(model.state_dict(), tmp_path / f"{t}.pt")
    with pytest.raises(CheckpointError, match=f"1.pt: a difference .* overflows {dtype}"):
        Trajectory.from_checkpoints(tmp_path, model, dtype=dtype)
    with pytest.raises(CheckpointError, match=f"1.pt: a difference .* overflows {dtype}"):
        Analysis(Series(tmp_path), tmp_path / "out", dtype=dtype).run()


def test_a_walk_costs_little_variance(tmp_path):
    """Directions of 8-bit snapshots capture nearly all that those of float32 do."""
    exact, _ = recorded("host", tmp_path, dtype=torch.float32)
    rows = exact.snapshots - exact.snapshots.mean(0)
    best = exact.subspace(3).explained_variance_ratio.sum() * rows.double().square().sum()
    for dtype, most in ((torch.int8, 2e-4), (torch.float8_e4m3fn, 3e-3)):
        torch.manual_seed(1234)
        near, _ = recorded("host", tmp_path, dtype=dtype)
        found = near.subspace(3, dtype=torch.float32).basis
        lost = 1 - float((rows @ found.T).double().square().sum() / best)
        assert 0 < lost < most
