"""`dldr soup`: the average of checkpoints."""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import typer

from ..averaging.copies import copy_notes
from ..averaging.outputs import parse_output
from ..averaging.soup_files import normalized_weights, soup_notes, write_greedy_soup, write_mean
from .options import (
    AsGiven,
    AsJson,
    ByteBar,
    Exclude,
    Include,
    Key,
    Paths,
    Quiet,
    SkipBad,
    one_line_errors,
    open_series,
)
from .terminal import say


def soup(
    checkpoints: Paths,
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
    metric: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Greedy soup: called with a state dict, returns a score, higher is better.",
        ),
    ] = None,
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

    The output's name says its format. A folder/ is one that transformers or
    PEFT loads: configuration and tokenizer are those of the first checkpoint.

    Batch-norm statistics of an average must be estimated anew, with
    torch.optim.swa_utils.update_bn(loader, model). A trained average needs
    training data: dldr_ext.weight_averaging_subspace, in Python.

    \b
    Examples:
      dldr soup runs/checkpoints --output soup.safetensors
      dldr soup a.pt b.pt c.pt --weights 1,1,2
      dldr soup out/checkpoint-* --output averaged/
      dldr soup runs/checkpoints --exclude '*.mask' --output soup.pt
      dldr soup runs/*.safetensors --metric my_eval:accuracy --json
    """
    if weights is not None and metric is not None:
        raise typer.BadParameter("expected --weights or --metric, got both", param_hint="--metric")
    factors = None if weights is None else _numbers(weights)
    score = None if metric is None else _function(metric)
    try:
        place = parse_output(output)
    except ValueError as error:
        problem = str(error).removeprefix("output: ")
        raise typer.BadParameter(problem, param_hint="--output") from None
    facts: dict[str, Any] = {"output": output}
    with one_line_errors(), ByteBar(quiet or as_json) as bar:
        patterns = {"include": include or [], "exclude": exclude or []}
        series = open_series(
            checkpoints, as_given, key=key, skip_bad=skip_bad, rows=False, **patterns
        )
        members = series.paths
        if score is not None:
            best = write_greedy_soup(series, output, score)
            facts["score"] = best.score
            members = [series.paths[t] for t in best.members]
            notes = soup_notes(series, place)
        else:
            notes = write_mean(series, output, factors, partial(bar, "average"))
        if factors is not None:
            facts["weights"] = normalized_weights(series, factors)
        notes = [*series.decisions, *copy_notes(series), *notes]
    facts |= {"skipped": [str(error) for error in series.skipped]}
    facts |= {"members": list(map(str, members)), "notes": notes}
    for line in facts["skipped"]:
        say(f"dldr: left out {line}", err=True)
    if as_json:
        typer.echo(json.dumps(facts))
    elif not quiet:
        reached = f", score {facts['score']:g}" if "score" in facts else ""
        say(f"{len(facts['members'])} checkpoints{reached}: {output}")
        for weight, member in zip(facts.get("weights", ()), facts["members"], strict=False):
            say(f"{weight:.4g} x {member}")
        for note in facts["notes"]:
            say(f"note: {note}")


def _numbers(text: str) -> list[float]:
    try:
        return [float(number) for number in text.split(",")]
    except ValueError:
        raise typer.BadParameter(
            f"expected numbers joined by commas, got {text!r}", param_hint="--weights"
        ) from None


def _function(text: str) -> Callable[[dict[str, Any]], float]:
    module, _, name = text.partition(":")
    sys.path.insert(0, os.getcwd())  # as python -m would
    try:
        function = getattr(importlib.import_module(module), name) if module and name else None
    except (ImportError, AttributeError) as error:
        raise typer.BadParameter(str(error), param_hint="--metric") from None
    finally:
        sys.path.remove(os.getcwd())
    if not callable(function):
        raise typer.BadParameter(f"expected module:function, got {text!r}", param_hint="--metric")
    return function
