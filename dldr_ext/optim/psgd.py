"""Stochastic gradient descent in a subspace."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from ..collectives.process_group import listed, together
from ..subspace.base import AffineSubspace
from .first_order import FirstOrder
from .options import check_flag, check_lr, check_number, names_options
from .state_dict import saved_tensor
from .status import Status
from .step.closure import Closure, Loss
from .step.objective import Objective


class PSGD(FirstOrder):
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
    weight_decay : float
        >= 0; wd / 2 |w|^2 is added to the objective. The gradient is as in ``torch.optim.SGD``.
    maximize : bool
        Maximises what the closure returns.
    process_group : ProcessGroup, DeviceMesh, module, "world" or None
        Steps together with other ranks: see `PBFGS`.
    theta0 : Tensor of shape (d,), "current" or None
        Where to start; None is 0, "current" the projection of the current weights.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came. Nothing has moved then.

    Notes
    -----
    Gradient scaling works as with torch's optimizers: ``scaler.scale(loss).backward()``,
    ``scaler.step(optimizer)``, ``scaler.update()``.
    """

    @names_options
    def __init__(
        self,
        params: Iterable[Any],
        subspace: AffineSubspace,
        lr: float = 1.0,
        momentum: float = 0.9,
        *,
        weight_decay: float = 0.0,
        maximize: bool = False,
        process_group: Any = None,
        theta0: Tensor | Literal["current"] | None = None,
    ) -> None:
        params = listed(params)
        ranks = together("PSGD", process_group, params)
        with nullcontext() if ranks is None else ranks.agreeing():
            defaults = {
                "lr": check_lr("PSGD", lr),
                "momentum": check_number("PSGD", "momentum", momentum, 0.0, 1.0),
                "weight_decay": check_number("PSGD", "weight_decay", weight_decay, 0.0),
                "maximize": check_flag("PSGD", "maximize", maximize),
            }
            super().__init__(params, subspace, defaults, theta0, ranks)
        self._momentum = torch.zeros_like(self._theta)

    def _slope(self, loss: Loss | None) -> tuple[Tensor, Loss | None]:
        group = self.param_groups[0]
        objective = Objective(-1.0 if group["maximize"] else 1.0, float(group["weight_decay"]))
        weights = [self._params] if objective.decay else []
        rows, loss = self._measured(loss, self._gradients(), *weights, same=len(weights))
        c = objective.factor * rows[0]
        if objective.decay:
            c.add_(rows[1], alpha=objective.decay)
        return c, loss

    def _move(self, closure: Closure | None, first: Loss | None, loss: float, c: Tensor) -> None:
        group = self.param_groups[0]
        size = float(torch.linalg.vector_norm(c))
        if not math.isfinite(size):
            self._record(loss, Status.NON_FINITE_GRADIENT, gradient_norm=size)
            return
        lr = float(group["lr"])
        self._momentum.mul_(group["momentum"]).add_(c)
        self._theta.add_(self._momentum, alpha=-lr)
        self._subspace.reconstruct_(self._params, self._to_basis(self._theta))
        length = lr * float(torch.linalg.vector_norm(self._momentum))
        self._record(loss, Status.ACCEPTED, gradient_norm=size, alpha=lr, step_length=length)

    def _own_state(self) -> dict[str, Any]:
        return {"momentum": self._momentum.clone()}

    def _checked_own_state(self, state: dict[str, Any], theta: Tensor) -> dict[str, Any]:
        return {"momentum": saved_tensor(self, state, "momentum", theta)}

    def _carry(self, m: Tensor) -> None:
        self._momentum = torch.mv(m, self._momentum)

    def _adopt(self, own: dict[str, Any]) -> None:
        self._momentum = own["momentum"]
        self._subspace.reconstruct_(self._params, self._to_basis(self._theta))
