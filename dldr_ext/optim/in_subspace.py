"""Optimizers of torch in a subspace: P-Adam and the like."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from ..collectives.consistency import Facts
from ..collectives.process_group import as_list, failing_together, ranks_for
from ..subspace.base import AffineSubspace
from ..tensors.parameters import flatten
from .first_order import FirstOrder
from .metric import Metric
from .step.closure import Closure, Loss
from .step.replay import Replay


class InSubspace(FirstOrder):
    """An optimizer of torch on the d coordinates: ``torch.optim.Adam`` gives P-Adam.

    A step projects the gradient, c = P^T g, lets the optimizer step theta / s with the gradient
    s c, s being the metric's units, and writes w = w0 + P theta: two passes over the basis. The
    state of the optimizer (Adam's moments) takes d numbers each instead of n. Constructing it puts
    the model at origin + P theta0 and says so (logger ``dldr_ext``, level INFO) if that moved the
    weights.

    Parameters
    ----------
    params : iterable of Tensor, or of dict
        The parameters that the subspace was made for. If groups have their own ``weight_decay``, it
        is that of the weights, as in `PSGD`, and the optimizer gets none.
    subspace : Subspace or GroupedSubspace
    optimizer : type
        A subclass of ``torch.optim.Optimizer``. One that evaluates the closure several times a
        step (``torch.optim.LBFGS``) costs two passes for each evaluation; all of LBFGS's draw the
        same random numbers, and its closures are as those of `PBFGS`.
    metric : "auto", "trajectory" or None
        What theta is measured in: see `PBFGS`.
    theta0 : Tensor of shape (d,), "current" or None
        Where to start; None is 0, "current" the projection of the current weights.
    process_group : ProcessGroup, DeviceMesh, module, "world" or None
        Steps together with other ranks: see `PBFGS`. Every rank steps theta itself, so that the
        optimizer must do the same everywhere (one that draws random numbers needs the same seed).
    **options
        Of the optimizer, such as ``lr``; in ``param_groups``, so that schedulers work. They act on
        theta / s: weight decay that is not of a group pulls towards the origin of the subspace.

    Raises
    ------
    TypeError, ValueError
        Naming the argument, what was expected and what came; also what the optimizer raises about
        its options. Nothing has moved then.

    See Also
    --------
    PSGD : SGD with momentum, with weight decay of the weights themselves.

    Examples
    --------
    >>> import torch
    >>> from dldr_ext import InSubspace, Subspace
    >>> x = torch.nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
    >>> subspace = Subspace(torch.eye(2, 3), x.detach().clone())
    >>> optimizer = InSubspace([x], subspace, torch.optim.Adam, lr=0.5)
    >>> optimizer.step(lambda: x.square().sum())
    tensor(14.)
    >>> [round(coordinate, 3) for coordinate in optimizer.theta.tolist()]
    [-0.5, -0.5]
    """

    def __init__(
        self,
        params: Iterable[Any],
        subspace: AffineSubspace,
        optimizer: type[torch.optim.Optimizer],
        *,
        metric: Metric = "auto",
        theta0: Tensor | Literal["current"] | None = None,
        process_group: Any = None,
        **options: Any,
    ) -> None:
        params = as_list(params)
        ranks = ranks_for("InSubspace", process_group, params)
        with failing_together(ranks):
            if not isinstance(optimizer, type) or not issubclass(optimizer, torch.optim.Optimizer):
                raise TypeError(
                    "InSubspace: optimizer: expected a class such as torch.optim.Adam, got "
                    f"{optimizer!r}"
                )
            placeholder = torch.zeros(1, device="cpu", requires_grad=True)
            probe = optimizer([placeholder], **options)  # checks the options
            self._make, self._options = optimizer, options
            # One that searches compares losses: all are to see the same random numbers.
            self._replay = Replay([]) if issubclass(optimizer, torch.optim.LBFGS) else None
            defaults = probe.defaults | {"metric": metric}
            super().__init__(params, subspace, defaults, theta0, ranks)
        self._evaluator.alone = self._replay is not None
        self._renew()

    def _facts(self, theta0: Tensor | str | None) -> Facts:
        facts = super()._facts(theta0)
        return facts | {"optimizer": f"{facts['optimizer']} of {self._make.__name__}"}

    def __getstate__(self) -> dict[str, Any]:
        # torch's LBFGS, for one, cannot be copied or pickled: it is made anew from its state.
        state = super().__getstate__()
        state["_inner"] = state["_inner"].state_dict()["state"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "_inner" in state:  # torch loads a state dict this way too
            self._renew()
            self._load_inner(state["_inner"])

    def _first(self, closure: Closure) -> Loss:
        if self._replay is not None:
            self._replay.begin(closure)
        loss = super()._first(closure)
        if self._replay is not None:
            self._replay.mark()
        return loss

    def _move(self, closure: Closure | None, loss: Loss | None, c: Tensor) -> dict[str, Any]:
        units, group = self._units(), self.param_groups[0]
        self._variable.copy_(self._theta / units)
        self._variable.grad = c * units
        options = {key: group[key] for key in group.keys() - {"params", "metric"}}
        if self._decay_is_given:  # the weights' own, which is in the gradient
            options.pop("weight_decay")
        self._inner.param_groups[0].update(options)
        before, calls = self._theta.clone(), self._evaluator.calls
        try:
            inner = None if closure is None else self._inner_closure(closure, loss)
            with torch.device("cpu"):  # theta's, whatever the default for the user's tensors
                self._inner.step() if inner is None else self._inner.step(inner)
        except BaseException:
            self._theta.copy_(before)
            self._write_weights()
            self._guard.remember()
            if self._replay is not None:  # torch's LBFGS does not go on from the middle of a step
                self._renew()
            raise
        if self._replay is not None and closure is not None:
            self._replay.finish()
        self._follow()
        return {
            "alpha": float(options.get("lr", math.nan)),
            "step_length": float(torch.linalg.vector_norm(self._theta - before)),
            "trials": self._evaluator.calls - calls,
        }

    def _gradient(self, loss: Loss | None) -> tuple[Tensor, Loss | None]:
        if not self._decay_is_given:
            return super()._gradient(loss)
        objective, gradients = self._objective(), [self._problem.gradients()]
        rows, loss = objective.coordinates(
            self._problem, loss, gradients, [objective.sign], self._params
        )
        return rows[0].mul_(objective.sign), loss  # the optimizer maximises by itself

    def _value(self, loss: Any) -> Any:
        """Return the objective, which a search compares, from what the closure returned."""
        if not (self._decay_is_given and self._replay is not None):
            return loss
        point = flatten(self._params, self._subspace.origin.dtype)
        return loss + 0.5 * self._decay().dot(self._subspace, point, point)

    def _inner_closure(self, closure: Closure, loss: Any) -> Callable[[], Any]:
        """Return the closure that the inner optimizer calls; its first evaluation has been made."""
        evaluated, device = [self._value(loss)], torch.get_default_device()

        @torch.no_grad()
        def evaluate() -> Any:
            if evaluated:
                return evaluated.pop()
            self._follow()
            self._rewind()
            with device:
                again = self._evaluator.again(closure, graph=True, rewind=self._rewind)
                self._evaluator.backward(again)
            c, mean = self._gradient(again)
            self._variable.grad = c * self._units()
            return self._value(mean)

        return evaluate

    def _rewind(self) -> None:
        if self._replay is not None:
            self._replay.rewind()

    def _follow(self) -> None:
        """Put theta and the weights where the inner optimizer has moved theta / s."""
        self._theta.copy_(self._variable.detach() * self._units())
        self._write_weights()

    def _renew(self) -> None:
        """Make a new optimizer for theta / s, which each step computes from theta."""
        self._variable = torch.zeros_like(self._theta).requires_grad_()
        self._inner = self._make([self._variable], **self._options)
        if self._decay_is_given and "weight_decay" in self._inner.defaults:
            self._inner.param_groups[0]["weight_decay"] = 0.0

    def _load_inner(self, state: dict[Any, Any]) -> None:
        groups = self._inner.state_dict()["param_groups"]
        self._inner.load_state_dict({"state": state, "param_groups": groups})

    def _method_state(self) -> dict[str, Any]:
        state = copy.deepcopy(self._inner.state_dict()["state"])
        return {"optimizer": self._make.__name__, "optimizer_state": state}

    def _checked_method_state(self, state: dict[str, Any], theta: Tensor) -> dict[str, Any]:
        if state["optimizer"] != self._make.__name__:
            raise ValueError(
                f"InSubspace: state_dict: optimizer: expected {self._make.__name__}, got "
                f"{state['optimizer']}"
            )
        return {"state": copy.deepcopy(state["optimizer_state"])}

    def _adopt(self, state: dict[str, Any]) -> None:
        self._load_inner(state["state"])
        self._write_weights()

    def _transfer(self, m: Tensor) -> None:
        self._renew()  # what its state means is the optimizer's business
