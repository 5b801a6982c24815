"""The exact Gram matrix of stored rows: coordinates without rounding, and what rounding lost."""

from __future__ import annotations

import copy
import logging

import pytest
import reference
import torch
from samples import wide
from subspace_kinds import FORMATS, D, orthonormal
from torch import nn

from dldr_ext import PBFGS, PSGD, GroupedSubspace, Subspace
from dldr_ext.subspace import exact as exact_module

N = 700


def subspace(n=N, d=D, dtype=torch.float32):
    sigma = torch.logspace(0, -2, d, dtype=torch.float64)
    origin = torch.randn(n, dtype=wide(dtype))
    return Subspace(orthonormal(d, n, dtype), origin, singular_values=sigma)


def gram_of(space):
    rows = reference.decode(space.basis, space.scale)
    return rows @ rows.T


@pytest.mark.parametrize("row", [torch.zeros(N), torch.ones(N)], ids=["zero", "double"])
def test_dependent_rows_are_an_error(row):
    rows = orthonormal(D, N)
    rows[0], rows[1] = torch.ones(N), row
    space = Subspace(rows, torch.zeros(N))
    with pytest.raises(ValueError, match="exact: expected linearly independent basis rows, got"):
        space.project([torch.randn(N)], exact=True)
    assert space.quantization_error().spectral > 0.5


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


def test_quantization_error_is_that_of_the_stored_rows(any_dense):
    space = any_dense
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
    rows, origin = orthonormal(D, N), torch.zeros(N)
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
