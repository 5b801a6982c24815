"""Training of the coordinates of a subspace within a budget of passes."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dldr_ext import PBFGS, PSGD, Subspace

from .training import Account, Outcome, Task, copied, counted_closure, has_norms


def principal(weights: Tensor, dim: int) -> Subspace:
    """The first `dim` principal directions of raw weights (T, n), or the T - 1 that there are."""
    return Subspace.from_snapshots(weights, min(dim, len(weights) - 1))


class Run:
    """Training of the coordinates within a budget, one pass of which is kept for batch norm.

    Parameters
    ----------
    passes : the budget
    sampling : passes that the subspace has cost
    decay : weight decay in the objective
    averages : share of the budget, its end, over which the coordinates are averaged for the outcome
    """

    def __init__(
        self,
        task: Task,
        subspace: Subspace,
        passes: float,
        sampling: float,
        decay: float,
        averages: float = 0.0,
    ) -> None:
        self.task, self.subspace, self.sampling = task, subspace, sampling
        self.decay, self.averages = decay, averages
        self.model = task.model()
        self.account = Account(len(task.problem.train))
        self._allowed = math.floor((passes - has_norms(self.model)) * self.account.size)
        self._curve: list[tuple[float, float]] = []
        self._best: tuple[float, dict[str, Tensor] | None] = (-1.0, None)
        self._sum, self._summed = torch.zeros(subspace.dim), 0

    @property
    def done(self) -> float:
        """Share of the budget spent."""
        return self.account.images / self._allowed

    def step(self, optimizer: PBFGS | PSGD, inputs: Tensor, labels: Tensor) -> None:
        """One step on one batch; about once per pass the model is validated, off the clock."""
        closure = counted_closure(self.model, inputs, labels, self.decay, self.account)
        with self.account:
            optimizer.step(closure)
            if self.averages and self.done >= 1 - self.averages:
                self._sum += optimizer.theta
                self._summed += 1
        if not self._curve or self.account.passes >= self._curve[-1][0] + 1:
            self._validate()

    def outcome(self) -> Outcome:
        """At the last coordinates or the mean of the last ones, as the settings have it; batch-norm
        statistics are averaged anew there."""
        with self.account:
            if self._summed:
                self.subspace.reconstruct_(self.model.parameters(), self._sum / self._summed)
            self.account.read(self.task.renew_norms(self.model))
        self._note(self.task.validate(self.model))
        return Outcome(self.model, self.account, self.sampling, self._curve, self._best[1])

    @property
    def left(self) -> int:
        """Items that may still be read."""
        return self._allowed - self.account.images

    def _validate(self) -> None:
        self.task.renew_norms(self.model, 500)  # training has no use for the statistics
        self._note(self.task.validate(self.model))

    def _note(self, accuracy: float) -> None:
        self._curve.append((self.account.passes, accuracy))
        if accuracy > self._best[0]:
            self._best = accuracy, copied(self.model)


def run_pbfgs(run: Run, batch: int, start: Tensor | None = None) -> Outcome:
    """P-BFGS on batches of about `batch` items, 0 for all, until the budget is spent.

    Parameters
    ----------
    start : coordinates (d,) to start from instead of the subspace's origin
    """
    optimizer = PBFGS(run.model.parameters(), run.subspace, buffers=run.model, theta0=start)
    group = optimizer.param_groups[0]
    most, steps, failed = group["max_ls"], 0, 0
    for inputs, labels in run.task.batches(batch, 2):
        # A step reads its batch for the gradient, for every trial and, unless the accepted trial
        # kept its graph, once more for the curvature. The search gets what the budget still pays.
        group["max_ls"] = min(most, run.left // len(labels) - 2)
        if group["max_ls"] < 1:
            break
        run.step(optimizer, inputs, labels)
        steps += 1
        failed += not optimizer.status.moved
    outcome = run.outcome()
    outcome.notes |= {"steps": steps, "failed_steps": failed}
    return outcome


def flat(model: nn.Module) -> Tensor:
    """A copy of the parameters as one vector (n,)."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@torch.no_grad()
def write(model: nn.Module, vector: Tensor) -> None:
    """Sets the parameters to the pieces of a vector (n,)."""
    parameters = list(model.parameters())
    for p, piece in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
        p.copy_(piece.view(p.shape))
