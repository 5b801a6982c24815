"""The six ways to train that the demo compares.

All minimise the same objective, mean cross-entropy + weight_decay / 2 |w|^2, from the same initial
weights on the same training images, moved at random by a pixel or two in every batch:

* ``sgd``: SGD with momentum and a decaying learning rate, the full run;
* ``sgd_half``: the same run half way, where the recording of the trajectory ends;
* ``psgd``: P-SGD in the DLDR subspace of that first half, with the recipe of ``sgd``;
* ``pbfgs``: P-BFGS in the same subspace;
* ``one_pass``: Adam on its coordinates in the metric of the trajectory, for a single pass;
* ``random``: the same P-BFGS in a random subspace of the same dimension, as the control.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional

from .. import PBFGS, PSGD, InSubspace, Subspace, Trajectory
from ..batch_norm import reestimate_
from .data import Dataset
from .model import accuracy, build
from .recipe import Account, Recipe, batches, learning_rate, shifted, snapshot_steps

#: Called with the method at work and the share of it that is done, 0 to 1.
Progress = Callable[[str, float], None]
#: The methods, in the order of the tables, and what people call them.
NAMES = {
    "sgd": "SGD",
    "sgd_half": "SGD, first half",
    "psgd": "P-SGD",
    "pbfgs": "P-BFGS",
    "one_pass": "one pass of P-Adam",
    "random": "random subspace",
}
_ONE_PASS_LR = 0.3  # standard deviations of the snapshots along each direction
#: Formats of the basis.
DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn")


@dataclass
class Outcome:
    """A trained network, and what it took to train it."""

    method: str
    model: nn.Module  # weights and batch-norm statistics as they are tested
    passes: float
    seconds: float
    curve: list[tuple[float, float]]  # (passes, validation accuracy)
    path: list[tuple[float, float]] = field(default_factory=list)  # theta[:2] from step to step


def objective(model: nn.Module, images: Tensor, labels: Tensor, weight_decay: float) -> Tensor:
    """Return the mean cross-entropy + weight_decay / 2 |w|^2."""
    squares = torch.stack([p.square().sum() for p in model.parameters()])
    return functional.cross_entropy(model(images), labels) + weight_decay / 2 * squares.sum()


def counted_closure(
    model: nn.Module, images: Tensor, labels: Tensor, weight_decay: float, account: Account
) -> Callable[[], Tensor]:
    """Make a forward-only closure over one batch that puts every evaluation on the account."""

    def closure() -> Tensor:
        account.read(len(labels))
        return objective(model, images, labels, weight_decay)

    return closure


class Task:
    """Everything that the methods of one seed share.

    Parameters
    ----------
    data : Dataset
    recipe : Recipe
    seed : int
        Of the initial weights, the order of the batches and the random subspace.
    snapshots : int
        How many to record after the initial weights, evenly over the first half of SGD.
    progress : callable
        Called with the method at work and the share of it that is done, 0 to 1.
    """

    def __init__(
        self, data: Dataset, recipe: Recipe, seed: int, snapshots: int, progress: Progress
    ) -> None:
        self.data, self.recipe, self.seed = data, recipe, seed
        self.snapshots, self.progress = snapshots, progress

    def model(self) -> nn.Module:
        """Build the network at the initial weights."""
        return build(self.data.train.images.shape[-1], self.seed).to(self.device)

    @property
    def device(self) -> torch.device:
        """Where the images and the networks are."""
        return self.data.train.images.device

    def generator(self, stream: int, device: torch.device | str = "cpu") -> torch.Generator:
        """Return a generator of this seed; each use has a stream of its own."""
        return torch.Generator(device).manual_seed(10 * self.seed + stream)

    def validate(self, model: nn.Module) -> float:
        """Return the accuracy on the validation part."""
        return accuracy(model, self.data.validation.images, self.data.validation.labels)


def sgd(task: Task) -> tuple[Outcome, Outcome, Trajectory]:
    """Run SGD; return the full run, the run at half and the recorded first half."""
    task.progress("sgd", 0.0)
    recipe, train = task.recipe, task.data.train
    model = task.model()
    optimizer = torch.optim.SGD(
        model.parameters(), recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay
    )
    per_epoch, first_half = recipe.steps_per_epoch(len(train)), recipe.first_half(len(train))
    recorded = snapshot_steps(first_half, task.snapshots)
    trajectory = Trajectory(model.named_parameters(), 1 + len(recorded), dtype=torch.float32)
    trajectory.record()
    account = Account(len(train))
    curve = [(0.0, task.validate(model))]
    half: Outcome | None = None
    stream = batches(train, recipe.batch_size, recipe.shift, task.generator(0))
    total = per_epoch * recipe.epochs
    for step in range(1, total + 1):
        with account:
            images, labels = next(stream)
            account.read(len(labels))
            optimizer.param_groups[0]["lr"] = learning_rate(recipe, (step - 1) / total)
            optimizer.zero_grad()
            functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
            if step in recorded:
                trajectory.record()
        if step % per_epoch == 0 or step == first_half:
            curve.append((account.passes, task.validate(model)))
            task.progress("sgd", step / total)
        if step == first_half:
            half = Outcome(
                "sgd_half", deepcopy(model), account.passes, account.seconds, list(curve)
            )
    assert half is not None
    return Outcome("sgd", model, account.passes, account.seconds, curve), half, trajectory


def psgd(task: Task, subspace: Subspace) -> Outcome:
    """Run P-SGD from the initial weights: the recipe of `sgd`, in half the passes."""
    recipe = task.recipe
    run = _SubspaceRun(task, "psgd", subspace, recipe.budget - 1)
    optimizer = PSGD(run.model.parameters(), subspace, recipe.lr, recipe.momentum, metric=None)
    for images, labels in run.batches(recipe.batch_size, 1):
        if run.images_left < len(labels):
            return run.outcome()
        optimizer.param_groups[0]["lr"] = learning_rate(recipe, run.done)
        run.step(optimizer, images, labels)
    raise AssertionError("batches are endless")


def pbfgs(task: Task, subspace: Subspace, method: str = "pbfgs") -> Outcome:
    """Run P-BFGS from the initial weights, in the DLDR subspace or another."""
    run = _SubspaceRun(task, method, subspace, task.recipe.budget - 1)
    optimizer = PBFGS(run.model.parameters(), subspace, buffers=run.model)
    group = optimizer.param_groups[0]
    most = group["max_ls"]
    for images, labels in run.batches(task.recipe.pbfgs_batch_size, 2):
        # A step reads its batch for the gradient, for every trial and, unless the accepted trial
        # kept its graph, once more for the curvature. The search gets what the budget still pays.
        group["max_ls"] = min(most, run.images_left // len(labels) - 2)
        if group["max_ls"] < 1:
            return run.outcome()
        run.step(optimizer, images, labels)
    raise AssertionError("batches are endless")


def one_pass(task: Task, subspace: Subspace) -> Outcome:
    """Run one pass of Adam from the initial weights, its rate along a cosine."""
    run = _SubspaceRun(task, "one_pass", subspace, passes=1)
    optimizer = InSubspace(run.model.parameters(), subspace, torch.optim.Adam, lr=_ONE_PASS_LR)
    for images, labels in run.batches(task.recipe.batch_size, 4):
        if run.images_left < len(labels):
            return run.outcome()
        optimizer.param_groups[0]["lr"] = _ONE_PASS_LR * (1 + math.cos(math.pi * run.done)) / 2
        run.step(optimizer, images, labels)
    raise AssertionError("batches are endless")


def random(task: Task, dim: int, dtype: str = "float32") -> Outcome:
    """Run the control: the same P-BFGS in a random subspace of dimension ``dim``."""
    parameters, generator = task.model().parameters(), task.generator(3, task.device)
    subspace = Subspace.random(parameters, dim, generator=generator)
    return pbfgs(task, stored_as(subspace, dtype), "random")


def stored_as(subspace: Subspace, dtype: str) -> Subspace:
    """Return the subspace with its basis in one of `DTYPES`."""
    if dtype in ("int8", "float8_e4m3fn"):
        return subspace.quantize(dtype)
    return subspace.to(dtype=getattr(torch, dtype))


class _SubspaceRun:
    """Training of the coordinates for so many passes; one more is for batch norm."""

    def __init__(self, task: Task, method: str, subspace: Subspace, passes: int) -> None:
        self.task, self.method, self.subspace = task, method, subspace
        task.progress(method, 0.0)
        self.model = task.model()
        self.account = Account(len(task.data.train))
        self._allowed_images = passes * self.account.size
        self._path = [(0.0, 0.0)]
        # (passes, theta) to be validated later, about once a pass
        self._to_validate = [(0.0, torch.zeros(subspace.dim, device=subspace.device))]

    @property
    def images_left(self) -> int:
        """Images that may still be read."""
        return self._allowed_images - self.account.images

    @property
    def done(self) -> float:
        """Share of the budget spent, 0 to 1."""
        return self.account.images / self._allowed_images

    def batches(self, size: int, stream: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Draw training batches, endlessly; making them is on the clock."""
        task = self.task
        endless = batches(task.data.train, size, task.recipe.shift, task.generator(stream))
        while True:
            with self.account:
                batch = next(endless)
            yield batch

    def step(self, optimizer: PBFGS | PSGD | InSubspace, images: Tensor, labels: Tensor) -> None:
        """Take one step on one batch."""
        with self.account:
            optimizer.step(
                counted_closure(
                    self.model, images, labels, self.task.recipe.weight_decay, self.account
                )
            )
        theta = optimizer.theta
        x, y = (*theta[:2].tolist(), 0.0)[:2]
        self._path.append((x, y))
        if self.account.passes >= self._to_validate[-1][0] + 1:
            self._to_validate.append((self.account.passes, theta))
            self.task.progress(self.method, self.done)

    def outcome(self) -> Outcome:
        """Re-estimate the batch-norm statistics at the last weights; then draw the curve."""
        trained = self.account.passes
        with self.account:
            self.account.read(self._reestimate(self.model))
        curve = [
            self._validated(passes, theta)
            for passes, theta in self._to_validate
            if passes < trained
        ]
        curve.append((self.account.passes, self.task.validate(self.model)))
        self.task.progress(self.method, 1.0)
        return Outcome(
            self.method, self.model, self.account.passes, self.account.seconds, curve, self._path
        )

    def _validated(self, passes: float, theta: Tensor) -> tuple[float, float]:
        """Return the point of the curve if the run had ended at ``theta``: one pass later."""
        model = self.task.model()
        self.subspace.reconstruct_(model.parameters(), theta)
        read = self._reestimate(model)
        return passes + read / self.account.size, self.task.validate(model)

    def _reestimate(self, model: nn.Module) -> int:
        # As training sees them: statistics of images that stay in place are others.
        recipe = self.task.recipe
        images = shifted(self.task.data.train.images, recipe.shift, self.task.generator(5))
        reestimate_(model, images.split(recipe.norm_batch_size))
        return len(images)
