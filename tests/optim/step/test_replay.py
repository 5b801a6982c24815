"""Random numbers and buffers: what every evaluation of a step sees, and what is left behind."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from optim_problems import bits, closure_of, random_subspace, whole_space
from torch import Tensor, nn

from dldr_ext import PBFGS, InSubspace, Status
from dldr_ext.tensors.random_state import RandomState

SEARCHES = ["armijo", "strong_wolfe"]
STYLES = ["forward", "usual"]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("curvature", ["same_batch", "consecutive"])
@pytest.mark.parametrize("search", [*SEARCHES, None])
def test_random_numbers_and_buffers_are_the_same_in_every_evaluation(
    search: str | None, curvature: str, style: str
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1))
    params, x = list(model.parameters()), torch.randn(32, 6)
    subspace = random_subspace(params, 5, dtype=torch.float32)
    optimizer = PBFGS(
        params, subspace, lr=20.0, line_search_fn=search, curvature=curvature, buffers=model
    )
    masks: list[bytes] = []
    entered: list[list[bytes]] = []

    def record(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        masks.append((output.detach() != 0).numpy().tobytes())

    model[2].register_forward_hook(record)

    def forward() -> Tensor:
        entered.append(bits(model.buffers()))
        return model(x).square().mean()

    last = None
    for _ in range(4):
        masks.clear()
        entered.clear()
        state, before = torch.get_rng_state(), bits(model.buffers())
        optimizer.step(closure_of(forward, params, style))
        assert len(masks) > 1 or (search is None and curvature == "consecutive")
        assert set(masks) == {masks[0]} and masks[0] != last  # new ones in the next step
        last = masks[0]
        assert all(found == before for found in entered)
        # Random state and buffers are as one evaluation at the weights we are at leaves them.
        after, buffers = torch.get_rng_state(), bits(model.buffers())
        if optimizer.status.moved and len(masks) > 1:
            replay = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8))
            replay.load_state_dict(
                {k: v for k, v in model.state_dict().items() if k.startswith(("0.", "1."))}
            )
            for buffer, old in zip(replay.buffers(), before, strict=True):
                dtype = buffer.dtype
                old_ = torch.frombuffer(bytearray(old), dtype=dtype).reshape(buffer.shape)
                buffer.copy_(old_)
            replay(x)
            assert bits(replay.buffers()) == buffers
        torch.set_rng_state(state)
        nn.functional.dropout(torch.ones(32, 8))
        assert torch.equal(after, torch.get_rng_state())
    assert model[1].num_batches_tracked == 4 or not optimizer.status.moved


def test_failed_search_leaves_the_buffers_and_moves_the_random_state_on() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 1))
    params, x = list(model.parameters()), torch.randn(16, 3)
    optimizer = PBFGS(
        params, random_subspace(params, 5, torch.float32), max_ls=3, buffers=model.buffers()
    )
    buffers, state = bits(model.buffers()), torch.get_rng_state()
    calls = iter(range(100))
    optimizer.step(lambda: model(x).square().mean() + 1e6 * next(calls))
    assert optimizer.status is Status.LINE_SEARCH_FAILED
    assert bits(model.buffers()) == buffers
    after = torch.get_rng_state()
    torch.set_rng_state(state)
    nn.functional.dropout(torch.ones(16, 4))
    assert torch.equal(after, torch.get_rng_state())


@pytest.mark.parametrize("search", SEARCHES)
def test_random_state_is_that_of_the_first_evaluation_alone(search: str) -> None:
    """Though the others draw more numbers."""
    params = [nn.Parameter(torch.full((4,), 2.0))]
    optimizer = PBFGS(params, whole_space(params), line_search_fn=search)
    drawn = []

    def closure() -> Tensor:
        drawn.append(torch.rand(1 + len(drawn)))
        return params[0].double().square().sum()

    state = torch.get_rng_state()
    optimizer.step(closure)
    after = torch.get_rng_state()
    assert optimizer.status.moved and len(drawn) > 1
    torch.set_rng_state(state)
    torch.rand(1)
    assert torch.equal(after, torch.get_rng_state())


GENERATOR, RNG, OLD, OWN = (
    torch.Generator(),
    np.random.default_rng(0),
    np.random.RandomState(0),
    random.Random(0),
)
DRAWS: dict[str, Callable[[], float]] = {
    "torch": lambda: torch.rand(()).item(),
    "torch.Generator": lambda: torch.rand((), generator=GENERATOR).item(),
    "numpy": np.random.rand,
    "numpy, normal": np.random.randn,
    "numpy Generator": lambda: RNG.random(),
    "numpy RandomState": OLD.rand,
    "random": random.random,
    "random.Random": OWN.random,
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize(
    "make",
    [
        PBFGS,
        lambda params, subspace: PBFGS(params, subspace, curvature="consecutive"),
        lambda params, subspace: PBFGS(params, subspace, max_iter=3),
        lambda params, subspace: InSubspace(
            params, subspace, torch.optim.LBFGS, line_search_fn="strong_wolfe", max_iter=3
        ),
    ],
)
def test_every_generator_draws_the_same_in_all_evaluations(make: Any, draw: Any) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 6)
    model = nn.Linear(6, 1)
    optimizer = make(model.parameters(), random_subspace(model.parameters(), 5, torch.float32))
    drawn: list[float] = []
    last, state = None, RandomState([torch.default_generator, GENERATOR, np.random, RNG, OLD, OWN])
    random.seed(0)

    def closure() -> Tensor:
        drawn.append(draw())
        return model(x + drawn[-1]).square().mean()

    firsts = []
    for _ in range(3):
        drawn.clear()
        optimizer.step(closure)
        assert len(drawn) > 1 and set(drawn) == {drawn[0]} and drawn[0] != last
        last = drawn[0]
        firsts.append(last)
    # The next step goes on as after one evaluation of each step.
    state.restore()
    random.seed(0)
    assert [draw() for _ in range(3)] == firsts


@pytest.mark.parametrize("noise", [0.0, 5.0])
def test_what_is_not_replayed_is_noticed_where_a_point_is_evaluated_twice(
    noise: float, caplog: pytest.LogCaptureFixture
) -> None:
    x = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = PBFGS([x], whole_space([x]), line_search_fn="strong_wolfe", max_ls=2)
    calls: list[float] = []

    def closure() -> Tensor:
        calls.append(x.item())
        extra = noise if x.item() in calls[:-1] else 0.0
        return 50.0 - x.sum() + 1e3 * nn.functional.relu(x - 1.5).sum() + extra

    with caplog.at_level(logging.WARNING, logger="dldr_ext"):
        optimizer.step(closure)
    assert calls == [0.0, 1.0, 10.0, 1.0] and optimizer.status is Status.DECREASED
    assert caplog.text.count("gave 49 and then 54 at the same weights") == (noise > 0.0)
