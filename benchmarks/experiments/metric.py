"""How often training in the subspace sticks on the plateau it starts on, by metric and optimizer.

``python -m benchmarks.experiments.metric --seeds 14 --output FILE``. Eight epochs of SGD at a
constant rate are recorded; then 30 variables are trained from the initial weights: `PBFGS` with
default options for eight passes, `PSGD` and Adam for one, each with and without the metric of the
trajectory. A run sticks if it ends more than two points of test accuracy below the recorded one.
A run that is in the file already is not made again; the table is printed. With ``--defaults``
`PBFGS` with its default options alone, to count stuck runs among many seeds.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from dldr_ext import PBFGS, PSGD, InSubspace, Subspace, Trajectory
from dldr_ext.batch_norm import reestimated

from .data import Problem, load
from .networks import build
from .training import cross_entropy, evaluate

PROBLEMS = {"mlp": "mnist5k", "lenet": "mnist5k", "vit": "digits", "resnet8": "digits"}
DIM, SNAPSHOTS, EPOCHS, BATCH = 30, 80, 8, 64
STUCK = 0.02

Make = Callable[[Any, Subspace, Any], Any]
# What is made, passes over the data, items of a batch (0: all), and whether the rate anneals.
METHODS: dict[str, tuple[Make, int, int, bool]] = {
    **{
        f"PBFGS, batches of {size}" if size else "PBFGS, all data": (
            lambda p, s, m: PBFGS(p, s, metric=m), 8, size, False,
        )
        for size in (250, 1000, 0)
    },
    "PSGD, one pass": (lambda p, s, m: PSGD(p, s, lr=0.3 if m else 0.2, metric=m), 1, 32, True),
    "Adam, one pass": (
        lambda p, s, m: InSubspace(p, s, torch.optim.Adam, lr=0.3, metric=m),
        1, 32, True,
    ),
}  # fmt: skip


def recorded(problem: Problem, network: str, seed: int) -> tuple[nn.Module, Subspace]:
    """The network after SGD, and the principal directions of its way."""
    model, generator = build(network, problem, seed), torch.Generator().manual_seed(seed)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    train = problem.train
    steps = EPOCHS * -(-len(train) // BATCH)
    trajectory = Trajectory(model.parameters(), capacity=SNAPSHOTS + 1)
    trajectory.record()
    step = 0
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(train), generator=generator).split(BATCH):
            sgd.zero_grad()
            cross_entropy(model, train.inputs[batch], train.labels[batch]).backward()
            sgd.step()
            step += 1
            if step * SNAPSHOTS // steps > (step - 1) * SNAPSHOTS // steps:
                trajectory.record()
    return model, trajectory.subspace(DIM)


def trained(
    problem: Problem, network: str, seed: int, subspace: Subspace, method: str, metric: Any
) -> nn.Module:
    """The network after training in the subspace, from the initial weights."""
    make, passes, size, anneals = METHODS[method]
    train, generator = problem.train, torch.Generator().manual_seed(1000 + seed)
    size = size or len(train)
    model = build(network, problem, seed)
    optimizer = make(model.parameters(), subspace, metric)
    schedule = CosineAnnealingLR(optimizer, passes * len(train) // size) if anneals else None
    read = 0
    while True:
        for batch in torch.randperm(len(train), generator=generator).split(size):
            calls = optimizer.closure_calls
            optimizer.step(
                lambda batch=batch: cross_entropy(model, train.inputs[batch], train.labels[batch])
            )
            read += len(batch) * (optimizer.closure_calls - calls)
            if schedule is not None:
                schedule.step()
            if read >= passes * len(train):
                return model


def scores(model: nn.Module, problem: Problem) -> dict[str, float]:
    """Training loss and test accuracy, with batch-norm statistics of these weights."""
    with reestimated(model, [problem.train.inputs]):
        accuracy, _ = evaluate(model, problem.test)
        return {"loss": evaluate(model, problem.train)[1], "accuracy": accuracy}


def runs(network: str, seed: int, missing: list[tuple[str, Any]]) -> list[dict[str, Any]]:
    """The missing runs, (method, metric), of one network and seed."""
    problem = load(PROBLEMS[network])
    model, subspace = recorded(problem, network, seed)
    sgd = scores(model, problem)
    facts = {"network": network, "seed": seed, "sgd": sgd}
    return [
        facts
        | {"method": method, "metric": metric}
        | scores(trained(problem, network, seed, subspace, method, metric), problem)
        for method, metric in missing
    ]


def table(found: list[dict[str, Any]]) -> str:
    """A row for each network and method."""
    lines = [
        "| network | method | stuck, plain | stuck, metric | loss, plain | loss, metric |",
        "|---|---|---|---|---|---|",
    ]
    for network in PROBLEMS:
        for method in METHODS:
            cells: list[list[str]] = [[], []]
            for metric in (None, "trajectory"):
                chosen = [
                    run
                    for run in found
                    if (run["network"], run["method"], run["metric"]) == (network, method, metric)
                ]
                if not chosen:
                    break
                low = [run["sgd"]["accuracy"] - run["accuracy"] > STUCK for run in chosen]
                cells[0].append(f"{sum(low)} of {len(low)}")
                cells[1].append(f"{median(run['loss'] for run in chosen):.3f}")
            else:
                lines.append(f"| {network} | {method} | {' | '.join([*cells[0], *cells[1]])} |")
    return "\n".join(lines)


def counts(found: list[dict[str, Any]]) -> str:
    """How many runs of `PBFGS` with its defaults are stuck, of each network."""
    lines = ["| network | seeds | runs | stuck | seeds that are |", "|---|---|---|---|---|"]
    for network in PROBLEMS:
        runs = [r for r in found if r["network"] == network and r["metric"] is not None]
        runs = [r for r in runs if r["method"].startswith("PBFGS")]
        low = [r["seed"] for r in runs if r["sgd"]["accuracy"] - r["accuracy"] > STUCK]
        seeds = len({r["seed"] for r in runs})
        stuck = ", ".join(map(str, sorted(set(low)))) or "none"
        lines.append(f"| {network} | {seeds} | {len(runs)} | {len(low)} | {stuck} |")
    return "\n".join(lines)


def main() -> None:
    """Make what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--networks", nargs="*", default=[*PROBLEMS], choices=[*PROBLEMS])
    parser.add_argument("--seeds", type=int, default=14, metavar="N", help="0 to N - 1")
    parser.add_argument("--output", type=Path, required=True, help="JSON, kept and added to")
    parser.add_argument("--defaults", action="store_true", help="PBFGS with its defaults alone")
    options = parser.parse_args()
    torch.set_num_threads(1)  # the same bits on any machine with these instructions
    found = json.loads(options.output.read_text()) if options.output.exists() else []
    keys = ("network", "seed", "method", "metric")
    known = {tuple(run[key] for key in keys) for run in found}
    pairs = [(method, metric) for method in METHODS for metric in (None, "trajectory")]
    if options.defaults:
        pairs = [(method, metric) for method, metric in pairs if metric and "PBFGS" in method]
    for network in options.networks:
        for seed in range(options.seeds):
            missing = [pair for pair in pairs if (network, seed, *pair) not in known]
            if missing:
                found += runs(network, seed, missing)
                options.output.write_text(json.dumps(found, indent=1) + "\n")
                print(f"{network} {seed}", flush=True)
    print(counts(found) if options.defaults else table(found))


if __name__ == "__main__":
    main()
