"""The op that does a step's whole d x d algebra, against the functions of dldr_ext.optim.bfgs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opcheck import check
from torch import Tensor

from dldr_ext.optim.algebra import bfgs

SEEDS = st.integers(0, 2**31)
quasi_newton_ = torch.ops.dldr_ext.quasi_newton_


def step_by_step(
    b: Tensor, guess: Tensor, c: Tensor, s: Tensor, y: Tensor, hs: Tensor, **rule: bool
) -> tuple[Tensor, Tensor, bool, int]:
    """The same with small tensors: the next H, the direction, whether H was set back, and learnt
    (2: from a damped y)."""
    result = None
    if rule["published"]:
        new = bfgs.published_update(b, s, y)
    else:
        result = bfgs.update(b, s, y, predicted=hs, fresh=rule["fresh"], damped=rule["damped"])
        new = None if result is None else result[0]
    singular = new is not None and bfgs.condition(new) >= bfgs.CONDITION_LIMIT
    reset = singular and not rule["published"]
    learnt = 0 if new is None or reset else 2 if result is not None and result[1] else 1
    b = torch.diag(guess) if reset else b if new is None else new
    direction = bfgs.descent_direction(b, c)
    if direction is None:
        b, reset = torch.diag(guess), True
        direction = bfgs.descent_direction(b, c)
    assert direction is not None
    return b, direction[0], reset, learnt


@given(
    st.integers(1, 30),
    SEEDS,
    st.sampled_from([-1.0, 0.0, 1e-12, 1.0]),
    st.floats(-5, 5),
    st.booleans(),
    st.sampled_from(["damped", "plain", "published"]),
)
@settings(deadline=None, max_examples=200)
def test_the_op_follows_the_functions(dim, seed, sign, log_scale, fresh, name) -> None:
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator))
    b = q @ torch.diag(torch.logspace(0, -3, dim, dtype=torch.float64)) @ q.T
    b = (b + b.T) / 2
    before, c, noise = torch.randn(3, dim, dtype=torch.float64, generator=generator)
    guess = torch.linspace(1, 0.1, dim, dtype=torch.float64)
    s, hs = -0.5 * b @ before, -0.5 * before
    y = sign * 10**log_scale * (torch.linalg.solve(b, s) + 0.1 * noise)
    rule = {"fresh": fresh, "damped": name == "damped", "published": name == "published"}
    right_b, right_p, reset, learnt = step_by_step(b, guess, c, s, y, hs, **rule)
    mine = b.clone()
    p, info = quasi_newton_(mine, guess, c, s, y, hs, **rule)
    scale = float(right_b.abs().max())
    torch.testing.assert_close(mine, right_b, rtol=1e-7, atol=1e-9 * scale)
    torch.testing.assert_close(p, right_p, rtol=1e-6, atol=1e-8 * scale * float(c.abs().max()))
    torch.testing.assert_close(info[0], c @ p, rtol=1e-9, atol=0.0)
    assert bool(info[3]) == reset
    assert info[2] == learnt
    assert info[4] == 1
    torch.testing.assert_close(info[6], torch.linalg.vector_norm(p), rtol=1e-9, atol=0.0)
    assert torch.equal(mine, mine.T)


@pytest.mark.parametrize("name", ["b", "guess", "c", "s", "y", "hs"])
def test_bad_arguments_are_named_and_nothing_is_written(name) -> None:
    given = {key: torch.ones(3, dtype=torch.float64) for key in ("guess", "c", "s", "y", "hs")}
    given = {"b": torch.eye(3, dtype=torch.float64), **given}
    before = given["b"].clone()
    rule = {"fresh": True, "damped": True, "published": False}
    wrong = torch.ones(3, 4, dtype=torch.float64) if name == "b" else torch.ones(4).double()
    with pytest.raises(RuntimeError, match=f"{name}: expected"):
        quasi_newton_(*{**given, name: wrong}.values(), **rule)
    with pytest.raises(RuntimeError, match=f"{name}: expected torch.float64"):
        quasi_newton_(*{**given, name: given[name].float()}.values(), **rule)
    if name in ("y", "hs"):
        with pytest.raises(RuntimeError, match=f"{name}: expected"):
            quasi_newton_(*{**given, name: None}.values(), **rule)
    assert torch.equal(given["b"], before)


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning", "ignore:.*:FutureWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_opcheck() -> None:
    vectors = torch.rand(5, 4, dtype=torch.float64) + 0.5
    arguments = (torch.eye(4, dtype=torch.float64), *vectors)
    check(quasi_newton_.default, arguments, {"fresh": True, "damped": True, "published": False})
