"""Optimizers that take one gradient, and move without a search of their own."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from ._base import SubspaceOptimizer
from ._closure import Closure, Loss, number
from .status import Status

__all__ = ["FirstOrder"]


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
        loss = None if closure is None else self._evaluator.first(closure)
        value = math.nan if loss is None else number(loss)
        if loss is not None:
            self._check_first_loss(value)
        if not self._evaluator.has_gradient():
            self._record(value, Status.NO_GRADIENT)
        elif loss is not None and not math.isfinite(value):
            self._record(value, Status.NON_FINITE_LOSS)
        else:
            self._move(closure, loss, value)
        self._guard.remember()
        return loss.detach() if isinstance(loss, Tensor) else loss

    @abstractmethod
    def _move(self, closure: Closure | None, first: Loss | None, loss: float) -> None:
        """Moves theta and the weights by the gradients in place, and records the step.

        ``first`` is what the closure returned, ``loss`` its value (NaN without a closure).
        """
