"""What several commands share: options and their values, a progress bar, errors in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
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
from ..ops.library import device_problem

INTERRUPTED = 130

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="all cores")]

# Of the commands that read checkpoints.
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


def count(text: str | int) -> int:
    """Parse a whole number, also as 7e9 or 7_000_000_000."""
    try:
        value = float(text)
    except ValueError:
        value = 0.5
    if not (value.is_integer() and value >= 1):
        raise typer.BadParameter(f"expected a whole number of at least 1, as 7e9, got {text}")
    return int(text) if isinstance(text, int) or text.isdecimal() else int(value)


def directions(text: str) -> int | str:
    """Parse a number of directions, or "auto"."""
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(
            f"expected a number of at least 1, or auto, got {text}", param_hint="--dim"
        )
    return int(text)


def usable_device(name: str) -> torch.device:
    """Return the device that ``--device`` names, if the ops run there."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise typer.BadParameter(f"expected cpu, cuda or cuda:N, got {name}", param_hint="--device")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter(
            f"expected a device of this machine, got {name}: torch {torch.__version__} finds no "
            "CUDA device",
            param_hint="--device",
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise typer.BadParameter(
            f"expected one of {torch.cuda.device_count()} CUDA devices, got {name}",
            param_hint="--device",
        )
    problem = device_problem(device)
    if problem:
        raise typer.BadParameter(problem, param_hint="--device")
    return device


def open_series(paths: list[Path], as_given: bool, **options: Any) -> Series:
    """Open checkpoints, in the order of their steps unless ``as_given``."""
    return Series(paths, as_given=as_given, **options)


@contextmanager
def one_line_errors(hint: str = "") -> Iterator[None]:
    """End the command with one line and exit code 1, or 130 if it was interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        typer.echo(f"dldr: interrupted{hint}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except (ValueError, TypeError, OSError) as error:
        typer.echo(f"dldr: {' '.join(str(error).split())}", err=True)
        raise typer.Exit(1) from None


class ByteBar:
    """A progress bar on stderr of bytes read, bytes/s and the time left: a context manager."""

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

    def __enter__(self) -> ByteBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, description: str, done: int, total: int) -> None:
        """Move the bar to ``done`` of ``total`` bytes."""
        self._bar.update(self._task, description=description, completed=done, total=total)
