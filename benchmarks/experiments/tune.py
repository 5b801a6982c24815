"""Hyper-parameters chosen on the validation part, with seeds that no experiment uses."""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from . import data, methods
from .cells import Cell, Store
from .plans import Plan, Say, lead
from .settings import Settings, key, settings
from .training import Task, evaluate

SEEDS = (100, 101, 102)
_FEW = 500  # labels: a smaller validation part tells methods in the subspace apart over all seeds
NOISE = 0.4  # at which the options of the experiment with label noise are chosen, for all levels
_RATES = {"text": (0.1, 0.2, 0.4), "tinyshakespeare": (1e-3, 2e-3, 4e-3)}
_COMPARE = (
    ("psgd", {"psgd_lr": (0.1, 0.2, 0.3, 0.5)}),
    ("swa", {"swa_lr": (0.01, 0.02, 0.05, 0.1)}),
    ("twa", {"twa_lr": (0.001, 0.01, 0.1)}),
    ("lbfgs", {"lbfgs_batch": (0, 500)}),
)
_FINETUNE = (("tuned_pbfgs", {"tuning_lr": (0.01, 0.05, 0.1), "tuning_start": ("first", "last")}),)


def stages(experiment: str, name: str, items: int) -> tuple[tuple[str, dict[str, tuple]], ...]:
    """What is tried, one stage after the other: a method, and options whose product is tried.

    Parameters
    ----------
    items : of the training part
    """
    rates = _RATES.get(name, (0.02, 0.05, 0.1))
    batches = tuple(items // share for share in (8, 4, 2))
    decays = (0.0, 5e-4)
    plain = (
        ("sgd", {"lr": rates}),
        ("pbfgs", {"subspace_batch": batches, "subspace_decay": decays}),
        ("pbfgs_last", {"last_batch": batches, "last_decay": decays}),
    )
    if experiment == "noise":
        early = {"sampled": (0.1, 0.25), "dim": (5, 10), "subspace_batch": (items // 4, 0)}
        return (("sgd", {"lr": rates}), ("pbfgs", early))
    if experiment == "real":
        return plain[:1]
    return plain + {"compare": _COMPARE, "finetune": _FINETUNE}.get(experiment, ())


def tune(plan: Plan, store: Store, say: Say) -> None:
    """Choose options for the problems of a plan and write them to its file, after every try.

    What the file holds already is not tried again: delete an entry to have it tried anew.
    """
    torch.set_num_threads(1)
    for name, network in plan.problems():
        problem = data.load(name, plan.folder)
        entry = key(plan.experiment, name, network)
        for method, grid in stages(plan.experiment, name, len(problem.train)):
            tries = []
            for values in itertools.product(*grid.values()):
                options = dict(zip(grid, values, strict=True))
                tried = _known(plan.tuned, entry, method, options)
                if tried is None:
                    s = settings(plan.experiment, name, network, plan.epochs, plan.tuned)
                    found = _try(plan, store, problem, network, method, replace(s, **options))
                    tried = {"method": method, "options": options} | found
                    _keep(plan.tuned, entry, {}, [tried])
                    say(f"{entry} {tried}")
                tries.append(tried)
            best = max(tries, key=lambda t: (t["validation_accuracy"], -t["validation_loss"]))
            _keep(plan.tuned, entry, best["options"], [])


def _try(
    plan: Plan, store: Store, problem: data.Problem, network: str, method: str, s: Settings
) -> dict[str, Any]:
    """Mean accuracy and loss on the validation part; for SGD under label noise those of its best
    epoch, since the last one has learnt the wrong labels whatever the options."""
    noise = NOISE if plan.experiment == "noise" else 0.0
    few = problem.validation.labels.numel() < _FEW and method in methods.IN_SUBSPACE
    seeds = SEEDS if few else SEEDS[:1]
    found = []
    for seed in seeds:
        cell = Cell("tune", problem.name, network, method, s.dim, noise, seed)
        task = Task(problem, network, s, seed, noise)
        try:
            outcome = methods.METHODS[method](task, lead(task, store.lead(cell, s)))
        except ValueError as error:
            if "finite" not in str(error):  # weights that are not finite cannot be recorded
                raise
            found.append((0.0, 1e9))
            continue
        if noise and method == "sgd" and outcome.best is not None:
            outcome.model.load_state_dict(outcome.best)
        found.append(evaluate(outcome.model, problem.validation))
    accuracy, loss = (statistics.fmean(values) for values in zip(*found, strict=True))
    return {
        "seeds": len(seeds),
        "validation_accuracy": round(accuracy, 5),
        "validation_loss": round(loss, 5),
    }


def _known(path: Path, entry: str, method: str, options: dict[str, Any]) -> dict[str, Any] | None:
    tried = read(path).get(entry, {}).get("tried", [])
    return next((t for t in tried if t["method"] == method and t["options"] == options), None)


def read(path: Path) -> dict[str, Any]:
    """The whole file; empty if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def _keep(path: Path, entry: str, chosen: dict[str, Any], tried: list[dict[str, Any]]) -> None:
    content = read(path)
    known = content.setdefault(entry, {"chosen": {}, "tried": []})
    known["chosen"] |= chosen
    known["tried"] += tried
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(path)
