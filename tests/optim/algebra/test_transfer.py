"""The inverse Hessian in the coordinates of another subspace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optim_problems import Batches, random_subspace
from torch import Tensor

from dldr_ext import GroupedSubspace, Subspace
from dldr_ext.optim.algebra.transfer import overlap, transferred


def positive(dim: int, seed: int) -> Tensor:
    factor = torch.randn(
        dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    return factor @ factor.T + 0.01 * torch.eye(dim, dtype=torch.float64)


@pytest.mark.parametrize("kind", ["float64", "bfloat16", "int8", "grouped"])
def test_overlap(kind: str) -> None:
    params = Batches(0).params
    old, new = random_subspace(params, 11), random_subspace(params, 5, seed=1)
    known: Any = old
    if kind == "grouped":
        known = GroupedSubspace.random(params, 4, [1, 2, 1], dtype=torch.float64)
        old = Subspace(torch.block_diag(*[one.basis for one in known.subspaces]), known.origin)
    elif kind != "float64":
        wide = old.to(dtype=torch.float32)
        known = wide.quantize(kind) if kind == "int8" else wide.to(dtype=torch.bfloat16)
        new = new.to(dtype=torch.float32)
    m = overlap(new, known)
    expected = new.basis.double() @ old.basis.T
    eps = 1e-12 if old is known or kind == "grouped" else 1e-2
    assert m.dtype == torch.float64
    torch.testing.assert_close(m, expected, rtol=eps, atol=eps)
    if kind == "grouped":
        torch.testing.assert_close(overlap(known, new), expected.T)


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(12, 30), st.integers(0, 2**31))
def test_h_stays_positive_definite(d: int, wide: int, n: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, _ = torch.linalg.qr(torch.randn(n, d, dtype=torch.float64, generator=generator))
    q, _ = torch.linalg.qr(torch.randn(n, wide, dtype=torch.float64, generator=generator))
    b = positive(d, seed)
    new = transferred(b, q.T @ p)
    assert new.shape == (wide, wide) and torch.equal(new, new.T)
    before, after = torch.linalg.eigvalsh(b), torch.linalg.eigvalsh(new)
    assert after[0] >= 0.999 * before[0] and after[-1] <= 1.001 * before[-1]


def test_h_where_the_answer_is_known() -> None:
    b = positive(4, 0)
    torch.testing.assert_close(transferred(b, torch.eye(4, dtype=torch.float64)), b)
    q, _ = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))
    torch.testing.assert_close(transferred(b, q), q @ b @ q.T)
    # A part of the old subspace: the same part of H.
    torch.testing.assert_close(transferred(b, q[:2]), q[:2] @ b @ q[:2].T)
    # Nothing in common: the geometric mean of the eigenvalues.
    apart = transferred(b, torch.zeros(3, 4, dtype=torch.float64))
    typical = torch.linalg.det(b) ** 0.25
    torch.testing.assert_close(apart, typical * torch.eye(3, dtype=torch.float64))
