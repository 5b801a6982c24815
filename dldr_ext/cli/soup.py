"""`dldr soup`: the average of checkpoints."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from ..averaging.copies import copy_notes
from ..averaging.outputs import parse_output
from ..averaging.soup_files import (
    normalized_weights,
    soup_notes,
    verify_mean,
    write_greedy_soup,
    write_mean,
)
from ..averaging.weights import schedule_weights
from ..checkpoints import Series
from .options import (
    AsGiven,
    AsJson,
    ByteBar,
    Exclude,
    Include,
    Key,
    Quiet,
    SkipBad,
    as_typed,
    at_home,
    function_of,
    number,
    one_line_errors,
)
from .terminal import say


def soup(
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            metavar="CKPT[:WEIGHT]",
            help="Files or folders of them; with a weight for each, as a.pt:1 b.pt:-0.5.",
            show_default=False,
        ),
    ],
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            help="A .safetensors, .pt, .pth, .ckpt or .bin file, or a folder/ of a model.",
        ),
    ] = "soup.safetensors",
    weights: Annotated[
        str | None,
        typer.Option(help="One for each path as typed, as 1,1,2; divided by their sum."),
    ] = None,
    schedule: Annotated[
        str | None,
        typer.Option(
            metavar="mean|linear|1-sqrt|ema:B",
            help="Weights that stand for a run whose rate falls so, as ema:0.99.",
        ),
    ] = None,
    last: Annotated[int | None, number("Take the last so many alone.", show_default="all")] = None,
    every: Annotated[int, number("Of these the last one, and each N-th before it.")] = 1,
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Greedy soup: called with a state dict, returns a score, higher is better.",
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Read the result back, and compare it.")
    ] = False,
    include: Include = None,
    exclude: Exclude = None,
    key: Key = None,
    skip_bad: SkipBad = False,
    as_given: AsGiven = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Average checkpoints into one, in pieces: a model need not fit into memory.

    With --metric from the best checkpoint on, as long as the score does not
    fall (greedy soup; one checkpoint and the sums are in memory).

    The output's name says its format. A folder/ is as that of the first
    checkpoint: one that transformers, PEFT or diffusers loads, with its
    configuration, or one of torch.distributed.checkpoint.

    Batch-norm statistics of an average must be estimated anew, with
    torch.optim.swa_utils.update_bn(loader, model). A trained average needs
    training data: dldr_ext.weight_averaging_subspace, in Python.

    \b
    Examples:
      dldr soup runs/checkpoints --output soup.safetensors
      dldr soup runs/checkpoints --last 20 --schedule 1-sqrt --verify
      dldr soup tuned.pt:1 base.pt:-0.5 other.pt:0.5
      dldr soup out/checkpoint-* --output averaged/
      dldr soup runs/checkpoints --exclude '*.mask' --output soup.pt
      dldr soup runs/*.safetensors --metric my_eval:accuracy --json
    """
    paths, typed = _weighted(checkpoints)
    factors = typed if weights is None else _numbers(weights)
    ways = {"CKPT:WEIGHT": typed, "--weights": weights, "--schedule": schedule, "--metric": metric}
    chosen = [name for name, value in ways.items() if value is not None]
    if len(chosen) > 1:
        raise typer.BadParameter(f"expected {' or '.join(chosen)}, got both", param_hint=chosen[-1])
    if factors is not None and (last is not None or every > 1):
        raise typer.BadParameter(
            f"expected {chosen[0]} or a window, got both", param_hint="--last, --every"
        )
    try:
        schedule_weights(schedule or "mean", 1)
    except ValueError as error:
        problem = str(error).removeprefix("schedule: ")
        raise typer.BadParameter(problem, param_hint="--schedule") from None
    output = at_home(output)
    score = None if metric is None else function_of(metric, "--metric")
    try:
        place = parse_output(output)
    except ValueError as error:
        problem = str(error).removeprefix("output: ")
        raise typer.BadParameter(problem, param_hint="--output") from None
    facts: dict[str, Any] = {"output": output}
    with one_line_errors(), ByteBar(quiet or as_json) as bar:
        patterns = {"include": include or [], "exclude": exclude or []}
        options: dict[str, Any] = {"key": key, "skip_bad": skip_bad, **patterns}
        series = Series(as_typed(paths), as_given=as_given, rows=False, **options)
        series.thin(last, every)
        if typed is not None:
            factors = [typed[argument] for argument in series.arguments]
        if score is not None:
            best = write_greedy_soup(series, output, score)
            facts["score"] = best.score
            members = best.members
            notes, shares = soup_notes(series, place), [1 / len(members)] * len(members)
        else:
            notes = write_mean(series, output, factors or schedule, partial(bar, "average"))
            members, shares = (
                list(range(len(series))),
                normalized_weights(series, factors or schedule),
            )
        if factors is not None or schedule is not None:
            facts["weights"] = shares
        if verify:
            facts["verified"] = verify_mean(series, place.path, members, shares)
        notes = [*series.decisions, *copy_notes(series), *notes]
    facts |= {"skipped": [str(error) for error in series.skipped]}
    facts |= {"members": [str(series.paths[t]) for t in members], "notes": notes}
    for line in facts["skipped"]:
        say(f"dldr: left out {line}", err=True)
    if as_json:
        typer.echo(json.dumps(facts))
    elif not quiet:
        reached = f", score {facts['score']:g}" if "score" in facts else ""
        counted = "1 checkpoint" if len(members) == 1 else f"{len(members)} checkpoints"
        say(f"{counted}{reached}: {output}")
        for weight, member in zip(facts.get("weights", ()), facts["members"], strict=False):
            say(f"{weight:.4g} x {member}")
        if verify:
            say(f"read back: as computed anew, within {facts['verified']:.2g} of a rounding")
        for note in facts["notes"]:
            say(f"note: {note}")


def _weighted(arguments: list[str]) -> tuple[list[str], list[float] | None]:
    """Split paths from the weights that are joined to them."""
    paths, weights = [], []
    for argument in arguments:
        path, _, text = argument.rpartition(":")
        if (
            path
            and re.fullmatch(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[-+]?[0-9]+)?", text)
            and not Path(argument).exists()
        ):
            paths.append(path)
            weights.append(float(text))
        else:
            paths.append(argument)
    if weights and len(weights) < len(paths):
        raise typer.BadParameter(
            f"expected a weight for each path or for none, got {len(weights)} for {len(paths)}",
            param_hint="CKPT:WEIGHT",
        )
    return paths, weights or None


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"expected numbers joined by commas, got {text!r}", param_hint="--weights"
        ) from None
