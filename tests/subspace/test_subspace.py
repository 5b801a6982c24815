"""Subspaces: passes over the basis, 8-bit formats, files, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dldr_ext import Subspace
from dldr_ext.files import artifacts
from dldr_ext.tensors import formats

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
FORMATS = ["int8", "float8_e4m3fn"]
SHAPES = [(2, 3, 3, 3), (7,), (11, 5), (), (300,)]
N = 54 + 7 + 55 + 1 + 300


def parameters(dtype=torch.float32):
    tensors = [torch.randn(shape, dtype=dtype) for shape in SHAPES]
    tensors[0] = tensors[0].to(memory_format=torch.channels_last)
    tensors[2] = tensors[2].T.contiguous().T
    return [nn.Parameter(t) for t in tensors]


def flat(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def rows(d=6, n=N, dtype=torch.float32):
    return torch.linalg.qr(torch.randn(n, d, dtype=torch.float64)).Q.T.to(dtype)


def subspace(dtype=torch.float32, d=6, **options):
    origin = torch.randn(N, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return Subspace(rows(d, dtype=dtype), origin, shapes=SHAPES, **options)


def values(space):
    """What the basis stands for, in float64."""
    basis = space.basis.double()
    if space.scale is None:
        return basis
    return basis * space.scale.double().repeat_interleave(256, 1)[:, : space.numel]


def every_kind():
    for dtype in FLOATS:
        yield pytest.param(lambda dtype=dtype: subspace(dtype), id=str(dtype))
    for name in FORMATS:
        yield pytest.param(lambda name=name: subspace().quantize(name), id=name)


@pytest.fixture(params=every_kind())
def any_subspace(request):
    return request.param()


def close(actual, expected, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(actual.double(), expected, rtol=tolerance, atol=tolerance)


# The passes over the basis


def test_attributes_and_repr():
    space = subspace(torch.bfloat16)
    assert (space.dim, space.numel, space.dtype) == (6, N, torch.bfloat16)
    assert space.origin.dtype == torch.float32 and space.shapes == SHAPES
    assert space.names is None and space.scale is None and space.singular_values is None
    assert repr(space) == f"Subspace(dim=6, numel={N}, dtype=bfloat16, device=cpu)"


def test_project_coordinates_and_reconstruct(any_subspace):
    space, params = any_subspace, parameters()
    exact = values(space)
    close(space.project(params), exact @ flat(params).double(), space.dtype)
    difference = flat(params).double() - space.origin.double()
    close(space.coordinates(params), exact @ difference, space.dtype)
    close(space.coordinates(iter(params)), exact @ difference, space.dtype)
    theta = torch.randn(6)
    expected = space.origin.double() + theta.double() @ exact
    close(space.reconstruct(theta), expected, space.dtype)
    space.reconstruct_(params, theta)
    close(flat(params), expected, torch.float32)


def test_coordinates_of_a_point_of_the_subspace():
    space, params = subspace(), parameters()
    theta = torch.randn(6)
    space.reconstruct_(params, theta)
    torch.testing.assert_close(space.coordinates(params), theta, rtol=1e-5, atol=1e-5)


def test_coordinates_do_not_cancel():
    """P^T w - P^T w0 in float32 would lose a step of 1e-4 beside weights of 1e3."""
    space = subspace()
    space = Subspace(space.basis, 1e3 * space.origin.double(), shapes=SHAPES)
    step = 1e-1 * torch.randn(N).double()
    params = [(space.origin.double() + step).float()]
    exact = values(space) @ (params[0].double() - space.origin.double())
    assert (space.coordinates(params).double() - exact).abs().max() < 1e-6


def test_parameters_of_several_dtypes_are_rounded_once():
    params = parameters()
    for p, dtype in zip(params, [*FLOATS, torch.float32], strict=True):
        p.data = p.data.to(dtype)
    space, theta = subspace(), torch.randn(6)
    space.reconstruct_(params, theta)
    pieces = space.reconstruct(theta).split([p.numel() for p in params])
    for p, piece in zip(params, pieces, strict=True):
        assert torch.equal(p.detach(), piece.view(p.shape).to(p.dtype))
    assert params[0].is_contiguous(memory_format=torch.channels_last)


def test_none_counts_as_zeros():
    space, params = subspace(), parameters()
    listed = [None, params[1], None, params[3], params[4]]
    zeroed = [torch.zeros_like(p) if t is None else t for p, t in zip(params, listed, strict=True)]
    assert torch.equal(space.project(listed), space.project(zeroed))
    unknown = Subspace(space.basis, space.origin)
    assert torch.equal(unknown.project([None, *params[1:]]), space.project([None, *params[1:]]))


def test_a_flat_vector_will_do():
    space, params = subspace(), parameters()
    assert torch.equal(space.project(flat(params)), space.project(params))
    assert torch.equal(space.project([flat(params)]), space.project(params))
    assert torch.equal(space.coordinates(flat(params)), space.coordinates(params))
    target = torch.zeros(N)
    space.reconstruct_([target], torch.ones(6))
    assert torch.equal(target, space.reconstruct(torch.ones(6)))


@pytest.mark.parametrize("kind", [torch.float64, "int8", "float8_e4m3fn"], ids=str)
def test_reconstruct_is_differentiable(kind):
    if kind == torch.float64:
        space = subspace(kind)
        theta = torch.randn(6, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(space.reconstruct, theta)
        return
    space, theta = subspace().quantize(kind), torch.randn(6, requires_grad=True)
    weights = torch.randn(N)
    (space.reconstruct(theta) @ weights).backward()
    close(theta.grad, values(space) @ weights.double(), torch.float32)


def test_lists_that_do_not_match():
    space, params = subspace(), parameters()
    before = [p.detach().clone() for p in params]
    named = Subspace(space.basis, space.origin, shapes=SHAPES, names=list("abcde"))
    calls = [
        lambda space, listed: space.project(listed),
        lambda space, listed: space.coordinates(listed),
        lambda space, listed: space.reconstruct_(listed, torch.ones(6)),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"\[1\] \(b\): expected shape \(7,\).* got \(11, 5\)"):
            call(named, [params[0], params[2], params[1], *params[3:]])
        with pytest.raises(ValueError, match=r"expected 5 tensors, as in the subspace, got 4"):
            call(space, params[:4])
        with pytest.raises(ValueError, match=f"expected {N} elements in all .*, got {N - 300}"):
            call(Subspace(space.basis, space.origin), params[:4])
        with pytest.raises(TypeError, match="expected a tensor, got int"):
            call(space, [*params[:4], 3])
    for p, old in zip(params, before, strict=True):
        assert torch.equal(p.detach(), old)


def test_parameters_on_another_device():
    space = subspace()
    params = [torch.ones(shape, device="meta") for shape in SHAPES]
    for call in (space.coordinates, lambda listed: space.reconstruct_(listed, torch.ones(6))):
        with pytest.raises(ValueError, match=r"params: expected device cpu, .* got meta"):
            call(params)


def test_theta_that_does_not_match_writes_nothing():
    space, params = subspace(), parameters()
    before = flat(params)
    for theta in (torch.ones(5), torch.ones(2, 3), torch.ones(6).int()):
        with pytest.raises((ValueError, TypeError), match="theta"):
            space.reconstruct_(params, theta)
        with pytest.raises((ValueError, TypeError), match="theta"):
            space.reconstruct(theta)
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
    space = subspace()
    space.basis[3, 299] = bad
    with pytest.raises(ValueError, match="basis: expected finite values, got NaN or Inf"):
        space.quantize("int8")


def test_other_formats_are_refused():
    with pytest.raises(ValueError, match=r"format: expected one of .*'int8'\], got 'int4'"):
        subspace().quantize("int4")
    with pytest.raises(ValueError, match=r"got torch.int8; for int8 .* use quantize\(\)"):
        subspace().to(dtype=torch.int8)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_to_another_dtype(any_subspace, dtype, monkeypatch):
    monkeypatch.setattr("dldr_ext.subspace.basis.column_step", lambda rows: 256)
    result = any_subspace.to(dtype=dtype)
    assert result.dtype == dtype and result.scale is None and result.shapes == SHAPES
    assert result.origin.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = values(any_subspace)
    if any_subspace.scale is not None:
        expected = expected.float().double()
    assert torch.equal(result.basis, expected.to(dtype))
    if dtype == any_subspace.dtype:
        assert result is any_subspace


def test_to_keeps_what_is_known():
    space = subspace(singular_values=torch.ones(6), explained_variance_ratio=torch.ones(6) / 6)
    for result in (space.to(dtype=torch.bfloat16), space.quantize("int8"), space.to("cpu")):
        assert torch.equal(result.singular_values, space.singular_values)
        assert torch.equal(result.explained_variance_ratio, space.explained_variance_ratio)
        assert result.shapes == SHAPES
    assert space.to("cpu") is space
    requantized = space.quantize("int8").quantize("float8_e4m3fn")
    assert (values(requantized) - values(space)).abs().max() < 0.1 * space.basis.abs().max()


# Files


def test_round_trip_of_a_file(any_subspace, tmp_path):
    any_subspace.save(tmp_path / "file")
    loaded = Subspace.load(tmp_path / "file")
    for name in ("basis", "origin", "scale"):
        one, other = getattr(any_subspace, name), getattr(loaded, name)
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype and torch.equal(one.float(), other.float())
    assert loaded.shapes == SHAPES and loaded.names is None
    assert loaded.singular_values is None


def test_round_trip_of_what_is_known(tmp_path):
    space = subspace(
        singular_values=torch.rand(6),
        explained_variance_ratio=torch.rand(6, dtype=torch.float64),
        names=["a", "b.c", "ä", "d", "e"],
    )
    space.save(tmp_path / "file")
    loaded = Subspace.load(tmp_path / "file", device="cpu")
    assert torch.equal(loaded.singular_values, space.singular_values)
    assert torch.equal(loaded.explained_variance_ratio, space.explained_variance_ratio)
    assert loaded.names == space.names
    theta = torch.randn(6)
    assert torch.equal(loaded.reconstruct(theta), space.reconstruct(theta))


def test_damaged_files(tmp_path):
    path = tmp_path / "file"
    subspace().quantize("int8").save(path)
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
    subspace().save(tmp_path / "file")
    loaded = Subspace.load(tmp_path / "file")
    params = [torch.randn(N - 300), torch.randn(300)]
    before = flat(params)
    with pytest.raises(ValueError, match=r"params\[0\]: expected shape \(2, 3, 3, 3\)"):
        loaded.reconstruct_(params, torch.ones(6))
    assert torch.equal(flat(params), before)


def test_blocks():
    assert [formats.blocks(n) for n in (1, 256, 257)] == [1, 1, 2]
