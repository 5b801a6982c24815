"""What a step minimises, beside what the closure returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """sign * f(w) + decay / 2 |w|^2, from gradients of scale * f.

    Attributes
    ----------
    sign : float
        1, or -1 where f is maximised.
    decay : float
        Weight decay; it pulls towards 0 either way, as in torch.
    scale : float
        Of a gradient scaler, or 1.
    """

    sign: float = 1.0
    decay: float = 0.0
    scale: float = 1.0

    @property
    def factor(self) -> float:
        """Of a gradient as the closure leaves it."""
        return self.sign / self.scale

    @property
    def plain(self) -> bool:
        """Whether gradients are those of the objective as they are."""
        return self.factor == 1.0 and self.decay == 0.0

    def gradient(self, tensors: list[Tensor], point: Tensor) -> list[Tensor]:
        """The gradient of the objective; one flat tensor unless it is ``tensors`` themselves."""
        if self.plain:
            return tensors
        flat = torch.cat([g.reshape(-1) for g in tensors], out=torch.empty_like(point))
        return [flat.mul_(self.factor).add_(point, alpha=self.decay)]


class Line:
    """The objective along w + alpha u, less decay / 2 |w|^2, which is the same in every trial.

    Costs two dot products of flat vectors where there is weight decay, no pass over the basis.
    """

    def __init__(
        self,
        objective: Objective,
        point: Tensor,
        direction: Tensor,
        dot: Callable[[Tensor, Tensor], float],
    ) -> None:
        self._objective = objective
        decay = objective.decay
        self._slope = decay * dot(point, direction) if decay else 0.0
        self._curvature = decay * dot(direction, direction) if decay else 0.0

    def loss(self, raw: float, alpha: float) -> float:
        """From what the closure returned at alpha."""
        return self._objective.sign * raw + alpha * (self._slope + 0.5 * alpha * self._curvature)

    def slope(self, raw: float, alpha: float) -> float:
        """From the closure's gradient at alpha times u."""
        return self._objective.factor * raw + self._slope + alpha * self._curvature
