"""Small problems that the tests of the optimizers share."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from published import PublishedPBFGS
from torch import Tensor, nn

from dldr_ext import Subspace


def flat(params: Iterable[Tensor]) -> Tensor:
    """A float64 copy of a list of tensors, flattened."""
    return torch.cat([p.detach().reshape(-1).double() for p in params])


def bits(params: Iterable[Tensor]) -> list[bytes]:
    """Every bit of a list of tensors."""
    return [p.detach().reshape(-1).view(torch.uint8).numpy().tobytes() for p in params]


def random_subspace(
    params: Iterable[Tensor], dim: int, dtype: torch.dtype = torch.float64, seed: int = 0
) -> Subspace:
    """Orthonormal random directions through the current weights."""
    origin = flat(params)
    generator = torch.Generator().manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(len(origin), dim, dtype=torch.float64, generator=generator))
    accumulate = torch.float64 if dtype == torch.float64 else torch.float32
    return Subspace(q.T.contiguous().to(dtype), origin.to(accumulate))


def two_tensors() -> tuple[list[nn.Parameter], Subspace]:
    """Ten float32 weights and a subspace of three directions elsewhere."""
    params = [nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(4))]
    subspace = random_subspace(params, 3, dtype=torch.float32)
    return params, Subspace(subspace.basis, subspace.origin + 1.0)


def whole_space(params: Iterable[Tensor]) -> Subspace:
    """P = I: the optimizer is then a plain quasi-Newton method."""
    origin = flat(params)
    return Subspace(torch.eye(len(origin), dtype=torch.float64), origin)


class Batches:
    """A classification problem in mini-batches with a small network."""

    def __init__(
        self,
        seed: int = 0,
        count: int = 4,
        dtype: torch.dtype = torch.float64,
        layers: Callable[[], list[nn.Module]] | None = None,
    ) -> None:
        torch.manual_seed(seed)
        middle = [nn.Tanh()] if layers is None else layers()
        self.model = nn.Sequential(nn.Linear(6, 8), *middle, nn.Linear(8, 3)).to(dtype)
        inputs = torch.randn(count, 32, 6, dtype=torch.float64)
        targets = (inputs @ torch.randn(6, 3, dtype=torch.float64)).argmax(-1)
        self.inputs, self.targets = inputs.to(dtype), targets

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    def forward(self, step: int) -> Callable[[], Tensor]:
        """Forward-only closure of the step's batch."""
        i = step % len(self.inputs)
        return lambda: nn.functional.cross_entropy(
            self.model(self.inputs[i]).double(), self.targets[i]
        )

    def usual(self, step: int) -> Callable[[], Tensor]:
        """Closure that zeroes gradients and calls backward itself."""
        forward = self.forward(step)

        def closure() -> Tensor:
            self.model.zero_grad()
            loss = forward()
            loss.backward()
            return loss

        return closure


def published(batches: Batches, subspace: Subspace, **options: float) -> PublishedPBFGS:
    """The published algorithm on the same parameters and subspace."""
    return PublishedPBFGS(batches.params, subspace.basis.T, **options)


def closure_of(forward: Callable[[], Tensor], params: list[nn.Parameter], style: str) -> Any:
    """The forward-only closure itself, or one that zeroes gradients and calls backward."""

    def usual() -> Tensor:
        for p in params:
            p.grad = None
        loss = forward()
        loss.backward()
        return loss

    return forward if style == "forward" else usual


def interrupted(closure: Callable[[], Any], call: int) -> Callable[[], Any]:
    """The closure, stopped in its ``call``-th call."""
    calls = 0

    def interrupting() -> Any:
        nonlocal calls
        calls += 1
        if calls == call:
            raise KeyboardInterrupt
        return closure()

    return interrupting


def check_copies_go_their_own_way(batches: Batches, optimizer: Any) -> None:
    """deepcopy and pickle of model and optimizer together; the copies take the same steps."""
    for step in range(3):
        optimizer.step(batches.forward(step))
    pairs = [copy.deepcopy((batches, optimizer)), pickle.loads(pickle.dumps((batches, optimizer)))]
    for other, copied in pairs:
        assert copied.param_groups[0]["params"][0] is other.params[0]
        kept = bits(batches.params)
        for step in range(3, 6):
            copied.step(other.forward(step))
        assert bits(batches.params) == kept
    for step in range(3, 6):
        optimizer.step(batches.forward(step))
    for other, copied in pairs:
        assert bits(other.params) == bits(batches.params)
        assert torch.equal(copied.theta, optimizer.theta)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These problems are too small for threads, which only wait for each other on a busy machine.

    For the modules and folders (in conftest.py) that import it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
