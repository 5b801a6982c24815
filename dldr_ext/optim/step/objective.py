"""What a step minimises: the closure's loss as all ranks see it, and what is added to that."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ... import ops
from ...collectives.process_group import Ranks
from ...subspace.base import AffineSubspace
from ...tensors.parameters import gradients
from ..groups import Decay
from .closure import Evaluator, Loss


class Problem:
    """Losses and gradients in a subspace, of one process or as the mean over several ranks.

    Parameters
    ----------
    evaluator : Evaluator
    leaves : list of Tensor
        The parameters that hold the gradients.
    subspace : AffineSubspace
    ranks : Ranks or None
        None: one process.
    device : torch.device
        Of the d-vectors.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        leaves: list[Tensor],
        subspace: AffineSubspace,
        ranks: Ranks | None,
        device: torch.device,
    ) -> None:
        self.evaluator, self.subspace = evaluator, subspace
        self._leaves, self._ranks, self._device = leaves, ranks, device

    def gradients(self) -> list[Tensor]:
        """Return what the last evaluation left, on this rank."""
        return gradients(self._leaves)

    def mean(self, loss: Loss) -> Loss:
        """Return the mean of the ranks' losses, as a tensor; alone the loss itself."""
        if self._ranks is None:
            return loss
        local = torch.as_tensor(loss, dtype=torch.float64, device=self._ranks.device).detach()
        return self._ranks.sum_(local.reshape(1) / self._ranks.size, "the loss")[0]

    def project(
        self, loss: Loss | None, *lists: list[Tensor], same: int = 0
    ) -> tuple[Tensor, Loss | None]:
        """Project lists of tensors, c = P^T g of each: (len(lists), d) float64, in one pass.

        Of several ranks it is the mean's, where the last ``same`` lists are the same on all; the
        mean of the losses comes with it, in one sum of d + 1 numbers.
        """
        if self._ranks is None:
            c = self.subspace.project_many(lists)
        else:
            c = self.subspace.partial_sum(lists, self._ranks.size, same)
            terms = [c.reshape(-1)]
            if loss is not None:
                local = torch.as_tensor(loss, dtype=torch.float64, device=c.device).detach()
                terms.append(local.reshape(1) / self._ranks.size)
            sums = self._ranks.sum_(torch.cat(terms), "coordinates and loss")
            c = sums[: c.numel()].view(c.shape)
            loss = loss if loss is None else sums[-1]
        return c.to(device=self._device, dtype=torch.float64), loss

    def slope(self, gradient: list[Tensor], direction: Tensor) -> float:
        """Return the product of a gradient, the ranks' mean, with a flat direction."""
        if direction.numel():
            product = ops.project(direction.unsqueeze(0), gradient).to(torch.float64)
        else:  # a rank may have no weights
            product = torch.zeros(1, dtype=torch.float64, device=direction.device)
        if self._ranks is not None:
            product *= self.subspace.weight(self._ranks.size)
            self._ranks.sum_(product, "the slope")
        return float(product)

    def mean_gradient(self, gradient: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
        """Return the gradient as this rank needs it outside the subspace: a sum of n numbers."""
        if self._ranks is None or self.subspace.spans_ranks:
            return gradient
        flat = torch.cat([g.reshape(-1).to(dtype) for g in gradient])
        return [self._ranks.sum_(flat, "gradients").div_(self._ranks.size)]


@dataclass(frozen=True)
class Objective:
    """sign * f(w) + 1/2 sum_i decay_i |w_i|^2, from gradients of scale * f.

    Attributes
    ----------
    sign : float
        1, or -1 where f is maximised.
    decay : Decay
        It pulls towards 0 either way, as in torch.
    scale : float
        Of a gradient scaler, or 1.
    """

    sign: float = 1.0
    decay: Decay = Decay()  # noqa: RUF009  (frozen)
    scale: float = 1.0

    @property
    def factor(self) -> float:
        """Factor of a gradient as the closure leaves it."""
        return self.sign / self.scale

    @property
    def plain(self) -> bool:
        """Whether gradients are those of the objective as they are."""
        return self.factor == 1.0 and not self.decay

    def gradient(self, tensors: list[Tensor], point: Tensor) -> list[Tensor]:
        """Return the objective's gradient; one flat tensor unless it is ``tensors`` themselves."""
        if self.plain:
            return tensors
        flat = torch.cat([g.reshape(-1) for g in tensors], out=torch.empty_like(point))
        return [self.decay.add_(flat.mul_(self.factor), point)]

    def coordinates(
        self,
        problem: Problem,
        loss: Loss | None,
        gradients: list[list[Tensor]],
        factors: list[float],
        weights: list[Tensor],
    ) -> tuple[list[Tensor], Loss | None]:
        """Project gradients of the objective: the weights, too, in the same pass.

        Parameters
        ----------
        problem : Problem
        loss : Tensor, float or None
            Whose mean over the ranks comes with them.
        gradients : list of lists of Tensor
            As closures leave them.
        factors : list of float
            Of each: `factor`, or ``sign`` where the scale is out already.
        weights : list of Tensor
            Where they were made, or one flat vector.
        """
        parts = self.decay.parts(weights)
        decaying = [tensors for _, tensors in parts]
        rows, loss = problem.project(loss, *gradients, *decaying, same=len(parts))
        found = list(rows[: len(gradients)])
        for factor, row in zip(factors, found, strict=True):
            if factor != 1.0:
                row.mul_(factor)
            for (rate, _), projected in zip(parts, rows[len(gradients) :], strict=True):
                row.add_(rate * projected)
        return found, loss


class Line:
    """The objective along w + alpha u, less the decay at w, which is the same in every trial.

    Costs two dot products of flat vectors where there is weight decay, no pass over the basis.
    """

    def __init__(
        self, objective: Objective, subspace: AffineSubspace, point: Tensor, direction: Tensor
    ) -> None:
        self._objective = objective
        decay = objective.decay
        self._slope = decay.dot(subspace, point, direction)
        self._curvature = decay.dot(subspace, direction, direction)

    def loss(self, value: float, alpha: float) -> float:
        """Return the objective from what the closure returned at alpha."""
        return self._objective.sign * value + alpha * (self._slope + 0.5 * alpha * self._curvature)

    def slope(self, product: float, alpha: float) -> float:
        """Return the slope from the closure's gradient at alpha times u."""
        return self._objective.factor * product + self._slope + alpha * self._curvature
