"""PBFGS in the whole space, and the minimisers that it is measured against, on one problem each."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import torch
from more_garbow_hillstrom import Problem
from optim_problems import whole_space
from torch import nn

from dldr_ext import PBFGS

TOLERANCE = 1e-6  # of |gradient|, the Euclidean norm
MOST = 3000  # iterations


@dataclass(frozen=True)
class Result:
    """Where a minimiser ended, and how often it evaluated the function."""

    value: float
    evaluations: int
    converged: bool
    x: np.ndarray


#: Eigenvalues of the quadratics, by dimension.
SPECTRA = {
    "squares": lambda dim: torch.arange(1, dim + 1, dtype=torch.float64) ** 2,
    "decades": lambda dim: torch.logspace(0, 4, dim, dtype=torch.float64),
}


def quadratic(spectrum: str, dim: int, seed: int) -> Problem:
    """sum of e_i (q_i.x)^2 / 2 in random directions q_i, from a random start."""
    generator = torch.Generator().manual_seed(seed)
    random = torch.randn(dim, dim + 1, dtype=torch.float64, generator=generator)
    q, _ = torch.linalg.qr(random[:, 1:])
    factor = (SPECTRA[spectrum](dim) / 2).sqrt()[:, None] * q
    return Problem(f"quadratic, {spectrum}", lambda x: factor @ x, random[:, 0].contiguous())


def pbfgs(problem: Problem) -> Result:
    """The default options, as many iterations as are needed."""
    x = nn.Parameter(problem.start.clone())
    optimizer = PBFGS([x], whole_space([x]), max_iter=MOST, tolerance_grad=TOLERANCE)
    optimizer.step(lambda: problem(x))
    last = optimizer.history[-1]
    converged = last.gradient_norm <= TOLERANCE
    return Result(last.loss, optimizer.closure_calls, converged, x.detach().numpy().copy())


class Counted:
    """Value and gradient for SciPy."""

    def __init__(self, problem: Problem) -> None:
        self.problem, self.calls = problem, 0

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        self.calls += 1
        leaf = torch.tensor(x, requires_grad=True)
        value = self.problem(leaf)
        (gradient,) = torch.autograd.grad(value, leaf)
        return value.item(), gradient.numpy()

    def hessian(self, x: np.ndarray) -> np.ndarray:
        return torch.autograd.functional.hessian(self.problem, torch.tensor(x)).numpy()


def scipy_bfgs(problem: Problem) -> Result:
    f = Counted(problem)
    options = {"gtol": TOLERANCE, "norm": 2, "maxiter": MOST}
    with np.errstate(all="ignore"):
        found = scipy.optimize.minimize(
            f, problem.start.numpy(), jac=True, method="BFGS", options=options
        )
    return Result(found.fun, f.calls, bool(found.success), found.x)


def scipy_trust_exact(problem: Problem) -> Result:
    """Evaluations count values with gradients, not the Hessians that it needs besides."""
    f = Counted(problem)
    options = {"gtol": TOLERANCE, "maxiter": MOST}
    with np.errstate(all="ignore"):
        found = scipy.optimize.minimize(
            f,
            problem.start.numpy(),
            jac=True,
            hess=f.hessian,
            method="trust-exact",
            options=options,
        )
    return Result(found.fun, f.calls, bool(found.success), found.x)


def torch_lbfgs(problem: Problem) -> Result:
    x = nn.Parameter(problem.start.clone())
    optimizer = torch.optim.LBFGS(
        [x],
        max_iter=MOST,
        max_eval=10 * MOST,
        history_size=10,
        tolerance_grad=TOLERANCE / math.sqrt(len(x)),  # of the largest entry
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = problem(x)
        value.backward()
        return value

    optimizer.step(closure)
    calls = optimizer.state[x]["func_evals"]
    value = closure().item()
    converged = float(x.grad.norm()) <= TOLERANCE
    return Result(value, calls, converged, x.detach().numpy().copy())
