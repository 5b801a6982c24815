"""The published P-BFGS, restated plainly: reference in float64, and the peer that benchmarks time.

After the training script of Li et al. (TPAMI 2022): gradients flattened with ``cat``, P as one
(n, d) matrix in the gradient's dtype, read for the projection, for the residual, for each trial
and for the final move; trials build graphs; a Python loop writes the weights back. The script keeps
the weights in a file, written in each step and read back after each trial: so does this if it is
given one. The loss comes from ``forward``, not cross-entropy. Generic in the dtype of P.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PUBLISHED = {
    "line_search_fn": "armijo",
    "c1": 0.4,
    "backtrack": 0.4,
    "max_ls": 20,
    "curvature": "consecutive",
    "damping": None,
    "metric": None,
}
"""Options of PBFGS that select the published algorithm."""


class PublishedPBFGS:
    """P+-BFGS with Armijo backtracking.

    Parameters
    ----------
    params : sequence of Tensor
    p : Tensor, shape (n, d)
    residual_lr, residual_momentum : float
        alpha and gamma of the paper: SGD with momentum outside the subspace.
    file : path, optional
        Where the script's ``temporary.pt`` goes; None keeps the weights in memory instead.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        p: Tensor,
        residual_lr: float = 0.0,
        residual_momentum: float = 0.9,
        file: str | os.PathLike[str] | None = None,
    ) -> None:
        self.params = list(params)
        self.file = file
        self.kept: list[Tensor] = []
        self.p = p
        self.alpha, self.gamma = residual_lr, residual_momentum
        self.h = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
        self.last_gradient: Tensor | None = None
        self.s = torch.zeros(p.shape[1], 1, dtype=p.dtype, device=p.device)
        self.momentum: Tensor | float = 0.0
        self.trials = 0  # of the last step
        self.failed = False  # the last step's search; the script then steps anyway

    def step(self, forward: Callable[[], Tensor]) -> float:
        """One step; ``forward`` returns a loss with a graph."""
        for param in self.params:
            param.grad = None
        loss = forward()
        loss.backward()
        old = loss.item()
        gradient = torch.cat([param.grad.reshape(-1) for param in self.params])
        g = torch.mm(self.p.T, gradient.reshape(-1, 1))
        projected = torch.mm(self.p, g)
        residual = gradient - projected.reshape(-1)

        if self.last_gradient is not None:
            y = g - self.last_gradient
            ys = torch.mm(y.T, self.s)[0, 0]
            if ys > 1e-20:
                rho = 1.0 / ys
                left = torch.eye(len(g), dtype=g.dtype, device=g.device) - rho * y @ self.s.T
                self.h = left.T @ self.h @ left + rho * self.s @ self.s.T
        self.last_gradient = g
        direction = -torch.mm(self.h, g)

        descent = torch.mm(g.T, direction)[0, 0]
        self._keep()
        s = direction
        self.failed = True
        for trial in range(20):
            self._add(torch.mm(self.p, s).reshape(-1))
            new = forward().item()
            self._put_back()
            self.trials = trial + 1
            if new < old + 0.4 * descent:
                self.failed = False
                break
            descent = descent * 0.4
            s = s * 0.4
        self.s = s
        self.momentum = self.momentum * self.gamma + residual
        self._add(torch.mm(self.p, s).reshape(-1) - self.alpha * self.momentum)
        return old

    def _keep(self) -> None:
        if self.file is None:
            self.kept = [param.detach().clone() for param in self.params]
        else:
            torch.save([param.detach() for param in self.params], self.file)

    def _put_back(self) -> None:
        kept = self.kept if self.file is None else torch.load(self.file)
        with torch.no_grad():
            for param, value in zip(self.params, kept, strict=True):
                param.copy_(value)

    def _add(self, change: Tensor) -> None:
        start = 0
        with torch.no_grad():
            for param in self.params:
                part = change[start : start + param.numel()]
                param.add_(part.reshape(param.shape))
                start += param.numel()
