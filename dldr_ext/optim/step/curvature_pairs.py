"""The last step and the change of the gradient along it, from which B learns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .objective import Objective

Pair = tuple[Tensor, Tensor, Tensor]  # s, y, B^-1 s
Project = Callable[..., Tensor]  # lists of tensors -> (len(lists), d) float64; see `_projected`


class Pairs:
    """A step s, and y once both of its gradients are there.

    With "same_batch" the second is the flat gradient at the accepted point, projected beside the
    next step's, by when B is needed; with "consecutive" the next step's own gradient is all there
    is.
    """

    def __init__(self) -> None:
        self._waiting: Pair | None = None  # s, c before it, B^-1 s
        self._other: Tensor | None = None  # the flat gradient, without its scale

    def put(self, alpha: float, p: Tensor, c: Tensor) -> None:
        """A step alpha p = -alpha B c was taken, so that B^-1 s = -alpha c."""
        self._waiting = alpha * p, c, -alpha * c

    def drop(self) -> None:
        """Forgets the step."""
        self._waiting = None

    def keep(self, tensors: list[Tensor], like: Tensor, scale: float) -> Tensor:
        """A flat copy of gradients, without their scale: the other gradient of a pair."""
        if self._other is None:
            self._other = torch.empty_like(like)
        torch.cat([g.reshape(-1) for g in tensors], out=self._other)
        return self._other if scale == 1.0 else self._other.div_(scale)

    def coordinates(
        self,
        project: Project,
        gradient: list[Tensor],
        point: Tensor,
        objective: Objective,
        curvature: str,
        inner: bool,
    ) -> tuple[Tensor, Pair | None]:
        """c at the weights, and the last step's pair if there is one. One pass over the basis.

        ``inner``: the gradient is that of the accepted point already, of the same closure.
        """
        kept = self._other if self._waiting is not None and not inner else None
        if kept is None or curvature == "consecutive":
            (c,) = _of_objective(project, [gradient], [objective.factor], point, objective)
            return c, self._with(c)
        factors = [objective.factor, objective.sign]
        c, other = _of_objective(project, [gradient, [kept]], factors, point, objective)
        return c, self._with(other)

    def early(self, project: Project, point: Tensor, objective: Objective) -> Pair | None:
        """The pair of "same_batch" before the next step; then bitwise what that would get."""
        if self._waiting is None or self._other is None:
            return None
        return self._with(
            *_of_objective(project, [[self._other]], [objective.sign], point, objective)
        )

    def state(self) -> dict[str, Any]:
        """What the next step depends on, as copies."""
        s, c, hs = (None, None, None) if self._waiting is None else self._waiting
        state = {
            "previous_step": s,
            "previous_coordinates": c,
            "previous_believed": hs,
        }
        return {key: None if value is None else value.clone() for key, value in state.items()}

    def load(self, state: dict[str, Any]) -> None:
        """Takes over checked entries of `state`."""
        s, c, hs = (state[f"previous_{key}"] for key in ("step", "coordinates", "believed"))
        self._waiting = None if s is None else (s, c, hs)
        self._other = None

    def _with(self, after: Tensor) -> Pair | None:
        if self._waiting is None:
            return None
        (s, before, hs), self._waiting = self._waiting, None
        return s, after - before, hs


def _of_objective(
    project: Project,
    lists: list[list[Tensor]],
    factors: list[float],
    point: Tensor,
    objective: Objective,
) -> list[Tensor]:
    """Coordinates of gradients of the objective; the weights are projected in the same pass."""
    if objective.decay == 0.0:
        rows = list(project(*lists))
    else:
        *rows, weights = project(*lists, [point], same=1)
    for f, row in zip(factors, rows, strict=True):
        if f != 1.0:
            row.mul_(f)
        if objective.decay != 0.0:
            row.add_(objective.decay * weights)
    return rows
