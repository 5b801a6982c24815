"""What ``dim="auto"`` keeps of real trainings, and what P-BFGS makes of it beside d = 1 and d = 40.

``python -m benchmarks.experiments.choosing_dim [TRAINING ...]``. Digits and networks of
`dldr demo`, and an MLP; P-BFGS starts from the initial weights, with the demo's budget.
Prints one line for each run: d, the share of the variance, and accuracies on the test part.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn import functional

from dldr_ext import Subspace, Trajectory
from dldr_ext.demo import data, methods
from dldr_ext.demo.model import accuracy
from dldr_ext.demo.recipe import RECIPES, batches, learning_rate, snapshot_steps


@dataclass(frozen=True)
class Training:
    """The whole of it is sampled."""

    batch_size: int
    lr: float
    steps: int
    snapshots: int = 80  # besides the first
    shift: int = 1
    adam: bool = False
    decay: bool = False  # of the rate, as in the demo


TRAININGS = {
    "slow": Training(24, 0.005, 1000),
    "large-batches": Training(300, 0.1, 300, snapshots=60),
    "full-batch": Training(10**9, 0.1, 400, shift=0),
    "early": Training(24, 0.1, 100, snapshots=100),
    "decay": Training(24, 0.1, 2000, snapshots=40, decay=True),
    "adam": Training(64, 1e-3, 800, adam=True),
}
# The recipe of the demo, whose first half is sampled; "mnist" in half the epochs.
DEMOS = {"demo": {}, "mnist": {"epochs": 20}, "demo-mlp": {"lr": 0.05}}


class MLPTask(methods.Task):
    """The same task for a network without convolutions and batch norm."""

    def model(self) -> nn.Module:
        """The network at the initial weights."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU()]
            return nn.Sequential(nn.Flatten(), *layers, nn.Linear(64, 10))


def trained(task: methods.Task, training: Training) -> tuple[nn.Module, Trajectory]:
    """The trained network and its trajectory."""
    model, train = task.model(), task.data.train
    optimizer: torch.optim.Optimizer = (
        torch.optim.Adam(model.parameters(), training.lr)
        if training.adam
        else torch.optim.SGD(model.parameters(), training.lr, 0.9, weight_decay=5e-4)
    )
    recorded = snapshot_steps(training.steps, training.snapshots)
    trajectory = Trajectory(model.named_parameters(), 1 + len(recorded), torch.float32)
    trajectory.record()
    size = min(training.batch_size, len(train))
    stream = batches(train, size, training.shift, task.generator(0))
    for step in range(1, training.steps + 1):
        images, labels = next(stream)
        if training.decay:
            done = (step - 1) / training.steps
            optimizer.param_groups[0]["lr"] = learning_rate(task.recipe, done)
        optimizer.zero_grad()
        functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if step in recorded:
            trajectory.record()
    return model, trajectory


def run(name: str, network: str, seed: int) -> str:
    """One training and three subspaces of it."""
    which = "mnist5k" if name == "mnist" else "digits"
    recipe = replace(RECIPES[which], **DEMOS.get(name, {}))
    kind = MLPTask if network == "mlp" else methods.Task
    task = kind(data.load(which), recipe, seed, 80, lambda *_: None)
    if name in TRAININGS:
        model, trajectory = trained(task, TRAININGS[name])
    else:
        outcome, _, trajectory = methods.sgd(task)
        model = outcome.model
    test = task.data.test
    chosen, whole = trajectory.subspace("auto"), trajectory.subspace(40)
    found = [f"trained {100 * accuracy(model, test.images, test.labels):.1f} %"]
    for dim in (1, chosen.dim, 40):
        subspace = Subspace(whole.basis[:dim].clone(), whole.origin)
        model = methods.pbfgs(task, subspace).model
        found.append(f"d = {dim}: {100 * accuracy(model, test.images, test.labels):.1f} %")
    assert chosen.explained_variance_ratio is not None
    share = 100 * float(chosen.explained_variance_ratio.sum())
    return f"{name} {network} {seed}: auto {chosen.dim}, {share:.1f} %; {', '.join(found)}"


def main() -> None:
    """Every training that is named, or all, with seeds 0, 1 and 2."""
    names = [*DEMOS, *TRAININGS]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trainings", nargs="*", help=f"of {', '.join(names)}; all by default")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    for name in options.trainings or names:
        if name not in names:
            parser.error(f"expected one of {', '.join(names)}, got {name}")
        networks = {"demo": ["cnn"], "mnist": ["cnn"], "demo-mlp": ["mlp"]}.get(name)
        for network in networks or ["cnn", "mlp"]:
            for seed in range(options.seeds):
                print(run(name, network, seed), flush=True)


if __name__ == "__main__":
    main()
