"""The exact Gram matrix of stored rows: coordinates without rounding, and what rounding lost."""

from __future__ import annotations

import copy
import logging

import pytest
import reference
import torch
from torch import distributed as dist
from torch import nn

from dldr_ext import PBFGS, PSGD, GroupedSubspace, ShardedSubspace, Subspace
from dldr_ext.subspace import exact as exact_module

FORMATS = ["int8", "float8_e4m3fn"]
N, D = 700, 6


def orthonormal(d=D, n=N, dtype=torch.float32):
    return torch.linalg.qr(torch.randn(n, d, dtype=torch.float64)).Q.T.to(dtype).contiguous()


def subspace(n=N, d=D, dtype=torch.float32):
    sigma = torch.logspace(0, -2, d, dtype=torch.float64)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    origin = torch.randn(n, dtype=wide)
    return Subspace(orthonormal(d, n, dtype), origin, singular_values=sigma)


def gram_of(space):
    rows = reference.decode(space.basis, space.scale)
    return rows @ rows.T


def every_kind():
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        yield pytest.param(lambda dtype=dtype: subspace(dtype=dtype), id=str(dtype))
    for name in FORMATS:
        yield pytest.param(lambda name=name: subspace().quantize(name), id=name)


@pytest.fixture(params=every_kind())
def any_subspace(request):
    return request.param()


# Coordinates


def test_exact_coordinates_solve_with_the_gram_of_the_stored_rows(any_subspace):
    space, g = any_subspace, torch.randn(N, dtype=torch.float64)
    rows = reference.decode(space.basis, space.scale)
    expected = torch.linalg.lstsq(rows.T, g[:, None]).solution[:, 0]
    c = space.project([g], exact=True)
    assert c.dtype == space.coordinate_dtype
    tolerance = 1e-12 if c.dtype == torch.float64 else 2e-6
    torch.testing.assert_close(c.double(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(space.project([g]), space.project([g], exact=False))


@pytest.mark.parametrize("name", FORMATS)
def test_coordinates_of_a_point_give_theta_back(name, device):
    space, theta = subspace().quantize(name), torch.randn(D)
    weights = space.reconstruct(theta)
    plain = (space.coordinates(weights) - theta).abs().max()
    exact = (space.coordinates(weights, exact=True) - theta).abs().max()
    assert plain > 1e-4 and exact < 2e-6


def test_exact_projection_is_differentiable():
    space = subspace(dtype=torch.float64)
    g = torch.randn(N, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda g: space.project([g], exact=True), g, fast_mode=True)


def test_grouped_bases_are_solved_one_by_one():
    parts = [subspace(300, 4).quantize("int8"), subspace(500, 3).quantize("float8_e4m3fn")]
    space, theta = GroupedSubspace(parts), torch.randn(7)
    weights = space.reconstruct(theta)
    assert (space.coordinates(weights) - theta).abs().max() > 1e-4
    assert (space.coordinates(weights, exact=True) - theta).abs().max() < 2e-6


@pytest.mark.parametrize("row", [torch.zeros(N), torch.ones(N)], ids=["zero", "double"])
def test_dependent_rows_are_an_error(row):
    rows = orthonormal()
    rows[0], rows[1] = torch.ones(N), row
    space = Subspace(rows, torch.zeros(N))
    with pytest.raises(ValueError, match="exact: expected linearly independent basis rows, got"):
        space.project([torch.randn(N)], exact=True)
    assert space.quantization_error().spectral > 0.5


def test_a_basis_cut_over_ranks_refuses():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        space = ShardedSubspace(subspace(), "world")
        with pytest.raises(ValueError, match="exact: expected False for a ShardedSubspace, got T"):
            space.project([torch.randn(N)], exact=True)
    finally:
        dist.destroy_process_group()


# The cache


def test_gram_is_made_once_and_goes_where_the_basis_goes(monkeypatch):
    space, made = subspace().quantize("int8"), []
    real = exact_module._gram_of
    monkeypatch.setattr(exact_module, "_gram_of", lambda s: made.append(s) or real(s))
    for _ in range(3):
        space.project([torch.randn(N)], exact=True)
    moved = space.with_origin([torch.randn(N)])
    assert moved._stored_gram() is space._stored_gram() and len(made) == 1
    torch.testing.assert_close(copy.deepcopy(space)._stored_gram(), gram_of(space))
    assert len(made) == 1
    # Other numbers have another Gram matrix.
    for other in (space.to(dtype=torch.bfloat16), space.quantize("float8_e4m3fn")):
        torch.testing.assert_close(other._stored_gram(), gram_of(other), rtol=0, atol=1e-13)
    assert len(made) == 3


def test_the_gram_of_many_chunks(monkeypatch):
    monkeypatch.setattr(exact_module, "columns_together", lambda rows, device: 4096)
    space = subspace(n=10_000).quantize("int8")
    torch.testing.assert_close(space._stored_gram(), gram_of(space), rtol=0, atol=1e-13)


# Optimizers


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("optimizer", [PBFGS, PSGD])
def test_theta0_current_finds_a_point_of_an_8_bit_subspace(optimizer, grouped, caplog):
    space, theta = subspace().quantize("int8"), 100 * torch.randn(D)
    if grouped:
        space = GroupedSubspace([space])
    weights = nn.Parameter(space.reconstruct(theta))
    before = weights.detach().clone()
    with caplog.at_level(logging.WARNING, "dldr_ext"):
        found = optimizer([weights], space, theta0="current")
    torch.testing.assert_close(found.theta.float(), theta, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(weights.detach(), before, rtol=1e-5, atol=1e-5)
    assert not caplog.records


# What rounding has lost


def captured(space, before):
    """Through a QR decomposition of the stored rows, float64."""
    q = torch.linalg.qr(reference.decode(space.basis, space.scale).T.cpu()).Q
    rows, weights = reference.decode(before.basis, before.scale).cpu(), before.singular_values**2
    return float(weights @ (rows @ q).square().sum(1) / (weights @ rows.square().sum(1)))


def test_quantization_error_is_that_of_the_stored_rows(any_subspace):
    space = any_subspace
    difference = gram_of(space) - torch.eye(D, dtype=torch.float64)
    found = space.quantization_error()
    assert found.largest == pytest.approx(float(difference.abs().max()), rel=1e-6, abs=1e-14)
    norm = float(torch.linalg.matrix_norm(difference, 2))
    assert found.spectral == pytest.approx(norm, rel=1e-6, abs=1e-14)
    assert found.captured_variance is None and "captured variance unknown" in str(found)


@pytest.mark.parametrize("name", FORMATS)
def test_captured_variance_against_the_basis_before_rounding(name, device):
    before = subspace()
    space = before.quantize(name)
    found = space.quantization_error(before)
    assert found.captured_variance == pytest.approx(captured(space, before), abs=1e-13)
    assert 1e-6 < 1 - found.captured_variance < 1e-2
    assert found[:2] == pytest.approx(space.quantization_error()[:2], rel=1e-9)
    assert f"{1 - found.captured_variance:.2g}" in str(found)
    # A reference of more directions: what the fewer rows cannot capture counts as lost.
    fewer = Subspace(before.basis[:3], before.origin)
    share = fewer.quantization_error(before).captured_variance
    assert share == pytest.approx(captured(fewer, before), abs=1e-13) and share < 0.9999


def test_variances_of_the_reference_alone_count():
    rows, origin = orthonormal(), torch.zeros(N)
    ratio = torch.linspace(1, 0.5, D) / 10
    space = subspace().quantize("int8")
    known = Subspace(rows, origin, explained_variance_ratio=ratio)
    same = Subspace(rows, origin, singular_values=ratio.sqrt())
    a = space.quantization_error(known).captured_variance
    assert a == pytest.approx(space.quantization_error(same).captured_variance)
    assert space.quantization_error(Subspace(rows, origin)).captured_variance is None


def test_a_wrong_reference_is_named():
    space = subspace()
    with pytest.raises(TypeError, match=r"reference: expected a Subspace or .*, got GroupedSub"):
        space.quantization_error(GroupedSubspace([space]))
    with pytest.raises(ValueError, match=r"reference: expected 700 weights on cpu, .*, got 300"):
        space.quantization_error(subspace(n=300))
