"""The two-loop recursion of L-BFGS, against matrices."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dldr_ext.optim.algebra import bfgs, lbfgs

SEEDS = st.integers(0, 2**31)


def pairs_of(hessian: Tensor, count: int, seed: int) -> list[lbfgs.Pair]:
    generator = torch.Generator().manual_seed(seed)
    result = []
    for _ in range(count):
        s = torch.randn(len(hessian), dtype=torch.float64, generator=generator)
        y = hessian @ s
        result.append((s, y, float(s @ y)))
    return result


@given(st.integers(1, 10), st.integers(0, 6), SEEDS)
@settings(deadline=None, max_examples=60)
def test_is_bfgs_from_the_scaled_guess(dim: int, count: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(dim, dim, dtype=torch.float64, generator=generator)
    hessian = root @ root.T + torch.eye(dim, dtype=torch.float64)
    guess = torch.rand(dim, dtype=torch.float64, generator=generator) + 0.5
    c = torch.randn(dim, dtype=torch.float64, generator=generator)
    pairs = pairs_of(hessian, count, seed)
    b = torch.diag(guess)
    if pairs:
        _, y, sy = pairs[-1]
        b = b * (sy / (y @ b @ y))
    for s, y, _ in pairs:
        result = bfgs.update(b, s, y, fresh=False, damped=False)
        assert result is not None
        b = result[0]
    kept = c.clone()
    torch.testing.assert_close(lbfgs.apply(pairs, guess, c), b @ c, rtol=1e-7, atol=1e-8)
    assert torch.equal(c, kept)


def test_newest_pair_meets_the_secant_equation() -> None:
    hessian = torch.diag(torch.logspace(0, 3, 5, dtype=torch.float64))
    pairs = pairs_of(hessian, 3, 0)
    s, y, _ = pairs[-1]
    torch.testing.assert_close(lbfgs.apply(pairs, torch.ones(5).double(), y), s)
