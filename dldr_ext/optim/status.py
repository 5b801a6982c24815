"""How a step of an optimizer ended."""

from __future__ import annotations

import enum

__all__ = ["Status"]


class Status(enum.Enum):
    """How the last ``step`` ended; read it as ``optimizer.status``.

    Whatever is not `moved` left the weights bitwise as they were. Of a step of several iterations
    (``max_iter``) it is how the last of them ended.
    """

    INITIAL = "no step has been taken yet"
    ACCEPTED = "the step was taken"
    DECREASED = (
        "the step was taken: the strong Wolfe search ran out of trials, and its best point with "
        "sufficient decrease was kept"
    )
    RESTORED = (
        "the loss or a gradient at the current weights is NaN or infinite: weights put back to the "
        "last point where both were finite, B reset"
    )
    CONVERGED = "the gradient in the subspace is zero, or within tolerance_grad: nothing to do"
    LINE_SEARCH_FAILED = "no trial decreased the loss enough: weights kept, B reset"
    NON_FINITE_LOSS = "the loss at the current weights is NaN or infinite: weights kept, B reset"
    NON_FINITE_GRADIENT = (
        "a gradient is NaN or infinite: weights kept, B reset (with a gradient scaler: B kept, the "
        "scale made smaller)"
    )
    NO_GRADIENT = "no parameter has a gradient: weights kept"

    @property
    def moved(self) -> bool:
        """Whether the step changed the weights."""
        return self in (Status.ACCEPTED, Status.DECREASED, Status.RESTORED)
