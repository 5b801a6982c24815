"""The metric that coordinates are measured in: plain, or the spread of the recorded trajectory."""

from __future__ import annotations

import logging
import math
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ..subspace.base import AffineSubspace
from .options import check_choice

_log = logging.getLogger("dldr_ext")
Metric = Literal["auto", "trajectory"] | None
# Rows whose lengths are off by more than this part are not a basis that rounding left so: int8
# leaves 0.01, float8 0.05.
_ORTHONORMAL = 0.2


class Start(NamedTuple):
    """What the snapshots say of where to go first.

    The gradient of a start on a plateau says nothing of how far to go, and little of the direction.

    Attributes
    ----------
    spread : Tensor, shape (d,), float64
        Their standard deviation along each direction.
    mean : Tensor, shape (d,), float64, or None
        Their mean, where it is known.
    """

    spread: Tensor
    mean: Tensor | None

    @property
    def reach(self) -> float:
        """How far they are from their mean, in standard deviations: the root mean square."""
        return math.sqrt(len(self.spread))

    def way(self, theta: Tensor) -> Tensor | None:
        """Return the way from theta to their mean, where that is a standard deviation or more."""
        if self.mean is None:
            return None
        way = self.mean.to(self.spread.device) - theta
        return way if float(torch.linalg.vector_norm(way / self.spread)) >= 1.0 else None


def trajectory_spread(subspace: AffineSubspace) -> tuple[Tensor | None, str]:
    """Return the spread (d,) that theta can be measured in, or None and why there is none.

    Costs nothing for a basis that is known to come from a trajectory, two passes over another.
    """
    spread = subspace.spread
    if spread is None:
        return None, "got one without; pass metric=None, or singular_values= to the Subspace"
    bad = (~(spread.isfinite() & (spread > 0.0))).nonzero()
    if len(bad):
        i = int(bad[0])
        sigma = float(subspace.singular_values[i])  # type: ignore[index]
        what = "pass metric=None, or leave the direction out"
        return None, f"all finite and > 0, got {sigma:g} for direction {i}; {what}"
    length = 1.0 if subspace.choice is not None else _row_length(subspace)
    if not abs(length - 1.0) <= _ORTHONORMAL:
        what = "pass metric=None, which measures theta in these rows"
        return None, f"and orthonormal rows, got rows of length {length:.3g} or so; {what}"
    return spread, ""


def check_metric(owner: str, metric: Any, subspace: AffineSubspace) -> Tensor | None:
    """Return the spread of the subspace if it can be a metric; refuse a metric that cannot be.

    Without a metric too: a state that is loaded later may bring one.
    """
    check_choice(owner, "metric", metric, ("auto", "trajectory", None))
    spread, why = trajectory_spread(subspace)
    if spread is None and metric is not None:
        expected = f"{owner}: metric: 'trajectory' expects a subspace with singular values, {why}"
        if metric == "trajectory":
            raise ValueError(expected)
        if subspace.singular_values is not None:
            _log.warning("%s; 'auto' is None here", expected)
    return spread


def _row_length(subspace: AffineSubspace) -> float:
    """Return the length of the row of P that is furthest from 1, if all are orthogonal."""
    theta = torch.ones(subspace.dim, device=subspace.device, dtype=subspace.coordinate_dtype)
    point = subspace.reconstruct(theta).sub_(subspace.origin)
    squares = subspace.project([point])
    return float(squares[(squares - 1.0).abs().argmax()].clamp_min(0.0).sqrt())
