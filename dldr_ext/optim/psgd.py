"""Stochastic gradient descent in a subspace."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from ..collectives.process_group import as_list, failing_together, ranks_for
from ..subspace.base import AffineSubspace
from .first_order import FirstOrder
from .metric import Metric
from .options import check_flag, check_lr, check_number, names_options
from .state_dict import saved_tensor
from .step.closure import Closure, Loss


class PSGD(FirstOrder):
    """P-SGD: SGD with momentum on the d coordinates of a subspace (Li et al., section 3).

    With c = P^T g and the metric's units s a step is m <- momentum * m + c, theta <- theta - lr *
    s^2 m, w = w0 + P theta: two passes over the basis, and d numbers of memory. It is
    ``torch.optim.SGD`` on theta / s; without a metric, in exact arithmetic, ``torch.optim.SGD`` on
    the weights with the projected gradient P c. Constructing it puts the model at origin + P
    theta0 and says so (logger ``dldr_ext``, level INFO) if that moved the weights.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        The parameters that the subspace was made for; groups may have their own ``weight_decay``.
    subspace : Subspace or GroupedSubspace
    lr : float
        Learning rate, >= 0; in ``param_groups``, so that schedulers work. In the metric of the
        trajectory 0.3, annealed, is a good first guess, and 1 with momentum too much.
    momentum : float
        In [0, 1).
    weight_decay : float
        >= 0; wd / 2 |w|^2 is added to the objective. The gradient is as in ``torch.optim.SGD``.
    maximize : bool
        Maximises what the closure returns.
    metric : "auto", "trajectory" or None
        What theta is measured in: see `PBFGS`.
    process_group : ProcessGroup, DeviceMesh, module, "world" or None
        Steps together with other ranks: see `PBFGS`.
    theta0 : Tensor of shape (d,), "current" or None
        Where to start; None is 0, "current" the projection of the current weights.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came. Nothing has moved then.

    See Also
    --------
    PBFGS : quasi-Newton steps, which search for their length.
    InSubspace : any optimizer of torch on the coordinates.

    Notes
    -----
    Gradient scaling works as with torch's optimizers: ``scaler.scale(loss).backward()``,
    ``scaler.step(optimizer)``, ``scaler.update()``.

    References
    ----------
    Li, Tan, Huang, Tao, Liu, Huang, "Low Dimensional Trajectory Hypothesis is True: DNNs Can Be
    Trained in Tiny Subspaces", TPAMI 2022 (arXiv:2103.11154).

    Examples
    --------
    >>> import torch
    >>> from dldr_ext import PSGD, Subspace
    >>> x = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    >>> subspace = Subspace(torch.eye(2, 3), x.detach().clone())
    >>> optimizer = PSGD([x], subspace, lr=0.25, momentum=0.0)
    >>> optimizer.step(lambda: x.square().sum())
    tensor(14.)
    >>> x.tolist(), optimizer.theta.tolist()
    ([0.5, 1.0, 3.0], [-0.5, -1.0])
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
        metric: Metric = "auto",
        process_group: Any = None,
        theta0: Tensor | Literal["current"] | None = None,
    ) -> None:
        params = as_list(params)
        ranks = ranks_for("PSGD", process_group, params)
        with failing_together(ranks):
            defaults = {
                "lr": check_lr("PSGD", lr),
                "momentum": check_number("PSGD", "momentum", momentum, 0.0, 1.0),
                "weight_decay": check_number("PSGD", "weight_decay", weight_decay, 0.0),
                "maximize": check_flag("PSGD", "maximize", maximize),
                "metric": metric,
            }
            super().__init__(params, subspace, defaults, theta0, ranks)
        self._momentum = torch.zeros_like(self._theta)

    def _gradient(self, loss: Loss | None) -> tuple[Tensor, Loss | None]:
        objective, gradients = self._objective(), [self._problem.gradients()]
        rows, loss = objective.coordinates(
            self._problem, loss, gradients, [objective.factor], self._params
        )
        return rows[0], loss

    def _move(self, closure: Closure | None, loss: Loss | None, c: Tensor) -> dict[str, Any]:
        group = self.param_groups[0]
        lr = float(group["lr"])
        self._momentum.mul_(group["momentum"]).add_(c)
        step = self._units().square() * self._momentum
        self._theta.add_(step, alpha=-lr)
        self._write_weights()
        return {"alpha": lr, "step_length": lr * float(torch.linalg.vector_norm(step))}

    def _method_state(self) -> dict[str, Any]:
        return {"momentum": self._momentum.clone()}

    def _checked_method_state(self, state: dict[str, Any], theta: Tensor) -> dict[str, Any]:
        return {"momentum": saved_tensor(self, state, "momentum", theta)}

    def _transfer(self, m: Tensor) -> None:
        self._momentum = torch.mv(m, self._momentum)

    def _adopt(self, state: dict[str, Any]) -> None:
        self._momentum = state["momentum"]
        self._write_weights()
