"""The last iterate with finite loss and gradient."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..status import Status


class RestorePoint:
    """The theta where loss and gradient were last finite, and what was seen finite since."""

    def __init__(self) -> None:
        self._theta: Tensor | None = None
        self._loss = self._gradient = False

    def see(self, theta: Tensor, loss: bool, gradient: bool) -> None:
        """Note which of loss and gradient have been seen finite at the current theta."""
        self._loss, self._gradient = loss, gradient
        if loss and gradient:
            self._theta = theta.clone()

    def see_gradient(self, theta: Tensor) -> None:
        """Note that the gradient at the current theta, seen later than the loss, is finite."""
        self.see(theta, self._loss, True)

    def instead(self, status: Status) -> Tensor | None:
        """Return the theta to go back to from a point that ended a step so; None: stay.

        Losses of different batches do not compare, so it is the best one known. A value that is not
        finite at a point where it has been seen finite is the batch's fault: the weights stay.
        """
        seen = {Status.NON_FINITE_LOSS: self._loss, Status.NON_FINITE_GRADIENT: self._gradient}
        return None if seen.get(status, True) else self._theta

    def forget(self) -> None:
        """Forget the way back."""
        self._theta, self._loss, self._gradient = None, False, False

    def state(self) -> dict[str, Any]:
        """Return all of it, as copies."""
        return {
            "good": None if self._theta is None else self._theta.clone(),
            "loss_seen": self._loss,
            "gradient_seen": self._gradient,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over checked entries of `state`."""
        self._theta = state["good"]
        self._loss, self._gradient = state["loss_seen"], state["gradient_seen"]
