"""What several commands share: options and their values, a progress bar, errors in one line."""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import filesize
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from ..ops.library import usable_device
from ..plan.costs import SHORT
from .terminal import console, say

INTERRUPTED = 130
STORED = ("float64", "float32", "bfloat16", "float16", "int8", "float8_e4m3fn")

_SUFFIXES = {"k": 3, "m": 6, "b": 9, "g": 9, "t": 12}


def _whole(text: str | int) -> int | None:
    """Return a whole number of at least 1; None for anything else."""
    digits, power = str(text).strip().lower(), 0
    if digits[-1:] in _SUFFIXES:
        digits, power = digits[:-1].rstrip(), _SUFFIXES[digits[-1]]
    try:
        value = Decimal(digits).scaleb(power)
        fits = 1 <= value < 1 << 63 and value == value.to_integral_value()
    except ArithmeticError:  # no number, or NaN
        return None
    return int(value) if fits else None


def count(text: str | int) -> int:
    """Parse a whole number, also as 7e9, 7B, 1.5M or 7_000_000_000."""
    number = _whole(text)
    if number is None:
        raise typer.BadParameter(f"expected a whole number of at least 1, as 7e9, got {text}")
    return number


def number(help: str, least: int = 1, most: int | None = None, **settings: Any) -> Any:
    """Return an option for a whole number, written as `count` takes it."""

    def parse(text: str | int) -> int:
        value = count(text)
        if value < least or (most is not None and value > most):
            bounds = f"at least {least}" if most is None else f"{least} to {most}"
            raise typer.BadParameter(f"expected {bounds}, got {text}")
        return value

    return typer.Option(parser=parse, metavar="INT", help=help, **settings)


def dtype_of(option: str, help: str, *names: str) -> Any:
    """Return an option for a dtype, by torch's name or a short one."""

    def parse(text: str) -> str:
        name = text.lower().removeprefix("torch.")
        name = SHORT.get(name, name)
        if name not in names:
            short = {long: name for name, long in reversed(SHORT.items())}
            known = ", ".join(
                f"{long} ({short[long]})" if long in short else long for long in names
            )
            raise typer.BadParameter(f"expected one of {known}, got {text}", param_hint=option)
        return name

    return typer.Option(option, parser=parse, metavar="DTYPE", help=help)


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]
Threads = Annotated[int | None, number("CPU threads.", show_default="all cores")]

# Of the commands that read checkpoints.
Paths = Annotated[
    list[str],
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


def directions(text: str) -> int | str:
    """Parse a number of directions, or "auto"."""
    if text == "auto":
        return text
    number = _whole(text)
    if number is None:
        raise typer.BadParameter(
            f"expected a number of at least 1, or auto, got {text}", param_hint="--dim"
        )
    return number


def function_of(text: str, option: str) -> Callable[[dict[str, Any]], Any]:
    """Return the function that MODULE:FUNCTION names; modules in the current folder are found."""
    module, _, name = text.partition(":")
    sys.path.insert(0, os.getcwd())  # as python -m would
    try:
        function = getattr(importlib.import_module(module), name) if module and name else None
    except Exception as error:  # of the module: any
        reason = str(error) or type(error).__name__
        raise typer.BadParameter(f"{text}: {reason}", param_hint=option) from None
    finally:
        sys.path.remove(os.getcwd())
    if not callable(function):
        raise typer.BadParameter(f"expected module:function, got {text!r}", param_hint=option)
    return function


def at_home(text: str | os.PathLike[str]) -> str:
    """Return a path with the home folder for its ~, which no shell sees in ``--output=~/x``."""
    return os.fspath(text) if os.path.exists(text) else os.path.expanduser(text)


def check_folder(folder: Path, option: str = "--output") -> Path:
    """Return a folder that can be made, if it is missing, and written to; leave nothing behind."""
    folder = Path(at_home(folder))
    nearest = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise typer.BadParameter(f"{nearest} is not a folder", param_hint=option)
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        reason = error.strerror or error
        raise typer.BadParameter(
            f"expected a folder that can be written to, got {folder} ({reason})", param_hint=option
        ) from None
    return folder


def device_of(name: str) -> torch.device:
    """Return the device that ``--device`` names, if the ops run there."""
    try:
        return usable_device(name)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--device") from None


def as_typed(paths: list[str]) -> list[str]:
    """Return the paths of checkpoints, none of them empty, as `at_home` does."""
    if "" in paths:  # which would be the current folder
        raise ValueError("checkpoints: expected paths, got an empty one: is a variable not set?")
    return list(map(at_home, paths))


@contextmanager
def one_line_errors(kept: str = "nothing has been written") -> Iterator[None]:
    """End the command with one line and exit code 1, or 130 and what is kept after Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        say(f"dldr: interrupted; {kept}", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        raise  # nobody reads on, as after `| head`: click ends the command without a word
    except (ValueError, TypeError, OSError) as error:
        say(f"dldr: {error}", err=True)
        raise typer.Exit(1) from None


class ByteBar:
    """A progress bar on stderr of bytes read, bytes/s and the time left: a context manager.

    It is shown in a terminal alone, from the first bytes on; a log gets one line at the end.
    """

    def __init__(self, quiet: bool) -> None:
        screen = console(stderr=True, quiet=quiet)
        self._screen, self._read, self._start = screen, 0, time.monotonic()
        self._bar = Progress(
            TextColumn("{task.description:<11}"),
            BarColumn(bar_width=30),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=screen,
            disable=not screen.is_terminal,
        )
        self._task = self._bar.add_task("", total=None)

    def __enter__(self) -> ByteBar:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._bar.stop()
        if error is None and self._read and not self._screen.is_terminal:
            seconds = time.monotonic() - self._start
            self._screen.print(f"read {filesize.decimal(self._read)} in {seconds:.1f} s")

    def __call__(self, description: str, done: int, total: int) -> None:
        """Move the bar to ``done`` of ``total`` bytes."""
        self._read = max(self._read, done)
        self._bar.start()
        self._bar.update(self._task, description=description, completed=done, total=total)


class Counter:
    """A line on stderr, in a terminal alone, that counts calls of a loss: a context manager."""

    def __init__(self, quiet: bool) -> None:
        screen = console(stderr=True, quiet=quiet)
        self._status = screen.status("")
        self._shown = screen.is_terminal

    def __enter__(self) -> Counter:
        return self

    def __exit__(self, *_: object) -> None:
        self._status.stop()

    def __call__(self, done: int, total: int) -> None:
        """Say that ``done`` of ``total`` are done."""
        if self._shown:
            self._status.update(f"loss: {done} of {total}")
            self._status.start()
