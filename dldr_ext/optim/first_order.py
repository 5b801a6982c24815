"""Optimizers that take one gradient, and move without a search of their own."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from .base import SubspaceOptimizer
from .status import Status
from .step.closure import Closure, Loss, number, returned


class FirstOrder(SubspaceOptimizer):
    """The step that `PSGD` and `InSubspace` share."""

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

        Raises
        ------
        TypeError, ValueError
            The closure does not return a scalar loss; something else wrote to the weights since
            the last step (see `resync`). Nothing has moved then.
        """
        self._check_untouched()
        first = loss = None if closure is None else self._evaluator.first(closure)
        c = None
        if self._ranks is not None or self._evaluator.has_gradient():
            c, first = self._slope(loss)
        value = math.nan if first is None else number(first)
        if loss is not None:
            self._check_first_loss(value)
        if c is None:
            self._record(value, Status.NO_GRADIENT)
        elif loss is not None and not math.isfinite(value):
            self._record(value, Status.NON_FINITE_LOSS)
        else:
            self._move(closure, loss, value, c)
        self._guard.remember()
        return returned(loss, first)

    def _slope(self, loss: Loss | None) -> tuple[Tensor, Loss | None]:
        """c = P^T g, (d,) float64, of the gradients in place; and the loss, the ranks' mean."""
        c, loss = self._measured(loss, self._gradients())
        return c[0], loss

    @abstractmethod
    def _move(self, closure: Closure | None, first: Loss | None, loss: float, c: Tensor) -> None:
        """Moves theta and the weights, and records the step.

        ``first`` is what the closure returned, ``loss`` its value (NaN without a closure), ``c``
        what `_slope` found.
        """
