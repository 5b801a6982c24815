"""Stochastic gradient descent in a subspace."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from .._affine import AffineSubspace
from .._params import gradients
from ._base import SubspaceOptimizer, check_number
from ._closure import Closure, Loss, number
from .status import Status

__all__ = ["PSGD"]


class PSGD(SubspaceOptimizer):
    """P-SGD: SGD with momentum on the d coordinates of a subspace (Li et al., section 3).

    With c = P^T g a step is m <- momentum * m + c, theta <- theta - lr * m, w = w0 + P theta: two
    passes over the basis, and d numbers of memory. In exact arithmetic it is ``torch.optim.SGD``
    on the projected gradient P c. Constructing it puts the model at origin + P theta0 and logs a
    warning (logger ``dldr_ext``) if that moved the weights.

    Parameters
    ----------
    params : iterable of Tensor
        The parameters that the subspace was made for.
    subspace : Subspace or GroupedSubspace
    lr : float
        Learning rate, >= 0; in ``param_groups``, so that schedulers work.
    momentum : float
        In [0, 1).
    theta0 : Tensor of shape (d,), "current" or None
        Where to start; None is 0, "current" the projection of the current weights.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came. Nothing has moved then.
    """

    def __init__(
        self,
        params: Iterable[Any],
        subspace: AffineSubspace,
        lr: float = 1.0,
        momentum: float = 0.9,
        *,
        theta0: Tensor | Literal["current"] | None = None,
    ) -> None:
        defaults = {
            "lr": check_number("PSGD", "lr", lr, 0.0),
            "momentum": check_number("PSGD", "momentum", momentum, 0.0, 1.0),
        }
        super().__init__(params, subspace, defaults, theta0)
        self._momentum = torch.zeros_like(self._theta)

    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Loss | None:  # type: ignore[override]
        """One step.

        Parameters
        ----------
        closure : callable, optional
            Returns the loss, with or without having called backward (see `PBFGS.step`). Without
            it the gradients that the parameters hold are used.

        Returns
        -------
        Tensor, float or None
            What the closure returned, detached.
        """
        loss = None if closure is None else self._evaluator.first(closure)
        if not self._evaluator.has_gradient():
            self._status = Status.NO_GRADIENT
        elif loss is not None and not math.isfinite(number(loss)):
            self._status = Status.NON_FINITE_LOSS
        else:
            self._status = self._move()
        return loss.detach() if isinstance(loss, Tensor) else loss

    def _move(self) -> Status:
        (c,) = self._projected(gradients(self._params))
        if not bool(c.isfinite().all()):
            return Status.NON_FINITE_GRADIENT
        group = self.param_groups[0]
        self._momentum.mul_(group["momentum"]).add_(c)
        self._theta.add_(self._momentum, alpha=-float(group["lr"]))
        self._subspace.reconstruct_(self._params, self._to_basis(self._theta))
        return Status.ACCEPTED

    def _own_state(self) -> dict[str, Any]:
        return {"momentum": self._momentum.clone()}

    def _checked_own_state(self, state: dict[str, Any], theta: Tensor) -> dict[str, Any]:
        return {"momentum": self._saved_tensor(state, "momentum", theta)}

    def _adopt(self, own: dict[str, Any]) -> None:
        self._momentum = own["momentum"]
        self._subspace.reconstruct_(self._params, self._to_basis(self._theta))
