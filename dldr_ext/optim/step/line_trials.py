"""The loss along a direction, as a line search sees it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..algebra.line_search import SearchResult, armijo, first_trial, fixed, strong_wolfe
from ..options import C2, C2_FIRST
from ..status import Status
from .closure import Closure, Loss, number
from .iterate import Iterate
from .objective import Line, Objective, Problem
from .replay import Replay


def read_together(losses: list[Loss], info: Tensor) -> list[float]:
    """Read losses and a vector of numbers, in one transfer if they are on one device."""
    on_device = [x for x in losses if isinstance(x, Tensor) and x.device == info.device]
    vectors = [x.detach().reshape(1).to(info.dtype) for x in on_device]
    numbers = torch.cat([*vectors, info]).tolist()
    transferred = iter(numbers[: len(on_device)])
    values = [
        next(transferred) if any(x is loss for loss in on_device) else number(x) for x in losses
    ]
    return values + numbers[len(on_device) :]


class Trials:
    """Evaluations of one closure at w + alpha u, all with the same random numbers and buffers.

    Writes the parameters and leaves them at the last trial.

    Attributes
    ----------
    raw_loss : float
        What the closure returned in the last trial, the mean over the ranks.
    unread : bool
        `run_ahead` made the last trial, and `loss` has yet to give it.
    """

    def __init__(
        self,
        closure: Closure,
        problem: Problem,
        replay: Replay,
        iterate: Iterate,
        objective: Objective,
    ) -> None:
        self._closure, self._problem = closure, problem
        self._replay, self._iterate = replay, iterate
        self._line = Line(objective, problem.subspace, iterate.point, iterate.direction)
        self._alpha = math.nan
        self._loss: Loss = math.nan
        self._graph = False
        self.unread = False
        self.raw_loss = math.nan

    def run_ahead(self, alpha: float, graph: bool) -> Loss:
        """Make the trial that `loss` is going to be asked for first, and read nothing of it.

        Its number is to be put into ``raw_loss`` once it is there.
        """
        self._evaluate(alpha, graph)
        self.unread = True
        return self._problem.mean(self._loss)

    def loss(self, alpha: float, graph: bool) -> float:
        """Return the objective at alpha (`Line.loss`), with a graph for `gradient` if asked for."""
        if not (self.unread and alpha == self._alpha):
            self._evaluate(alpha, graph)
            self.raw_loss = number(self._problem.mean(self._loss))
        self.unread = False
        return self._line.loss(self.raw_loss, alpha)

    def gradient(self) -> list[Tensor]:
        """Return the closure's gradients at the last trial, which has a graph."""
        self._problem.evaluator.backward(self._loss)
        self._loss = math.nan
        return self._problem.gradients()

    def slope(self) -> float:
        """Return the objective's slope at the last trial: one pass over u, none over the basis."""
        product = self._problem.slope(self.gradient(), self._iterate.direction)
        return self._line.slope(product, self._alpha)

    def settle(self, alpha: float, gradient: bool) -> float:
        """Put model, buffers and, if asked for, gradients at alpha, and return the objective."""
        if alpha != self._alpha or (gradient and not self._graph):
            self.loss(alpha, graph=gradient)
        if gradient:
            self.gradient()
        return self._line.loss(self.raw_loss, alpha)

    def _evaluate(self, alpha: float, graph: bool) -> None:
        evaluator = self._problem.evaluator
        self._loss = math.nan  # frees the last trial's graph
        self._replay.rewind()
        self._iterate.trial(alpha)
        self._alpha, self._graph = alpha, graph or not evaluator.cheap_without_gradient
        self._loss = evaluator.again(self._closure, graph, self._replay.rewind)


def search(
    trials: Trials,
    group: dict[str, Any],
    loss: float,
    slope: float,
    *,
    wanted: bool,
    fresh: bool,
    published: bool,
    decrease: float | None,
    reach: float | None,
    resolution: float,
) -> SearchResult:
    """Run the line search that the options of PBFGS ask for.

    Parameters
    ----------
    trials : Trials
    group : dict
        The options.
    loss, slope : float
        The objective and its slope at alpha = 0.
    wanted : bool
        The gradient is wanted at the accepted point.
    fresh : bool
        Nothing is known of the curvature.
    published : bool
        As in the paper: "armijo" goes from ``lr`` on in steps of ``backtrack``.
    decrease : float or None
        What the step before has lowered the same objective by; None if it was another one.
    reach : float or None
        Length that the first trial has in the metric of H for an ``lr`` of 1; None: H says it.
    resolution : float
        Losses that differ by less are the same. The published rule does not ask.
    """
    alpha, kind = float(group["lr"]), group["line_search_fn"]
    if kind is None or alpha == 0.0:  # a schedule may end at 0: there is nothing to search
        return fixed(alpha)
    slopes = wanted and not published  # without them a step could not get longer again
    known, first = slopes and decrease is not None, slopes and fresh
    if first and reach is not None:
        alpha *= reach / math.sqrt(-slope)
    elif known or (first and group["max_iter"] > 1):
        alpha = first_trial(alpha, slope, decrease)
    options = {name: group[name] for name in ("c1", "backtrack", "max_ls")}
    if not published:
        options["resolution"] = resolution
    if kind == "strong_wolfe" or known or first:
        found = strong_wolfe(
            lambda alpha: trials.loss(alpha, graph=True),
            lambda _: trials.slope(),
            loss,
            slope,
            alpha,
            c2=max(C2_FIRST if first and reach is None else C2, options["c1"]),
            **options,
        )
        # Sufficient decrease is all that "armijo" asks for.
        enough = kind == "armijo" and found.status.moved
        return replace(found, status=Status.ACCEPTED) if enough else found
    # A trial that keeps its graph needs only a backward pass to give the gradient that is wanted
    # at the accepted point.
    return armijo(
        lambda alpha: trials.loss(alpha, graph=wanted),
        loss,
        slope,
        alpha,
        interpolate=not published,
        **options,
    )
