"""What happened in a step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from .status import Status

__all__ = ["Curvature", "StepRecord"]

Curvature = Literal["none", "updated", "damped", "skipped", "reset"]


@dataclass(frozen=True)
class StepRecord:
    """One entry of ``optimizer.history``. Its ``str`` is a line for a progress bar.

    Attributes
    ----------
    step : int
        Number of the iteration, from 1.
    loss : float
        What the closure returned, before the step. NaN for a step without a closure.
    status : Status
    gradient_norm : float
        |c|, the gradient of the objective in the subspace. NaN where it was not computed.
    alpha : float
        Accepted step along the direction; 0 if there was none.
    step_length : float
        Distance that theta was moved, |alpha p|, and the weights with it.
    trials : int
        Evaluations of the line search.
    curvature : str
        What became of the last step's pair (s, y) before this step: "updated", "damped" (updated
        with Powell's damping), "skipped" (nothing in it could be trusted), "reset" (B became
        singular and was set back), "none" (there was no pair).
    condition : float
        Estimate of the condition number of B, from below; NaN where the rule has none to offer.
    loss_after : float
        What the closure returned at the accepted point; NaN where nothing was evaluated there.
    """

    step: int
    loss: float
    status: Status
    gradient_norm: float = math.nan
    alpha: float = 0.0
    step_length: float = 0.0
    trials: int = 0
    curvature: Curvature = "none"
    condition: float = math.nan
    loss_after: float = math.nan

    def __str__(self) -> str:
        return (
            f"step {self.step}: loss {self.loss:.6g}, {self.trials} "
            f"trial{'' if self.trials == 1 else 's'}, step length {self.step_length:.3g}, "
            f"{self.status.name.lower()}"
        )
