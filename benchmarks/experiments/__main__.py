"""``python -m benchmarks.experiments``: the command line of the experiments."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path

from . import data, networks, overhead, plans, report, settings, tune
from .cells import Store

_OUTPUT = Path("benchmarks/results/experiments")
_HELP = {
    "compare": "SGD, L-BFGS, averaging and the subspace methods on one network",
    "dims": "P-BFGS in 5, 10, 20, 40 and 80 dimensions",
    "zoo": "P-BFGS against SGD on six kinds of networks",
    "noise": "wrong labels: 0 to 80 % of the training part",
    "real": "Fashion-MNIST, CIFAR-10 and Shakespeare: every method, and averages of weights",
    "finetune": "a trained model improved in the subspace of a short fine-tune",
}


def parser() -> argparse.ArgumentParser:
    """The commands and their options."""
    result = argparse.ArgumentParser(prog="python -m benchmarks.experiments", description=__doc__)
    commands = result.add_subparsers(dest="command", required=True)
    for name, text in _HELP.items():
        _plan_options(commands.add_parser(name, help=text), seeds=True)
    tuning = commands.add_parser("tune", help="choose options on the validation part")
    tuning.add_argument("experiment", choices=plans.METHODS)
    _plan_options(tuning, seeds=False)
    steps = commands.add_parser("overhead", help="what a step costs besides its closure")
    steps.add_argument("--network", default="resnet20", choices=networks.NAMES)
    steps.add_argument("--batch", type=int, default=1024)
    steps.add_argument("--size", type=int, default=32, help="height and width of the images")
    steps.add_argument("--dim", type=int, default=40)
    steps.add_argument("--rounds", type=int, default=9)
    steps.add_argument("--threads", type=int, default=1)
    _output(steps)
    _output(commands.add_parser("report", help="results.json and plots of what has been run"))
    return result


def _plan_options(sub: argparse.ArgumentParser, seeds: bool) -> None:
    sub.add_argument("--data", default="mnist5k", choices=data.NAMES)
    sub.add_argument("--network", choices=networks.NAMES, help="instead of the usual one")
    sub.add_argument(
        "--folder",
        type=Path,
        help="torchvision's root, for CIFAR and Fashion-MNIST; that of tinyshakespeare.txt",
    )
    sub.add_argument("--epochs", type=int, help="of the full SGD, instead of the recipe's")
    sub.add_argument("--tuned", type=Path, default=settings.TUNED, help="file of tuned options")
    if seeds:
        sub.add_argument("--seeds", type=int, default=5)
        sub.add_argument("--methods", nargs="*", default=[], help="some of the experiment's alone")
        sub.add_argument("--device", default="cpu")
        sub.add_argument("--threads", type=int, default=1)
    _output(sub)


def _output(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--output", type=Path, default=_OUTPUT, help="results.json and plots")
    sub.add_argument(
        "--work", type=Path, default=Path("build/experiments"), help="files of single runs"
    )


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 2 if its options make no sense."""
    options = parser().parse_args(arguments)
    log = logging.getLogger("dldr_ext")
    level = log.level
    log.setLevel(logging.ERROR)  # every run starts with a move
    try:
        return _run(options)
    finally:
        log.setLevel(level)


def _run(options: argparse.Namespace) -> int:
    store = Store(options.work)
    try:
        if options.command == "overhead":
            overhead.run(options, store, _say)
        elif options.command != "report":
            plan = plans.Plan(
                options.experiment if options.command == "tune" else options.command,
                options.data,
                options.network,
                options.folder,
                getattr(options, "seeds", 1),
                options.epochs,
                options.tuned,
                tuple(getattr(options, "methods", ())),
                getattr(options, "device", "cpu"),
                getattr(options, "threads", 1),
            )
            if options.command == "tune":
                tune.tune(plan, store, _say)
                return 0
            plans.run(plan, store, _say)
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for path in report.write(store, options.output):
        _say(str(path))
    return 0


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
