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
from ..analysis import comparison, plots, report, tables
from ..analysis.analysis import Analysis
from ..analysis.loss import Loss, on_plane
from ..checkpoints import Series
from ..files.partial import alone_in
from ..reporting import html
from ..reporting.figures import save_figures
from ..reporting.text import printable
from .options import (
    STORED,
    AsGiven,
    AsJson,
    ByteBar,
    Counter,
    Exclude,
    Include,
    Key,
    Paths,
    Quiet,
    SkipBad,
    as_typed,
    check_folder,
    directions,
    dtype_of,
    function_of,
    number,
    one_line_errors,
)
from .requirements import missing
from .terminal import console, fits, say


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
            show_default="auto; of fewer than 8 checkpoints all",
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
    loss: Annotated[
        str | None,
        typer.Option(
            metavar="MODULE:FUNCTION",
            help="Called with a state dict, returns its loss: along the path and on the plane.",
        ),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="CKPT", help="Checkpoints of a second run, beside the first; repeat for more."
        ),
    ] = None,
    subspace: Annotated[
        bool, typer.Option(help="Whether to write subspace.safetensors: dim n numbers.")
    ] = True,
    chunk_mb: Annotated[int, number("Megabytes in memory at a time.")] = 112,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Find the directions along which checkpoints differ: path, spectrum, layers, a subspace.

    All floating-point tensors count, tied ones once, but for the running
    statistics of batch norm. Files are read twice, in pieces: a model need
    not fit into memory. An analysis that was interrupted goes on where it
    was when called again.

    With --loss my_eval:loss the module my_eval, of the current folder, has
    the function loss(state_dict). It is called for each checkpoint before
    anything is written, and for 121 points of the plane.

    \b
    Examples:
      dldr analyze runs/checkpoints
      dldr analyze runs/*.pt --dim 20 --exclude 'head.*' --output out
      dldr analyze run1 --compare run2 --loss my_eval:loss
      dldr analyze run1 --skip-bad --no-subspace --json > analysis.json
    """
    if dim is not None and explained is not None:
        raise typer.BadParameter("expected --dim or --explained, got both", param_hint="--dim")
    directions_kept = None if dim is None else directions(dim)
    problem = missing("matplotlib")
    if problem:
        typer.echo(problem, err=True)
        raise typer.Exit(2)

    output = check_folder(output)
    function = None if loss is None else Loss(function_of(loss, "--loss"), f"--loss {loss}")
    again = "the same command goes on from here"
    options: dict[str, Any] = {"include": include or (), "exclude": exclude or ()}
    options |= {"key": key, "skip_bad": skip_bad}
    bar = ByteBar(quiet or as_json)
    with one_line_errors(again), Counter(quiet or as_json) as count:
        series = Series(as_typed(checkpoints), as_given=as_given, **options)
        runs = [series]
        if compare:
            runs.append(Series(as_typed(compare), as_given=as_given, **options))
            runs[1].match(series)
        losses = [] if function is None else [function.along(run, count) for run in runs]
    with one_line_errors(again), alone_in(output):
        with bar:
            analysis = Analysis(
                series,
                output,
                dim=directions_kept,
                explained=explained,
                dtype=getattr(torch, dtype),
                keep_basis=subspace,
                chunk_bytes=chunk_mb << 20,
                skip_bad=skip_bad,
                progress=bar,
            )
            results = analysis.run()
            if compare:
                results["other"], results["comparison"] = comparison.compare(
                    series,
                    runs[1],
                    results["kept"],
                    double=dtype == "float64",
                    chunk_bytes=chunk_mb << 20,
                    skip_bad=skip_bad,
                    progress=bar,
                )
        with Counter(quiet or as_json) as count:
            if function is not None:
                plane = results.get("comparison", results)["path"]
                grid = on_plane(function, runs, plane["coefficients"], plane["coordinates"], count)
                along = [
                    [of_run[path] for path in run.paths]
                    for run, of_run in zip(runs, losses, strict=True)
                ]
                results["loss"] = {"function": loss, "along": along, "plane": grid}
            drawings = plots.drawings(results)
            save_figures(drawings, output)
            versions = html.versions(build_info()["version"])
            page = report.write(results, drawings, versions, output)
            written = report.write_json(results, output)
    for line in [*results["skipped"], *results.get("other", {}).get("skipped", [])]:
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
    if "other" in results:
        screen.print(_shown(tables.runs(results)))
    if "loss" in results:
        for content in tables.loss_along(results, 20):
            screen.print(_shown(content))
        for every in (1, 2, 5):
            grid = _shown(tables.loss_on_plane(results, every))
            if fits(screen, grid):
                break
        screen.print(grid)
    screen.print(f"Open {printable(page)}", soft_wrap=True)


def _shown(content: html.Table) -> Table:
    """Return a table of a report for the terminal."""
    table = Table(box=box.SIMPLE_HEAD, title=content.caption, title_justify="left")
    for i, column in enumerate(content.columns):
        table.add_column(column, justify="right" if i else "left", overflow="fold")
    for i, row in enumerate(content.rows):
        table.add_row(*map(printable, row), style="bold" if i == content.best else "")
    return table
