"""Averages of the checkpoints of one run, fixed and learned, against a run whose rate decays.

``python -m benchmarks.experiments.averages --folder FOLDER --output FILE`` trains a character
transformer for half of its epochs at a constant rate, then twice on from there: along a cosine, and
at the constant rate, whose weights are averaged, a few of each epoch. Weights of an average that
are a formula need no data; the decay of an EMA is chosen and the learned ones
(`dldr_ext.weight_averaging_subspace`) are trained on the validation part. All are read on the test
part, once. A seed that is in the file already is not trained again; the table is printed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dldr_ext import InSubspace, weight_averaging_subspace
from dldr_ext.averaging import schedule_weights

from . import data
from .settings import cosine, settings
from .sgd import make_optimizer, train_epochs
from .statistics import mean_and_spread
from .training import Account, Task, copied, cross_entropy, evaluate, flat, write

SNAPSHOTS = 4  # an epoch
DECAYS = (0.5, 0.7, 0.8, 0.9, 0.95)  # of an EMA over the checkpoints
LEARNING_EPOCHS, LEARNING_BATCH, LEARNING_LR = 5, 32, 0.3
SCHEDULES = {"mean": "mean", "1 - sqrt": "1-sqrt"}


def averaged(rows: Tensor, schedule: str) -> Tensor:
    """The average (n,) of rows (T, n)."""
    return torch.tensor(schedule_weights(schedule, len(rows)), dtype=rows.dtype) @ rows


def learned(task: Task, states: list[dict[str, Tensor]]) -> Tensor:
    """The weights (n,) after training the coefficients of the average on the validation part."""
    model, part = task.model(), task.problem.validation
    subspace = weight_averaging_subspace(states, model)
    optimizer = InSubspace(model.parameters(), subspace, torch.optim.Adam, lr=LEARNING_LR)
    generator, done = task.generator(8), 0
    for _ in range(LEARNING_EPOCHS):
        order = torch.randperm(len(part), generator=generator).split(LEARNING_BATCH)
        for batch in order:
            share = done / (LEARNING_EPOCHS * len(order))
            optimizer.param_groups[0]["lr"] = cosine(LEARNING_LR, share)
            optimizer.step(
                lambda batch=batch: cross_entropy(model, part.inputs[batch], part.labels[batch])
            )
            done += 1
    return flat(model)


def run(task: Task) -> dict[str, float]:
    """Test losses of one seed."""
    s, model, due = task.settings, task.model(), task.snapshot_steps()
    optimizer = make_optimizer(task, model)
    account, stream = Account(len(task.problem.train)), task.batches(s.batch, 0)
    rows: list[Tensor] = []
    states: list[dict[str, Tensor]] = []

    def keep(step: int) -> None:
        if step in due:
            rows.append(flat(model))
            states.append(copied(model))

    def train(
        epochs: int, rate: Callable[[float], float], after: Callable[[int], object] | None = None
    ) -> None:
        for _ in train_epochs(task, model, optimizer, account, stream, epochs, rate, {}, after):
            pass

    def loss(weights: Tensor, part: data.Part) -> float:
        other = task.model()
        write(other, weights)
        return evaluate(other, part)[1]

    train(s.half, lambda _: s.lr)
    half = copied(model), deepcopy(optimizer.state_dict()), stream.taken
    train(s.epochs - s.half, lambda _: s.lr, keep)
    model.load_state_dict(half[0])
    optimizer.load_state_dict(half[1])
    stream.taken = half[2]
    train(s.epochs - s.half, lambda done: cosine(s.lr, done))

    constant, test = torch.stack(rows), task.problem.test
    found = {
        "constant rate, last weights": loss(constant[-1], test),
        "rate along a cosine": loss(flat(model), test),
    }
    found |= {
        name: loss(averaged(constant, schedule), test) for name, schedule in SCHEDULES.items()
    }
    later = torch.arange(1.0, len(constant) + 1)
    found["weight k"] = loss(later / later.sum() @ constant, test)
    by_decay = [averaged(constant, f"ema:{decay}") for decay in DECAYS]
    found["EMA"] = loss(min(by_decay, key=lambda w: loss(w, task.problem.validation)), test)
    found["learned"] = loss(learned(task, states), test)
    return found


def table(found: list[dict[str, Any]]) -> str:
    """A row for each average: the test loss, and its difference from the decayed run's."""
    lines = ["| weights | test loss | against the cosine |", "|---|---|---|"]
    for name in found[0]["losses"]:
        losses = [one["losses"][name] for one in found]
        gaps = [one["losses"][name] - one["losses"]["rate along a cosine"] for one in found]
        shown = ["{:.4f} ± {:.4f}".format(*mean_and_spread(values)) for values in (losses, gaps)]
        lines.append(f"| {name} | {shown[0]} | {shown[1]} |")
    return "\n".join(lines)


def main() -> None:
    """Make what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="tinyshakespeare", choices=data.TEXTS)
    parser.add_argument("--network", default="gpt", choices=("gpt", "chars"))
    parser.add_argument("--folder", type=Path, help="that of tinyshakespeare.txt")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=5, metavar="N", help="0 to N - 1")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True, help="JSON, kept and added to")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    problem = data.load(options.data, options.folder)
    known = settings("real", options.data, options.network, options.epochs)
    about = {"data": options.data, "network": options.network, "epochs": options.epochs}
    found = json.loads(options.output.read_text()) if options.output.exists() else []
    for seed in range(options.seeds):
        facts = about | {"seed": seed, "lr": known.lr}
        if not any(facts.items() <= one.items() for one in found):
            task = Task(problem, options.network, replace(known, snapshots=SNAPSHOTS), seed)
            found.append(facts | {"losses": run(task)})
            options.output.write_text(json.dumps(found, indent=1) + "\n")
            print(found[-1], flush=True)
    print(table([one for one in found if about.items() <= one.items()]))


if __name__ == "__main__":
    main()
