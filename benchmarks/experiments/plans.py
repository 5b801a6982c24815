"""Which runs an experiment consists of, and running those that are missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from . import data, methods
from .cells import Cell, Store
from .progress import Progress
from .settings import TUNED, Settings, settings
from .sgd import Lead, load_lead, run_sgd, save_lead
from .training import Outcome, Task, evaluate

#: Called with a line about each run.
Say = Callable[[str], None]

DIMS = (5, 10, 20, 40, 80)
NOISES = (0.0, 0.2, 0.4, 0.6, 0.8)
#: (data, network); the costly networks are on the small images.
ZOO = (
    ("mnist5k", "mlp"),
    ("mnist5k", "lenet"),
    ("digits", "resnet8"),
    ("digits", "resnet20"),
    ("digits", "vit"),
    ("text", "chars"),
)
METHODS = {
    "compare": (
        "sgd",
        "sgd_half",
        "sgd_short",
        "lbfgs",
        "swa",
        "twa",
        "psgd",
        "pbfgs",
        "pbfgs_last",
        "pbfgs_early",
        "random",
    ),
    "dims": ("sgd", "pbfgs", "pbfgs_last"),
    "zoo": ("sgd", "sgd_half", "pbfgs", "pbfgs_last", "pbfgs_early"),
    "noise": ("sgd", "sgd_sampled", "pbfgs", "pbfgs_last"),
    "real": (
        "sgd",
        "sgd_half",
        "sgd_cosine",
        "one_pass",
        "one_pass_mean",
        "one_pass_last",
        "pbfgs",
        "pbfgs_published",
        "psgd",
        "ema",
        "mean_last",
        "swa",
    ),
    "finetune": ("trained", "tuned_sgd", "tuned_pbfgs"),
}
_NETWORKS = {
    "cifar10": "resnet20",
    "cifar10_jpeg": "resnet20",
    "cifar100": "resnet32",
    "fashion": "lenet",
    "text": "chars",
    "tinyshakespeare": "gpt",
}


@dataclass(frozen=True)
class Plan:
    """What a command asks for.

    Parameters
    ----------
    experiment : one of `METHODS`
    data, network : None is the experiment's own choice
    folder : for CIFAR
    seeds : how many, from 0
    epochs : of the full SGD, instead of the recipe's
    methods : some of the experiment's alone
    device : where networks and data are
    threads : of torch
    """

    experiment: str
    data: str = "mnist5k"
    network: str | None = None
    folder: Path | None = None
    seeds: int = 5
    epochs: int | None = None
    tuned: Path = TUNED
    methods: tuple[str, ...] = ()
    device: str = "cpu"
    threads: int = 1

    def __post_init__(self) -> None:
        # Averaging wants two checkpoints from the second half of the run.
        epochs = 4 if self.experiment in ("compare", "real") else 1
        known = METHODS[self.experiment]
        for method in self.methods:
            if method not in known:
                raise ValueError(f"methods: expected some of {', '.join(known)}, got {method}")
        for name, value, least in (
            ("seeds", self.seeds, 1),
            ("epochs", self.epochs, epochs),
            ("threads", self.threads, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")

    def problems(self) -> list[tuple[str, str]]:
        """(data, network)."""
        if self.experiment == "zoo" and self.network is None:
            return list(ZOO)
        chosen = "lenet" if self.experiment == "noise" else "cnn"
        return [(self.data, self.network or _NETWORKS.get(self.data, chosen))]

    def cells(self) -> Iterator[tuple[Cell, Settings]]:
        """All runs; those that share a run of SGD are neighbours."""
        for name, network in self.problems():
            known = settings(self.experiment, name, network, self.epochs, self.tuned)
            for noise in NOISES if self.experiment == "noise" else (0.0,):
                for seed in range(self.seeds):
                    for method in self.methods or METHODS[self.experiment]:
                        for dim in self._dims(method, known):
                            chosen = replace(known, dim=dim or known.dim)
                            yield (
                                Cell(self.experiment, name, network, method, dim, noise, seed),
                                chosen,
                            )

    def _dims(self, method: str, known: Settings) -> tuple[int | None, ...]:
        if method not in methods.IN_SUBSPACE:
            return (None,)
        most = known.sampled_epochs * known.snapshots
        if self.experiment == "dims":
            return tuple(dim for dim in DIMS if dim <= most)
        if method == "tuned_pbfgs":
            return (min(30, known.dim, known.tuning_epochs * known.snapshots),)
        if method == "pbfgs_early":
            most = max(1, known.sampled_epochs // 2) * known.snapshots
        return (min(known.dim, most),)


def run(plan: Plan, store: Store, say: Say) -> None:
    """Run what is missing in the store, one run after the other."""
    torch.set_num_threads(plan.threads)
    problem: data.Problem | None = None
    held: tuple[Path, Lead] | None = None
    for cell, chosen in plan.cells():
        if store.load(cell, chosen) is not None:
            continue
        if problem is None or problem.name != cell.data:
            problem = data.load(cell.data, plan.folder).to(plan.device)
        task = Task(problem, cell.network, chosen, cell.seed, cell.noise)
        path = store.lead(cell, chosen)
        if held is None or held[0] != path:
            held = path, lead(task, path)
        task.progress = store.progress(cell, chosen)
        outcome = methods.METHODS[cell.method](task, held[1])
        result = record(outcome, task)
        store.save(cell, chosen, result)
        task.progress.clear()
        say(
            f"{cell.name}: {100 * result['test_accuracy']:.2f} % in {result['passes']:.1f} passes,"
            f" {result['cpu_seconds']:.1f} s of processor time"
        )


def lead(task: Task, path: Path) -> Lead:
    """The run of SGD that comes first, from its files if it was done before."""
    found = load_lead(task, path)
    if found is None:
        task.progress = Progress(path)
        found = run_sgd(task)
        save_lead(found, path)
        task.progress.clear()
    return found


def record(outcome: Outcome, task: Task) -> dict[str, Any]:
    """What a finished run is kept as. Here alone the test part is read: for the final weights and
    for those that were best on the validation part."""
    test = task.problem.test
    accuracy, loss = evaluate(outcome.model, test)
    result: dict[str, Any] = {
        "test_accuracy": accuracy,
        "test_loss": loss,
        "validation_accuracy": outcome.curve[-1][1],
        "passes": outcome.account.passes,
        "sampling_passes": outcome.sampling,
        "seconds": round(outcome.account.seconds, 3),
        "cpu_seconds": round(outcome.account.cpu_seconds, 3),
        "numel": sum(p.numel() for p in outcome.model.parameters()),
        "curve": [[round(x, 3), round(y, 5)] for x, y in outcome.curve],
        **outcome.notes,
    }
    if outcome.best is not None:
        outcome.model.load_state_dict(outcome.best)
        best = max(outcome.curve, key=lambda point: point[1])
        result["early_test_accuracy"] = evaluate(outcome.model, test)[0]
        result["early_passes"] = best[0]
    return result
