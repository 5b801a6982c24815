"""What looks at an optimizer at work: its records as they come, trackers, a progress bar."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.hooks import RemovableHandle

from .status import StepRecord

if TYPE_CHECKING:
    import mlflow
    import wandb
    from rich.console import Console
    from torch.utils.tensorboard import SummaryWriter


def on_step(
    optimizer: torch.optim.Optimizer, function: Callable[[StepRecord], Any]
) -> RemovableHandle:
    """Call a function with every record that a step leaves in ``optimizer.history``.

    Parameters
    ----------
    optimizer : PBFGS, PSGD or InSubspace
    function : callable
        Takes a `StepRecord`; called after the step, once for each of its iterations. Records from
        before are not for it.

    Returns
    -------
    RemovableHandle
        ``handle.remove()`` ends it.

    Raises
    ------
    TypeError
        The optimizer has no history; the function is none.

    Examples
    --------
    >>> import torch
    >>> from dldr_ext import PSGD, Subspace
    >>> from dldr_ext.callbacks import on_step
    >>> x = torch.nn.Parameter(torch.ones(3))
    >>> optimizer = PSGD([x], Subspace(torch.eye(2, 3), x.detach().clone()), lr=0.5)
    >>> handle = on_step(optimizer, lambda record: print(record.loss, record.status))
    >>> loss = optimizer.step(lambda: x.square().sum())
    3.0 ACCEPTED
    """
    _check_has_history(optimizer)
    if not callable(function):
        raise TypeError(f"function: expected a callable that takes a record, got {function!r}")
    seen = _last(optimizer)

    def call(optimizer: Any, args: Any, kwargs: Any) -> None:
        nonlocal seen
        new = []
        for record in reversed(optimizer.history):
            if record is seen:  # not by its number: a state that is loaded may go back
                break
            new.append(record)
        seen = _last(optimizer)
        for record in reversed(new):
            function(record)

    return optimizer.register_step_post_hook(call)


def log_to_tensorboard(
    optimizer: torch.optim.Optimizer, writer: SummaryWriter, prefix: str = "optimizer"
) -> RemovableHandle:
    """Write every record to TensorBoard: see `on_step`.

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
    words: dict[str, str] = {}

    def write(record: StepRecord) -> None:
        numbers, said = _entries(record, prefix)
        for tag, value in numbers.items():
            writer.add_scalar(tag, value, record.step)
        for tag, word in said.items() - words.items():
            writer.add_text(tag, word, record.step)
        words.update(said)

    return on_step(optimizer, write)


def log_to_wandb(
    optimizer: torch.optim.Optimizer, run: wandb.Run, prefix: str = "optimizer"
) -> RemovableHandle:
    """Write every record to a run of Weights & Biases: see `on_step`.

    Parameters
    ----------
    optimizer : PBFGS, PSGD or InSubspace
    run : wandb.Run
        As ``wandb.init()`` returns it, in any mode. What it logs besides keeps its own steps: these
        are over ``optimizer/step``.
    prefix : str
        Of the keys: ``optimizer/loss``, ``optimizer/status``, ... Numbers that are NaN are left
        out.

    Returns
    -------
    RemovableHandle
        ``handle.remove()`` ends it.

    Raises
    ------
    TypeError
        The optimizer has no history.
    """

    def write(record: StepRecord) -> None:
        numbers, said = _entries(record, prefix)
        run.log({f"{prefix}/step": record.step, **numbers, **said})

    handle = on_step(optimizer, write)
    run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/step")
    return handle


def log_to_mlflow(
    optimizer: torch.optim.Optimizer,
    run: mlflow.entities.Run | None = None,
    prefix: str = "optimizer",
) -> RemovableHandle:
    """Write every record to a run of MLflow: see `on_step`.

    Parameters
    ----------
    optimizer : PBFGS, PSGD or InSubspace
    run : mlflow.entities.Run, optional
        As ``mlflow.start_run()`` returns it; default: the one that is active at the step.
    prefix : str
        Of the metrics: ``optimizer/loss``, ``optimizer/alpha``, ... over the record's step, left
        out where they are NaN. The last status is the tag ``optimizer/status``.

    Returns
    -------
    RemovableHandle
        ``handle.remove()`` ends it.

    Raises
    ------
    TypeError
        The optimizer has no history.
    """
    import mlflow

    words: dict[str, str] = {}

    def write(record: StepRecord) -> None:
        numbers, said = _entries(record, prefix)
        current = mlflow.active_run() if run is None else run
        if current is None:
            raise RuntimeError(
                "log_to_mlflow: run: expected a run, or an active one, got none: mlflow.start_run()"
            )
        run_id = current.info.run_id
        mlflow.log_metrics(numbers, step=record.step, run_id=run_id)
        for tag, word in said.items() - words.items():
            mlflow.MlflowClient().set_tag(run_id, tag, word)
        words.update(said)

    return on_step(optimizer, write)


@contextmanager
def progress(
    optimizer: torch.optim.Optimizer, total: int, *, console: Console | None = None
) -> Iterator[None]:
    """Show a bar while steps are taken: ``with progress(optimizer, total=100): ...``.

    With loss, trials and step length of the last step. Needs the package rich
    (``pip install rich``).

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


def _entries(record: StepRecord, prefix: str) -> tuple[dict[str, float], dict[str, str]]:
    """Return the numbers of a record but NaN, and what it says in words, by their tags."""
    entries = {f"{prefix}/{key}": value for key, value in vars(record).items() if key != "step"}
    words = {tag: str(value) for tag, value in entries.items() if isinstance(value, str)}
    numbers = {tag: value for tag, value in entries.items() if tag not in words}
    return {tag: value for tag, value in numbers.items() if not math.isnan(value)}, words


def _last(optimizer: Any) -> StepRecord | None:
    return optimizer.history[-1] if optimizer.history else None


def _check_has_history(optimizer: Any) -> None:
    if not hasattr(optimizer, "history"):
        raise TypeError(
            "optimizer: expected one of dldr_ext, which has a history, got "
            f"{type(optimizer).__name__}"
        )
