"""The last point that was fine."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..status import Status
from . import policy


class GoodPoint:
    """theta where loss and gradient were last finite, and what was seen finite since."""

    def __init__(self) -> None:
        self._theta: Tensor | None = None
        self._loss = self._gradient = False

    def see(self, theta: Tensor, loss: bool, gradient: bool) -> None:
        """Loss or gradient, or both, were looked at and are finite at the current theta."""
        self._loss, self._gradient = loss, gradient
        if loss and gradient:
            self._theta = theta.clone()

    def see_gradient(self, theta: Tensor) -> None:
        """The gradient at the current theta was looked at later than the loss, and is finite."""
        self.see(theta, self._loss, True)

    def instead(self, status: Status) -> Tensor | None:
        """Where to return to from a point that ended a step so; None: stay."""
        back = policy.goes_back(status, self._loss, self._gradient)
        return self._theta if back else None

    def forget(self) -> None:
        """There is no way back from here on."""
        self._theta, self._loss, self._gradient = None, False, False

    def state(self) -> dict[str, Any]:
        """All of it, as copies."""
        return {
            "good": None if self._theta is None else self._theta.clone(),
            "loss_seen": self._loss,
            "gradient_seen": self._gradient,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Takes over checked entries of `state`."""
        self._theta = state["good"]
        self._loss, self._gradient = state["loss_seen"], state["gradient_seen"]
