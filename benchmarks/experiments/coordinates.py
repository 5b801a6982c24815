"""Training of the coordinates of a subspace within a budget of passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dldr_ext import PBFGS, PSGD, InSubspace, Subspace

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
        decay: float = 0.0,
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

    @property
    def left(self) -> int:
        """Items that may still be read."""
        return self._allowed - self.account.images

    def train(
        self,
        optimizer: PBFGS | PSGD | InSubspace,
        size: int,
        stream: int,
        ready: Callable[[int], bool],
        after: Callable[[], object] = lambda: None,
    ) -> Outcome:
        """Step on batches until the budget is spent.

        The outcome is at the last coordinates or the mean of the last ones; batch-norm statistics
        are averaged anew there. A run that was killed goes on where it was last validated.

        Parameters
        ----------
        size, stream : of the batches: see `Task.batches`
        ready : called with the items of the next batch; sets the optimizer's options for a step on
            it, or returns False if there is no budget for one
        after : called after each step
        """
        batches = self.task.batches(size, stream)
        self._resume(optimizer, batches)
        while True:
            inputs, labels = next(batches)
            if not ready(len(labels)):
                break
            self._step(optimizer, inputs, labels)
            after()
            if not self._curve or self.account.passes >= self._curve[-1][0] + 1:
                self.task.renew_norms(self.model, 500)  # training has no use for the statistics
                self._note(self.task.validate(self.model))
                state = partial(self._state, optimizer, batches)
                self.task.progress.save("coordinates", state)
        with self.account:
            if self._summed:
                mean = (self._sum / self._summed).to(self.task.device)
                self.subspace.reconstruct_(self.model.parameters(), mean)
            self.account.read(self.task.renew_norms(self.model))
        self._note(self.task.validate(self.model))
        return Outcome(self.model, self.account, self.sampling, self._curve, self._best[1])

    def _step(self, optimizer: PBFGS | PSGD | InSubspace, inputs: Tensor, labels: Tensor) -> None:
        closure = counted_closure(self.model, inputs, labels, self.decay, self.account)
        with self.account:
            optimizer.step(closure)
            if self.averages and self.done >= 1 - self.averages:
                self._sum += optimizer.theta.cpu()
                self._summed += 1

    def _note(self, accuracy: float) -> None:
        self._curve.append((self.account.passes, accuracy))
        if accuracy > self._best[0]:
            self._best = accuracy, copied(self.model)

    def _state(self, optimizer: Any, batches: Any) -> dict[str, Any]:
        return {
            "optimizer": optimizer.state_dict(),
            "model": self.model.state_dict(),
            "taken": batches.taken,
            "account": vars(self.account),
            "curve": self._curve,
            "best": self._best,
            "sum": (self._sum, self._summed),
        }

    def _resume(self, optimizer: Any, batches: Any) -> None:
        saved = self.task.progress.load("coordinates")
        if saved is None:
            return
        self.model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])  # writes the weights, which are its own
        batches.taken = saved["taken"]
        self.account.__dict__.update(saved["account"])
        self._curve, self._best = saved["curve"], saved["best"]
        self._sum, self._summed = saved["sum"]


def run_pbfgs(run: Run, batch: int, start: Tensor | None = None, **options: Any) -> Outcome:
    """P-BFGS on batches of about `batch` items, 0 for all, until the budget is spent.

    Parameters
    ----------
    start : coordinates (d,) to start from instead of the subspace's origin
    options : of `PBFGS`
    """
    model = run.model
    optimizer = PBFGS(model.parameters(), run.subspace, buffers=model, theta0=start, **options)
    group = optimizer.param_groups[0]
    most, count = group["max_ls"], {"steps": 0, "failed_steps": 0}

    def ready(items: int) -> bool:
        # A step reads its batch for the gradient, for every trial and, unless the accepted trial
        # kept its graph, once more for the curvature. The search gets what the budget still pays.
        optimizer.param_groups[0]["max_ls"] = min(most, run.left // items - 2)
        return optimizer.param_groups[0]["max_ls"] >= 1

    def after() -> None:
        count["steps"] += 1
        count["failed_steps"] += not optimizer.status.moved

    outcome = run.train(optimizer, batch, 2, ready, after)
    outcome.notes |= count
    return outcome


def run_first_order(
    run: Run, optimizer: PSGD | InSubspace, batch: int, rate: Callable[[float], float]
) -> Outcome:
    """Steps at a rate that depends on the share of the budget that is spent."""

    def ready(items: int) -> bool:
        optimizer.param_groups[0]["lr"] = rate(run.done)
        return run.left >= items

    return run.train(optimizer, batch, 1, ready)
