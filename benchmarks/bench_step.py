"""A whole P-BFGS step without its closure, against the published algorithm in plain torch."""

from __future__ import annotations

import pytest
import torch
from measure import Spread, resnet18_sizes, seconds
from published import PUBLISHED, PublishedPBFGS

from dldr_ext import PBFGS, Subspace

D, N = 40, 270_000


class Objective:
    """Gradients made beforehand and a loss that falls enough for every first trial to pass."""

    def __init__(self, params) -> None:
        self.params = params
        self.sets = [[torch.randn_like(p) for p in params] for _ in range(4)]
        self.calls = 0

    def _next(self) -> float:
        self.calls += 1
        return -1e6 * self.calls

    def backward(self) -> None:
        for param, gradient in zip(self.params, self.sets[self.calls % 4], strict=True):
            param.grad = gradient

    def item(self) -> float:
        return self._next()

    def closure(self) -> float:
        """For PBFGS: sets the gradients, returns the loss."""
        self.backward()
        return self._next()

    def forward(self):
        """For the published algorithm: has backward() and item(), as a loss tensor has."""
        return self


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", ["published", "default"])
def test_step(dtype, options, note, request):
    sizes = resnet18_sizes(N)
    basis = torch.linalg.qr(torch.randn(N, D))[0].T.contiguous()
    ours, theirs = ([torch.zeros(size, requires_grad=True) for size in sizes] for _ in range(2))
    chosen = PUBLISHED if options == "published" else {}
    optimizer = PBFGS(ours, Subspace(basis.to(dtype), torch.zeros(N)), **chosen)
    published = PublishedPBFGS(theirs, basis.T.contiguous())
    own, other = Objective(ours), Objective(theirs)

    ratios, times = [], []
    for turn in range(10 * request.config.getoption("--rounds")):
        fast = seconds(lambda: optimizer.step(own.closure))
        slow = seconds(lambda: published.step(other.forward))
        if turn >= 5:
            ratios.append(slow / fast)
            times.append(fast)
    assert published.trials == 1 and optimizer.status.moved
    note(
        {
            "case": f"PBFGS step {str(dtype)[6:]}, {options} options",
            "against_torch": vars(Spread.of(ratios)),
            "seconds": vars(Spread.of(times)),
            "peer": "published algorithm, float32",
        }
    )
