"""The iterate: the flat point that the weights stand at, and the line that they move along."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...subspace.base import AffineSubspace

# Accepted steps after which the flat point is computed anew from theta: rounding in its sums
# would let it leave the subspace slowly.
_ANCHOR_EVERY = 32


class Iterate:
    """Moves weights along u = P p, and outside the subspace too if asked for (P+-BFGS).

    Attributes
    ----------
    point : Tensor, shape (n,)
        origin + P theta, from which the weights are written.
    direction : Tensor, shape (n,)
        u of the last `aim`.
    """

    def __init__(self, subspace: AffineSubspace, params: list[Tensor], point: Tensor) -> None:
        self._subspace, self._params = subspace, params
        self.point = point
        self.direction = torch.empty_like(point)
        self._alpha = 0.0  # of the weights
        self._since_anchor = 0
        # P+-BFGS: momentum outside the subspace, where it has carried the origin, and how far of
        # that the last step went.
        self._residual: Tensor | None = None
        self._moved_origin: Tensor | None = None
        self._last_shift = 0.0

    @property
    def origin(self) -> Tensor:
        """The point that theta = 0 stands for now."""
        return self._subspace.origin if self._moved_origin is None else self._moved_origin

    def aim(self, p: Tensor) -> None:
        """Set u = P p: one pass over the basis."""
        self._subspace.combine_(self.direction, p)

    def aim_outside(self, p: Tensor, c: Tensor, gradient: list[Tensor], momentum: float) -> Tensor:
        """Set u = P p, and return the momentum of g - P c as it is if the step is taken."""
        self.direction, residual = self._subspace.combine_residual(p, c, gradient)
        return residual if self._residual is None else residual.add_(self._residual, alpha=momentum)

    def trial(self, alpha: float) -> None:
        """Write point + alpha u into the weights."""
        self._alpha = alpha
        _trial(self._params, self.point, self.direction, alpha)

    def written(self) -> Tensor:
        """Return the flat weights that were written last."""
        if self._alpha == 0.0:
            return self.point
        flat = torch.empty_like(self.point)
        _trial([flat], self.point, self.direction, self._alpha)
        return flat

    def put_back(self) -> None:
        """Write the point into the weights."""
        self._alpha = 0.0
        # The point times zero adds nothing; the direction may hold an infinity, which would.
        _trial(self._params, self.point, self.point, 0.0)

    def advance(self, alpha: float, theta: Tensor) -> None:
        """Move the point to the weights that a trial at alpha left; theta has moved already."""
        _trial([self.point], self.point, self.direction, alpha)
        self._alpha = 0.0
        self._since_anchor += 1
        if self._since_anchor >= _ANCHOR_EVERY:
            self._anchor(theta)

    def leave_subspace(self, residual: Tensor, lr: float) -> None:
        """Move point, origin and weights by -lr * residual."""
        self._residual, self._last_shift = residual, lr
        self._shift(-lr)
        self.put_back()

    def forget_residual(self) -> None:
        """Go on without momentum."""
        self._residual = None

    def retreat(self, theta: Tensor) -> None:
        """Take the last step back: to origin + P theta with the origin as it was before."""
        if self._residual is not None and self._last_shift:
            self._shift(self._last_shift)
        self._anchor(theta)

    def stay_outside(self, theta: Tensor, weights: Tensor) -> None:
        """Take over weights that are not origin + P theta, by moving the origin."""
        self.point = weights
        self._moved_origin = torch.empty_like(weights)
        self._subspace.combine_(self._moved_origin, -theta, weights)
        self._residual = None

    def state(self) -> dict[str, Any]:
        """Return what the next step depends on, as copies."""

        def copy(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.clone()

        return {
            "point": self.point.clone(),
            "since_anchor": self._since_anchor,
            "residual": copy(self._residual),
            "moved_origin": copy(self._moved_origin),
            "last_shift": self._last_shift,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over checked entries of `state` and write the weights."""
        self.point, self._since_anchor = state["point"], state["since_anchor"]
        self._residual, self._moved_origin = state["residual"], state["moved_origin"]
        self._last_shift = state["last_shift"]
        self.put_back()

    def _shift(self, alpha: float) -> None:
        if self._moved_origin is None:
            self._moved_origin = self._subspace.origin.to(self.point.dtype, copy=True)
        assert self._residual is not None
        for flat in (self.point, self._moved_origin):
            flat.add_(self._residual, alpha=alpha)

    def _anchor(self, theta: Tensor) -> None:
        self._since_anchor = 0
        self._subspace.combine_(self.point, theta, self.origin)
        self.put_back()


def _trial(params: list[Tensor], point: Tensor, direction: Tensor, alpha: float) -> None:
    """Call `ops.trial_`; of several ranks one may have no weights."""
    if point.numel():
        ops.trial_(params, point, direction, alpha)
