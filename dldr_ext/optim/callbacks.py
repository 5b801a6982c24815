"""TensorBoard and a progress bar for an optimizer at work: both read its ``history``."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.hooks import RemovableHandle

if TYPE_CHECKING:
    from rich.console import Console
    from torch.utils.tensorboard import SummaryWriter


def log_to_tensorboard(
    optimizer: torch.optim.Optimizer, writer: SummaryWriter, prefix: str = "optimizer"
) -> RemovableHandle:
    """Write every record that a step leaves in ``optimizer.history``.

    Parameters
    ----------
    optimizer : PBFGS, PSGD or InSubspace
    writer : torch.utils.tensorboard.SummaryWriter
        Or anything else with its ``add_scalar`` and ``add_text``.
    prefix : str
        Of the tags: ``optimizer/loss``, ``optimizer/alpha``, ... Numbers are scalars over the
        record's step, left out where they are NaN; what is said in words (the status, what became
        of a curvature pair) is a text wherever it changes.

    Returns
    -------
    RemovableHandle
        ``handle.remove()`` ends it.

    Raises
    ------
    TypeError
        The optimizer has no history.
    """
    _check_has_history(optimizer)
    written = [len(optimizer.history) and optimizer.history[-1].step]  # type: ignore[attr-defined]
    words: dict[str, str] = {}

    def write(optimizer: Any, args: Any, kwargs: Any) -> None:
        for record in optimizer.history:
            if record.step <= written[0]:
                continue
            written[0] = record.step
            for name, value in dataclasses.asdict(record).items():
                tag = f"{prefix}/{name}"
                if isinstance(value, (str, enum.Enum)):
                    word = value.name if isinstance(value, enum.Enum) else value
                    if words.get(tag) != word:
                        words[tag] = word
                        writer.add_text(tag, word, record.step)
                elif name != "step" and not math.isnan(value):
                    writer.add_scalar(tag, value, record.step)

    return optimizer.register_step_post_hook(write)


@contextmanager
def progress(
    optimizer: torch.optim.Optimizer, total: int, *, console: Console | None = None
) -> Iterator[None]:
    """Show a bar while steps are taken: ``with progress(optimizer, total=100): ...``.

    With loss, trials and step length of the last step. Needs the package rich
    (``pip install "dldr_ext[cli]"``).

    Parameters
    ----------
    optimizer : PBFGS, PSGD or InSubspace
    total : int
        Steps to come.
    console : rich.console.Console, optional
        Where to; default: the terminal's.

    Raises
    ------
    TypeError
        The optimizer has no history.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    _check_has_history(optimizer)
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}")
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("", total=total)

        def update(optimizer: Any, args: Any, kwargs: Any) -> None:
            bar.update(task, advance=1, description=str(optimizer.history[-1]))

        handle = optimizer.register_step_post_hook(update)
        try:
            yield
        finally:
            handle.remove()


def _check_has_history(optimizer: Any) -> None:
    if not hasattr(optimizer, "history"):
        raise TypeError(
            "optimizer: expected one of dldr_ext, which has a history, got "
            f"{type(optimizer).__name__}"
        )
