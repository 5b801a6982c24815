"""The quasi-Newton algebra: pure functions of d-vectors and a d x d matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dldr_ext.optim.algebra import bfgs

DIMS = st.integers(1, 12)
SEEDS = st.integers(0, 2**31)


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def updated(*args: Tensor, **rule: object) -> Tensor | None:
    result = bfgs.update(*args, **rule)
    return None if result is None else result[0]


def positive_definite(seed: int, dim: int, condition: float = 100.0) -> Tensor:
    q, _ = torch.linalg.qr(normal(seed, dim, dim))
    return q @ torch.diag(torch.logspace(0, -torch.tensor(condition).log10(), dim).double()) @ q.T


@given(DIMS, SEEDS)
@settings(deadline=None, max_examples=50)
def test_update_is_the_inverse_bfgs_formula(dim: int, seed: int) -> None:
    b = positive_definite(seed, dim)
    b = (b + b.T) / 2
    s = normal(seed + 1, dim)
    y = torch.linalg.solve(positive_definite(seed + 2, dim), s)  # positive curvature
    new = updated(b, s, y, fresh=False, damped=False)
    assert new is not None
    rho = 1 / torch.dot(s, y)
    left = torch.eye(dim, dtype=torch.float64) - rho * torch.outer(s, y)
    torch.testing.assert_close(
        new, left @ b @ left.T + rho * torch.outer(s, s), rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(new @ y, s, rtol=1e-8, atol=1e-8)  # secant equation
    assert torch.equal(new, new.T)


@given(DIMS, SEEDS, st.floats(-6, 6), st.floats(1e-3, 1e3), st.booleans())
@settings(deadline=None, max_examples=150)
def test_damping_keeps_h_positive_definite(
    dim: int, seed: int, log_scale: float, alpha: float, fresh: bool
) -> None:
    b = torch.eye(dim, dtype=torch.float64) if fresh else positive_definite(seed, dim)
    c = normal(seed + 1, dim)
    s = -alpha * (b @ c)
    y = normal(seed + 2, dim) * 10**log_scale  # any sign of curvature
    new = updated(b, s, y, predicted=-alpha * c, fresh=fresh, damped=True)
    if new is not None:
        # Rank-two changes of very different size leave rounding of the larger one behind.
        smallest = torch.linalg.eigvalsh(new)[0]
        assert smallest > -1e-12 * torch.linalg.matrix_norm(new, 2)


def test_condition() -> None:
    b = positive_definite(0, 6, condition=1e8)
    assert 1e2 < bfgs.condition(b) <= 1.001e8  # a lower bound
    assert bfgs.condition(torch.diag(torch.tensor([4.0, 0.5, 1.0])).double()) == pytest.approx(8.0)
    for indefinite in ([1.0, -1e-3], [1.0, 0.0], [float("nan"), 1.0], [float("inf"), 1.0]):
        assert bfgs.condition(torch.diag(torch.tensor(indefinite)).double()) == float("inf")


def test_update_says_whether_y_was_damped() -> None:
    s = normal(0, 4)
    initial = torch.eye(4, dtype=torch.float64)
    for y, expected in ((s, False), (0.1 * s, True), (-s, True)):
        result = bfgs.update(initial, s, y, predicted=s, fresh=False, damped=True)
        assert result is not None and result[1] is expected


def test_updates_that_conflict_are_noticed_before_h_is_indefinite() -> None:
    """Random y have no common Hessian: H grows without bound until rounding decides its signs."""
    b, fresh, noticed = torch.eye(8, dtype=torch.float64), True, 0
    for k in range(200):
        c, alpha = normal(k, 8), 0.5
        y = normal(1000 + k, 8)
        new = updated(b, -alpha * (b @ c), y, predicted=-alpha * c, fresh=fresh, damped=True)
        assert new is not None
        if bfgs.condition(new) < bfgs.CONDITION_LIMIT:
            b, fresh = new, False
        else:
            b, fresh, noticed = torch.eye(8, dtype=torch.float64), True, noticed + 1
        assert torch.linalg.eigvalsh(b)[0] > 0
    assert noticed > 0


@given(DIMS, SEEDS, st.floats(-3, 3))
@settings(deadline=None, max_examples=50)
def test_powell_damping(dim: int, seed: int, scale: float) -> None:
    s, y = normal(seed, dim), scale * normal(seed + 1, dim)
    hs = positive_definite(seed + 2, dim) @ s
    r = bfgs.powell_damped(y, s, hs)
    expected = torch.dot(s, hs)
    if torch.dot(s, y) >= 0.2 * expected:
        assert r is y
    else:
        torch.testing.assert_close(torch.dot(s, r), 0.2 * expected, rtol=1e-9, atol=1e-12)
        # On the line between y and hs.
        t = torch.linalg.vector_norm(r - hs) / torch.linalg.vector_norm(y - hs)
        torch.testing.assert_close(r, t * y + (1 - t) * hs, rtol=1e-7, atol=1e-9)


def test_hs_is_solved_for_where_it_is_not_given() -> None:
    b, c = positive_definite(3, 5), normal(4, 5)
    s, y = -0.25 * (b @ c), normal(5, 5)
    solved = updated(b, s, y, fresh=False, damped=True)
    given_ = updated(b, s, y, predicted=-0.25 * c, fresh=False, damped=True)
    torch.testing.assert_close(solved, given_, rtol=1e-9, atol=1e-9)


def test_first_update_scales_b_up_only() -> None:
    s = normal(0, 6)
    initial = torch.eye(6, dtype=torch.float64)
    new = updated(initial, s, 0.02 * s, predicted=s, fresh=True, damped=True)
    torch.testing.assert_close(new, 50.0 * initial)
    for y, fresh in ((0.02 * s, False), (50.0 * s, True)):
        new = updated(initial, s, y, fresh=fresh, damped=False)
        values = torch.linalg.eigvalsh(new)
        torch.testing.assert_close(values[1:5], torch.ones(4, dtype=torch.float64))


@pytest.mark.parametrize(
    ("s", "y"),
    [
        ([0.0, 0.0], [1.0, 0.0]),
        ([1.0, 0.0], [0.0, 0.0]),
        ([1.0, 0.0], [float("nan"), 0.0]),
        ([1.0, 0.0], [float("inf"), 0.0]),
        ([1.0, 0.0], [-1.0, 0.0]),
        ([1.0, 0.0], [1e-9, 1.0]),
        ([1e-160, 0.0], [1e-160, 0.0]),  # y.s underflows
    ],
)
def test_update_skips_pairs_that_tell_nothing(s: list[float], y: list[float]) -> None:
    s_, y_ = torch.tensor(s, dtype=torch.float64), torch.tensor(y, dtype=torch.float64)
    assert updated(torch.eye(2, dtype=torch.float64), s_, y_, fresh=False, damped=False) is None


def test_curvature_test_is_relative() -> None:
    s = 1e-12 * normal(0, 4)  # y.s is about 1e-24
    assert updated(torch.eye(4, dtype=torch.float64), s, s, fresh=False, damped=False) is not None
    assert bfgs.published_update(torch.eye(4, dtype=torch.float64), s, s) is None


def test_published_update_has_the_absolute_threshold() -> None:
    s, y = torch.tensor([1e-10, 0.0]).double(), torch.tensor([1.0, 0.0]).double()
    b = torch.eye(2, dtype=torch.float64)
    assert bfgs.published_update(b, s, 0.9e-10 * y) is None
    assert bfgs.published_update(b, s, 1.1e-10 * y) is not None
    assert bfgs.published_update(b, s, -y) is None
    assert bfgs.published_update(b, s, float("nan") * y) is None


def test_descent_direction() -> None:
    b, c = positive_definite(1, 5), normal(2, 5)
    result = bfgs.descent_direction(b, c)
    assert result is not None
    torch.testing.assert_close(result[0], -b @ c)
    assert result[1] == pytest.approx(float(-c @ b @ c))
    assert bfgs.descent_direction(-b, c) is None
    assert bfgs.descent_direction(b, 0 * c) is None
    assert bfgs.descent_direction(float("nan") * b, c) is None
    skew = torch.tensor([[0.0, 1.0], [-1.0, 0.0]]).double()
    assert bfgs.descent_direction(skew, c[:2]) is None  # orthogonal to the gradient


def test_exact_searches_recover_the_inverse_hessian() -> None:
    """On a quadratic, d exact line searches make H the inverse Hessian (N & W, theorem 6.4)."""
    dim = 7
    h = torch.linalg.inv(positive_definite(0, dim, condition=30.0))
    x, b = normal(1, dim), torch.eye(dim, dtype=torch.float64)
    for k in range(dim):
        c = h @ x
        direction = bfgs.descent_direction(b, c)
        assert direction is not None
        p, slope = direction
        s = -slope / (p @ h @ p) * p
        new = updated(b, s, h @ s, fresh=k == 0, damped=False)
        assert new is not None
        b, x = new, x + s
    torch.testing.assert_close(b, torch.linalg.inv(h), rtol=1e-6, atol=1e-8)
    assert torch.linalg.vector_norm(x) < 1e-8
