"""The ways in which a step of an optimizer ends, and the record of it."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Any, Literal


class Status(str, enum.Enum):
    """The way in which the last ``step`` ended; read it as ``optimizer.status``.

    Whatever is not `moved` left the weights bitwise as they were. Of a step of several iterations
    (``max_iter``) it is how the last of them ended. As a string it is its name, in JSON too; the
    value is a sentence.

    Examples
    --------
    >>> from dldr_ext import Status
    >>> Status.CONVERGED.moved, Status.ACCEPTED.moved
    (False, True)
    >>> print(Status.LINE_SEARCH_FAILED)
    LINE_SEARCH_FAILED
    >>> print(Status.LINE_SEARCH_FAILED.value)
    no trial decreased the loss enough: weights kept, H reset
    """

    INITIAL = "INITIAL", "no step has been taken yet"
    ACCEPTED = "ACCEPTED", "the step was taken"
    DECREASED = (
        "DECREASED",
        "the step was taken: the strong Wolfe search ran out of trials, and its best point with "
        "sufficient decrease was kept",
    )
    RESTORED = (
        "RESTORED",
        "the loss or a gradient at the current weights is NaN or infinite: weights put back to the "
        "last point where both were finite, H reset",
    )
    CONVERGED = (
        "CONVERGED",
        "the gradient in the subspace is zero, or within tolerance_grad: nothing to do",
    )
    LINE_SEARCH_FAILED = (
        "LINE_SEARCH_FAILED",
        "no trial decreased the loss enough: weights kept, H reset",
    )
    NON_FINITE_LOSS = (
        "NON_FINITE_LOSS",
        "the loss at the current weights is NaN or infinite: weights kept, H reset",
    )
    NON_FINITE_GRADIENT = (
        "NON_FINITE_GRADIENT",
        "a gradient is NaN or infinite: weights kept, H reset (with a gradient scaler: H kept, the "
        "scale made smaller)",
    )
    NO_GRADIENT = "NO_GRADIENT", "no parameter has a gradient: weights kept"

    def __new__(cls, name: str, sentence: str) -> Status:  # noqa: D102
        status = str.__new__(cls, name)
        status._value_ = sentence
        return status

    # The same in every Python: those of enum have changed.
    def __str__(self) -> str:
        return self.name

    def __format__(self, format_spec: str) -> str:
        return format(self.name, format_spec)

    @property
    def moved(self) -> bool:
        """Whether the step changed the weights."""
        return self in (Status.ACCEPTED, Status.DECREASED, Status.RESTORED)


Curvature = Literal["none", "updated", "damped", "skipped", "reset"]


@dataclass
class Iteration:
    """What is known of an iteration so far: the entries of its `StepRecord`."""

    loss: float = math.nan
    status: Status = Status.INITIAL
    loss_after: float = math.nan
    trials: int = 0
    alpha: float = 0.0
    step_length: float = 0.0
    gradient_norm: float = math.nan
    condition: float = math.nan
    curvature: Curvature = "none"


@dataclass(frozen=True)
class StepRecord:
    """An entry of ``optimizer.history``; its ``str`` is a line for a progress bar.

    Attributes
    ----------
    step : int
        Number of the iteration, from 1.
    loss : float
        What the closure returned, before the step. NaN for a step without a closure.
    status : Status
        How the iteration ended.
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
        with Powell's damping), "skipped" (nothing in it could be trusted), "reset" (H became
        singular and was set back), "none" (there was no pair).
    condition : float
        Estimate of the condition number of H, from below; NaN where there is none.
    loss_after : float
        What the closure returned at the accepted point; NaN where nothing was evaluated there.

    Examples
    --------
    >>> import json
    >>> from dldr_ext import Status, StepRecord
    >>> record = StepRecord(7, 0.25, Status.ACCEPTED, step_length=1.5, trials=1)
    >>> print(record)
    step 7: loss 0.25, 1 trial, step length 1.5, accepted
    >>> json.dumps(record.to_dict())[:70]
    '{"step": 7, "loss": 0.25, "status": "ACCEPTED", "gradient_norm": null,'
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

    def to_dict(self) -> dict[str, Any]:
        """Return the entries as JSON has them.

        Returns
        -------
        dict
            The status by its name, None for NaN and infinity.
        """
        return {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in (vars(self) | {"status": self.status.name}).items()
        }

    def __str__(self) -> str:
        return (
            f"step {self.step}: loss {self.loss:.6g}, {self.trials} "
            f"trial{'' if self.trials == 1 else 's'}, step length {self.step_length:.3g}, "
            f"{self.status.name.lower()}"
        )
