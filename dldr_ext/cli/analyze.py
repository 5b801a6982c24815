"""`dldr analyze`: the path that checkpoints took, and the subspace that they span."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.table import Table

from .. import build_info
from ..analysis import plots, report
from ..analysis.analysis import Analysis
from ..reporting import html
from ..reporting.figures import save_figures
from ..reporting.text import printable
from .options import (
    STORED,
    AsGiven,
    AsJson,
    ByteBar,
    Exclude,
    Include,
    Key,
    Paths,
    Quiet,
    SkipBad,
    directions,
    dtype_of,
    number,
    one_line_errors,
    open_series,
)
from .requirements import missing
from .terminal import console, say


def analyze(
    checkpoints: Paths,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", help="Folder for report.html, plots, analysis.json and subspace."
        ),
    ] = Path("analysis"),
    dim: Annotated[
        str | None,
        typer.Option(
            metavar="INT|auto",
            help="Directions to keep; auto: as many as the spectrum speaks for.",
            show_default="40, or all",
        ),
    ] = None,
    explained: Annotated[
        float | None, typer.Option(help="Keep as many as explain this share, as 0.99.")
    ] = None,
    dtype: Annotated[
        str,
        dtype_of(
            "--dtype", "Of differences and basis: fp32, bf16, fp16, fp64, int8 or fp8.", *STORED
        ),
    ] = "bfloat16",
    include: Include = None,
    exclude: Exclude = None,
    key: Key = None,
    skip_bad: SkipBad = False,
    as_given: AsGiven = False,
    subspace: Annotated[
        bool, typer.Option(help="Whether to write subspace.safetensors: dim n numbers.")
    ] = True,
    chunk_mb: Annotated[int, number("Megabytes in memory at a time.")] = 112,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Find the directions along which checkpoints differ: spectrum, drift, cosines, a subspace.

    All floating-point tensors count, tied ones once, but for the running
    statistics of batch norm. Files are read twice, in pieces: a model need
    not fit into memory. An analysis that was interrupted goes on where it
    was when called again.

    \b
    Examples:
      dldr analyze runs/checkpoints --dim auto
      dldr analyze runs/*.pt --dim 20 --exclude 'head.*' --output out
      dldr analyze run1 --skip-bad --no-subspace --json > analysis.json
    """
    if dim is not None and explained is not None:
        raise typer.BadParameter("expected --dim or --explained, got both", param_hint="--dim")
    count = None if dim is None else directions(dim)
    problem = missing("matplotlib")
    if problem:
        typer.echo(problem, err=True)
        raise typer.Exit(2)

    with one_line_errors("the same command goes on from here"), ByteBar(quiet or as_json) as bar:
        series = open_series(
            checkpoints,
            as_given,
            include=include or (),
            exclude=exclude or (),
            key=key,
            skip_bad=skip_bad,
        )
        results = Analysis(
            series,
            output,
            dim=count,
            explained=explained,
            dtype=getattr(torch, dtype),
            keep_basis=subspace,
            chunk_bytes=chunk_mb << 20,
            skip_bad=skip_bad,
            progress=bar,
        ).run()
        drawings = plots.drawings(results)
        save_figures(drawings, output)
        versions = html.versions(build_info()["version"])
        page = report.write(results, drawings, versions, output)
        written = report.write_json(results, output)
    for line in results["skipped"]:
        say(f"dldr: left out {line}", err=True)
    if as_json:
        typer.echo(json.dumps(written))
    elif not quiet:
        _print(results, page)


def _print(results: dict[str, Any], page: Path) -> None:
    screen = console()
    screen.print(report.verdict(results))
    table = Table(box=box.SIMPLE, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    dimension, kept = results["effective_dimension"], results["subspace"]
    table.add_row("participation ratio", f"{dimension['participation_ratio']:.2f}")
    table.add_row("distance, first to last", f"{results['drift']['from_first'][-1]:.4g}")
    for name, text in results["report"].items():
        table.add_row(name, text)
    if kept is not None:
        table.add_row("written", printable(kept["path"]))
    table.add_row("read", f"{results['bytes'] / 1e9:.2f} GB, {results['seconds']:.1f} s")
    for note in results["notes"]:
        table.add_row("note", printable(note))
    for line in report.duplicates(results):
        table.add_row("near-duplicate", printable(line))
    screen.print(table)
    screen.print(f"Open {printable(page)}", soft_wrap=True)
