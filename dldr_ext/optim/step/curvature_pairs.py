"""The last step and the change of the gradient along it, from which H learns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..algebra.bfgs import Pair
from .closure import Loss
from .objective import Objective, Problem


class CurvaturePairs:
    """A step s, and y once both of its gradients are there.

    With "same_batch" the second is the flat gradient at the accepted point, projected beside the
    next step's, by when H is needed; with "consecutive" the next step's own gradient is all there
    is.
    """

    def __init__(self) -> None:
        self._waiting: tuple[Tensor, Tensor, Tensor] | None = None  # s, c before it, H^-1 s
        self._after: Tensor | None = None  # the flat gradient at the accepted point, unscaled

    def put(self, alpha: float, p: Tensor, c: Tensor) -> None:
        """Remember a step alpha p = -alpha H c, for which H^-1 s = -alpha c."""
        self._waiting = alpha * p, c, -alpha * c

    def drop(self) -> None:
        """Forget the step."""
        self._waiting = None

    def keep(self, tensors: list[Tensor], like: Tensor, scale: float) -> Tensor:
        """Keep a flat copy of the gradients at the accepted point, without their scale."""
        if self._after is None:
            self._after = torch.empty_like(like)
        torch.cat([g.reshape(-1) for g in tensors], out=self._after)
        return self._after if scale == 1.0 else self._after.div_(scale)

    def leave_subspace(self, residual: Tensor, lr: float, objective: Objective) -> None:
        """Note that the weights move by -lr * residual from where the kept gradient was made.

        The decay is that at the weights when the pair is asked for. One rate for all makes no
        difference in it: the residual is orthogonal to the subspace.
        """
        if self._after is not None and len(objective.decay.rates) > 1:
            objective.decay.add_(self._after, residual * (objective.sign * lr))

    def coordinates(
        self,
        problem: Problem,
        loss: Loss,
        gradient: list[Tensor],
        point: Tensor,
        objective: Objective,
        *,
        same_batch: bool,
        inner: bool,
    ) -> tuple[Tensor, Pair | None, Loss]:
        """Return c at the weights, the last step's pair if there is one, and the ranks' mean loss.

        One pass over the basis. ``inner``: loss and gradient are those of the accepted point
        already, of the same closure.
        """
        lists, factors = [gradient], [objective.factor]
        if same_batch and not inner and self._waiting is not None and self._after is not None:
            lists, factors = [gradient, [self._after]], [objective.factor, objective.sign]
        rows, mean = objective.coordinates(
            problem, None if inner else loss, lists, factors, [point]
        )
        return rows[0], self._pair(rows[-1]), loss if mean is None else mean

    def early(self, problem: Problem, point: Tensor, objective: Objective) -> Pair | None:
        """Return the pair of "same_batch" before the next step; bitwise what that would get."""
        if self._waiting is None or self._after is None:
            return None
        rows, _ = objective.coordinates(problem, None, [[self._after]], [objective.sign], [point])
        return self._pair(rows[0])

    def state(self) -> dict[str, Any]:
        """Return what the next step depends on, as copies."""
        names = ("previous_step", "previous_coordinates", "previous_predicted")
        values = (None, None, None) if self._waiting is None else self._waiting
        return {
            name: None if value is None else value.clone()
            for name, value in zip(names, values, strict=True)
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over checked entries of `state`."""
        s, c, predicted = (state[f"previous_{key}"] for key in ("step", "coordinates", "predicted"))
        self._waiting = None if s is None else (s, c, predicted)
        self._after = None

    def _pair(self, after: Tensor) -> Pair | None:
        if self._waiting is None:
            return None
        (s, before, predicted), self._waiting = self._waiting, None
        return Pair(s, after - before, predicted)
