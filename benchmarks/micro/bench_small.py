"""Iterations of P-BFGS on small problems, against torch's LBFGS and pytorch-minimize's BFGS.

All minimise the same function of the same 40 coordinates for as many iterations, from the same
start: the peers as one of theta, with w0 + theta P in plain torch under autograd, P-BFGS as one of
the weights. It has 40 curvatures from 1 to 1,000 and a quartic term. pytorch-minimize is no
dependency: where it is not installed its rows are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from dldr_ext import PBFGS, Subspace
from dldr_ext.performance.timing import Spread, seconds

D, ITERATIONS = 40, 20


@dataclass
class Problem:
    """sum a (w - b)^2 / 2 + (w - b)^4 / 4 of weights in some tensors, over blocks of equal a."""

    basis: Tensor
    origin: Tensor
    sizes: list[int]
    curvatures: tuple[Tensor, ...]
    targets: tuple[Tensor, ...]

    def loss(self, weights) -> Tensor:
        terms = zip(weights, self.curvatures, self.targets, strict=True)
        return sum(_term(w - b, a) for w, a, b in terms)

    def of_theta(self, theta: Tensor) -> Tensor:
        return self.loss((self.origin + theta @ self.basis).split(self.sizes))


def _term(distance: Tensor, curvature: Tensor) -> Tensor:
    square = distance.square()
    return (0.5 * curvature * square + 0.25 * square.square()).sum()


def problem(n: int, tensors: int) -> Problem:
    basis, curvature = torch.zeros(D, n), torch.empty(n)
    for i, a in enumerate(torch.logspace(0, 3, D)):
        block = slice(i * n // D, (i + 1) * n // D)
        basis[i, block], curvature[block] = (block.stop - block.start) ** -0.5, a
    sizes = [n // tensors] * tensors
    return Problem(
        basis, torch.randn(n), sizes, curvature.split(sizes), torch.randn(n).split(sizes)
    )


class Ours:
    """P-BFGS with its defaults, on weights in several tensors."""

    def __init__(self, p: Problem) -> None:
        self.weights = [nn.Parameter(w.clone()) for w in p.origin.split(p.sizes)]
        subspace = Subspace(p.basis, p.origin)
        self.optimizer = PBFGS(self.weights, subspace, max_iter=ITERATIONS)
        self.problem = p

    def run(self) -> None:
        self.optimizer.step(lambda: self.problem.loss(self.weights))

    def result(self) -> tuple[float, int]:
        """The loss at the end and the iterations made."""
        return float(self.problem.loss(self.weights).detach()), len(self.optimizer.history)


class TorchLBFGS:
    """torch's LBFGS, which keeps as many pairs as there are iterations."""

    def __init__(self, p: Problem) -> None:
        self.theta, self.problem = torch.zeros(D, requires_grad=True), p
        self.optimizer = torch.optim.LBFGS(
            [self.theta], max_iter=ITERATIONS, history_size=D, line_search_fn="strong_wolfe",
            tolerance_grad=0, tolerance_change=0,
        )  # fmt: skip

    def run(self) -> None:
        def closure() -> Tensor:
            self.optimizer.zero_grad()
            loss = self.problem.of_theta(self.theta)
            loss.backward()
            return loss

        self.optimizer.step(closure)

    def result(self) -> tuple[float, int]:
        loss = float(self.problem.of_theta(self.theta).detach())
        return loss, self.optimizer.state[self.theta]["n_iter"]


class MinimizeBFGS:
    """BFGS of pytorch-minimize."""

    def __init__(self, p: Problem) -> None:
        self.minimize = pytest.importorskip("torchmin").minimize
        self.problem = p

    def run(self) -> None:
        self.found = self.minimize(
            self.problem.of_theta, torch.zeros(D), method="bfgs", max_iter=ITERATIONS,
            options={"gtol": 0, "xtol": 0},
        )  # fmt: skip

    def result(self) -> tuple[float, int]:
        return float(self.found.fun), self.found.nit


@pytest.mark.parametrize("peer", [TorchLBFGS, MinimizeBFGS])
@pytest.mark.parametrize("tensors", [1, 8])
@pytest.mark.parametrize("n", [1_000, 10_000, 100_000])
def test_small(n, tensors, peer, note, request):
    posed = problem(n, tensors)
    ratios, times = [], []
    for _ in range(request.config.getoption("--rounds")):
        ours, theirs = Ours(posed), peer(posed)
        fast, slow = seconds(ours.run), seconds(theirs.run)
        (own, steps), (other, iterations) = ours.result(), theirs.result()
        assert steps == iterations == ITERATIONS
        ratios.append(slow / fast)
        times.append(fast / ITERATIONS)
    note(
        {
            "case": f"PBFGS iteration, n = {n:,} in {tensors}; peer {peer.__name__}",
            "against_torch": vars(Spread.of(ratios)),
            "seconds": vars(Spread.of(times)),
            "losses": [own, other],
        }
    )
