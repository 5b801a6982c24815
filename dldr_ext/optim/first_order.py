"""The base of optimizers that take one gradient, and move without a search of their own."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from .base import SubspaceOptimizer
from .status import Status
from .step.closure import Closure, Loss, LossT, check_closure, number, returned


class FirstOrder(SubspaceOptimizer):
    """The step that `PSGD` and `InSubspace` share."""

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], LossT]) -> LossT: ...

    @torch._disable_dynamo  # in a loop that is compiled too: a step runs as it stands
    @torch.no_grad()
    def step(self, closure: Closure | None = None) -> Loss | None:
        """Take one step.

        Parameters
        ----------
        closure : callable, optional
            Returns the loss, with or without having called backward (see `PBFGS.step`). One that
            calls backward steps by what the parameters' gradients then are, as in torch's
            optimizers: with what was accumulated before, and clipped. Without a closure the
            gradients that the parameters hold are used.

        Returns
        -------
        Tensor, float or None
            What the closure returned, detached; None without a closure.

        Raises
        ------
        TypeError, ValueError
            There is no closure for LBFGS; it does not return a scalar loss; it calls no backward,
            and there are gradients from before it; something else wrote to the weights since the
            last step (see `resync`). Nothing has moved then.
        """
        if self._evaluator.alone:
            check_closure(type(self).__name__, closure)
        self._check_untouched()
        first = mean = None if closure is None else self._first(closure)
        c = None
        if self._ranks is not None or self._evaluator.has_gradient():
            c, mean = self._gradient(first)
        loss = math.nan if mean is None else number(mean)
        if first is not None:
            self._check_first_loss(loss)
        if c is None:
            self._record(loss, Status.NO_GRADIENT)
        elif first is not None and not math.isfinite(loss):
            self._record(loss, Status.NON_FINITE_LOSS)
        elif not math.isfinite(size := float(torch.linalg.vector_norm(c))):
            self._record(loss, Status.NON_FINITE_GRADIENT, gradient_norm=size)
        else:
            moved = self._move(closure, mean, c)
            self._record(loss, Status.ACCEPTED, gradient_norm=size, **moved)
        self._remember()
        return returned(first, mean)

    def _first(self, closure: Closure) -> Loss:
        """Evaluate the closure where the weights are."""
        return self._evaluator.first(closure)

    def _gradient(self, loss: Loss | None) -> tuple[Tensor, Loss | None]:
        """Project the gradients in place, c = P^T g, (d,) float64, and take the loss's mean."""
        c, loss = self._problem.project(loss, self._problem.gradients())
        return c[0], loss

    def _write_weights(self) -> None:
        self._subspace.write_(self._params, self._to_basis(self._theta))

    @abstractmethod
    def _move(self, closure: Closure | None, loss: Loss | None, c: Tensor) -> dict[str, Any]:
        """Move theta and the weights, and return further entries of the `StepRecord`.

        ``loss`` is what the closure returned (None without one), ``c`` what `_gradient` found.
        """
