"""Training of all weights: the run that the methods in the subspace start from, and its likes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .training import Account, Batches, Task, copied, cross_entropy, flat

#: Decays of the running averages that a run keeps.
DECAYS = (0.99, 0.995, 0.998, 0.999, 0.9995)


@dataclass
class Lead:
    """What a full run of SGD leaves behind for the others to start from."""

    rows: Tensor  # (T, n): initial weights, then the sampled epochs
    ends: Tensor  # (E, n): weights at the end of each epoch of the second half
    averages: dict[float, Tensor]  # (n,) by decay: running averages of the weights of all steps
    states: dict[str, dict[str, Tensor]]  # of the model: "final", "half", "best"
    momenta: dict[str, Tensor]  # of SGD at half of the run, by parameter
    accounts: dict[str, Account]  # "final", "half"
    curve: list[tuple[float, float]]
    snapshots: int  # an epoch

    def weights(self, epochs: int) -> Tensor:
        """Weights (T, n) of the first `epochs` epochs, the initial ones first."""
        return self.rows[: 1 + self.snapshots * epochs]


def make_optimizer(task: Task, model: nn.Module) -> torch.optim.Optimizer:
    """torch's SGD or AdamW with the task's settings."""
    s = task.settings
    if s.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), s.lr, weight_decay=s.weight_decay)
    return torch.optim.SGD(model.parameters(), s.lr, s.momentum, weight_decay=s.weight_decay)


def train_epochs(
    task: Task,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    account: Account,
    batches: Batches,
    count: int,
    rate: Callable[[float], float],
    kept: dict[str, Any],
    after_step: Callable[[int], object] | None = None,
) -> Iterator[int]:
    """Train; yields after each epoch, off the clock, how many are done.

    A run that was killed goes on after its last epoch, with what its caller had put into `kept`.

    Parameters
    ----------
    rate : learning rate after a share of the epochs
    kept : what the caller collects
    after_step : called off the clock with the number of the step in its epoch, from 1
    """
    per_epoch = task.steps_per_epoch
    start, saved = 0, task.progress.load("sgd")
    if saved is not None:
        start, batches.taken = saved["epoch"], saved["taken"]
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        account.__dict__.update(saved["account"])
        kept.update(saved["kept"])
    for epoch in range(start, count):
        for step in range(1, per_epoch + 1):
            with account:
                inputs, labels = next(batches)
                account.read(len(labels))
                optimizer.param_groups[0]["lr"] = rate((epoch + (step - 1) / per_epoch) / count)
                optimizer.zero_grad()
                cross_entropy(model, inputs, labels).backward()
                optimizer.step()
            if after_step is not None:
                after_step(step)
        yield epoch + 1
        task.progress.save(
            "sgd",
            lambda epoch=epoch: {
                "epoch": epoch + 1,
                "taken": batches.taken,
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "account": account.__dict__,
                "kept": kept,
            },
        )


def run_sgd(task: Task) -> Lead:
    """The full run, recorded as long as the settings say."""
    s, model = task.settings, task.model()
    due = task.snapshot_steps()
    parameters = [p.detach() for p in model.parameters()]
    kept: dict[str, Any] = {
        "rows": [flat(model)],
        "ends": [],
        "averages": {decay: [p.clone() for p in parameters] for decay in DECAYS},
        "states": {},
        "accounts": {},
        "momenta": {},
        "curve": [(0.0, task.validate(model))],
        "best": -1.0,
    }
    optimizer, account = make_optimizer(task, model), Account(len(task.problem.train))

    def after_step(step: int) -> None:
        for decay, average in kept["averages"].items():
            torch._foreach_lerp_(average, parameters, 1 - decay)
        if step in due and len(kept["rows"]) <= len(due) * s.sampled_epochs:
            kept["rows"].append(flat(model))

    batches = task.batches(s.batch, 0)
    for epoch in train_epochs(
        task, model, optimizer, account, batches, s.epochs, s.rate, kept, after_step
    ):
        kept["curve"].append((account.passes, task.validate(model)))
        if kept["curve"][-1][1] > kept["best"]:
            kept["best"], kept["states"]["best"] = kept["curve"][-1][1], copied(model)
        if epoch == s.half:
            kept["states"]["half"], kept["accounts"]["half"] = copied(model), vars(account.copy())
            kept["momenta"] = _momenta(optimizer, model)
        if epoch > s.half or epoch == s.epochs:
            kept["ends"].append(flat(model))
    kept["states"]["final"], kept["accounts"]["final"] = copied(model), vars(account)
    return Lead(
        torch.stack(kept["rows"]),
        torch.stack(kept["ends"]),
        {decay: torch.cat([p.reshape(-1) for p in ps]) for decay, ps in kept["averages"].items()},
        kept["states"],
        kept["momenta"],
        _accounts(kept["accounts"]),
        kept["curve"],
        len(due),
    )


def _accounts(saved: dict[str, dict[str, Any]]) -> dict[str, Account]:
    found = {name: Account(values["size"]) for name, values in saved.items()}
    for name, account in found.items():
        account.__dict__.update(saved[name])
    return found


def _momenta(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, Tensor]:
    return {
        name: optimizer.state[p]["momentum_buffer"].clone()
        for name, p in model.named_parameters()
        if "momentum_buffer" in optimizer.state[p]
    }


def save_lead(lead: Lead, path: Path) -> None:
    """A file that is complete or not there."""
    content = {name: getattr(lead, name) for name in Lead.__dataclass_fields__}
    content["accounts"] = {name: vars(account) for name, account in lead.accounts.items()}
    unfinished = path.with_suffix(".part")
    torch.save(content, unfinished)
    unfinished.replace(path.with_suffix(".pt"))


def load_lead(task: Task, path: Path) -> Lead | None:
    """What `save_lead` left; None if it did not come to that."""
    path = path.with_suffix(".pt")
    if not path.exists():
        return None
    content = torch.load(path, weights_only=True, map_location=task.device)
    return Lead(**(content | {"accounts": _accounts(content["accounts"])}))
