"""What all methods share: the task of one seed, its batches, the account of reads."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dldr_ext.batch_norm import reestimate_
from dldr_ext.demo import recipe

from . import networks
from .data import Part, Problem
from .progress import Progress
from .settings import Settings

_EVALUATED = 500  # items a forward pass without gradients


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


class Batches(Iterator[tuple[Tensor, Tensor]]):
    """Endless batches of about ``size`` items, 0 for all, in a new order for each pass.

    Those of one pass are equally large up to one item and hold every item once. The random numbers
    of a pass depend on the seed and the pass alone, those of a batch on its place too: setting
    `taken`, how many have been drawn, goes on from there.
    """

    def __init__(self, problem: Problem, size: int, seed: int) -> None:
        self.taken = 0
        self._part, self._augment, self._seed = problem.train, problem.augment, seed
        self._count = max(1, round(len(self._part) / size)) if size else 1
        self._pass, self._pieces = -1, ()  # type: int, tuple[Tensor, ...]

    def __next__(self) -> tuple[Tensor, Tensor]:
        part, (which, place) = self._part, divmod(self.taken, self._count)
        self.taken += 1
        if self._count == 1 and self._augment is None:
            return part.inputs, part.labels
        if which != self._pass:
            order = torch.randperm(len(part), generator=self._generator(which, 0))
            self._pass = which
            self._pieces = order.to(part.labels.device).tensor_split(self._count)
        index = self._pieces[place]
        inputs = part.inputs[index]
        if self._augment is not None:
            inputs = self._augment(inputs, self._generator(which, 1 + place))
        return inputs, part.labels[index]

    def _generator(self, which: int, use: int) -> torch.Generator:
        return torch.Generator().manual_seed(self._seed + 1_000_003 * which + 1_000_000_007 * use)


class Task:
    """A problem, perhaps with wrong labels, a network and settings, for one seed."""

    def __init__(
        self, problem: Problem, network: str, settings: Settings, seed: int, noise: float = 0.0
    ) -> None:
        self.network, self.settings, self.seed, self.noise = network, settings, seed, noise
        self.problem = problem.with_noise(noise, self.generator(9)) if noise else problem
        #: Where the run that is made keeps how far it has come.
        self.progress = Progress()

    @property
    def device(self) -> torch.device:
        """Where the problem is, and the networks."""
        return self.problem.train.inputs.device

    def model(self) -> nn.Module:
        """The network at the initial weights."""
        model = networks.build(self.network, self.problem, self.seed).to(self.device)
        if self.settings.bfloat16:
            autocast = torch.autocast(self.device.type, torch.bfloat16)
            model.forward = autocast(model.forward)  # type: ignore[method-assign]
        return model

    def generator(self, stream: int, device: torch.device | str = "cpu") -> torch.Generator:
        """Random numbers of this seed; one stream for each use."""
        return torch.Generator(device).manual_seed(100 * self.seed + stream)

    @property
    def steps_per_epoch(self) -> int:
        """Batches of SGD that make a pass."""
        return max(1, round(len(self.problem.train) / self.settings.batch))

    def snapshot_steps(self) -> frozenset[int]:
        """After which steps of an epoch there is a snapshot; its last one is among them."""
        return recipe.snapshot_steps(self.steps_per_epoch, self.settings.snapshots)

    def batches(self, size: int, stream: int) -> Batches:
        """Endless batches of about ``size`` items, 0 for all; see `Batches`."""
        return Batches(self.problem, size, 100 * self.seed + stream)

    def renew_norms(self, model: nn.Module, items: int | None = None) -> int:
        """Averages batch-norm statistics anew over the training part, or its first `items`.

        Over images as training sees them, moved at random: those of images that stay in place
        cost ResNet-20 on CIFAR-10 2.5 points of accuracy.

        Returns how many items were read: 0 without batch norm.
        """
        if not has_norms(model):
            return 0
        inputs, augment = self.problem.train.inputs[:items], self.problem.augment
        generator, batches = self.generator(10), inputs.split(_EVALUATED)
        reestimate_(model, (augment(x, generator) for x in batches) if augment else batches)
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
    logits = model(inputs).flatten(0, -2).float()
    return functional.cross_entropy(logits, labels.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, part: Part) -> tuple[float, float]:
    """Accuracy and mean cross-entropy in eval mode; leaves the model in train mode."""
    model.eval()
    correct, loss = 0, 0.0
    for inputs, labels in zip(
        part.inputs.split(_EVALUATED), part.labels.split(_EVALUATED), strict=True
    ):
        logits, flat = model(inputs).flatten(0, -2).float(), labels.flatten()
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


def copied(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the model's state."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def flat(model: nn.Module) -> Tensor:
    """A copy of the parameters as one vector (n,)."""
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


@torch.no_grad()
def write(model: nn.Module, vector: Tensor) -> None:
    """Sets the parameters to the pieces of a vector (n,)."""
    parameters = list(model.parameters())
    for p, piece in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
        p.copy_(piece.view(p.shape))
