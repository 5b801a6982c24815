"""Hyper-parameters: defaults, published recipes, and what `tune` chose on the validation part."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

#: What `tune` writes: per problem the options chosen and every value that was tried.
TUNED = Path(__file__).with_name("tuned.json")


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on besides the problem, the network and the seed."""

    epochs: int = 20  # of the full SGD run
    batch: int = 64
    optimizer: str = "sgd"  # or "adamw"
    lr: float = 0.1
    milestones: tuple[float, ...] = (0.5, 0.75)  # shares of the run; the rate falls to a tenth
    momentum: float = 0.9
    weight_decay: float = 5e-4
    bfloat16: bool = False  # autocast of all forward passes
    sampled: float = 0.5  # share of the run that the subspace is made from
    snapshots: int = 8  # an epoch
    dim: int = 40
    budget: float = 0.5  # passes in the subspace, as a share of the epochs of the full run
    subspace_batch: int = 500  # of P-BFGS; 0 is the whole training part
    subspace_decay: float = 0.0  # weight decay in the objective of the methods in the subspace
    last_batch: int = 500  # the same two where P-BFGS starts from the last weights of the sample
    last_decay: float = 0.0
    averages: float = 0.5  # share of P-BFGS, its end, whose coordinates are averaged; 0 is none
    psgd_lr: float = 0.3
    one_pass_lr: float = 0.3  # of Adam in the metric of the trajectory
    lbfgs_batch: int = 0  # 0 is the whole training part
    swa_lr: float = 0.05
    twa_lr: float = 0.01
    tuning_lr: float = 0.01  # of the short fine-tune of a trained model
    tuning_epochs: int = 4
    tuning_start: str = "first"  # the trained weights or, "last", the fine-tuned ones

    @property
    def sampled_epochs(self) -> int:
        """Epochs that are recorded; a whole one at least."""
        return max(1, round(self.sampled * self.epochs))

    @property
    def half(self) -> int:
        """Epochs of the half run."""
        return max(1, self.epochs // 2)

    @property
    def passes(self) -> int:
        """Passes over the training part that a run in the subspace may spend; fewer than three
        leave no room for a step of P-BFGS on the whole of it."""
        return max(3, round(self.budget * self.epochs))

    def rate(self, done: float) -> float:
        """Learning rate of SGD after a share `done` of the run."""
        return self.lr * 0.1 ** sum(done >= milestone for milestone in self.milestones)


def cosine(lr: float, done: float) -> float:
    """A learning rate that falls to 0 along a cosine."""
    return lr * (1 + math.cos(math.pi * done)) / 2


# Published: github.com/nblt/DLDR, CIFAR-10 and CIFAR-100 folders: SGD with one snapshot an epoch,
# 80 and 100 epochs of which are sampled, then 20 passes of P-BFGS with batches of 1024.
_CIFAR = {"batch": 128, "weight_decay": 1e-4, "snapshots": 1, "subspace_batch": 1024}
# The shape of it in a fifth of the epochs, with snapshots enough for 40 directions.
_SHORT_CIFAR = {"epochs": 30, "milestones": (2 / 3,), "snapshots": 3, "bfloat16": True}
# SGD is recorded for 7 of 20 epochs: with P-BFGS's 3 passes half of the whole run.
_HALF = {"sampled": 0.35, "budget": 0.15}
_BASE: dict[str, dict[str, Any]] = {
    "cifar10_jpeg": _CIFAR | _SHORT_CIFAR | {"sampled": 80 / 150, "budget": 20 / 150},
    "fashion": _HALF | {"batch": 128, "subspace_batch": 1024, "last_batch": 1024},
    "fashion/resnet8": {"bfloat16": True},
    "tinyshakespeare": _HALF
    | {"optimizer": "adamw", "lr": 2e-3, "weight_decay": 0.01, "batch": 32, "swa_lr": 1e-3}
    | {"subspace_batch": 256, "last_batch": 256},
    "cifar10": _CIFAR
    | {"epochs": 150, "milestones": (2 / 3,), "sampled": 80 / 150, "budget": 20 / 150},
    "cifar100": _CIFAR | {"epochs": 200, "milestones": (0.75,), "sampled": 0.5, "budget": 0.1},
    "digits": {"batch": 32, "subspace_batch": 300},
    "text": {"batch": 32, "subspace_batch": 300, "weight_decay": 0.0},
}
# Noise needs a run that is long enough to learn the wrong labels by heart, and an early sample.
_NOISE = {
    "epochs": 40,
    "milestones": (),
    "weight_decay": 0.0,
    "sampled": 0.25,
    "dim": 5,
    "subspace_batch": 0,
    "last_batch": 1000,
    "averages": 0.0,
}
# Of 54,000 images six passes are six evaluations of all of them: P-BFGS ends at 10 % of accuracy.
_LARGE_NOISE = {"fashion": {"lr": 0.02, "subspace_batch": 1024}}


def settings(
    experiment: str, data: str, network: str, epochs: int | None = None, tuned: Path = TUNED
) -> Settings:
    """The settings of an experiment: defaults, then the recipe of the data, then what was tuned.

    Parameters
    ----------
    experiment : name of the experiment; "noise" has a recipe of its own
    data, network : names
    epochs : instead of the recipe's, for a short try
    tuned : file that `tune` writes
    """
    options = _BASE.get(data, {}) | _BASE.get(f"{data}/{network}", {})
    if experiment == "noise":
        options |= _NOISE | _LARGE_NOISE.get(data, {})
    known = json.loads(tuned.read_text()) if tuned.exists() else {}
    options |= known.get(key(experiment, data, network), {}).get("chosen", {})
    if epochs is not None:
        options["epochs"] = epochs
    return replace(Settings(), **options)


def key(experiment: str, data: str, network: str) -> str:
    """Under which name tuned options are kept: `compare`, `dims`, `zoo` and `finetune` share."""
    return f"{'noise' if experiment == 'noise' else 'plain'}/{data}/{network}"


def names() -> frozenset[str]:
    """All options."""
    return frozenset(field.name for field in fields(Settings))
