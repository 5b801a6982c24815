"""Subspaces of one stored basis, beyond what test_contract.py asks of every kind."""

from __future__ import annotations

import pytest
import torch
from samples import FLOATS
from subspace_kinds import FORMATS, SHAPES, N, dense, flat, parameters, values
from torch import nn

from dldr_ext import Subspace
from dldr_ext.files import artifacts


def test_attributes_and_repr():
    space = dense(torch.bfloat16)
    assert (space.dim, space.numel, space.dtype) == (6, N, torch.bfloat16)
    assert space.origin.dtype == torch.float32 and space.shapes == SHAPES
    assert space.names is None and space.scale is None and space.singular_values is None
    assert repr(space) == f"Subspace(dim=6, numel={N}, dtype=bfloat16, device=cpu)"


def test_shapes_that_are_not_known():
    space, params = dense(), parameters()
    before = flat(params)
    unknown = Subspace(space.basis, space.origin)
    assert torch.equal(unknown.project([None, *params[1:]]), space.project([None, *params[1:]]))
    calls = [
        unknown.project,
        unknown.coordinates,
        lambda listed: unknown.reconstruct_(listed, torch.ones(6)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=f"expected {N} elements in all .*, got {N - 300}"):
            call(params[:4])
        with pytest.raises(TypeError, match="expected a tensor, got int"):
            call([*params[:4], 3])
    with pytest.raises(ValueError, match=r"params\[1\]: expected shape \(7,\), as in the subspace"):
        space.coordinates([params[0], params[2], params[1], *params[3:]])
    assert torch.equal(flat(params), before)


# The constructor


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"basis": None}, TypeError, "basis: expected a tensor, got None"),
        ({"basis": torch.ones(6, N).int()}, TypeError, "basis: expected a dtype of .* got int32"),
        ({"basis": torch.ones(N)}, ValueError, rf"basis: expected shape \(d, n\).* \({N},\)"),
        ({"basis": torch.ones(0, N)}, ValueError, rf"1 <= d <= 1024 .* got \(0, {N}\)"),
        ({"basis": torch.ones(1025, 1)}, ValueError, r"got \(1025, 1\)"),
        ({"basis": torch.ones(6, 0)}, ValueError, r"got \(6, 0\)"),
        ({"basis": torch.ones(6, N).to_sparse()}, TypeError, "basis: expected a dense tensor"),
        (
            {"basis": torch.ones(6, N).to(torch.int8)},
            ValueError,
            "scale: a basis of int8 needs one",
        ),
        ({"origin": None}, TypeError, "origin: expected a tensor, got None"),
        ({"origin": torch.ones(N).int()}, TypeError, "origin: expected .* floating.* got int32"),
        ({"origin": torch.ones(N + 1)}, ValueError, rf"origin: expected shape \({N},\)"),
        ({"origin": torch.ones(N, 1)}, ValueError, rf"origin: expected .* got \({N}, 1\)"),
        ({"origin": torch.ones(N, device="meta")}, ValueError, "origin: expected device cpu"),
        ({"origin": torch.full((N,), torch.nan)}, ValueError, "origin: expected finite"),
        ({"scale": torch.ones(6, 2)}, ValueError, "scale: expected None for a basis of float32"),
        ({"singular_values": torch.ones(5)}, ValueError, r"singular_values: expected shape \(6,\)"),
        ({"explained_variance_ratio": [1.0]}, ValueError, r"ratio: expected .* got \(1,\)"),
        ({"shapes": SHAPES[:4]}, ValueError, f"shapes: expected {N} elements .* got {N - 300}"),
        ({"names": ["a"]}, ValueError, "names: expected one for each of 5 shapes, got 1"),
        ({"names": list("abcde"), "shapes": None}, ValueError, "each of 0 shapes, got 5"),
    ],
)
def test_bad_arguments_of_the_constructor(changes, error, message):
    arguments = {"basis": torch.ones(6, N), "origin": torch.ones(N), "shapes": SHAPES} | changes
    with pytest.raises(error, match=message):
        Subspace(**arguments)


@pytest.mark.parametrize(
    ("scale", "error", "message"),
    [
        (torch.ones(6, 3), ValueError, r"scale: expected shape \(6, 2\), .* got \(6, 3\)"),
        (torch.ones(6, 2).double(), TypeError, "scale: expected float32, got float64"),
        (torch.ones(6, 2, device="meta"), ValueError, "scale: expected device cpu"),
        (torch.full((6, 2), torch.inf), ValueError, "scale: expected finite"),
        (1.0, TypeError, "scale: expected a tensor, got float"),
    ],
)
def test_bad_scales(scale, error, message):
    with pytest.raises(error, match=message):
        Subspace(torch.ones(6, N).to(torch.int8), torch.ones(N), scale=scale)


def test_conversions_of_the_constructor():
    basis = torch.randn(N, 3)
    space = Subspace(basis.T, torch.ones(N).double(), singular_values=[3.0, 2.0, 1.0])
    assert space.basis.is_contiguous() and torch.equal(space.basis, basis.T)
    assert space.origin.dtype == torch.float32 and space.singular_values.dtype == torch.float64
    basis = nn.Parameter(torch.randn(3, N))
    space = Subspace(basis, torch.ones(N))
    assert space.basis.data_ptr() == basis.data_ptr() and not space.basis.requires_grad


# Eight bits, other dtypes


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("n", [1, 255, 256, 257, 5000])
def test_quantize(name, dtype, n, monkeypatch):
    monkeypatch.setattr("dldr_ext.subspace.basis.column_step", lambda rows: 512)  # several chunks
    basis = torch.randn(3, n).to(dtype) * torch.tensor([[1e-3], [1.0], [50.0]]).to(dtype)
    basis[1, : min(n, 256)] = 0
    space = Subspace(basis, torch.ones(n))
    quantized = space.quantize(name)
    assert quantized.dtype == getattr(torch, name)
    assert quantized.scale.shape == (3, -(-n // 256)) and quantized.scale.isfinite().all()
    padded = torch.nn.functional.pad(basis.double(), (0, -n % 256)).view(3, -1, 256)
    peaks = padded.abs().amax(2)
    largest = {"int8": 127, "float8_e4m3fn": 448}[name]
    torch.testing.assert_close(quantized.scale.double(), peaks / largest, rtol=1e-6, atol=0)
    error = (values(quantized) - basis.double()).abs()
    bound = (peaks / largest).repeat_interleave(256, 1)[:, :n]
    if name == "int8":
        assert (error <= bound * 0.5001).all()
    else:  # 3 bits of mantissa; below 2^-6 multiples of 2^-9
        assert (error <= torch.maximum(basis.double().abs() * 2**-4, bound * 2**-10) * 1.001).all()
    assert (values(quantized)[1, :256] == 0).all()
    assert quantized.origin.dtype == torch.float32


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("exponent", [-45, -40, -38, -37, -36, -35, -20, 20, 37])
def test_quantize_at_any_magnitude(exponent, name):
    basis = (torch.randn(2, 300, dtype=torch.float64).clamp(-3, 3) * 10.0**exponent).float()
    basis[:, 5] = 0
    quantized = Subspace(basis, torch.zeros(300)).quantize(name)
    error = (values(quantized) - basis.double()).abs().max()
    assert error <= max(float(basis.abs().max()) * 2**-4, 1e-35)
    assert (values(quantized)[:, 5] == 0).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_basis_that_is_not_finite_is_not_quantized(bad):
    space = dense()
    space.basis[3, 299] = bad
    with pytest.raises(ValueError, match="basis: expected finite values, got NaN or Inf"):
        space.quantize("int8")


def test_other_formats_are_refused():
    with pytest.raises(ValueError, match=r"format: expected one of .*'int8'\], got 'int4'"):
        dense().quantize("int4")
    with pytest.raises(ValueError, match=r"got torch.int8; for int8 .* use quantize\(\)"):
        dense().to(dtype=torch.int8)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_to_another_dtype(any_dense, dtype, monkeypatch):
    monkeypatch.setattr("dldr_ext.subspace.basis.column_step", lambda rows: 256)
    result = any_dense.to(dtype=dtype)
    assert result.dtype == dtype and result.scale is None and result.shapes == SHAPES
    assert result.origin.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = values(any_dense)
    if any_dense.scale is not None:
        expected = expected.float().double()
    assert torch.equal(result.basis, expected.to(dtype))
    if dtype == any_dense.dtype:
        assert result is any_dense


def test_to_keeps_what_is_known():
    space = dense(singular_values=torch.ones(6), explained_variance_ratio=torch.ones(6) / 6)
    for result in (space.to(dtype=torch.bfloat16), space.quantize("int8"), space.to("cpu")):
        assert torch.equal(result.singular_values, space.singular_values)
        assert torch.equal(result.explained_variance_ratio, space.explained_variance_ratio)
        assert result.shapes == SHAPES
    assert space.to("cpu") is space
    requantized = space.quantize("int8").quantize("float8_e4m3fn")
    assert (values(requantized) - values(space)).abs().max() < 0.1 * space.basis.abs().max()


# Files


def test_round_trip_of_what_is_known(tmp_path):
    space = dense(
        singular_values=torch.rand(6),
        mean=torch.randn(6),
        explained_variance_ratio=torch.rand(6, dtype=torch.float64),
        names=["a", "b.c", "ä", "d", "e"],
    )
    space.save(tmp_path / "file")
    loaded = Subspace.load(tmp_path / "file", device="cpu")
    assert torch.equal(loaded.singular_values, space.singular_values)
    assert torch.equal(loaded.mean, space.mean)
    assert torch.equal(loaded.explained_variance_ratio, space.explained_variance_ratio)
    assert loaded.names == space.names
    theta = torch.randn(6)
    assert torch.equal(loaded.reconstruct(theta), space.reconstruct(theta))


def test_damaged_files(tmp_path):
    path = tmp_path / "file"
    dense().quantize("int8").save(path)
    whole = path.read_bytes()
    for size in (0, 8, 300, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"{path}: "):
            Subspace.load(path)
    for place in (0, 50, 300, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=f"{path}: "):
            Subspace.load(path)


@pytest.mark.parametrize(
    ("tensors", "metadata"),
    [
        ({"basis": torch.ones(2, 5), "origin": torch.ones(4)}, {}),
        ({"basis": torch.ones(2, 5)}, {}),
        ({"basis": torch.ones(2, 5), "origin": torch.ones(5), "more": torch.ones(1)}, {}),
        ({"basis": torch.ones(2, 5), "origin": torch.ones(5)}, {"shapes": [[4]]}),
        ({"basis": torch.ones(2, 5).to(torch.int8), "origin": torch.ones(5)}, {}),
    ],
)
def test_files_that_do_not_make_a_subspace(tmp_path, tensors, metadata):
    path = tmp_path / "file"
    artifacts.save(path, "subspace", 1, tensors, metadata)
    with pytest.raises(ValueError, match=f"{path}: not a usable subspace: "):
        Subspace.load(path)


def test_a_loaded_subspace_on_another_model(tmp_path):
    dense().save(tmp_path / "file")
    loaded = Subspace.load(tmp_path / "file")
    params = [torch.randn(N - 300), torch.randn(300)]
    before = flat(params)
    with pytest.raises(ValueError, match=r"params\[0\]: expected shape \(2, 3, 3, 3\)"):
        loaded.reconstruct_(params, torch.ones(6))
    assert torch.equal(flat(params), before)
