"""The scale of float16 gradients, kept by the optimizer."""

from __future__ import annotations

from typing import Any

import torch

from ..status import Status


class ScaleKeeper:
    """A gradient scaler, read once a step, its scale changed as ``GradScaler.update`` would.

    Attributes
    ----------
    scaler : torch.amp.GradScaler or None
        None if there is none, or a disabled one.
    value : float
        Its scale in the current step; 1 without one.
    finite_steps : int
        Steps without an overflow since the scale changed.
    """

    def __init__(self, scaler: torch.amp.GradScaler | None) -> None:
        if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
            raise TypeError(
                "PBFGS: grad_scaler: expected a torch.amp.GradScaler or None, got "
                f"{type(scaler).__name__}"
            )
        self.scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.value = 1.0
        self.finite_steps = 0

    def begin(self) -> None:
        """Read the scale of this step."""
        if self.scaler is not None:
            self.value = self.scaler.get_scale()

    def overflowed(self, status: Status) -> bool:
        """Whether a smaller scale might help."""
        bad = status is Status.NON_FINITE_GRADIENT
        return bad and self.scaler is not None and self.value > 1.0

    def end(self, status: Status) -> None:
        """Set the scale of the next step."""
        if self.scaler is None:
            return
        if self.overflowed(status):
            self._set(self.scaler.get_backoff_factor())
        else:
            self.finite_steps += 1
            if self.finite_steps >= self.scaler.get_growth_interval():
                self._set(self.scaler.get_growth_factor())

    def state(self) -> dict[str, Any]:
        """Return what `GradScaler.state_dict` does not hold."""
        return {"finite_steps": self.finite_steps}

    def load(self, state: dict[str, Any]) -> None:
        """Take over checked entries of `state`."""
        self.finite_steps = state["finite_steps"]

    def _set(self, factor: float) -> None:
        assert self.scaler is not None
        self.scaler.update(self.value * factor)
        self.finite_steps = 0
