"""Small problems that the tests of the optimizers share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

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


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These problems are too small for threads, which only wait for each other on a busy machine.

    For the modules that import it.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
