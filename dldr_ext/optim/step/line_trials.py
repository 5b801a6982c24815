"""The loss along a direction, as a line search sees it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..algebra.line_search import SearchResult, armijo, fixed, strong_wolfe
from ..options import C2
from .closure import Closure, Evaluator, Loss, number
from .iterate import Walk
from .objective import Line, Objective
from .replay import Replay


@dataclass(frozen=True)
class Start:
    """The objective and its slope at alpha = 0, and the length |p| of the direction."""

    loss: float
    slope: float
    length: float


def read_together(losses: list[Loss], info: Tensor) -> list[float]:
    """Losses and a vector of numbers, in one transfer if they are on one device."""
    waiting = [x for x in losses if isinstance(x, Tensor) and x.device == info.device]
    parts = [x.detach().reshape(1).to(info.dtype) for x in waiting]
    numbers = torch.cat([*parts, info]).tolist()
    there = iter(numbers[: len(waiting)])
    known = [next(there) if any(x is w for w in waiting) else number(x) for x in losses]
    return known + numbers[len(waiting) :]


class Trials:
    """Evaluations of one closure at w + alpha u, all with the same random numbers and buffers.

    Writes the parameters and leaves them at the last trial. ``mean`` makes the loss of this
    process that of all ranks, ``gradients`` gives those of the last evaluation.
    """

    def __init__(
        self,
        closure: Closure,
        evaluator: Evaluator,
        replay: Replay,
        walk: Walk,
        objective: Objective,
        mean: Callable[[Loss], Loss],
        gradients: Callable[[], list[Tensor]],
        along: Callable[[list[Tensor]], float],
    ) -> None:
        self._closure = closure
        self._evaluator = evaluator
        self._replay = replay
        self._walk = walk
        self._mean, self._gradients, self._along = mean, gradients, along
        self._line = Line(objective, walk.point, walk.direction, walk.dot)
        self._alpha = math.nan
        self._loss: Loss = math.nan
        self._graph = False
        self.ahead = False  # `run_ahead` made the last trial, and `loss` has yet to give it
        self.raw_loss = math.nan  # what the closure returned in the last trial

    def run_ahead(self, alpha: float, graph: bool) -> Loss:
        """The trial that `loss` is going to be asked for first, without reading what comes out.

        Its number is to be put into ``raw_loss`` once it is there.
        """
        self._evaluate(alpha, graph)
        self.ahead = True
        return self._mean(self._loss)

    def loss(self, alpha: float, graph: bool) -> float:
        """The objective at alpha (see `Line.loss`), with a graph for `gradient` if asked for."""
        if not (self.ahead and alpha == self._alpha):
            self._evaluate(alpha, graph)
            self.raw_loss = number(self._mean(self._loss))
        self.ahead = False
        return self._line.loss(self.raw_loss, alpha)

    def gradient(self) -> list[Tensor]:
        """The closure's gradients at the last trial, which has a graph."""
        self._evaluator.backward(self._loss)
        self._loss = math.nan
        return self._gradients()

    def slope(self) -> float:
        """The objective's slope at the last trial: one pass over u, none over the basis."""
        return self._line.slope(self._along(self.gradient()), self._alpha)

    def settle(self, alpha: float, gradient: bool) -> float:
        """The objective at alpha, where model, buffers and, if asked for, gradients then stand."""
        if alpha != self._alpha or (gradient and not self._graph):
            self.loss(alpha, graph=gradient)
        if gradient:
            self.gradient()
        return self._line.loss(self.raw_loss, alpha)

    def _evaluate(self, alpha: float, graph: bool) -> None:
        self._loss = math.nan  # frees the last trial's graph
        self._replay.rewind()
        self._walk.trial(alpha)
        self._alpha, self._graph = alpha, graph or not self._evaluator.cheap_without_gradient
        self._loss = self._evaluator.again(self._closure, graph)


def search(
    trials: Trials,
    group: dict[str, Any],
    line: Start,
    wanted: bool,
    fresh: bool,
) -> SearchResult:
    """The search that the options of PBFGS ask for.

    Parameters
    ----------
    trials : Trials
    group : dict
        The options.
    line : Start
    wanted : bool
        The gradient is wanted at the accepted point.
    fresh : bool
        Nothing is known of the curvature.
    """
    alpha, kind = float(group["lr"]), group["line_search_fn"]
    if kind is None or alpha == 0.0:  # a schedule may end at 0: there is nothing to search
        return fixed(alpha)
    options = {name: group[name] for name in ("c1", "backtrack", "max_ls")}
    if kind == "strong_wolfe":
        return strong_wolfe(
            lambda alpha: trials.loss(alpha, graph=True),
            lambda _: trials.slope(),
            line.loss,
            line.slope,
            alpha,
            c2=C2,
            **options,
        )
    # A trial that keeps its graph needs only a backward pass to give the gradient that is wanted
    # at the accepted point. Worth it unless several trials are expected.
    return armijo(
        lambda alpha: trials.loss(alpha, graph=wanted and not fresh),
        line.loss,
        line.slope,
        alpha,
        **options,
    )
