"""What the commands that read checkpoints share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ..checkpoints import Series
from ..checkpoints.discovery import find_checkpoints, natural_key

Paths = Annotated[
    list[Path],
    typer.Argument(
        metavar="CKPT",
        help="Files (.pt, .pth, .safetensors, an index of shards) or folders of them.",
        show_default=False,
    ),
]
Include = Annotated[
    list[str] | None, typer.Option(help="Tensors to take, as 'encoder.*'; repeat for more.")
]
Exclude = Annotated[
    list[str] | None, typer.Option(help="Tensors to leave out, as '*.bias'; repeat for more.")
]
Key = Annotated[
    str | None,
    typer.Option(help="Where the state dict is in a file, as ema.weights.", show_default="found"),
]
SkipBad = Annotated[
    bool, typer.Option("--skip-bad", help="Go on without checkpoints that cannot be used.")
]
AsGiven = Annotated[
    bool,
    typer.Option("--as-given", help="Keep the order of the arguments; else 2.pt is before 10.pt."),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
INTERRUPTED = 130


def series(paths: list[Path], as_given: bool, **options: Any) -> Series:
    """Opens the checkpoints, in natural order unless ``as_given``."""
    files = find_checkpoints(paths)
    return Series(files if as_given else sorted(files, key=natural_key), **options)


@contextmanager
def one_line_errors(hint: str = "") -> Iterator[None]:
    """Ends the command with one line and exit code 1, or 130 if it was interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"dldr: interrupted{hint}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except (ValueError, TypeError, OSError) as error:
        typer.echo(f"dldr: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None


class Bar:
    """Bytes read, bytes/s and the time left, on stderr: a context manager."""

    def __init__(self, quiet: bool) -> None:
        self._bar = Progress(
            TextColumn("{task.description:<11}"),
            BarColumn(bar_width=30),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True, quiet=quiet),
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        self._bar.update(self._task, description=what, completed=done, total=total)
