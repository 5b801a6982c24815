"""The loss along a direction, as a line search sees it."""

from __future__ import annotations

import math

from torch import Tensor

from .. import ops
from .._params import gradients
from ._closure import Closure, Evaluator, Loss, number
from ._replay import Replay

__all__ = ["Trials"]


class Trials:
    """Evaluations of one closure at w + alpha u, all with the same random numbers and buffers.

    Writes the parameters and leaves them at the last trial.
    """

    def __init__(
        self,
        closure: Closure,
        evaluator: Evaluator,
        replay: Replay,
        params: list[Tensor],
        point: Tensor,
        direction: Tensor,
    ) -> None:
        self._closure = closure
        self._evaluator = evaluator
        self._replay = replay
        self._params = params
        self._point = point
        self._direction = direction
        self._alpha = math.nan
        self._loss: Loss = math.nan
        self._graph = False
        self.count = 0

    def loss(self, alpha: float, graph: bool) -> float:
        """phi(alpha), with a graph for `gradient` if asked for."""
        self._loss = math.nan  # frees the last trial's graph
        self._replay.rewind()
        ops.trial_(self._params, self._point, self._direction, alpha)
        self._alpha, self._graph = alpha, graph or not self._evaluator.forward_only
        self.count += 1
        self._loss = self._evaluator.again(self._closure, graph)
        return number(self._loss)

    def gradient(self) -> list[Tensor]:
        """Gradients at the last trial, which has a graph."""
        self._evaluator.backward(self._loss)
        self._loss = number(self._loss)
        return gradients(self._params)

    def slope(self) -> float:
        """phi' at the last trial: one pass over u, none over the basis."""
        return float(ops.project(self._direction.unsqueeze(0), self.gradient()))

    def settle(self, alpha: float, gradient: bool) -> float:
        """The loss at alpha, where model, buffers and, if asked for, gradients then stand."""
        if alpha != self._alpha or (gradient and not self._graph):
            self.loss(alpha, graph=gradient)
        if gradient:
            self.gradient()
        return number(self._loss)
