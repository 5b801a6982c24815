"""SR1 and its trust region: pure functions of d-vectors and a d x d matrix."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.optimize
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dldr_ext.optim.algebra import sr1

DIMS = st.integers(1, 12)
SEEDS = st.integers(0, 2**31)


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def symmetric(seed: int, dim: int, values: Tensor | None = None) -> Tensor:
    q, _ = torch.linalg.qr(normal(seed, dim, dim))
    h = q @ torch.diag(normal(seed + 1, dim) if values is None else values) @ q.T
    return 0.5 * (h + h.T)


@given(DIMS, SEEDS)
@settings(deadline=None, max_examples=50)
def test_update_meets_the_secant_equation(dim: int, seed: int) -> None:
    h, s, y = symmetric(seed, dim), normal(seed + 2, dim), normal(seed + 3, dim)
    new = sr1.update(h, s, y)
    if new is None:
        r = y - h @ s
        assert abs(r @ s) <= 1e-8 * r.norm() * s.norm()
        return
    scale = float(new.abs().max())
    torch.testing.assert_close(new @ s, y, rtol=1e-6, atol=1e-9 * (1 + scale))
    assert torch.equal(new, new.T)
    assert torch.linalg.matrix_rank(new - h, atol=1e-9 * (1 + scale)) <= 1


def test_any_independent_steps_recover_an_indefinite_hessian() -> None:
    """Without exact searches, which BFGS would need (Nocedal & Wright, theorem 6.1)."""
    dim = 7
    hessian, h = symmetric(0, dim), torch.eye(dim, dtype=torch.float64)
    assert torch.linalg.eigvalsh(hessian)[0] < 0
    for k in range(dim):
        s = normal(10 + k, dim)
        new = sr1.update(h, s, hessian @ s)
        assert new is not None
        h = new
    torch.testing.assert_close(h, hessian, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize(
    ("s", "y"),
    [
        ([0.0, 0.0], [1.0, 0.0]),
        ([1.0, 0.0], [1.0, 0.0]),  # known already
        ([1.0, 0.0], [1.0, 1.0]),  # r is orthogonal to s
        ([1.0, 0.0], [float("nan"), 0.0]),
        ([1.0, 0.0], [float("inf"), 0.0]),
    ],
)
def test_update_skips_pairs_that_tell_nothing(s: list[float], y: list[float]) -> None:
    h = torch.eye(2, dtype=torch.float64)
    assert sr1.update(h, torch.tensor(s).double(), torch.tensor(y).double()) is None


def check_optimal(h: Tensor, c: Tensor, radius: float) -> None:
    """The conditions that hold at a minimiser of the subproblem and nowhere else.

    Nocedal & Wright, theorem 4.1: (H + mu) p = -c, H + mu positive semidefinite, mu >= 0, and
    mu = 0 inside the region.
    """
    step = sr1.model_step(h, c, radius)
    assert step is not None
    p, lowest = step.p, float(torch.linalg.eigvalsh(h)[0])
    scale = float(h.abs().max()) + float(c.abs().max()) / radius + 1e-300
    assert p.norm() <= radius * (1 + 1e-8)
    mu = float(-(c + h @ p) @ p / (p @ p)) if float(p.norm()) > 0 else 0.0
    torch.testing.assert_close(h @ p + mu * p, -c, rtol=1e-5, atol=1e-6 * scale * radius)
    assert mu >= -1e-6 * scale and lowest + mu >= -1e-6 * scale
    if p.norm() < radius * (1 - 1e-6):
        assert abs(mu) <= 1e-6 * scale
    assert step.slope == pytest.approx(float(c @ p), rel=1e-9, abs=1e-12 * scale)
    assert step.curvature == pytest.approx(float(p @ h @ p), rel=1e-6, abs=1e-9 * scale * radius**2)
    assert step.length == pytest.approx(float(p.norm()), rel=1e-9)
    model = float(c @ p + 0.5 * p @ h @ p)
    assert step.predicted(1.0) == pytest.approx(-model, rel=1e-6, abs=1e-9 * scale * radius)
    assert step.slope <= 0


@given(DIMS, SEEDS, st.floats(-4, 4))
@settings(deadline=None, max_examples=200)
def test_step_minimises_the_model(dim: int, seed: int, log_radius: float) -> None:
    check_optimal(symmetric(seed, dim), normal(seed + 5, dim), 10**log_radius)


@pytest.mark.parametrize("part", [0.0, 1e-300, 1e-30, 1e-15, 1e-8])
@pytest.mark.parametrize("lowest", [-2.0, -1e-6, 0.0])
@pytest.mark.parametrize("radius", [0.1, 10.0, 1e4])
def test_hard_case(part: float, lowest: float, radius: float) -> None:
    """The gradient has (almost) no part along the lowest eigenvector."""
    h = torch.diag(torch.tensor([lowest, 1.0, 3.0], dtype=torch.float64))
    c = torch.tensor([part, 1.0, -2.0], dtype=torch.float64)
    check_optimal(h, c, radius)
    if lowest < 0:
        step = sr1.model_step(h, c, radius)
        assert step is not None and step.length == pytest.approx(radius, rel=1e-8)


def test_step_without_a_region_is_newtons() -> None:
    h = symmetric(3, 5, torch.logspace(-3, 3, 5, dtype=torch.float64))
    c = normal(1, 5)
    step = sr1.model_step(h, c, math.inf)
    assert step is not None
    torch.testing.assert_close(step.p, -torch.linalg.solve(h, c), rtol=1e-8, atol=1e-8)
    assert step.condition == pytest.approx(1e6, rel=1e-6)


def test_no_step_of_what_is_not_finite() -> None:
    h, c = symmetric(0, 3, torch.tensor([-1.0, 1.0, 2.0]).double()), normal(1, 3)
    assert sr1.model_step(h, c, math.inf) is None  # unbounded
    assert sr1.model_step(h * math.nan, c, 1.0) is None
    assert sr1.model_step(h, c * math.inf, 1.0) is None


def test_next_radius() -> None:
    step = sr1.model_step(torch.eye(1).double(), torch.tensor([4.0]).double(), 1.0)
    assert step is not None and step.length == pytest.approx(1.0)
    good = step.predicted(1.0)
    assert good == pytest.approx(3.5)
    assert sr1.next_radius(1.0, step, 1.0, good) == pytest.approx(2.0)  # agreed, at the border
    assert sr1.next_radius(5.0, step, 1.0, good) == 5.0  # agreed, inside
    assert sr1.next_radius(1.0, step, 1.0, 0.5 * good) == 1.0
    assert sr1.next_radius(1.0, step, 1.0, 0.01 * good) == pytest.approx(0.5)
    assert sr1.next_radius(1.0, step, 0.25, step.predicted(0.25)) == pytest.approx(0.25)
    assert sr1.next_radius(3.0, step, 1.0, math.nan) == 3.0
    assert sr1.next_radius(math.inf, step, 0.5, math.nan) == pytest.approx(1.0)


def test_the_functions_make_a_minimiser() -> None:
    """Algorithm 6.2 on the Rosenbrock function, whose Hessian is indefinite on the way."""
    x, h, radius = np.array([-1.2, 1.0]), torch.eye(2, dtype=torch.float64), 1.0
    f, g = scipy.optimize.rosen(x), scipy.optimize.rosen_der(x)
    for _ in range(200):
        if np.abs(g).max() < 1e-9:
            break
        step = sr1.model_step(h, torch.tensor(g), radius)
        assert step is not None
        trial = x + step.p.numpy()
        value, gradient = scipy.optimize.rosen(trial), scipy.optimize.rosen_der(trial)
        new = sr1.update(h, step.p, torch.tensor(gradient - g))
        h = h if new is None else new
        if value < f:
            radius = sr1.next_radius(radius, step, 1.0, f - value)
            x, f, g = trial, value, gradient
        else:
            radius = 0.5 * step.length
    np.testing.assert_allclose(x, [1.0, 1.0], rtol=1e-7)
