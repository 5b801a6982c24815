"""What all methods share: the task of one seed, the account of reads, SGD and what it leaves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dldr_ext import Trajectory
from dldr_ext.demo import recipe

from . import networks
from .data import Part, Problem
from .settings import Settings

_EVALUATED = 500  # items a forward pass without gradients
Batches = Iterator[tuple[Tensor, Tensor]]


class Account(recipe.Account):
    """The demo's account, of images or other items, and the time of the process.

    `cpu_seconds` is the process's own and stays right when it is stopped for a while or shares its
    core.
    """

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.cpu_seconds = 0.0

    def copy(self) -> Account:
        """The account as it stands now."""
        other = Account(self.size)
        other.__dict__.update(self.__dict__)
        return other

    def part(self, share: float) -> Account:
        """The first part of a run whose speed was even."""
        other = Account(self.size)
        other.images = round(share * self.images)
        other.seconds, other.cpu_seconds = share * self.seconds, share * self.cpu_seconds
        return other

    def __enter__(self) -> Account:
        self._cpu_since = time.process_time()
        super().__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.cpu_seconds += time.process_time() - self._cpu_since


class Task:
    """A problem, perhaps with wrong labels, a network and settings, for one seed."""

    def __init__(
        self, problem: Problem, network: str, settings: Settings, seed: int, noise: float = 0.0
    ) -> None:
        self.network, self.settings, self.seed, self.noise = network, settings, seed, noise
        self.problem = problem.with_noise(noise, self.generator(9)) if noise else problem

    def model(self) -> nn.Module:
        """The network at the initial weights."""
        return networks.build(self.network, self.problem, self.seed)

    def generator(self, stream: int) -> torch.Generator:
        """Random numbers of this seed; one stream for each use."""
        return torch.Generator().manual_seed(100 * self.seed + stream)

    def batches(self, size: int, stream: int) -> Batches:
        """Endless batches of about `size` items, 0 for all, in a new order for each pass.

        Those of one pass are equally large up to one item and hold every item once.
        """
        part, augment = self.problem.train, self.problem.augment
        generator = self.generator(stream)
        count = max(1, round(len(part) / size)) if size else 1
        while True:
            if count == 1 and augment is None:
                yield part.inputs, part.labels
                continue
            order = torch.randperm(len(part), generator=generator)
            for index in order.tensor_split(count):
                inputs = part.inputs[index]
                yield (augment(inputs, generator) if augment else inputs), part.labels[index]

    def renew_norms(self, model: nn.Module, items: int | None = None) -> int:
        """Averages batch-norm statistics anew over the training part, or its first `items`.

        Returns how many items were read: 0 without batch norm.
        """
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        if not norms:
            return 0
        inputs = self.problem.train.inputs[:items]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
        model.train()
        with torch.no_grad():
            for batch in inputs.split(_EVALUATED):
                model(batch)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
        return len(inputs)

    def validate(self, model: nn.Module) -> float:
        """Accuracy on the validation part."""
        return evaluate(model, self.problem.validation)[0]


def has_norms(model: nn.Module) -> bool:
    """Whether there are batch-norm statistics to keep up."""
    return any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


def counted_closure(
    model: nn.Module, inputs: Tensor, labels: Tensor, decay: float, account: Account
) -> Callable[[], Tensor]:
    """A forward-only closure over one batch, mean cross-entropy + decay / 2 |w|^2; every call goes
    on the account."""

    def closure() -> Tensor:
        account.read(len(labels))
        loss = cross_entropy(model, inputs, labels)
        if decay:
            squares = torch.stack([p.square().sum() for p in model.parameters()])
            loss = loss + decay / 2 * squares.sum()
        return loss

    return closure


def cross_entropy(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    """Mean over all labels, those of the characters of a sequence too."""
    return functional.cross_entropy(model(inputs).flatten(0, -2), labels.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, part: Part) -> tuple[float, float]:
    """Accuracy and mean cross-entropy in eval mode; leaves the model in train mode."""
    model.eval()
    correct, loss = 0, 0.0
    for inputs, labels in zip(
        part.inputs.split(_EVALUATED), part.labels.split(_EVALUATED), strict=True
    ):
        logits, flat = model(inputs).flatten(0, -2), labels.flatten()
        correct += int((logits.argmax(1) == flat).sum())
        loss += float(functional.cross_entropy(logits, flat, reduction="sum"))
    model.train()
    return correct / part.labels.numel(), loss / part.labels.numel()


@dataclass
class Outcome:
    """What a method came to: the model to be tested, and at what cost."""

    model: nn.Module
    account: Account
    sampling: float = 0.0  # passes that had to be read before
    curve: list[tuple[float, float]] = field(default_factory=list)  # (passes, validation accuracy)
    best: dict[str, Tensor] | None = None  # state of the model where the curve was highest
    notes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Lead:
    """What a full run of SGD leaves behind for the others to start from."""

    trajectory: Trajectory  # initial weights, then the sampled epochs
    states: dict[str, dict[str, Tensor]]  # of the model: "final", "half", "best"
    momenta: dict[str, Tensor]  # of SGD at half of the run, by parameter
    accounts: dict[str, Account]  # "final", "half"
    curve: list[tuple[float, float]]
    snapshots: int  # an epoch

    def weights(self, epochs: int) -> Tensor:
        """Raw weights (T, n) of the first `epochs` epochs, the initial ones first."""
        rows = self.trajectory.snapshots[: 1 + self.snapshots * epochs]
        assert self.trajectory.anchor is not None
        return rows + self.trajectory.anchor


def sgd_steps(
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.SGD,
    account: Account,
    batches: Batches,
    epochs: int,
    rate: Callable[[float], float],
    record: Callable[[], object] | None = None,
    records: int = 1,
) -> Iterator[int]:
    """SGD; yields after each epoch, off the clock, how many are done.

    Parameters
    ----------
    rate : learning rate after a share of the epochs
    record : called `records` times in each epoch, at its end too
    """
    per_epoch = max(1, round(len(task.problem.train) / task.settings.batch))
    due = {math.ceil(per_epoch * (i + 1) / records) for i in range(records)}
    for epoch in range(epochs):
        for step in range(1, per_epoch + 1):
            with account:
                inputs, labels = next(batches)
                account.read(len(labels))
                optimizer.param_groups[0]["lr"] = rate((epoch + (step - 1) / per_epoch) / epochs)
                optimizer.zero_grad()
                cross_entropy(model, inputs, labels).backward()
                optimizer.step()
            if record is not None and step in due:
                record()
        yield epoch + 1


def make_sgd(task: Task, model: nn.Module) -> torch.optim.SGD:
    """torch's SGD with the task's settings."""
    s = task.settings
    return torch.optim.SGD(model.parameters(), s.lr, s.momentum, weight_decay=s.weight_decay)


def run_sgd(task: Task) -> Lead:
    """The full run of SGD, recorded as long as the settings say."""
    s, model = task.settings, task.model()
    records = min(s.snapshots, max(1, round(len(task.problem.train) / s.batch)))
    trajectory = Trajectory(
        model.named_parameters(), 1 + records * s.sampled_epochs, dtype=torch.float32
    )
    trajectory.record()
    optimizer, account = make_sgd(task, model), Account(len(task.problem.train))
    states, accounts, halfway = {}, {}, {}
    curve = [(0.0, task.validate(model))]
    best = -1.0

    def record() -> None:
        if len(trajectory) < trajectory.capacity:
            trajectory.record()

    batches = task.batches(s.batch, 0)
    for epoch in sgd_steps(
        task, model, optimizer, account, batches, s.epochs, s.rate, record, records
    ):
        curve.append((account.passes, task.validate(model)))
        if curve[-1][1] > best:
            best, states["best"] = curve[-1][1], copied(model)
        if epoch == s.half:
            states["half"], accounts["half"] = copied(model), account.copy()
            halfway = {k: v.clone() for k, v in _momenta(optimizer, model).items()}
    states["final"], accounts["final"] = copied(model), account
    return Lead(trajectory, states, halfway, accounts, curve, records)


def copied(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's state."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def _momenta(optimizer: torch.optim.SGD, model: nn.Module) -> dict[str, Tensor]:
    return {
        name: optimizer.state[p]["momentum_buffer"]
        for name, p in model.named_parameters()
        if "momentum_buffer" in optimizer.state[p]
    }


def save_lead(lead: Lead, path: Path) -> None:
    """Two files; the second marks that the first is complete."""
    lead.trajectory.save(path.with_suffix(".safetensors"))
    rest = {
        "states": lead.states,
        "momenta": lead.momenta,
        "accounts": {name: dict(account.__dict__) for name, account in lead.accounts.items()},
        "curve": lead.curve,
        "snapshots": lead.snapshots,
    }
    unfinished = path.with_suffix(".part")
    torch.save(rest, unfinished)
    unfinished.replace(path.with_suffix(".pt"))


def load_lead(task: Task, path: Path) -> Lead | None:
    """What `save_lead` left; None if it did not come to that."""
    if not path.with_suffix(".pt").exists():
        return None
    rest = torch.load(path.with_suffix(".pt"), weights_only=True)
    accounts = {}
    for name, values in rest["accounts"].items():
        accounts[name] = Account(values["size"])
        accounts[name].__dict__.update(values)
    trajectory = Trajectory.load(path.with_suffix(".safetensors"), task.model().named_parameters())
    return Lead(
        trajectory, rest["states"], rest["momenta"], accounts, rest["curve"], rest["snapshots"]
    )
