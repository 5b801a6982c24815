"""Values of options that several commands take."""

from __future__ import annotations

import torch
import typer

from ..ops.library import device_problem


def count(text: str | int) -> int:
    """A whole number, also as 7e9 or 7_000_000_000."""
    try:
        value = float(text)
    except ValueError:
        value = 0.5
    if not (value.is_integer() and value >= 1):
        raise typer.BadParameter(f"expected a whole number of at least 1, as 7e9, got {text}")
    return int(text) if isinstance(text, int) or text.isdecimal() else int(value)


def directions(text: str) -> int | str:
    """A number of directions, or "auto"."""
    if text == "auto":
        return text
    if not text.isdecimal() or int(text) < 1:
        raise typer.BadParameter(
            f"expected a number of at least 1, or auto, got {text}", param_hint="--dim"
        )
    return int(text)


def usable_device(name: str) -> torch.device:
    """The device that ``--device`` names, if the ops run there."""
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
